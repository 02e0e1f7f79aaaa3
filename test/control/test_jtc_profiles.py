"""What the releases of the controller have, accept and do differently with the same messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vla_policy_ros.control.jtc import GoalStatus, JointTrajectoryController
from vla_policy_ros.control.jtc_rules import DISTROS, ControllerParameters, Rule, validate
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint

MS = 1_000_000
T0 = 1_000_000 * MS
PERIOD = 10 * MS
ONE = ('a',)
NEW = ('jazzy', 'kilted', 'rolling')
# How a release is told to start new trajectories from the last command.
FROM_COMMAND = {'humble': 'open_loop_control', **dict.fromkeys(NEW, 'interpolate_from_desired_state')}


def profile(distro: str, **changes: Any) -> ControllerParameters:
    """A release that forgets what it replaces, as they all do but Rolling as installed (test_jtc_blending.py)."""
    return ControllerParameters.for_distro(distro, ONE, **{'allow_trajectory_replacement': False, **changes})


def point(ms: int, position: float, velocity: float | None = None) -> TrajectoryPoint:
    return TrajectoryPoint(ms * MS, [position], [] if velocity is None else [velocity])


def message(*points: TrajectoryPoint, stamp_ns: int = 0) -> TrajectoryMessage:
    return TrajectoryMessage(ONE, list(points), stamp_ns)


def ramp(start: float = 0.0, first_ms: int = 100, stamp_ns: int = 0) -> TrajectoryMessage:
    """1 rad/s, a knot every 100 ms, and a resting end."""
    rows = [point(first_ms + 100 * i, start + 0.1 * (i + 1), 1.0) for i in range(8)]
    return message(*rows, point(first_ms + 900, start + 0.8, 0.0), stamp_ns=stamp_ns)


def run(parameters: ControllerParameters, events: dict[int, TrajectoryMessage], ticks: int) -> np.ndarray:
    """The start, then the command of every update; the arm is where it was commanded one update before."""
    controller = JointTrajectoryController(parameters, [0.0])
    commands = [0.0]
    for tick in range(ticks):
        now = T0 + tick * PERIOD
        if tick in events:
            assert controller.receive(events[tick], now).accepted
        commands.append(float(controller.update(now, commands[-1:]).positions[0]))
    return np.array(commands)


def test_each_release_has_its_own_defaults() -> None:
    made = {distro: ControllerParameters.for_distro(distro, ONE) for distro in DISTROS}
    assert {d: made[d].allow_nonzero_velocity_at_trajectory_end for d in DISTROS} == {
        'humble': True, 'jazzy': False, 'kilted': False, 'rolling': False,
    }  # fmt: skip
    assert {d: made[d].allow_trajectory_replacement for d in DISTROS} == {
        'humble': False, 'jazzy': False, 'kilted': False, 'rolling': True,
    }  # fmt: skip
    assert not any(made[d].starts_from_command for d in DISTROS)


@pytest.mark.parametrize(
    ('name', 'value', 'neutral', 'releases'),
    [
        ('open_loop_control', True, False, ('humble', 'jazzy')),
        ('interpolate_from_desired_state', True, False, NEW),
        ('allow_trajectory_replacement', True, False, ('rolling',)),
        ('speed_scaling', 0.5, 1.0, NEW),
        ('decelerate_on_cancel', True, False, NEW),
        ('max_deceleration_on_cancel', {'a': 1.0}, {}, NEW),
        ('cmd_timeout', 1.0, 0.0, DISTROS),
        ('allow_partial_joints_goal', True, False, DISTROS),
    ],
)
def test_a_parameter_that_a_release_does_not_know_is_refused_with_the_releases_that_do(
    name: str, value: Any, neutral: Any, releases: tuple[str, ...]
) -> None:
    for distro in DISTROS:
        if distro in releases:
            assert getattr(ControllerParameters.for_distro(distro, ONE, **{name: value}), name) == value
            continue
        with pytest.raises(ValueError, match=f'{distro} has no parameter {name} .*exists in {", ".join(releases)}'):
            ControllerParameters.for_distro(distro, ONE, **{name: value})
        assert getattr(ControllerParameters.for_distro(distro, ONE, **{name: neutral}), name) == neutral


def test_an_unknown_release_or_parameter_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'iron' is unknown.*humble"):
        ControllerParameters.for_distro('iron', ONE)
    with pytest.raises(ValueError, match=r"no parameter 'speed'; use some of .*cmd_timeout"):
        ControllerParameters.for_distro('jazzy', ONE, speed=1)
    with pytest.raises(ValueError, match="'iron' is unknown"):
        ControllerParameters(ONE, distro='iron')  # type: ignore[arg-type]


GOOD = (point(100, 0.1, 0.5), point(200, 0.15, 0.0))
REJECTED = [
    (TrajectoryMessage((), list(GOOD)), Rule.JOINT_COUNT),
    (TrajectoryMessage(('a', 'b'), list(GOOD)), Rule.JOINT_COUNT),
    (TrajectoryMessage(('elbow',), list(GOOD)), Rule.UNKNOWN_JOINT),
    (message(), Rule.NO_POINTS),
    (message(*GOOD, stamp_ns=T0 - 201 * MS), Rule.ENDS_IN_PAST),
    (message(*GOOD, stamp_ns=1), Rule.ENDS_IN_PAST),
    (message(GOOD[1], GOOD[0]), Rule.TIME_NOT_INCREASING),
    (message(TrajectoryPoint(100 * MS, [0.1, 0.2])), Rule.FIELD_SIZE),
    (message(TrajectoryPoint(100 * MS, [0.1], [0.0, 0.0])), Rule.FIELD_SIZE),
    (message(TrajectoryPoint(100 * MS, [], [0.0])), Rule.FIELD_SIZE),
    (message(TrajectoryPoint(100 * MS, [0.1], [0.0], [], [1.0])), Rule.EFFORT),
]


@pytest.mark.parametrize('distro', DISTROS)
@pytest.mark.parametrize(('sent', 'rule'), REJECTED, ids=lambda value: value.name if isinstance(value, Rule) else '')
def test_every_release_drops_what_breaks_a_rule_and_takes_the_same_without(
    distro: str, sent: TrajectoryMessage, rule: Rule
) -> None:
    # A moving end, which Humble accepts and names later, must not hide the rule that is meant.
    finding = validate(sent, profile(distro, allow_nonzero_velocity_at_trajectory_end=True), T0)
    assert finding is not None and finding.rule is rule
    assert validate(message(*GOOD, stamp_ns=T0 - 200 * MS), profile(distro), T0) is None


def test_a_moving_end_is_accepted_by_humble_alone() -> None:
    moving = message(point(100, 0.1, 1.0), point(200, 0.2, 1.0))
    accepted = [distro for distro in DISTROS if validate(moving, ControllerParameters.for_distro(distro, ONE), T0) is None]
    assert accepted == ['humble']


def test_effort_is_refused_by_humble_also_with_an_effort_interface() -> None:
    pushing = message(TrajectoryPoint(100 * MS, [0.1], [0.0], [], [1.0]))
    accepted = [d for d in DISTROS if validate(pushing, profile(d, effort_command_interface=True), T0) is None]
    assert accepted == ['jazzy', 'kilted', 'rolling']


@pytest.mark.parametrize('distro', DISTROS)
def test_accelerations_without_velocities_command_zero_between_points_on_every_release(distro: str) -> None:
    sent = message(*(TrajectoryPoint(ms * MS, [1.0], [], [0.1]) for ms in (100, 200)))
    controller = JointTrajectoryController(profile(distro), [1.0])
    assert controller.receive(sent, T0).accepted
    assert [controller.update(T0 + tick * PERIOD, [1.0]).positions[0] for tick in range(1, 15)] == [0.0] * 14


@pytest.mark.parametrize('distro', DISTROS)
def test_the_command_is_the_trajectory_now_on_humble_and_one_update_ahead_elsewhere(distro: str) -> None:
    controller = JointTrajectoryController(profile(distro), [0.0])
    assert controller.receive(ramp(first_ms=0), T0).accepted
    for tick in range(30):
        command = controller.update(T0 + tick * PERIOD, [0.0])
    ahead = 0.0 if distro == 'humble' else 0.01
    assert command.positions[0] == pytest.approx(command.reference_positions[0] + ahead, abs=1e-9)


@pytest.mark.parametrize('distro', DISTROS)
def test_a_replacement_repeats_the_last_command_on_humble_and_steps_nearly_twice_elsewhere(distro: str) -> None:
    parameters = profile(distro, **{FROM_COMMAND[distro]: True})
    steps = np.diff(run(parameters, {0: ramp(), 30: ramp(start=0.3)}, 45))
    nominal = 0.01
    assert steps[29] == pytest.approx(nominal, rel=1e-3)
    if distro == 'humble':
        assert steps[30] == pytest.approx(0.0, abs=1e-9)
        assert steps[31:40].max() < 1.4 * nominal
    else:
        assert 1.8 * nominal < steps[30] < 1.95 * nominal


@pytest.mark.parametrize('distro', DISTROS)
def test_a_replacement_starts_from_the_measured_state_unless_told_otherwise(distro: str) -> None:
    for told in (False, True):
        controller, after = JointTrajectoryController(profile(distro, **{FROM_COMMAND[distro]: told}), [0.0]), 0.0
        for tick in range(31):
            now = T0 + tick * PERIOD
            if tick in (0, 30):
                assert controller.receive(ramp(start=0.01 * tick), now).accepted
            before = after
            after = controller.update(now, [before - 0.05]).positions[0]  # trails by 0.05 rad
        assert bool(after < before - 0.03) != told


@pytest.mark.parametrize('distro', DISTROS)
def test_without_blending_a_future_stamp_starts_the_motion_at_once_and_a_past_one_steps_into_it(distro: str) -> None:
    early = run(profile(distro), {0: message(point(100, 1.0), point(200, 1.0), stamp_ns=T0 + 1000 * MS)}, 3)
    assert 0.0 < early[-1] < 0.05
    late = run(profile(distro), {2: message(*(point(100 * i, 0.3 * i) for i in range(1, 11)), stamp_ns=T0 - 250 * MS)}, 3)
    assert late[-1] - late[-2] > 0.75


@pytest.mark.parametrize(('distro', 'moved'), [('humble', True), ('jazzy', False), ('kilted', False), ('rolling', False)])
def test_a_clock_jump_moves_a_running_trajectory_on_humble_alone(distro: str, moved: bool) -> None:
    for jump_ms in (200, -150):
        controller = JointTrajectoryController(profile(distro), [0.0])
        assert controller.receive(ramp(), T0).accepted
        for tick in range(40):
            before = controller.update(T0 + tick * PERIOD, [0.0]).positions[0]
        after = controller.update(T0 + 40 * PERIOD + jump_ms * MS, [0.0]).positions[0]
        # Back in time Humble finds no segment after the one it was in, and commands the last point.
        assert bool(abs(after - before) > 0.1) == moved
        if moved and jump_ms < 0:
            assert after == pytest.approx(0.8)


@pytest.mark.parametrize(('distro', 'scaled'), [('humble', False), ('jazzy', True), ('kilted', True), ('rolling', True)])
def test_speed_scaling_slows_the_trajectory_except_on_humble_which_has_none(distro: str, scaled: bool) -> None:
    controller = JointTrajectoryController(profile(distro, **({'speed_scaling': 0.5} if scaled else {})), [0.0])
    controller.speed_scaling = 0.5
    assert controller.receive(ramp(first_ms=0), T0).accepted
    commands = [controller.update(T0 + tick * PERIOD, [0.0]).positions[0] for tick in range(30)]
    assert np.diff(commands)[5:] == pytest.approx(0.005 if scaled else 0.01, abs=1e-6)


@pytest.mark.parametrize('distro', DISTROS)
def test_a_preempted_goal_ends_canceled_on_humble_and_aborted_elsewhere(distro: str) -> None:
    controller = JointTrajectoryController(profile(distro), [0.0])
    _, first = controller.send_goal(ramp(), T0)
    controller.update(T0, [0.0])
    controller.send_goal(ramp(), T0)
    assert first is not None
    assert first.status is (GoalStatus.CANCELED if distro == 'humble' else GoalStatus.INVALID_GOAL)


@pytest.mark.parametrize('distro', DISTROS)
def test_a_time_out_counts_from_the_last_point_and_holds_the_measured_position_on_every_release(distro: str) -> None:
    controller = JointTrajectoryController(profile(distro, cmd_timeout=0.2), [0.0])
    assert controller.receive(message(point(100, 0.1, 0.0), point(200, 0.1, 0.0)), T0).accepted
    out = [bool(controller.update(T0 + tick * PERIOD, [0.08]) and controller.timed_out) for tick in range(60)]
    assert out.index(True) in (41, 42)
    assert controller.update(T0 + 60 * PERIOD, [0.08]).positions[0] == pytest.approx(0.08)


@pytest.mark.parametrize(('distro', 'early'), [('jazzy', True), ('kilted', True), ('rolling', False)])
def test_a_look_past_the_end_moves_the_reference_there_early_until_rolling(distro: str, early: bool) -> None:
    controller = JointTrajectoryController(profile(distro), [0.0])
    assert controller.receive(message(point(0, 0.0), point(100, 1.0)), T0).accepted
    for tick in range(10):
        controller.update(T0 + tick * PERIOD, [0.0])
    command = controller.update(T0 + 92 * MS, [0.0], period_ns=2 * MS)
    assert command.reference_positions[0] == pytest.approx(1.0 if early else 0.92)
    assert command.positions[0] == 1.0, 'the command is not affected'


def test_kilted_does_as_jazzy_does() -> None:
    events = {0: ramp(), 17: ramp(start=0.1), 40: ramp(start=0.5, stamp_ns=T0 + 450 * MS), 55: message(point(0, 0.2))}
    for start in (False, True):
        commands = [run(profile(d, interpolate_from_desired_state=start), events, 70) for d in ('jazzy', 'kilted')]
        np.testing.assert_array_equal(*commands)
