"""How the controller executes what it accepted: timing, replacement, interpolation, time-out. One test per behaviour, on Jazzy;
what other releases do differently is in test_jtc_profiles.py and test_jtc_blending.py."""

from __future__ import annotations

import numpy as np
import pytest
from jtc_cell import MS, PARAMETERS, PERIOD, T0, Cell, message, point, run_until

from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_rules import ControllerParameters
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint


def test_activation_holds_the_measured_position() -> None:
    cell = Cell(start=0.4)
    assert cell.controller.is_holding
    cell.cycle(50)
    assert np.all(cell.positions() == 0.4)


def test_stamp_zero_starts_at_the_first_update() -> None:
    cell = Cell()
    cell.cycle(3)
    cell.send(message(point(100, 1.0), point(200, 1.0)))
    cell.now += 7 * MS
    first = cell.cycle()
    assert first.reference_positions[0] == 0.0
    assert first.positions[0] == pytest.approx(0.1)


def test_a_stamp_of_one_nanosecond_is_a_real_stamp() -> None:
    cell = Cell()
    cell.send(message(point(0, 1.0), point(T0 / MS + 1000, 2.0), stamp_ns=1))
    assert cell.cycle().reference_positions[0] == pytest.approx(1.0 + 100.0 / 101.0, abs=1e-3)


def test_stamp_zero_with_time_zero_steps_to_the_first_point_in_one_cycle() -> None:
    cell = Cell()
    cell.cycle()
    cell.send(message(point(0, 1.0)))
    assert cell.cycle().positions[0] == 1.0


def test_time_to_the_first_point_is_used_to_ramp_from_the_measured_state() -> None:
    cell = Cell(start=0.5, lag=0.1)
    cell.cycle()
    cell.send(message(point(100, 1.0)))
    cell.position = 0.5
    first = cell.cycle()
    assert first.reference_positions[0] == pytest.approx(0.4)
    assert first.positions[0] == pytest.approx(0.4 + 0.1 * 0.6)


@pytest.mark.parametrize('parameter', ['interpolate_from_desired_state', 'open_loop_control'])
def test_time_to_the_first_point_is_used_to_ramp_from_the_last_command(parameter: str) -> None:
    cell = Cell(start=0.5, lag=0.1, **{parameter: True})
    cell.send(message(point(10, 0.5)))
    cell.cycle(5)
    cell.send(message(point(100, 1.0)))
    # The command of one update earlier is dated at that update: two periods of eleven have passed when it is sampled.
    assert cell.cycle().positions[0] == pytest.approx(0.5 + 0.5 * 2 / 11)


def test_the_first_step_after_a_replacement_from_the_desired_state_is_almost_twice_the_nominal_one() -> None:
    cell = Cell(interpolate_from_desired_state=True)
    cell.send(message(*(point(100 * i, 0.1 * i, v=1.0) for i in range(1, 11)), point(1101, 1.05, v=0.0)))
    cell.cycle(30)
    before = cell.position
    nominal = before - cell.commands[-2].positions[0]
    cell.send(message(*(point(100 * i, before + 0.1 * i, v=1.0) for i in range(1, 11)), point(1101, before + 1.05, v=0.0)))
    step = cell.cycle().positions[0] - before
    assert nominal == pytest.approx(0.01, rel=1e-6)
    assert 1.8 < step / nominal < 1.95


def test_replacement_forgets_the_old_trajectory_and_never_blends() -> None:
    cell = Cell()
    cell.send(message(point(100, 1.0), point(1000, 10.0)))
    cell.cycle(5)
    here = cell.position
    cell.send(message(point(500, here), point(600, here)))
    cell.cycle(80)
    assert np.all(cell.positions()[5:] == pytest.approx(here, abs=0.1))
    assert cell.position == here


def test_a_future_stamp_does_not_wait_the_ramp_begins_at_once() -> None:
    cell = Cell()
    cell.send(message(point(100, 1.0), point(200, 1.0), stamp_ns=T0 + 1000 * MS))
    assert cell.cycle().positions[0] == pytest.approx(1.0 / 110.0)


def test_a_future_stamp_replaces_the_running_trajectory_at_once() -> None:
    cell = Cell()
    cell.send(message(point(1000, 1.0)))
    cell.cycle(10)
    here = cell.position
    cell.send(message(point(100, here), stamp_ns=cell.now + 1000 * MS))
    cell.cycle(20)
    assert np.all(cell.positions()[10:] == pytest.approx(here))


