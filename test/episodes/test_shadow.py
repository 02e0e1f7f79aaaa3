"""A policy in the shadow of another controller: its rolling error is the one that a recording would give."""

from __future__ import annotations

import numpy as np
import pytest

from vla_policy_ros.episodes.shadow import Shadow, ShadowScore
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import load_robot
from vla_policy_ros.types import NS_PER_S, ActionChunk

ROBOT = load_robot(robot_path('tabletop'))
JOINTS, HORIZON, PERIOD = ROBOT.action.joints, ROBOT.action.horizon, ROBOT.action.period_ns
STEP = NS_PER_S // 50
BEGIN = 1_700_000_000 * NS_PER_S
SLOPE = np.linspace(0.01, 0.07, len(JOINTS))
SOURCE = 'a test'


def path(stamp_ns: int) -> np.ndarray:
    """Where the robot is: every joint at its own constant speed, rad."""
    return SLOPE * ((stamp_ns - BEGIN) / NS_PER_S)


def chunk(observed_ns: int, shift: float = 0.0) -> ActionChunk:
    stamp = observed_ns + PERIOD
    times = stamp + PERIOD * np.arange(HORIZON)
    return ActionChunk(stamp, PERIOD, JOINTS, np.stack([path(int(time)) for time in times]) + shift, observed_ns, 'go')


def watch(shadow: Shadow, first_s: float, last_s: float, source: str = SOURCE) -> None:
    for stamp in range(BEGIN + round(first_s * NS_PER_S), BEGIN + round(last_s * NS_PER_S) + 1, STEP):
        shadow.robot_at(path(stamp), stamp, source)


def score(shadow: Shadow) -> ShadowScore:
    found = shadow.score()
    assert found is not None
    return found


def test_a_policy_that_foresees_everything_has_no_error_and_standing_still_has_the_distance_travelled() -> None:
    shadow = Shadow(ROBOT, 30.0)
    shadow.answered(chunk(BEGIN + NS_PER_S))
    watch(shadow, 0.0, 5.0)
    found = score(shadow)
    assert found.error.rmse == pytest.approx(0.0, abs=1e-9) and found.chunks == 1 and not found.worse_than_hold
    travelled = np.outer(PERIOD / NS_PER_S * np.arange(1, HORIZON + 1), SLOPE)
    assert found.hold.rmse == pytest.approx(np.sqrt(np.mean(travelled**2)), rel=1e-6)


def test_a_constant_offset_is_the_error_and_worse_than_standing_still_is_said() -> None:
    shadow = Shadow(ROBOT, 30.0)
    shadow.answered(chunk(BEGIN + NS_PER_S, shift=0.5))
    watch(shadow, 0.0, 5.0)
    found = score(shadow)
    assert found.error.mae == pytest.approx(0.5) and found.worse_than_hold
    assert SOURCE in found.sentence and 'rmse 0.5000' in found.sentence


def test_a_chunk_counts_once_its_last_action_has_passed_and_until_it_is_too_old() -> None:
    shadow = Shadow(ROBOT, 2.0)
    watch(shadow, 0.0, 1.0)
    shadow.answered(chunk(BEGIN + NS_PER_S))
    last = 1.0 + HORIZON * PERIOD / NS_PER_S
    watch(shadow, 1.0, last - 0.1)
    assert shadow.score() is None
    watch(shadow, last - 0.1, last + 0.1)
    assert score(shadow).chunks == 1
    watch(shadow, last + 0.1, last + 1.9)
    assert score(shadow).chunks == 1
    watch(shadow, last + 1.9, last + 2.2)
    assert shadow.score() is None


def test_another_source_and_a_clock_that_jumps_back_begin_anew() -> None:
    shadow = Shadow(ROBOT, 30.0)
    shadow.answered(chunk(BEGIN + NS_PER_S))
    watch(shadow, 0.0, 5.0)
    assert shadow.score() is not None
    watch(shadow, 5.0, 5.1, source='something else')
    assert shadow.score() is None
    shadow.answered(chunk(BEGIN + 6 * NS_PER_S))
    watch(shadow, 5.1, 10.0, source='something else')
    assert score(shadow).source == 'something else'
    watch(shadow, -100.0, -99.0, source='something else')
    assert shadow.score() is None


def test_chunks_that_are_not_finite_do_not_count() -> None:
    shadow = Shadow(ROBOT, 30.0)
    shadow.answered(chunk(BEGIN + NS_PER_S, shift=np.nan))
    watch(shadow, 0.0, 5.0)
    assert shadow.score() is None
