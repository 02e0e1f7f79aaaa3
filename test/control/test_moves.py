"""A move ends at its pose, at rest, within the limits, from rest and out of any motion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.check import extrema, violation
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.moves import Moves
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner

MS = 1_000_000
MODES = ('start', 'zero')


def planner_for(limits: JointLimits, mode: str) -> TrajectoryPlanner:
    return TrajectoryPlanner(limits, Emission.for_controller(100.0, mode))  # type: ignore[arg-type]


def pose(limits: JointLimits, values: Any) -> dict[str, float]:
    return dict(zip(limits.names, map(float, values), strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(MODES), st.sampled_from([None, 100.0]))
def test_from_rest_it_ends_at_the_pose_and_uses_half_of_the_limits(tools: Any, seed: int, mode: str, jerk: float | None) -> None:
    limits, rng = tools.limits(), np.random.default_rng(seed)
    if jerk is not None:
        limits = JointLimits(limits.names, limits.lower, limits.upper, limits.velocity, limits.acceleration, np.full(3, jerk))
    planner = planner_for(limits, mode)
    start, goal = rng.uniform(-2.8, 2.8, (2, 3))
    commanded = CommandedMotion.from_rest(limits.names, start, tools.t0)
    plan = Moves(planner).move_to(pose(limits, goal), tools.t0, commanded)
    assert plan.trajectory is not None, plan.reason
    np.testing.assert_allclose(plan.trajectory.positions[-1], goal, atol=1e-6)
    assert not plan.trajectory.velocities[-1].any()
    found = extrema(plan.trajectory)
    assert (found.speed <= 0.52 * planner.emission.velocity_fraction * limits.velocity).all()
    assert (found.acceleration <= 0.6 * limits.acceleration).all()
    low, high = np.minimum(start, goal), np.maximum(start, goal)
    assert (found.lowest >= low - 1e-4).all() and (found.highest <= high + 1e-4).all(), 'a straight way'


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(MODES))
def test_out_of_a_motion_it_keeps_the_limits_and_still_ends_at_the_pose(tools: Any, seed: int, mode: str) -> None:
    limits, rng = tools.limits(), np.random.default_rng(seed)
    planner = planner_for(limits, mode)
    start = rng.uniform(-1.0, 1.0, 3)
    commanded = CommandedMotion.from_rest(limits.names, start, tools.t0)
    actions = start + np.arange(1, 17)[:, None] * rng.uniform(-0.06, 0.06, 3)
    plan = planner.plan(tools.chunk(limits.names, tools.t0 + 100 * MS, actions), tools.t0, commanded)
    assert plan.trajectory is not None
    commanded.accept(plan.trajectory)
    now, goal = tools.t0 + int(rng.integers(200, 1500)) * MS, rng.uniform(-2.8, 2.8, 3)
    move = Moves(planner).move_to(pose(limits, goal), now, commanded)
    assert move.trajectory is not None, move.reason
    assert violation(move.trajectory, limits) is None
    before = commanded.sample(move.seam_ns)
    commanded.accept(move.trajectory)
    after = commanded.sample(move.seam_ns)
    np.testing.assert_allclose(after[0], before[0], atol=1e-9)
    np.testing.assert_allclose(after[1], before[1], atol=1e-9)
    np.testing.assert_allclose(move.trajectory.positions[-1], goal, atol=2e-3)


def test_joints_that_the_pose_does_not_name_stay(tools: Any) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.array([0.1, 0.2, 0.3]), tools.t0)
    plan = Moves(planner_for(limits, 'start')).move_to({'joint1': 1.0}, tools.t0, commanded)
    assert plan.trajectory is not None
    np.testing.assert_allclose(
        plan.trajectory.positions[:, [0, 2]], np.tile([0.1, 0.3], (len(plan.trajectory.positions), 1)), atol=1e-9
    )
    assert plan.trajectory.positions[-1, 1] == pytest.approx(1.0, abs=1e-6)


def test_a_pose_that_is_reached_already_is_no_motion(tools: Any) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.full(3, 0.5), tools.t0)
    plan = Moves(planner_for(limits, 'start')).move_to(pose(limits, np.full(3, 0.5)), tools.t0, commanded)
    assert plan.trajectory is not None and not plan.trajectory.velocities.any()


def test_a_longer_way_or_a_lower_limit_takes_longer(tools: Any) -> None:
    def seconds(limits: JointLimits, goal: float) -> float:
        commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), tools.t0)
        plan = Moves(planner_for(limits, 'start')).move_to({'joint0': goal}, tools.t0, commanded)
        assert plan.trajectory is not None
        return float(plan.trajectory.times_ns[-1]) * 1e-9

    usual = seconds(tools.limits(), 1.0)
    assert seconds(tools.limits(), 2.0) > usual and seconds(tools.limits(velocity=0.5), 1.0) > usual


@pytest.mark.parametrize(
    ('goal', 'text'), [({'elbow': 0.0}, "joint 'elbow'"), ({'joint0': 2.9}, r'outside its limits \[-2.8, 2.8\]')]
)
def test_an_impossible_pose_is_refused_by_name(tools: Any, goal: dict[str, float], text: str) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), tools.t0)
    with pytest.raises(ValueError, match=text):
        Moves(planner_for(limits, 'start')).move_to(goal, tools.t0, commanded)


def test_a_fraction_outside_of_zero_to_one_is_refused(tools: Any) -> None:
    with pytest.raises(ValueError, match='fraction of the limits is 2'):
        Moves(planner_for(tools.limits(), 'start'), 2.0)