def test_a_past_stamp_steps_into_the_segment_of_now() -> None:
    cell = Cell()
    cell.cycle()
    ramp = [point(100 * i, 0.3 * i) for i in range(1, 11)]
    cell.send(message(*ramp, stamp_ns=cell.now - 250 * MS))
    assert cell.cycle().positions[0] == pytest.approx(0.3 * 2.6)


def test_a_past_stamp_whose_first_point_is_ahead_is_bridged_over_the_remaining_time() -> None:
    cell = Cell()
    cell.cycle()
    cell.send(message(point(100, 1.0), point(200, 1.0), stamp_ns=cell.now - 60 * MS))
    assert cell.cycle().positions[0] == pytest.approx(10 / 40)


def test_a_wall_clock_stamp_on_simulated_time_looks_like_a_dead_arm() -> None:
    cell = Cell()
    cell.send(message(point(100, 1.0), stamp_ns=1_755_000_000_000 * MS))
    cell.cycle(6000)
    assert 0.0 < cell.position < 4e-8


def test_of_two_messages_in_one_period_the_first_is_lost() -> None:
    cell = Cell()
    cell.cycle()
    cell.send(message(point(0, 1.0)))
    cell.send(message(point(0, 2.0)))
    cell.cycle(5)
    assert 1.0 not in cell.positions()
    assert cell.controller.counters.overwritten == 1


def test_the_command_is_the_reference_one_period_ahead() -> None:
    cell = Cell()
    cell.send(message(point(100, 0.3, v=0.5), point(300, 0.1, v=0.0)))
    cell.cycle(40)
    commands = cell.positions()
    references = np.array([command.reference_positions[0] for command in cell.commands])
    assert references[1:] == pytest.approx(commands[:-1], abs=1e-12)


def test_partial_goals_hold_the_omitted_joints_at_the_last_command_with_zero_velocity() -> None:
    controller = JointTrajectoryController(ControllerParameters(('a', 'b'), allow_partial_joints_goal=True), [0.2, 0.7])
    controller.update(T0, [0.2, 0.7])
    sent = TrajectoryMessage(('a',), [point(50, 0.3, v=1.0), point(100, 0.4, v=0.0)])
    assert controller.receive(sent, T0).accepted
    for cycle in range(1, 30):
        # The measured second joint sags; its command must not follow.
        command = controller.update(T0 + cycle * PERIOD, [0.2, 0.6])
    assert command.positions[0] == pytest.approx(0.4)
    assert command.positions[1] == pytest.approx(0.7)
    assert command.velocities[1] == 0.0


def test_positions_only_are_interpolated_linearly() -> None:
    cell = Cell()
    cell.send(message(point(100, 1.0), point(200, 1.5)))
    cell.cycle(19)
    steps = np.diff(np.concatenate([[0.0], cell.positions()]))
    assert steps[:9] == pytest.approx(0.1)
    assert steps[10:18] == pytest.approx(0.05)


def test_positions_with_velocities_are_a_cubic() -> None:
    cell = Cell()
    cell.send(message(point(0, 0.0, v=0.0), point(100, 1.0, v=0.0)))
    cell.cycle(9)
    t = np.arange(1, 10) / 10
    assert cell.positions() == pytest.approx(3 * t**2 - 2 * t**3)


def test_positions_with_velocities_and_accelerations_are_a_quintic() -> None:
    cell = Cell()
    cell.send(message(point(0, 0.0, v=0.0, a=0.0), point(100, 1.0, v=0.0, a=0.0)))
    cell.cycle(9)
    t = np.arange(1, 10) / 10
    assert cell.positions() == pytest.approx(10 * t**3 - 15 * t**4 + 6 * t**5)


def test_without_interpolation_the_next_waypoint_is_commanded_raw() -> None:
    cell = Cell(interpolation_method='none')
    cell.send(message(point(50, 1.0), point(150, 2.0)))
    cell.cycle(20)
    assert set(cell.positions()) == {0.0, 2.0}


def test_the_last_point_is_held() -> None:
    cell = Cell()
    cell.send(message(point(100, 1.0)))
    cell.cycle(1000)
    assert np.all(cell.positions()[9:] == 1.0)
    assert not cell.controller.is_holding


