"""Limits, commanded motion, exact extrema and the follower's building blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.check import extrema, violation
from vla_policy_ros.control.chunk_path import ChunkPath
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.follower import stopping_distance
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.robot import load_robot
from vla_policy_ros.types import JointTrajectory

MS = 1_000_000
seeds = st.integers(0, 2**32 - 1)


def random_trajectory(rng: np.random.Generator, joints: int = 3, start_ns: int = 0) -> JointTrajectory:
    count = int(rng.integers(2, 9))
    times = np.cumsum(rng.integers(5 * MS, 300 * MS, count) // 8 * 8)  # eighths of a segment are whole nanoseconds
    velocities = rng.normal(0, 1, (count, joints))
    velocities[-1] = 0
    names = tuple(f'joint{index}' for index in range(joints))
    return JointTrajectory(start_ns, names, times, rng.normal(0, 1, (count, joints)), velocities)


def test_limits_of_the_shipped_robot_are_in_action_order() -> None:
    robot = load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')
    limits = JointLimits.from_robot(robot)
    assert limits.names == robot.action.joints
    fourth = robot.limits[robot.action.joints[3]]
    assert (limits.lower[3], limits.upper[3]) == fourth.position
    assert limits.velocity[3] == fourth.velocity and limits.acceleration[3] == fourth.acceleration


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        ({'names': ('a', 'a')}, 'distinct'),
        ({'lower': [0.0]}, 'shape'),
        ({'upper': [1.0, np.nan]}, "'b' is not finite"),
        ({'lower': [0.0, 2.0]}, "'b': need lower < upper"),
        ({'velocity': [0.0, 1.0]}, "'a': need"),
    ],
)
def test_impossible_limits_are_refused(change: dict[str, Any], match: str) -> None:
    values: dict[str, Any] = {
        'names': ('a', 'b'),
        'lower': [-1.0, -1.0],
        'upper': [1.0, 1.0],
        'velocity': [1.0, 1.0],
        'acceleration': [1.0, 1.0],
    }
    with pytest.raises(ValueError, match=match):
        JointLimits(**{**values, **change})


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_extrema_are_those_of_a_dense_sampling(tools: Any, seed: int) -> None:
    trajectory = random_trajectory(np.random.default_rng(seed))
    found = extrema(trajectory)
    q, v, a = tools.dense(trajectory, 400)
    for exact, sampled in (
        (found.highest, q.max(axis=0)),
        (-found.lowest, -q.min(axis=0)),
        (found.speed, np.abs(v).max(axis=0)),
        (found.acceleration, np.abs(a).max(axis=0)),
    ):
        assert np.all(exact >= sampled - 1e-9 * np.maximum(1, np.abs(sampled)))
        assert exact == pytest.approx(sampled, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ('positions', 'velocities', 'quantity'),
    [
        ([0.0, 3.0], [0.0, 0.0], 'position'),
        ([0.9, 0.9], [1.0, -1.0], 'position'),
        ([0.0, 0.9], [0.0, 0.0], 'speed'),
        ([0.0, 0.0], [0.9, 0.0], 'acceleration'),
        ([0.0, np.nan], [0.0, 0.0], 'position'),
    ],
)
def test_violation_names_what_the_knots_alone_do_not_show(
    positions: list[float], velocities: list[float], quantity: str
) -> None:
    limits = JointLimits(('elbow',), np.array([-1.0]), np.array([1.0]), np.array([1.0]), np.array([6.0]))
    trajectory = JointTrajectory(
        0, ('elbow',), np.array([0, 500 * MS]), np.array(positions)[:, None], np.array(velocities)[:, None]
    )
    sentence = violation(trajectory, limits)
    assert sentence is not None and sentence.startswith(f'{quantity} of joint') and "'elbow'" in sentence


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_commanded_motion_is_the_interpolant_of_what_was_accepted(tools: Any, seed: int) -> None:
    trajectory = random_trajectory(np.random.default_rng(seed), start_ns=10_000 * MS)
    commanded = CommandedMotion.from_rest(trajectory.joint_names, np.zeros(3), 0)
    commanded.accept(trajectory)
    q, v, _ = tools.dense(trajectory, 8)
    times = trajectory.times_ns
    for index in range(len(times) - 1):
        for part in range(9):
            t = int(times[index] + (times[index + 1] - times[index]) * part // 8)
            position, velocity = commanded.sample(trajectory.start_ns + t)
            assert position == pytest.approx(q[9 * index + part], abs=1e-6)
            assert velocity == pytest.approx(v[9 * index + part], abs=1e-4)


def test_the_old_motion_continues_until_the_first_knot_of_the_new_one() -> None:
    names = ('a',)
    commanded = CommandedMotion.from_rest(names, np.zeros(1), 0)
    ramp = np.linspace(0, 1, 11)[:, None]
    moving = np.vstack([np.ones((10, 1)), np.zeros((1, 1))])
    commanded.accept(JointTrajectory(0, names, np.arange(11) * 100 * MS, ramp, moving))
    at, rising = commanded.sample(500 * MS)
    times = np.array([200 * MS, 300 * MS])
    commanded.accept(JointTrajectory(300 * MS, names, times, np.vstack([at, [0.55]]), np.array([[1.0], [0.0]])))
    assert commanded.sample(420 * MS)[0] == pytest.approx(0.42)
    assert commanded.sample(500 * MS - 1)[0] == pytest.approx(at, abs=1e-6)
    assert commanded.sample(500 * MS)[1] == pytest.approx(rising)
    assert commanded.sample(900 * MS)[0] == pytest.approx(0.55)


def test_a_motion_that_rests_departs_when_the_next_trajectory_starts_not_before() -> None:
    commanded = CommandedMotion.from_rest(('a',), np.zeros(1), 0)
    commanded.accept(JointTrajectory(5000 * MS, ('a',), np.array([100 * MS]), np.ones((1, 1)), np.zeros((1, 1))))
    assert commanded.sample(4999 * MS)[0] == 0.0
    assert 0.4 < commanded.sample(5050 * MS)[0] < 0.6


def test_rest_is_known_exactly() -> None:
    commanded = CommandedMotion.from_rest(('a',), np.zeros(1), 0)
    assert commanded.at_rest(0) and commanded.at_rest(10**12)
    positions, velocities = np.array([[0.0], [0.1], [0.1]]), np.array([[1.0], [0.0], [0.0]])
    commanded.accept(JointTrajectory(0, ('a',), np.array([100, 200, 300]) * MS, positions, velocities))
    assert not commanded.at_rest(50 * MS) and not commanded.at_rest(199 * MS)
    assert commanded.at_rest(200 * MS)


def test_history_stays_short() -> None:
    commanded = CommandedMotion.from_rest(('a',), np.zeros(1), 0)
    for start in range(0, 100_000, 100):
        times = np.arange(1, 101) * 20 * MS
        commanded.accept(JointTrajectory(start * MS, ('a',), times, np.zeros((100, 1)), np.zeros((100, 1))))
    assert len(commanded.knots_between(0, 10**18)) < 250
    assert commanded.since_ns <= (100_000 - 100 - 2000) * MS


def test_other_joints_and_bad_positions_are_refused() -> None:
    commanded = CommandedMotion.from_rest(('a', 'b'), np.zeros(2), 0)
    with pytest.raises(ValueError, match='commanded are'):
        commanded.accept(JointTrajectory(0, ('b', 'a'), np.array([1]), np.zeros((1, 2)), np.zeros((1, 2))))
    with pytest.raises(ValueError, match="'b' is not finite"):
        CommandedMotion.from_rest(('a', 'b'), np.array([0.0, np.nan]), 0)
    with pytest.raises(ValueError, match='shape'):
        CommandedMotion.from_rest(('a', 'b'), np.zeros(3), 0)


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.floats(0.5, 20), st.floats(0.005, 0.05))
def test_stopping_distance_is_what_full_braking_on_the_grid_takes(speed: float, acceleration: float, step: float) -> None:
    v, travelled = speed, 0.0
    while v != 0.0:
        slower = v - float(np.clip(v, -acceleration * step, acceleration * step))
        travelled += 0.5 * step * (v + slower)
        v = slower
    assert stopping_distance(np.array([speed]), np.array([acceleration]), step)[0] == pytest.approx(travelled, abs=1e-9)
    assert abs(travelled) >= speed**2 / (2 * acceleration) - 1e-12


def test_chunk_path_reproduces_a_parabola_through_its_targets() -> None:
    t = np.arange(6) * 0.1
    path = ChunkPath(1000 * MS, 100 * MS, np.stack([t**2, 1 - t], axis=1))
    times = np.arange(1000, 1501, 7) * MS
    q, v = path.sample(times)
    s = times * 1e-9 - 1.0
    assert q == pytest.approx(np.stack([s**2, 1 - s], axis=1))
    assert v == pytest.approx(np.stack([2 * s, -np.ones_like(s)], axis=1))
    assert path.end_ns == 1500 * MS


def test_chunk_path_of_one_target_stands_there() -> None:
    q, v = ChunkPath(0, MS, np.array([[0.3]])).sample(np.array([-5, 0, 5]))
    assert np.all(q == 0.3) and np.all(v == 0.0)
