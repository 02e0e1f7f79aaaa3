"""What passes validation and still hurts, per controller: each finding is there when the emulator shows the harm, and only then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_rules import DISTROS, ControllerParameters, Finding, Rule, lint, validate
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint

MS = 1_000_000
NOW = 1_000_000 * MS
PERIOD = 10 * MS
JOINTS = ('a', 'b')


def profile(distro: str = 'jazzy', **changes: Any) -> ControllerParameters:
    return ControllerParameters.for_distro(distro, JOINTS, **changes)


def point(ms: int, a: float, b: float = 0.0, v: float | None = 0.0) -> TrajectoryPoint:
    return TrajectoryPoint(ms * MS, [a, b], [] if v is None else [v, 0.0])


def message(*points: TrajectoryPoint, stamp_ns: int = 0, names: tuple[str, ...] = JOINTS) -> TrajectoryMessage:
    return TrajectoryMessage(names, list(points), stamp_ns)


def only(sent: TrajectoryMessage, *judged_for: Any) -> Finding:
    (finding,) = lint(sent, *judged_for)
    return finding


def rules(sent: TrajectoryMessage, *judged_for: Any) -> list[Rule]:
    return [finding.rule for finding in lint(sent, *judged_for)]


@pytest.mark.parametrize('distro', DISTROS)
def test_a_trajectory_as_it_should_be_has_no_finding_on_any_release(distro: str) -> None:
    good = message(point(100, 0.1, v=0.5), point(200, 0.12), point(300, 0.12))
    assert validate(good, profile(distro), NOW) is None
    assert lint(good) == lint(good, profile(distro), NOW, [0.0, 0.0]) == []


def test_what_a_message_says_by_itself_is_found_without_a_controller_and_says_what_to_do() -> None:
    pushing = point(200, 0.1)
    pushing.effort = np.array([3.0, -4.0])
    accelerating = TrajectoryPoint(200 * MS, [0.1, 0.0], [], [1.0, 0.0])
    for sent, rule, words in (
        (message(point(100, 0.1), pushing), Rule.EFFORT_UNCHECKED, 'point 1 has effort up to 4: leave effort empty'),
        (
            message(point(100, 0.1), accelerating),
            Rule.ACCELERATION_WITHOUT_VELOCITY,
            'point 1 has accelerations without velocities',
        ),
        (message(point(100, 0.1), point(200, np.nan)), Rule.NOT_FINITE, 'point 1 has a value that is not finite'),
        (message(point(100, 0.1), point(200, 0.1), names=('a', 'a')), Rule.DUPLICATE_JOINT, "'a' is named 2 times: name each"),
        (message(point(0, 0.1), point(200, 0.1)), Rule.STEP_TO_FIRST_POINT, 'several update periods'),
        (message(point(100, 0.1)), Rule.SINGLE_POINT, 'at least two'),
        (message(point(100, 0.1, v=None), point(200, 0.1, v=None)), Rule.POSITIONS_ONLY, 'send them with the positions'),
    ):
        finding = only(sent)
        assert finding.rule is rule and words in finding.sentence


def test_effort_that_is_not_finite_is_found() -> None:
    sent = message(point(100, 0.1), point(200, 0.1))
    sent.points[0].effort = np.array([np.inf, 0.0])
    assert rules(sent) == [Rule.NOT_FINITE, Rule.EFFORT_UNCHECKED]


@pytest.mark.parametrize('distro', DISTROS)
def test_a_moving_end_is_found_where_it_is_allowed_and_is_commanded_for_ever(distro: str) -> None:
    moving = message(point(100, 0.1, v=1.0), point(200, 0.2, v=1.0))
    allowing = profile(distro, allow_nonzero_velocity_at_trajectory_end=True)
    finding = only(moving, allowing)
    assert finding.rule is Rule.MOVES_ON and 'moves at 1 ' in finding.sentence and 'end at rest' in finding.sentence
    controller = JointTrajectoryController(allowing, [0.0, 0.0])
    assert controller.receive(moving, NOW).accepted
    for tick in range(500):
        command = controller.update(NOW + tick * PERIOD, [0.0, 0.0])
    assert command.velocities[0] == 1.0
    forbidding = profile(distro, allow_nonzero_velocity_at_trajectory_end=False)
    finding_of_validation = validate(moving, forbidding, NOW)
    assert finding_of_validation is not None and finding_of_validation.rule is Rule.MOVING_END
    assert lint(moving, forbidding) == [], 'it is rejected, and not executed'


def line(stamp_ns: int, first_ms: int = 0, offset: float = 0.0) -> TrajectoryMessage:
    """Joint a at 1 per second through ``offset`` at its stamp, at rest after 1 s."""
    moving = [point(ms, offset + ms * 1e-3, v=1.0) for ms in range(first_ms, 1000, 100)]
    return message(*moving, point(1000, offset + 0.98), point(1100, offset + 0.98), stamp_ns=stamp_ns)


@pytest.mark.parametrize('late_ms', [-200, 0, 10, 11, 300])
@pytest.mark.parametrize('first_ms', [0, 500])
def test_a_past_stamp_is_found_where_it_is_replayed_beyond_one_update(late_ms: int, first_ms: int) -> None:
    sent = line(NOW - late_ms * MS, first_ms)
    found = rules(sent, profile('rolling'), NOW)
    assert found == ([Rule.PAST_STAMP] if late_ms > 10 else [])
    assert Rule.PAST_STAMP not in rules(sent, profile('rolling', allow_trajectory_replacement=False), NOW)
    if found:
        assert f'passed {late_ms / 1000:.3f} s ago' in lint(sent, profile('rolling'), NOW)[0].sentence


@pytest.mark.parametrize(
    ('offset', 'hurts'), [(0.0, False), (0.009, False), (0.011, True), (-0.3, True)], ids=['continues', 'near', 'off', 'far off']
)
@pytest.mark.parametrize('distro', ['humble', 'jazzy', 'kilted'])
def test_a_trajectory_that_runs_already_is_found_if_it_does_not_continue_what_is_commanded(
    distro: str, offset: float, hurts: bool
) -> None:
    sent, command = line(NOW - 250 * MS, offset=offset), [0.25, 0.0]
    found = rules(sent, profile(distro), NOW, command)
    assert found == ([Rule.STEP_INTO_PAST] if hurts else [])
    controller = JointTrajectoryController(profile(distro), command)
    controller.update(NOW - PERIOD, command)
    assert controller.receive(sent, NOW).accepted
    step = abs(controller.update(NOW, command).positions[0] - command[0])
    ahead = 0.0 if distro == 'humble' else 0.01
    assert step == pytest.approx(abs(offset + ahead), abs=1e-6), 'what is found is what the command steps by'


def test_the_order_of_the_joints_in_the_message_does_not_matter_for_the_step() -> None:
    sent = line(NOW - 250 * MS)
    for shuffled in sent.points:
        shuffled.positions = shuffled.positions[::-1].copy()
        shuffled.velocities = shuffled.velocities[::-1].copy()
    sent.joint_names = ('b', 'a')
    assert rules(sent, profile(), NOW, [0.25, 0.0]) == []
    finding = only(sent, profile(), NOW, [0.25, 0.4])
    assert "joint 'b' is commanded to 0.4; 0.250 s after its start the trajectory is at 0" in finding.sentence


def test_a_trajectory_that_begins_later_bridges_and_is_not_found() -> None:
    assert rules(line(NOW - 250 * MS, first_ms=300), profile(), NOW, [0.9, 0.0]) == []


def test_without_the_command_or_the_time_of_arrival_a_stamp_is_not_judged() -> None:
    sent = line(NOW - 250 * MS, offset=1.0)
    assert rules(sent, profile(), NOW) == rules(sent, profile(), None, [0.0, 0.0]) == rules(sent, profile('rolling')) == []


def test_a_single_point_is_found_and_what_replaces_it_is_not_blended() -> None:
    single = message(point(300, 0.3))
    assert rules(single, profile('rolling'), NOW) == [Rule.SINGLE_POINT]
    follower = message(point(200, 0.3), point(300, 0.3))
    commands = {}
    for blends in (True, False):
        controller = JointTrajectoryController(profile('rolling', allow_trajectory_replacement=blends), [0.0, 0.0])
        for tick in range(20):
            for due, sent in ((0, single), (10, follower)):
                if tick == due:
                    assert controller.receive(sent, NOW + tick * PERIOD).accepted
            commands[blends] = controller.update(NOW + tick * PERIOD, [0.0, 0.0]).positions[0]
    assert commands[True] == commands[False]


@pytest.mark.parametrize('sent', [message(), message(point(100, 0.1), stamp_ns=1), message(point(100, 0.1), names=('a',))])
def test_what_is_rejected_anyway_can_be_judged_as_well(sent: TrajectoryMessage) -> None:
    assert validate(sent, profile(), NOW) is not None
    assert set(rules(sent, profile(), NOW, [0.0, 0.0])) <= {Rule.SINGLE_POINT, Rule.STEP_INTO_PAST}
