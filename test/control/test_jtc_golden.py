"""The emulated `Trajectory` answers like the real controller class: every recorded case, every sample, in call order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_policy_ros.control.jtc_trajectory import Trajectory, TrajectoryMessage, TrajectoryPoint

GOLDEN = Path(__file__).resolve().parents[2].parent / 'shared' / 'data' / 'jtc' / 'jazzy_trajectory_cases.json'
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())['cases'] if GOLDEN.is_file() else []
TOLERANCE = 1e-9  # relative to max(1, |x|)

pytestmark = pytest.mark.skipif(not CASES, reason='the recorded controller cases (../shared/data/jtc) are not on this machine')


def _point(data: dict[str, Any]) -> TrajectoryPoint:
    return TrajectoryPoint(
        data.get('time_from_start_ns', 0),
        np.array(data.get('positions', [])),
        np.array(data.get('velocities', [])),
        np.array(data.get('accelerations', [])),
    )


def _close(actual: np.ndarray, expected: list[float]) -> bool:
    wanted = np.array(expected, dtype=float)
    return actual.shape == wanted.shape and bool(np.all(np.abs(actual - wanted) <= TOLERANCE * np.maximum(1.0, np.abs(wanted))))


def test_all_recorded_cases_are_here() -> None:
    assert len(CASES) == 41


@pytest.mark.parametrize('case', CASES, ids=[case['name'] for case in CASES])
def test_trajectory_agrees_with_the_real_class(case: dict[str, Any]) -> None:
    message = TrajectoryMessage(
        tuple(case['joint_names']), [_point(p) for p in case['message']['points']], case['message']['stamp_ns']
    )
    method = 'none' if case['interpolation_method'] == 'none' else 'splines'
    trajectory = Trajectory()
    trajectory.update(message)
    trajectory.set_point_before_trajectory_msg(
        case['state_before']['time_ns'], _point(case['state_before']), case.get('joints_angle_wraparound', ())
    )
    for number, wanted in enumerate(case['samples']):
        sample = trajectory.sample(wanted['t_ns'], method, wanted.get('search_monotonically_increasing', True))
        where = f'sample {number} at {wanted["t"]} s'
        assert sample.valid == wanted['valid'], where
        if sample.state is None:
            continue
        assert (sample.start_index, sample.end_index) == (wanted['start_index'], wanted['end_index']), where
        assert _close(sample.state.positions, wanted['positions']), where
        assert _close(sample.state.velocities, wanted['velocities']), where
        assert _close(sample.state.accelerations, wanted['accelerations']), where
    assert trajectory.start_ns == case['trajectory_start_ns']
