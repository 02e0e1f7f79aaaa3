"""Which messages the controller drops, and which it accepts and executes badly: one test per rule, on Jazzy; the other releases
are in test_jtc_profiles.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_rules import ControllerParameters, Rule, lint, validate
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint

MS = 1_000_000
NOW = 100_000 * MS
PARAMETERS = ControllerParameters(('a', 'b'))


def point(time_ms: int, *positions: float, v: tuple[float, ...] = (), a: tuple[float, ...] = ()) -> TrajectoryPoint:
    return TrajectoryPoint(time_ms * MS, np.array(positions), np.array(v), np.array(a))


def good() -> TrajectoryMessage:
    return TrajectoryMessage(('b', 'a'), [point(100, 0.1, 0.2, v=(0.1, 0.1)), point(200, 0.2, 0.3, v=(0.0, 0.0))])


def rule_of(message: TrajectoryMessage, parameters: ControllerParameters = PARAMETERS, now_ns: int = NOW) -> Rule | None:
    finding = validate(message, parameters, now_ns)
    return None if finding is None else finding.rule


def test_a_full_message_in_any_joint_order_is_accepted() -> None:
    assert rule_of(good()) is None
    assert lint(good()) == []


def test_rule_1_a_subset_of_the_joints_is_dropped_unless_partial_goals_are_allowed() -> None:
    message = TrajectoryMessage(('a',), [point(100, 0.1)])
    assert rule_of(message) is Rule.JOINT_COUNT
    assert rule_of(message, replace(PARAMETERS, allow_partial_joints_goal=True)) is None


def test_rule_2_empty_joint_names_are_dropped() -> None:
    message = TrajectoryMessage((), [point(100)])
    assert rule_of(message, replace(PARAMETERS, allow_partial_joints_goal=True)) is Rule.NO_JOINT_NAMES
    assert rule_of(message) is Rule.JOINT_COUNT


def test_rule_3_an_empty_trajectory_is_dropped_and_does_not_stop_the_arm() -> None:
    assert rule_of(TrajectoryMessage(('a', 'b'), [])) is Rule.NO_POINTS
    controller = JointTrajectoryController(PARAMETERS, [0.0, 0.0])
    controller.update(NOW, [0.0, 0.0])
    controller.receive(TrajectoryMessage(('a', 'b'), [point(1000, 1.0, 1.0)]), NOW)
    controller.update(NOW + 10 * MS, [0.0, 0.0])
    assert not controller.receive(TrajectoryMessage(('a', 'b'), []), NOW + 11 * MS).accepted
    before = controller.update(NOW + 20 * MS, [0.0, 0.0]).positions
    assert np.all(controller.update(NOW + 30 * MS, [0.0, 0.0]).positions > before)


def test_rule_4_an_unknown_joint_is_dropped_and_named() -> None:
    finding = validate(TrajectoryMessage(('a', 'elbow'), [point(100, 0.1, 0.2)]), PARAMETERS, NOW)
    assert finding is not None and finding.rule is Rule.UNKNOWN_JOINT and "'elbow'" in finding.sentence


@pytest.mark.parametrize(('velocity', 'dropped'), [(1.1e-7, False), (1.3e-7, True), (-0.5, True)])
def test_rule_5_a_moving_last_point_is_dropped_beyond_the_float_epsilon(velocity: float, dropped: bool) -> None:
    message = good()
    message.points[-1].velocities[1] = velocity
    assert (rule_of(message) is Rule.MOVING_END) == dropped
    assert rule_of(message, replace(PARAMETERS, allow_nonzero_velocity_at_trajectory_end=True)) is None


def test_rule_6_a_stamped_trajectory_that_is_over_is_dropped() -> None:
    over = replace(good(), stamp_ns=NOW - 201 * MS)
    just_running = replace(good(), stamp_ns=NOW - 200 * MS)
    assert rule_of(over) is Rule.ENDS_IN_PAST
    assert rule_of(just_running) is None


def test_rule_6_one_point_stamped_now_is_dropped_after_one_millisecond_of_transport() -> None:
    message = TrajectoryMessage(('a', 'b'), [point(0, 1.0, 1.0)], stamp_ns=NOW)
    assert rule_of(message, now_ns=NOW) is None
    assert rule_of(message, now_ns=NOW + MS) is Rule.ENDS_IN_PAST


def test_rule_6_uses_the_stamp_as_it_is_unless_it_is_exactly_zero() -> None:
    assert rule_of(replace(good(), stamp_ns=0)) is None
    assert rule_of(replace(good(), stamp_ns=1)) is Rule.ENDS_IN_PAST


@pytest.mark.parametrize('second_ms', [100, 50])
def test_rule_7_times_must_strictly_increase_from_the_second_point_on(second_ms: int) -> None:
    message = good()
    message.points[1].time_from_start_ns = second_ms * MS
    assert rule_of(message) is Rule.TIME_NOT_INCREASING


@pytest.mark.parametrize('first_ms', [0, -50])
def test_rule_7_the_first_time_may_be_zero_or_negative(first_ms: int) -> None:
    message = good()
    message.points[0].time_from_start_ns = first_ms * MS
    assert rule_of(message) is None


@pytest.mark.parametrize('name', ['positions', 'velocities', 'accelerations'])
def test_rule_8_a_field_must_have_one_value_per_joint(name: str) -> None:
    message = good()
    setattr(message.points[0], name, np.zeros(3))
    assert rule_of(message) is Rule.FIELD_SIZE


def test_rule_8_positions_are_required_velocities_and_accelerations_are_not() -> None:
    message = TrajectoryMessage(('a', 'b'), [point(100, 0.1, 0.2)])
    assert rule_of(message) is None
    message.points[0] = TrajectoryPoint(100 * MS, velocities=np.zeros(2))
    assert rule_of(message) is Rule.FIELD_SIZE


def test_rule_8_with_integration_allowed_any_one_field_is_enough_but_one_is_needed() -> None:
    integrating = replace(PARAMETERS, allow_integration_in_goal_trajectories=True)
    message = TrajectoryMessage(('a', 'b'), [TrajectoryPoint(100 * MS, accelerations=np.zeros(2))])
    assert rule_of(message, integrating) is None
    message.points[0] = TrajectoryPoint(100 * MS)
    assert rule_of(message, integrating) is Rule.NO_DATA


def test_rule_9_effort_needs_an_effort_command_interface() -> None:
    message = good()
    message.points[0].effort = np.zeros(2)
    assert rule_of(message) is Rule.EFFORT
    assert rule_of(message, replace(PARAMETERS, effort_command_interface=True)) is None


def test_rule_10_accelerations_without_velocities_are_accepted_and_command_zero() -> None:
    message = TrajectoryMessage(('a', 'b'), [point(100, 1.0, 1.0, a=(0.1, 0.1)), point(200, 1.1, 1.1, a=(0.0, 0.0))])
    assert rule_of(message) is None
    assert [finding.rule for finding in lint(message)] == [Rule.ACCELERATION_WITHOUT_VELOCITY]
    controller = JointTrajectoryController(PARAMETERS, [1.0, 1.0])
    controller.receive(message, NOW)
    for cycle in range(12):
        command = controller.update(NOW + cycle * 10 * MS, [1.0, 1.0])
    assert np.all(command.positions == 0.0)


def test_duplicate_joints_are_accepted_and_command_a_stale_value_to_the_one_left_out() -> None:
    message = TrajectoryMessage(('a', 'a'), [point(0, 1.0, 2.0)])
    assert rule_of(message) is None
    assert Rule.DUPLICATE_JOINT in {finding.rule for finding in lint(message)}
    controller = JointTrajectoryController(PARAMETERS, [0.3, 0.7])
    controller.update(NOW, [0.3, 0.7])
    controller.receive(TrajectoryMessage(('a', 'b'), [point(0, 5.0, 6.0)]), NOW)
    controller.update(NOW + 10 * MS, [0.3, 0.7])
    controller.receive(message, NOW + 10 * MS)
    assert controller.update(NOW + 20 * MS, [5.0, 6.0]).positions.tolist() == [2.0, 6.0]


@pytest.mark.filterwarnings('ignore:invalid value')
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite_are_accepted_and_commanded(value: float) -> None:
    message = good()
    message.points[0].positions[0] = value
    assert rule_of(message) is None
    assert [finding.rule for finding in lint(message)] == [Rule.NOT_FINITE]
    controller = JointTrajectoryController(PARAMETERS, [0.0, 0.0])
    controller.receive(message, NOW)
    assert not np.all(np.isfinite(controller.update(NOW, [0.0, 0.0]).positions))


def test_lint_names_the_single_point_that_steps() -> None:
    rules = {finding.rule for finding in lint(TrajectoryMessage(('a', 'b'), [point(0, 1.0, 1.0)]))}
    assert rules == {Rule.STEP_TO_FIRST_POINT, Rule.SINGLE_POINT, Rule.POSITIONS_ONLY}


def test_the_controller_counts_what_it_accepts_and_rejects_by_rule() -> None:
    controller = JointTrajectoryController(PARAMETERS, [0.0, 0.0])
    controller.receive(good(), NOW)
    acceptance = controller.receive(TrajectoryMessage(('a', 'b'), []), NOW)
    assert controller.counters.accepted == 1
    assert controller.counters.rejected == {Rule.NO_POINTS: 1}
    assert acceptance.reason.startswith('rejected: points is empty')
