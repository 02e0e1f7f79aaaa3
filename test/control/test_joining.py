"""How a chunk joins the commanded motion: the difference fades out, older chunks are averaged in, and jerk stays bounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.check import extrema
from vla_policy_ros.control.chunk_path import ChunkPath, EarlierPath, EnsemblePath, JoinedPath
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.control.smoothing import Smoother
from vla_policy_ros.types import JointTrajectory

MS = 1_000_000
T0 = 1_000_000 * MS
seeds = st.integers(0, 2**32 - 1)


def grid(start: int, end: int, step_ms: float = 1.0) -> np.ndarray:
    return np.arange(start, end + 1, round(step_ms * MS), dtype=np.int64)


def random_path(rng: np.random.Generator, start: int = T0, rows: int = 12, dt_ms: int = 50) -> ChunkPath:
    return ChunkPath(start, dt_ms * MS, np.cumsum(rng.normal(0, 0.02, (rows, 2)), axis=0))


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(0, 300), st.integers(20, 300))
def test_a_joined_path_starts_in_the_motion_s_state_and_becomes_the_path(seed: int, after_ms: int, fade_ms: int) -> None:
    rng = np.random.default_rng(seed)
    path, seam = random_path(rng), T0 + after_ms * MS
    q, v = rng.normal(0, 0.1, 2), rng.normal(0, 0.3, 2)
    joined = JoinedPath(path, seam, q, v, fade_ms * MS)
    times = grid(seam, path.end_ns)
    position, velocity = joined.sample(times)
    np.testing.assert_allclose(position[0], q, atol=1e-12)
    np.testing.assert_allclose(velocity[0], v, atol=1e-12)
    faded = times >= seam + fade_ms * MS
    expected = path.sample(times[faded])
    np.testing.assert_allclose(position[faded], expected[0], atol=1e-9)
    np.testing.assert_allclose(velocity[faded], expected[1], atol=1e-7)
    # Velocities are the derivative of positions.
    steepest = np.abs(np.diff(velocity, axis=0)).max()
    np.testing.assert_allclose(np.diff(position, axis=0) / 1e-3, 0.5 * (velocity[1:] + velocity[:-1]), atol=0.1 * steepest + 1e-3)


def test_the_end_of_a_path_still_moves_exactly_at_its_last_waypoint() -> None:
    path = ChunkPath(T0, 20 * MS, np.arange(50)[:, None] * 0.01)
    for time, moves in ((path.end_ns, True), (path.end_ns + 1, False), (T0, True), (T0 - 1, False)):
        assert bool((path.sample(np.array([time]))[1] != 0).all()) == moves


def test_an_earlier_path_is_the_same_path_sooner() -> None:
    path = random_path(np.random.default_rng(0))
    earlier = EarlierPath(path, 30 * MS)
    times = grid(T0, path.end_ns, 7)
    assert (earlier.start_ns, earlier.end_ns) == (path.start_ns - 30 * MS, path.end_ns - 30 * MS)
    for mine, theirs in zip(earlier.sample(times - 30 * MS), path.sample(times), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.1, 1.0))
def test_an_ensemble_is_continuous_between_its_paths_and_its_velocity_is_its_derivative(seed: int, decay: float) -> None:
    rng = np.random.default_rng(seed)
    paths = [random_path(rng, T0 - age * 130 * MS) for age in range(3)]
    mean = EnsemblePath(paths, decay, 100 * MS)
    times = grid(T0, paths[0].end_ns, 0.5)
    position, velocity = mean.sample(times)
    alone = np.array([path.sample(times)[0] for path in paths])
    assert (position >= alone.min(axis=0) - 1e-9).all() and (position <= alone.max(axis=0) + 1e-9).all()
    slopes = np.diff(position, axis=0) / 5e-4
    middle = 0.5 * (velocity[1:] + velocity[:-1])
    assert np.quantile(np.abs(slopes - middle), 0.99) < 0.02
    assert np.abs(np.diff(position, axis=0)).max() < 2e-3, 'no jump where a path ends'
    one = EnsemblePath(paths[:1], decay, 100 * MS).sample(times)
    np.testing.assert_array_equal(one[0], alone[0])
    for bad in (([], 0.5, 1), (paths, 0.0, 1), (paths, 1.1, 1), (paths, 0.5, 0)):
        with pytest.raises(ValueError, match='ensemble'):
            EnsemblePath(*bad)


def test_a_feasible_chunk_is_executed_as_it_is_and_one_that_is_not_is_bent(tools: Any) -> None:
    limits, emission = tools.limits(), Emission.for_controller(100.0, 'start')
    planner = TrajectoryPlanner(limits, emission)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    slow = np.tile(0.2 * (1 - np.cos(np.linspace(0, np.pi, 20)))[:, None], (1, 3))
    plan = planner.plan(tools.chunk(limits.names, T0, slow, 50), T0, commanded)
    assert plan.trajectory is not None and not plan.bent and plan.seam_ns >= T0 + emission.lead_ns
    commanded.accept(plan.trajectory)
    after = T0 + 400 * MS
    expected = ChunkPath(T0, 50 * MS, slow).sample(grid(after, T0 + 950 * MS, 5))[0]
    executed = [commanded.sample(int(time))[0] for time in grid(after, T0 + 950 * MS, 5)]
    np.testing.assert_allclose(executed, expected, atol=2e-4)
    fast = np.tile(np.arange(20)[:, None] * 0.13, (1, 3))
    bent = planner.plan(tools.chunk(limits.names, T0, fast, 50), T0, CommandedMotion.from_rest(limits.names, np.zeros(3), T0))
    assert bent.trajectory is not None and bent.bent


def test_fading_in_a_disagreeing_chunk_is_gentler_than_jumping_to_it(tools: Any) -> None:
    """A chunk that disagrees by 20 mrad while the arm moves: the commanded acceleration at the seam stays far below the limit."""
    limits = tools.limits()
    largest = {}
    for fade in (0.02, 0.3):
        emission = replace(Emission.for_controller(100.0, 'start'), fade_s=fade)
        planner = TrajectoryPlanner(limits, emission)
        commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
        ramp = np.tile(np.arange(40)[:, None] * 0.01, (1, 3))
        first = planner.plan(tools.chunk(limits.names, T0, ramp, 50), T0, commanded)
        assert first.trajectory is not None
        commanded.accept(first.trajectory)
        now = T0 + 800 * MS
        second = planner.plan(tools.chunk(limits.names, T0, ramp + 0.02, 50), now, commanded)
        assert second.trajectory is not None
        commanded.accept(second.trajectory)
        speeds = np.array([commanded.sample(int(time))[1] for time in grid(now, now + 600 * MS, 10)])
        largest[fade] = float(np.abs(np.diff(speeds, axis=0)).max() / 0.01)
    assert largest[0.3] < 0.35 * largest[0.02]
    assert largest[0.3] < 2.0


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 8))
def test_the_average_keeps_what_a_motion_keeps_and_bounds_its_jerk(seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    step, acceleration = 0.02, 5.0
    chosen = np.vstack([np.zeros((steps, 2)), rng.uniform(-acceleration, acceleration, (30, 2)), np.zeros((steps + 2, 2))])
    velocities = np.vstack([np.zeros(2), np.cumsum(chosen * step, axis=0)])
    positions = np.vstack([np.zeros(2), np.cumsum(0.5 * step * (velocities[:-1] + velocities[1:]), axis=0)])
    smoother = Smoother(steps, step)
    q, v = smoother(positions, velocities)
    assert len(q) == len(positions) - steps
    times = (step * 1e9 * np.arange(len(q))).astype(np.int64)
    found = extrema(JointTrajectory(0, ('a', 'b'), times, q, v))
    # On an equal grid, the Hermite cubic through averaged knots is the average itself: compare with a fine numerical one.
    fine = np.repeat(velocities[:-1], 20, axis=0) + np.tile(np.arange(20)[:, None] / 20 * step, (len(chosen), 1)) * np.repeat(
        chosen, 20, axis=0
    )
    kernel = np.ones(20 * steps) / (20 * steps)
    moving = np.array([np.convolve(fine[:, j], kernel, 'valid') for j in range(2)]).T
    np.testing.assert_allclose(v[: len(moving[::20])], moving[::20][: len(v)], atol=acceleration * step / 10)
    assert (found.acceleration <= acceleration + 1e-9).all()
    assert (found.jerk <= 2 * acceleration / (steps * step) + 1e-6).all()


@pytest.mark.parametrize('stamp', ['start', 'zero'])
def test_a_jerk_limit_holds_on_every_trajectory_and_costs_no_tracking(tools: Any, stamp: str) -> None:
    plain = tools.limits()
    limits = replace(plain, jerk=np.full(3, 60.0))
    emission = Emission.for_controller(100.0, stamp)  # type: ignore[arg-type]
    planner = TrajectoryPlanner(limits, emission)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)

    def path(times: np.ndarray) -> np.ndarray:
        return 0.3 * np.sin(1.2 * (times - T0)[:, None] * 1e-9 + np.arange(3)) - 0.3 * np.sin(np.arange(3))

    rng = np.random.default_rng(1)
    now, errors = T0, []
    for index in range(20):
        now += 200 * MS
        stamps = now - 100 * MS + 50 * MS * np.arange(1, 31)
        wild = 0.15 * rng.normal(size=3) if index in (7, 8) else rng.normal(0, 0.004, 3)
        plan = planner.plan(tools.chunk(limits.names, int(stamps[0]), path(stamps) + wild, 50), now, commanded)
        assert plan.trajectory is not None and plan.raw is not None, plan.reason
        first = int(np.searchsorted(plan.trajectory.times_ns, plan.seam_ns - plan.trajectory.start_ns))
        new = plan.trajectory
        tail = JointTrajectory(new.start_ns, new.joint_names, new.times_ns[first:], new.positions[first:], new.velocities[first:])
        found = extrema(tail)
        assert (found.jerk <= 60.0 * (1 + 1e-6)).all() and (found.acceleration <= 5.0 * (1 + 1e-6)).all()
        position, velocity = commanded.sample(plan.seam_ns)
        np.testing.assert_allclose(new.positions[first], position, atol=1e-9)
        np.testing.assert_allclose(new.velocities[first], velocity, atol=1e-9)
        assert (new.velocities[-1] == 0).all() and (new.positions[-1] == new.positions[-2]).all()
        commanded.accept(new, plan.raw)
        if index in (5, 6, 15, 16, 17, 18):
            check = now + 150 * MS
            errors.append(np.abs(commanded.sample(check)[0] - path(np.array([check]))[0]).max())
    assert max(errors) < 0.03
    stop = planner.brake(now + 50 * MS, commanded)
    assert stop is not None and stop.trajectory is not None and stop.raw is not None
    commanded.accept(stop.trajectory, stop.raw)
    assert commanded.at_rest(now + 1200 * MS)


def test_a_jerk_limit_that_would_delay_too_much_is_refused_with_the_remedy(tools: Any) -> None:
    limits = replace(tools.limits(), jerk=np.array([np.inf, 10.0, np.inf]))
    with pytest.raises(ValueError, match=r"'joint1'.*raise jerk to 20"):
        Smoother.for_limits(limits, 0.02)
    assert Smoother.for_limits(replace(limits, jerk=np.full(3, np.inf)), 0.02).steps == 0
    with pytest.raises(ValueError, match='positive'):
        replace(limits, jerk=np.array([1.0, -1.0, 1.0]))


@pytest.mark.parametrize('lead_ms', [0, 5, 10, 60, 200])
def test_a_chunk_that_begins_just_after_the_seam_does_not_lead_astray(tools: Any, lead_ms: int) -> None:
    """From rest at zero towards small positive targets: nothing moves far the other way, or far beyond."""
    limits, emission = tools.limits(), Emission.for_controller(100.0, 'start')
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    actions = np.tile(0.03 + 0.01 * np.arange(20)[:, None], (1, 3))
    seam = T0 + emission.lead_ns
    plan = TrajectoryPlanner(limits, emission).plan(tools.chunk(limits.names, seam + lead_ms * MS, actions, 50), T0, commanded)
    assert plan.trajectory is not None
    assert plan.trajectory.positions.min() > -0.002 and plan.trajectory.positions.max() < 0.24
