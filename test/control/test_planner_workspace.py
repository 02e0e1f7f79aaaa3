"""The planner keeps the tip of the arm in its workspace: it shortens, refuses and brakes, with and without a jerk limit.

The tip is sampled every 0.5 ms on the interpolant, by the simulator's own kinematics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm import MS, T0, arm_urdf, dense, tips

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.kinematics import Chain
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, LimitExceeded, Rejection, TrajectoryPlanner
from vla_policy_ros.control.workspace import TOLERANCE_M, Workspace
from vla_policy_ros.sim.mjcf import JOINT_NAMES
from vla_policy_ros.sim.scene import HOME
from vla_policy_ros.types import JointTrajectory

STEP_MS = 50


@pytest.fixture(scope='module')
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    path: Path = tmp_path_factory.mktemp('urdf') / 'arm.urdf'
    path.write_text(arm_urdf())
    tip = tips(HOME[None])[0]
    return Workspace(JOINT_NAMES, Chain.from_urdf(path, JOINT_NAMES, 'tcp', 'link0'), tip - 0.12, tip + 0.12, 0.01)


def limits(jerk: float | None) -> JointLimits:
    ones = np.ones(7)
    return JointLimits(JOINT_NAMES, HOME - 1.5, HOME + 1.5, 1.5 * ones, 5.0 * ones, None if jerk is None else jerk * ones)


def beyond(workspace: Workspace, trajectory: JointTrajectory, seam_ns: int) -> float:
    """How far the tip leaves the box after the seam, m."""
    first = int(np.searchsorted(trajectory.times_ns, seam_ns - trajectory.start_ns))
    after = JointTrajectory(
        T0, trajectory.joint_names, trajectory.times_ns[first:] - trajectory.times_ns[first], trajectory.positions[first:],
        trajectory.velocities[first:],
    )  # fmt: skip
    points = tips(dense(after))
    return float(np.maximum(workspace.lower - points, points - workspace.upper).max())


@pytest.mark.parametrize('jerk', [None, 100.0])
@pytest.mark.parametrize('stamp', ['start', 'zero'])
def test_replanned_motion_that_pushes_outwards_stays_inside(
    tools: Any, workspace: Workspace, stamp: str, jerk: float | None
) -> None:
    emission = Emission.for_controller(100.0, stamp)  # type: ignore[arg-type]
    free, kept = (TrajectoryPlanner(limits(jerk), emission, box) for box in (None, workspace))
    commanded = CommandedMotion.from_rest(JOINT_NAMES, HOME, T0)
    rng, now, cuts, left = np.random.default_rng(3), T0, 0, 0
    for index in range(24):
        now += 200 * MS
        start = commanded.sample(now)[0]
        push = np.zeros(7)
        push[0] = 0.9 * np.sin(index / 4.0)
        actions = start + np.arange(1, 25)[:, None] * STEP_MS * 1e-3 * (push + rng.normal(0, 0.1, 7))
        chunk = tools.chunk(JOINT_NAMES, now + STEP_MS * MS, actions, STEP_MS)
        without = free.plan(chunk, now, commanded)
        assert without.trajectory is not None
        left += beyond(workspace, without.trajectory, without.seam_ns) > 0.005
        plan = kept.plan(chunk, now, commanded)
        if plan.trajectory is None:
            assert plan.rejection is Rejection.OUTSIDE_WORKSPACE and 'workspace is' in plan.reason
            continue
        cuts += bool(plan.cut)
        assert beyond(workspace, plan.trajectory, plan.seam_ns) <= TOLERANCE_M
        assert (plan.trajectory.velocities[-1] == 0).all()
        position, velocity = commanded.sample(plan.seam_ns)
        seam = int(np.searchsorted(plan.trajectory.times_ns, plan.seam_ns - plan.trajectory.start_ns))
        np.testing.assert_allclose(plan.trajectory.positions[seam], position, atol=1e-8)
        np.testing.assert_allclose(plan.trajectory.velocities[seam], velocity, atol=1e-6)
        commanded.accept(plan.trajectory, plan.raw)
    assert left >= 5 and cuts >= 5, 'the chunks do lead outside, and are shortened'


def test_a_chunk_inside_is_not_touched(tools: Any, workspace: Workspace) -> None:
    emission = Emission.for_controller(100.0, 'start')
    actions = HOME + 0.05 * np.sin(np.arange(20) / 6)[:, None]
    plans = []
    for box in (None, workspace):
        commanded = CommandedMotion.from_rest(JOINT_NAMES, HOME, T0)
        plans.append(TrajectoryPlanner(limits(None), emission, box).plan(tools.chunk(JOINT_NAMES, T0, actions, 50), T0, commanded))
    assert plans[0].trajectory is not None and plans[1].trajectory is not None and not plans[1].cut
    np.testing.assert_array_equal(plans[0].trajectory.positions, plans[1].trajectory.positions)


def test_an_arm_outside_may_only_come_in(tools: Any, workspace: Workspace) -> None:
    emission = Emission.for_controller(100.0, 'start')
    planner = TrajectoryPlanner(limits(None), emission, workspace)
    outside = HOME.copy()
    outside[0] += 0.5
    commanded = CommandedMotion.from_rest(JOINT_NAMES, outside, T0)
    further, back = (outside + np.arange(20)[:, None] * step * np.eye(7)[0] for step in (0.02, -0.03))
    refused = planner.plan(tools.chunk(JOINT_NAMES, T0, further, 50), T0, commanded)
    assert refused.trajectory is None and refused.rejection is Rejection.OUTSIDE_WORKSPACE
    assert 'does not move inwards' in refused.reason
    assert planner.plan(tools.chunk(JOINT_NAMES, T0, back, 50), T0, commanded).trajectory is not None


def test_a_brake_stays_inside_or_is_left_to_the_tail(tools: Any, workspace: Workspace) -> None:
    emission = Emission.for_controller(100.0, 'start')
    planner = TrajectoryPlanner(limits(None), emission, workspace)
    commanded = CommandedMotion.from_rest(JOINT_NAMES, HOME, T0)
    actions = HOME + np.arange(1, 30)[:, None] * 0.04 * np.eye(7)[0]
    plan = planner.plan(tools.chunk(JOINT_NAMES, T0 + 50 * MS, actions, 50), T0, commanded)
    assert plan.trajectory is not None and plan.cut
    commanded.accept(plan.trajectory)
    sent = 0
    for now_ms in range(20, 900, 40):
        try:
            stop = planner.brake(T0 + now_ms * MS, commanded)
        except LimitExceeded as problem:
            assert 'workspace is' in str(problem)
            continue
        if stop is not None:
            assert stop.trajectory is not None
            assert beyond(workspace, stop.trajectory, stop.seam_ns) <= TOLERANCE_M
            sent += 1
    assert sent > 3
