"""One plan at a time: expiry, bands, seam, limits on the curve, rest at the end, brake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control import planner as planner_module
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.jtc_rules import ControllerParameters, lint, validate
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, LimitExceeded, Plan, Rejection, TrajectoryPlanner
from vla_policy_ros.types import JointTrajectory

MS = 1_000_000
T0 = 1_000_000 * MS
MODES = ('zero', 'start')
seeds = st.integers(0, 2**32 - 1)


def emission(mode: str) -> Emission:
    return Emission.for_controller(100.0, mode)  # type: ignore[arg-type]


def planned(plan: Plan) -> JointTrajectory:
    assert plan.trajectory is not None, plan.reason
    return plan.trajectory


def check_sendable(tools: Any, trajectory: JointTrajectory, limits: JointLimits, mode: Emission, now_ns: int) -> None:
    """A controller accepts it, it ends at rest, and its whole curve is within the limits."""
    message = TrajectoryMessage.from_trajectory(trajectory, mode.header_stamp_ns(trajectory))
    assert validate(message, ControllerParameters(limits.names), now_ns + 30 * MS) is None
    assert [finding.sentence for finding in lint(message)] == []
    assert len(trajectory.times_ns) >= 2
    assert np.all(trajectory.velocities[-1] == 0.0)
    assert np.array_equal(trajectory.positions[-1], trajectory.positions[-2])
    q, v, a = tools.dense(trajectory)
    assert np.all(q <= limits.upper + 1e-9) and np.all(q >= limits.lower - 1e-9)
    assert np.all(np.abs(v) <= limits.velocity * mode.velocity_fraction + 1e-9)
    assert np.all(np.abs(a) <= limits.acceleration * (1 + 1e-6))


def random_limits(rng: np.random.Generator, joints: int) -> JointLimits:
    middle, half = rng.normal(0, 1, joints), rng.uniform(0.05, 3, joints)
    names = tuple(f'joint{index}' for index in range(joints))
    return JointLimits(names, middle - half, middle + half, rng.uniform(0.2, 4, joints), rng.uniform(0.5, 20, joints))


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(MODES), st.sampled_from([10, 33, 100]), st.integers(1, 20), st.integers(-150, 400))
def test_any_chunk_within_the_bands_becomes_a_sendable_continuation(
    tools: Any, seed: int, mode: str, dt_ms: int, horizon: int, offset_ms: int
) -> None:
    rng = np.random.default_rng(seed)
    limits = random_limits(rng, int(rng.integers(1, 5)))
    shape = emission(mode)
    planner = TrajectoryPlanner(limits, shape)
    commanded = CommandedMotion.from_rest(limits.names, rng.uniform(limits.lower, limits.upper), T0)
    now = T0
    for _ in range(4):
        now += int(rng.integers(1 * MS, 400 * MS))
        margin = 0.04 * (limits.upper - limits.lower)
        actions = rng.uniform(limits.lower - margin, limits.upper + margin, (horizon, len(limits.names)))
        plan = planner.plan(tools.chunk(limits.names, now + offset_ms * MS, actions, dt_ms), now, commanded)
        if plan.trajectory is None:
            assert plan.rejection in (Rejection.EXPIRED, Rejection.TOO_FAR)
            continue
        trajectory = plan.trajectory
        check_sendable(tools, trajectory, limits, shape, now)
        first_ns = trajectory.start_ns + int(trajectory.times_ns[0])
        for index in range(len(trajectory.times_ns)):
            time = trajectory.start_ns + int(trajectory.times_ns[index])
            if index == 0 or (mode == 'start' and time <= now + shape.lead_ns):
                q, v = commanded.sample(time)
                assert trajectory.positions[index] == pytest.approx(q, abs=1e-9)
                assert trajectory.velocities[index] == pytest.approx(v, abs=1e-7)
        bridged = mode == 'zero' or commanded.at_rest(now)
        assert first_ns >= now + shape.lead_ns if bridged else first_ns <= now
        commanded.accept(trajectory)
    if not commanded.at_rest(now):
        stop = planner.brake(now, commanded)
        assert stop is not None
        check_sendable(tools, planned(stop), limits, shape, now)


@pytest.mark.parametrize('mode', MODES)
def test_actions_that_the_seam_has_passed_are_expired_and_counted(tools: Any, mode: str) -> None:
    limits = tools.limits()
    shape = emission(mode)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    actions = np.tile(np.linspace(0, 0.3, 16)[:, None], (1, 3))
    now = T0 + 1000 * MS
    plan = TrajectoryPlanner(limits, shape).plan(tools.chunk(limits.names, now - 200 * MS, actions), now, commanded)
    # Targets at -200, -100 and 0 ms are past in any case; the one at +100 ms is at the seam of stamp 'zero'.
    assert plan.points_expired == (4 if mode == 'zero' else 3)
    assert plan.trajectory is not None


@pytest.mark.parametrize('mode', MODES)
def test_a_chunk_that_is_entirely_past_is_rejected(tools: Any, mode: str) -> None:
    limits = tools.limits()
    planner = TrajectoryPlanner(limits, emission(mode))
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    plan = planner.plan(tools.chunk(limits.names, T0 - 2000 * MS, np.zeros((16, 3))), T0, commanded)
    assert (plan.trajectory, plan.rejection, plan.points_expired) == (None, Rejection.EXPIRED, 16)
    assert 'too old' in plan.reason


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_rejects_the_whole_chunk(tools: Any, value: float) -> None:
    limits = tools.limits()
    actions = np.zeros((16, 3))
    actions[15, 1] = value
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    plan = TrajectoryPlanner(limits, emission('start')).plan(tools.chunk(limits.names, T0, actions), T0, commanded)
    assert plan.trajectory is None and plan.rejection is Rejection.NON_FINITE
    assert "action 15 of joint 'joint1'" in plan.reason


def test_the_three_bands_of_the_position_limits(tools: Any) -> None:
    limits = tools.limits(position=1.0, velocity=5.0)
    planner = TrajectoryPlanner(limits, emission('start'))
    commanded = CommandedMotion.from_rest(limits.names, np.full(3, 0.9), T0)

    def plan(target: float) -> Plan:
        actions = np.full((16, 3), 0.9)
        actions[10:, 2] = target
        return planner.plan(tools.chunk(limits.names, T0 + 100 * MS, actions), T0, commanded)

    assert plan(0.99).clamped_joints == ()
    clamped = plan(1.09)
    assert clamped.clamped_joints == ('joint2',)
    assert 0.99 < planned(clamped).positions.max() <= 1.0
    rejected = plan(1.11)
    assert rejected.trajectory is None and rejected.rejection is Rejection.OUT_OF_LIMITS
    assert "'joint2'" in rejected.reason and '1.11' in rejected.reason and '[-1, 1]' in rejected.reason


def test_an_expired_action_outside_the_limits_does_not_reject(tools: Any) -> None:
    limits = tools.limits(position=1.0)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    actions = np.zeros((16, 3))
    actions[0] = 9.0
    plan = TrajectoryPlanner(limits, emission('start')).plan(tools.chunk(limits.names, T0 - 150 * MS, actions), T0, commanded)
    assert plan.trajectory is not None and plan.clamped_joints == ()


def test_a_demand_for_more_speed_than_usable_is_clamped_and_named(tools: Any) -> None:
    limits = tools.limits(velocity=1.0)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    actions = np.zeros((16, 3))
    actions[:, 0] = np.arange(16) * 0.15
    plan = TrajectoryPlanner(limits, emission('start')).plan(tools.chunk(limits.names, T0, actions), T0, commanded)
    assert plan.clamped_joints == ('joint0',)
    assert np.abs(planned(plan).velocities).max() == pytest.approx(1.0)


def test_a_chunk_that_starts_out_of_reach_is_rejected_with_the_distance(tools: Any) -> None:
    limits = tools.limits(velocity=1.0)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    planner = TrajectoryPlanner(limits, emission('start'))
    actions = np.zeros((16, 3))
    actions[:, 1] = 1.2
    plan = planner.plan(tools.chunk(limits.names, T0, actions), T0, commanded)
    assert plan.trajectory is None and plan.rejection is Rejection.TOO_FAR
    assert "'joint1'" in plan.reason and '1.2' in plan.reason
    assert plan.seam_jump == pytest.approx(1.2)


def test_the_seam_jump_is_the_distance_between_chunk_and_commanded_motion(tools: Any) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    planner = TrajectoryPlanner(limits, emission('start'))
    plan = planner.plan(tools.chunk(limits.names, T0, np.tile([0.0, -0.07, 0.02], (16, 1))), T0, commanded)
    assert plan.seam_jump == pytest.approx(0.07)
    later = planner.plan(tools.chunk(limits.names, T0 + 300 * MS, np.tile([0.0, -0.07, 0.02], (16, 1))), T0, commanded)
    assert later.seam_jump == pytest.approx(0.07)


def test_a_chunk_that_begins_later_is_reached_on_time(tools: Any) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    planner = TrajectoryPlanner(limits, emission('start'))
    actions = np.tile(0.2 + 0.02 * np.arange(16)[:, None], (1, 3))
    trajectory = planned(planner.plan(tools.chunk(limits.names, T0 + 700 * MS, actions), T0, commanded))
    commanded.accept(trajectory)
    assert commanded.sample(T0 + 700 * MS)[0] == pytest.approx(0.2, abs=2e-3)
    assert commanded.sample(T0 + 1500 * MS)[0] == pytest.approx(0.36, abs=2e-3)


def test_a_clock_behind_the_commanded_motion_is_rejected(tools: Any) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    past = T0 - 5000 * MS
    planner = TrajectoryPlanner(limits, emission('start'))
    plan = planner.plan(tools.chunk(limits.names, past, np.zeros((16, 3))), past, commanded)
    assert plan.trajectory is None and plan.rejection is Rejection.CLOCK_JUMPED and '5.000 s' in plan.reason


def test_joints_in_another_order_are_sorted_and_other_joints_refused(tools: Any) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    planner = TrajectoryPlanner(limits, emission('start'))
    reversed_names = tuple(reversed(limits.names))
    trajectory = planned(planner.plan(tools.chunk(reversed_names, T0, np.tile([0.3, 0.2, 0.1], (16, 1))), T0, commanded))
    assert trajectory.joint_names == limits.names
    assert trajectory.positions[-1] == pytest.approx([0.1, 0.2, 0.3], abs=1e-2)
    for names in (('joint0', 'joint1'), ('joint0', 'joint0', 'joint1'), ('joint0', 'joint1', 'elbow')):
        with pytest.raises(ValueError, match='chunk has joints'):
            planner.plan(tools.chunk(names, T0, np.zeros((16, len(names)))), T0, commanded)
    with pytest.raises(ValueError, match='shape'):
        planner.plan(tools.chunk(limits.names, T0, np.zeros((0, 3))), T0, commanded)
    with pytest.raises(ValueError, match='period'):
        planner.plan(tools.chunk(limits.names, T0, np.zeros((4, 3)), dt_ms=0), T0, commanded)
    with pytest.raises(ValueError, match='commanded motion'):
        planner.plan(tools.chunk(limits.names, T0, np.zeros((4, 3))), T0, CommandedMotion.from_rest(('a',), np.zeros(1), T0))


def test_an_arm_that_starts_outside_its_limits_moves_inward_only(tools: Any) -> None:
    limits = tools.limits(position=1.0)
    start = np.array([1.02, 0.0, -1.05])
    commanded = CommandedMotion.from_rest(limits.names, start, T0)
    planner = TrajectoryPlanner(limits, emission('start'))
    actions = np.tile([1.04, 0.0, -0.8], (16, 1))
    trajectory = planned(planner.plan(tools.chunk(limits.names, T0, actions), T0, commanded))
    assert trajectory.positions[:, 0].max() <= 1.02 and trajectory.positions[:, 2].min() >= -1.05
    assert trajectory.positions[-1] == pytest.approx([1.0, 0.0, -0.8], abs=1e-2)


def test_limits_that_tighten_under_a_moving_arm_are_left_only_as_far_as_full_braking_needs(tools: Any) -> None:
    wide, tight = tools.limits(position=2.0), tools.limits(position=0.5)
    commanded = CommandedMotion.from_rest(wide.names, np.zeros(3), T0)
    actions = np.tile(np.arange(16)[:, None] * 0.12, (1, 3))
    chunk = tools.chunk(wide.names, T0 + 100 * MS, actions)
    commanded.accept(planned(TrajectoryPlanner(wide, emission('start')).plan(chunk, T0, commanded)))
    planner = TrajectoryPlanner(tight, emission('start'))
    now = T0 + 400 * MS
    position, velocity = commanded.sample(now + 40 * MS)
    needed = position + velocity**2 / (2 * tight.acceleration)
    assert np.all(position < 0.5) and np.all(needed > 0.5)
    stay = planned(planner.plan(tools.chunk(tight.names, now, np.full((16, 3), 0.4)), now, commanded))
    assert np.all(stay.positions.max(axis=0) == pytest.approx(needed, abs=2e-3))
    assert stay.positions[-1] == pytest.approx(0.4, abs=1e-2)
    assert planner.brake(now, commanded) is not None


@pytest.mark.parametrize('mode', MODES)
def test_brake_from_full_speed_is_the_shortest_stop(tools: Any, mode: str) -> None:
    limits = tools.limits()
    shape = emission(mode)
    planner = TrajectoryPlanner(limits, shape)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    actions = np.tile(np.arange(16)[:, None] * 0.13, (1, 3))
    commanded.accept(planned(planner.plan(tools.chunk(limits.names, T0 + 100 * MS, actions), T0, commanded)))
    now = T0 + 1000 * MS
    speed = commanded.sample(now + shape.lead_ns)[1].max()
    stop = planner.brake(now, commanded)
    assert stop is not None and speed > 0.6
    check_sendable(tools, planned(stop), limits, shape, now)
    commanded.accept(planned(stop))
    needed = speed / 5.0
    slack = 3 * shape.knot_spacing_ns * 1e-9
    assert not commanded.at_rest(now + shape.lead_ns + int((needed - 0.02) * 1e9))
    assert commanded.at_rest(now + shape.lead_ns + int((needed + slack) * 1e9))


def test_brake_near_a_position_limit_stays_inside(tools: Any) -> None:
    limits = tools.limits(position=0.5)
    planner = TrajectoryPlanner(limits, emission('start'))
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    actions = np.tile(np.minimum(np.arange(16) * 0.14, 0.5)[:, None], (1, 3))
    commanded.accept(planned(planner.plan(tools.chunk(limits.names, T0 + 100 * MS, actions), T0, commanded)))
    for now_ms in range(0, 1500, 37):
        stop = planner.brake(T0 + now_ms * MS, commanded)
        if stop is not None:
            check_sendable(tools, planned(stop), limits, planner.emission, T0 + now_ms * MS)


def test_brake_at_rest_is_nothing(tools: Any) -> None:
    limits = tools.limits()
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    assert TrajectoryPlanner(limits, emission('zero')).brake(T0 + MS, commanded) is None


def test_the_last_gate_stops_a_trajectory_that_breaks_a_limit(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = tools.limits()
    planner = TrajectoryPlanner(limits, emission('start'))
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(3), T0)
    steps = tools.chunk(limits.names, T0, np.tile(np.arange(16)[:, None] * 0.1, (1, 3)))
    plan = planner.plan(steps, T0, commanded)
    # A follower that forgets the limits stands for any mistake in the code between chunk and gate.
    careless = planner_module.Follower._advance

    def advance(follower: Any, wanted: np.ndarray) -> None:
        careless(follower, wanted)
        follower._velocities[-1] = wanted

    monkeypatch.setattr(planner_module.Follower, '_advance', advance)
    gated = planner.plan(steps, T0, commanded)
    assert gated.trajectory is None and gated.rejection is Rejection.LIMIT_EXCEEDED
    assert "of joint 'joint0' reaches" in gated.reason and ', limit ' in gated.reason
    commanded.accept(planned(plan))
    monkeypatch.setattr(planner_module.Follower, 'brake', lambda follower: follower._advance(np.zeros(3)))
    with pytest.raises(LimitExceeded, match="brake not sent: speed of joint 'joint0' reaches"):
        planner.brake(T0 + 500 * MS, commanded)


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        ({'stamp': 'now'}, 'stamp'),
        ({'lead_ns': 39 * MS}, 'needs at least 40000000'),
        ({'lead_ns': 19 * MS, 'transport_ns': 0}, 'needs at least 20000000'),
        ({'velocity_fraction': 0.0}, 'velocity_fraction'),
        ({'velocity_fraction': 1.1}, 'velocity_fraction'),
        ({'tracking_rate': 20.0}, 'tracking_rate'),
        ({'knot_spacing_ns': 0}, 'knot_spacing_ns'),
        ({'reach_s': 0.0}, 'reach_s'),
    ],
)
def test_an_unusable_emission_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Emission(**change)


def test_every_rejection_has_a_text_for_the_operator() -> None:
    assert all(len(rejection.text) > 20 for rejection in Rejection)
