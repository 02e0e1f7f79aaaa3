"""Ten thousand random cases of the promise: whatever comes in, what goes out is executable, inside every limit, and ends at rest.

One case is a timeline with random limits (with and without jerk), stamps and modes, through random chunks, delays, disagreements,
stops and clock jumps. The checks sample the curve by Bernstein polynomials and share no code with the planner.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.jtc_rules import ControllerParameters, validate
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, Plan, Rejection, TrajectoryPlanner
from vla_policy_ros.control.timeline import Timeline

MS = 1_000_000
T0 = 1_000_000 * MS
EMISSIONS = {stamp: Emission.for_controller(100.0, stamp) for stamp in ('zero', 'start')}  # type: ignore[arg-type]


def random_limits(rng: np.random.Generator, joints: int) -> JointLimits:
    middle, half = rng.normal(0, 1, joints), rng.uniform(0.05, 3, joints)
    acceleration = rng.uniform(0.5, 20, joints)
    jerk = acceleration * rng.uniform(8, 200, joints) if rng.random() < 0.4 else None
    names = tuple(f'joint{index}' for index in range(joints))
    return JointLimits(names, middle - half, middle + half, rng.uniform(0.2, 4, joints), acceleration, jerk)


def check(tools: Any, plan: Plan, limits: JointLimits, emission: Emission, commanded: CommandedMotion, now: int) -> None:
    trajectory = plan.trajectory
    assert trajectory is not None
    message = TrajectoryMessage.from_trajectory(trajectory, emission.header_stamp_ns(trajectory))
    assert validate(message, ControllerParameters(limits.names), now + 30 * MS) is None
    assert all(point.accelerations.size == 0 and point.velocities.size for point in message.points)
    assert np.isfinite(trajectory.positions).all() and (trajectory.velocities[-1] == 0.0).all()
    assert (trajectory.positions[-1] == trajectory.positions[-2]).all()
    q, v, a = tools.dense(trajectory, 6)
    assert (q <= limits.upper + 1e-9).all() and (q >= limits.lower - 1e-9).all()
    assert (np.abs(v) <= limits.velocity + 1e-9).all()
    assert (np.abs(a) <= limits.acceleration * (1 + 1e-6) + 1e-6).all()
    if limits.jerk is not None:
        steps = a.reshape(len(trajectory.times_ns) - 1, -1, len(limits.names))
        jerk = (steps[:, -1] - steps[:, 0]) / (np.diff(trajectory.times_ns) * 1e-9)[:, None]
        assert (np.abs(jerk) <= limits.jerk * (1 + 1e-5) + 1e-5).all()
    seam = int(np.searchsorted(trajectory.times_ns, plan.seam_ns - trajectory.start_ns))
    position, velocity = commanded.sample(plan.seam_ns)
    np.testing.assert_allclose(trajectory.positions[seam], position, atol=1e-8)
    np.testing.assert_allclose(trajectory.velocities[seam], velocity, atol=1e-6)


def one_case(tools: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = random_limits(rng, int(rng.integers(1, 4)))
    emission = EMISSIONS['start' if rng.random() < 0.7 else 'zero']
    timeline = Timeline(TrajectoryPlanner(limits, emission), 'ensemble' if rng.random() < 0.3 else 'replace')
    now, dt = T0, int(rng.choice([10, 33, 100]))
    timeline.advance(now)
    home = rng.uniform(limits.lower, limits.upper)
    commanded = timeline.begin(home)
    for _ in range(int(rng.integers(1, 4))):
        now += int(rng.integers(1, 500)) * MS
        if rng.random() < 0.05:
            now += int(rng.choice([-2500, 1700])) * MS
        if timeline.advance(now) or timeline.commanded is None or timeline.starved():
            if not timeline.settled:
                now += int(3000 * MS)
                timeline.advance(now)
            commanded = timeline.begin(home)
        if rng.random() < 0.1:
            stop = timeline.brake()
            if stop is not None:
                check(tools, stop, limits, emission, commanded, timeline.now_ns)
                timeline.accept(stop)
            continue
        horizon = int(rng.integers(1, 16))
        spread = limits.velocity * dt * 1e-3 * rng.choice([0.2, 1.0, 4.0])
        actions = commanded.sample(timeline.now_ns)[0] + np.cumsum(rng.normal(0, spread, (horizon, len(home))), axis=0)
        if rng.random() < 0.03:
            actions[rng.integers(horizon), rng.integers(len(home))] = rng.choice([np.nan, np.inf, -np.inf])
        chunk = tools.chunk(limits.names, timeline.now_ns + int(rng.integers(-150, 300)) * MS, actions, dt)
        plan = timeline.plan(chunk, commanded)
        if plan.trajectory is None:
            assert plan.rejection is not None and plan.rejection is not Rejection.LIMIT_EXCEEDED, plan.reason
            assert plan.reason
            timeline.refused()
            continue
        assert np.isfinite(actions).all()
        check(tools, plan, limits, emission, commanded, timeline.now_ns)
        timeline.accept(plan)
        timeline.taken(chunk, plan)
        home = plan.trajectory.positions[-1]
    assert commanded.at_rest(commanded.until_ns)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.integers(0, 2**63 - 1))
def test_ten_thousand_random_timelines_send_only_what_a_controller_executes_within_the_limits(tools: Any, seed: int) -> None:
    one_case(tools, seed)


def test_a_path_along_the_very_limit_leaves_room_to_brake_on_the_grid(tools: Any) -> None:
    one_case(tools, 12_400_206_923_346)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_wider_limits_never_refuse_what_narrower_ones_execute(tools: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    narrow = replace(random_limits(rng, 2), jerk=None)
    grow = 1.0 + rng.uniform(0, 1)
    wide = JointLimits(
        narrow.names,
        narrow.lower - 0.5 * (grow - 1),
        narrow.upper + 0.5 * (grow - 1),
        narrow.velocity * grow,
        narrow.acceleration * grow,
    )
    start = rng.uniform(narrow.lower, narrow.upper)
    actions = start + np.cumsum(rng.normal(0, 0.05, (10, 2)), axis=0)
    chunk = tools.chunk(narrow.names, T0, actions, 50)
    plans = {}
    for name, limits in (('narrow', narrow), ('wide', wide)):
        commanded = CommandedMotion.from_rest(limits.names, start, T0)
        plans[name] = TrajectoryPlanner(limits, EMISSIONS['start']).plan(chunk, T0, commanded)
    if plans['narrow'].trajectory is not None:
        assert plans['wide'].trajectory is not None, plans['wide'].reason
        assert set(plans['wide'].clamped_joints) <= set(plans['narrow'].clamped_joints)
        if not plans['narrow'].bent:
            assert not plans['wide'].bent


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_clamping_is_never_worse_than_the_chunk_itself(tools: Any, seed: int) -> None:
    """Where the chunk leaves the limits, what is sent stays inside; where it does not, what is sent is not further from it."""
    rng = np.random.default_rng(seed)
    limits = replace(random_limits(rng, 2), jerk=None)
    start = rng.uniform(limits.lower, limits.upper)
    margin = 0.04 * (limits.upper - limits.lower)
    actions = np.clip(start + np.cumsum(rng.normal(0, 0.1, (10, 2)), axis=0), limits.lower - margin, limits.upper + margin)
    chunk = tools.chunk(limits.names, T0, actions, 100)
    plan = TrajectoryPlanner(limits, EMISSIONS['start']).plan(chunk, T0, CommandedMotion.from_rest(limits.names, start, T0))
    if plan.trajectory is None:
        assert plan.rejection is Rejection.TOO_FAR
        return
    q = plan.trajectory.positions
    outside = np.maximum(q - limits.upper, limits.lower - q).max()
    wanted = np.maximum(actions - limits.upper, limits.lower - actions).max()
    assert outside <= max(0.0, wanted) + 1e-9