def test_a_late_next_message_changes_nothing_without_cmd_timeout() -> None:
    cell = Cell(lag=0.05)
    cell.send(message(point(100, 1.0)))
    cell.cycle(3000)
    assert cell.position == 1.0 and not cell.controller.timed_out


def test_cmd_timeout_counts_from_the_last_point_and_holds_the_measured_position_within_one_cycle() -> None:
    cell = Cell(lag=0.05, cmd_timeout=0.5)
    cell.send(message(point(100, 1.0)))
    cycles = run_until(cell, lambda: cell.controller.timed_out)
    assert cycles == pytest.approx(62, abs=1)
    assert cell.position == 1.0
    assert cell.cycle().positions[0] == pytest.approx(0.95)
    assert cell.controller.is_holding
    assert cell.cycle(200).positions[0] == pytest.approx(0.95), 'it does not time out again and creep'


def test_cmd_timeout_is_silently_disabled_when_it_does_not_exceed_goal_time() -> None:
    cell = Cell(cmd_timeout=0.5, goal_time=0.5)
    cell.send(message(point(100, 1.0)))
    cell.cycle(300)
    assert not cell.controller.timed_out


def test_cmd_timeout_never_fires_at_speed_scaling_zero() -> None:
    cell = Cell(cmd_timeout=0.1)
    cell.controller.speed_scaling = 0.0
    cell.send(message(point(0, 0.0), point(10, 1.0)))
    cell.cycle(300)
    assert not cell.controller.timed_out


def test_an_allowed_end_velocity_is_repeated_for_ever() -> None:
    cell = Cell(allow_nonzero_velocity_at_trajectory_end=True)
    cell.send(message(point(100, 0.1, v=1.0)))
    last = cell.cycle(200)
    assert last.velocities[0] == 1.0 and last.positions[0] == 0.1


def test_a_query_ahead_moves_the_running_trajectory_to_its_end() -> None:
    cell = Cell()
    cell.send(message(point(0, 0.0), point(500, 0.5), point(1000, 1.0)))
    cell.cycle(10)
    cell.controller.query_state(cell.now + 2000 * MS)
    assert cell.cycle().positions[0] == 1.0


@pytest.mark.parametrize('jump_s', [-5, 5])
def test_a_clock_jump_does_not_move_a_running_trajectory(jump_s: int) -> None:
    cell = Cell()
    cell.send(message(point(0, 0.0), point(1000, 1.0)))
    cell.cycle(10)
    cell.now += jump_s * 1000 * MS
    cell.cycle(10)
    assert np.diff(cell.positions()) == pytest.approx(0.01)


def test_the_measured_period_moves_the_trajectory_not_the_nominal_one() -> None:
    controller = JointTrajectoryController(PARAMETERS, [0.0])
    controller.receive(message(point(0, 0.0), point(1000, 1.0)), T0)
    controller.update(T0, [0.0])
    assert controller.update(T0 + 13 * MS, [0.0], period_ns=13 * MS).positions[0] == pytest.approx(0.023)


def test_speed_scaling_slows_the_trajectory() -> None:
    cell = Cell()
    cell.controller.speed_scaling = 0.5
    cell.send(message(point(0, 0.0), point(1000, 1.0)))
    cell.cycle(21)
    assert np.diff(cell.positions())[1:] == pytest.approx(0.005)


def test_joints_that_turn_without_end_take_the_short_way_from_the_state_before() -> None:
    cell = Cell(start=3.0, angle_wraparound=('a',))
    cell.send(message(point(100, -3.0)))
    steps = np.diff(np.concatenate([[3.0 - 2 * np.pi], [cell.cycle().positions[0] for _ in range(9)]]))
    assert steps == pytest.approx((2 * np.pi - 6.0) / 10)


def test_the_message_that_was_sent_is_not_changed() -> None:
    cell = Cell(allow_integration_in_goal_trajectories=True)
    sent = TrajectoryMessage(('a',), [point(0, 0.0), TrajectoryPoint(100 * MS, velocities=np.array([0.0]))])
    cell.send(sent)
    cell.cycle(20)
    assert sent.points[1].positions.size == 0


def test_a_state_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match='1 joints'):
        JointTrajectoryController(PARAMETERS, [0.0, 1.0])
    with pytest.raises(ValueError, match='measured_positions'):
        Cell().controller.update(T0, [0.0, 0.0])
