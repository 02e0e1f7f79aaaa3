"""Action goals, tolerances and the ways to stop: what ends a motion before its last point, and where the arm is held then."""

from __future__ import annotations

import numpy as np
import pytest
from jtc_cell import Cell, message, point, run_until

from vla_policy_ros.control.jtc import GoalStatus
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage


def test_a_path_tolerance_violation_stops_a_topic_trajectory_at_the_measured_position() -> None:
    cell = Cell(trajectory_tolerance={'a': 0.1})
    cell.send(message(point(1000, 1.0)))
    cell.cycle(10)
    cell.position -= 0.2
    stuck = cell.position
    cell.cycle(2)
    assert cell.controller.is_holding
    assert cell.position == pytest.approx(stuck)
    cell.cycle(50)
    assert len(set(cell.positions()[-40:])) == 1


def test_the_path_tolerance_is_checked_on_the_first_sample_even_when_it_is_the_last_point() -> None:
    cell = Cell(trajectory_tolerance={'a': 0.1})
    cell.send(message(point(0, 1.0)))
    cell.cycle(5)
    assert np.all(cell.positions() == 0.0) and cell.controller.is_holding


def test_a_path_tolerance_violation_aborts_a_goal_and_writes_no_new_command() -> None:
    cell = Cell(trajectory_tolerance={'a': 0.1})
    _, goal = cell.controller.send_goal(message(point(1000, 1.0)), cell.now)
    before = cell.cycle(10).positions[0]
    cell.position -= 0.2
    assert cell.cycle().positions[0] == before
    assert goal is not None and goal.status is GoalStatus.PATH_TOLERANCE_VIOLATED


def test_a_goal_that_misses_its_tolerance_for_goal_time_is_aborted() -> None:
    cell = Cell(lag=0.05, goal_tolerance={'a': 0.01}, goal_time=0.3)
    _, goal = cell.controller.send_goal(message(point(100, 1.0)), cell.now)
    cycles = run_until(cell, lambda: cell.controller.goal is None)
    assert goal is not None and goal.status is GoalStatus.GOAL_TOLERANCE_VIOLATED
    assert cycles == pytest.approx(42, abs=1)


def test_success_holds_the_last_trajectory_point_not_the_measured_position() -> None:
    cell = Cell(lag=0.05, goal_tolerance={'a': 0.1})
    _, goal = cell.controller.send_goal(message(point(100, 1.0)), cell.now)
    cell.cycle(100)
    assert goal is not None and goal.status is GoalStatus.SUCCEEDED
    assert cell.position == 1.0 and cell.controller.is_holding


def test_cancel_holds_the_measured_position_within_one_cycle() -> None:
    cell = Cell(lag=0.02)
    _, goal = cell.controller.send_goal(message(point(1000, 1.0)), cell.now)
    cell.cycle(50)
    measured = cell.commands[-2].positions[0] - 0.02
    cell.controller.cancel_goal()
    assert cell.cycle().positions[0] == pytest.approx(measured)
    assert goal is not None and goal.status is GoalStatus.CANCELED


def test_cancel_decelerates_where_decelerations_and_velocities_are_known() -> None:
    cell = Cell(decelerate_on_cancel=True, max_deceleration_on_cancel={'a': 5.0})
    cell.controller.send_goal(message(point(1000, 1.0)), cell.now)
    cell.cycle(50, velocity=1.0)
    here = cell.commands[-2].positions[0]
    cell.controller.cancel_goal()
    cell.cycle(60, velocity=1.0)
    assert cell.position == pytest.approx(here + 1.0 / 10.0)
    steps = np.diff(cell.positions()[51:])
    assert np.all(np.abs(np.diff(steps)) <= 5.0 * 0.01**2 + 1e-9)


@pytest.mark.parametrize(
    ('asked', 'deceleration', 'velocity'),
    [(False, 5.0, 1.0), (True, 0.0, 1.0), (True, 5.0, None)],
    ids=['off', 'none', 'unmeasured'],
)
def test_cancel_stops_at_once_where_a_deceleration_is_not_asked_for_or_not_known(
    asked: bool, deceleration: float, velocity: float | None
) -> None:
    cell = Cell(lag=0.02, decelerate_on_cancel=asked, max_deceleration_on_cancel={'a': deceleration})
    cell.controller.send_goal(message(point(1000, 1.0)), cell.now)
    cell.cycle(50, velocity=velocity)
    cell.controller.cancel_goal()
    stopped = cell.cycle(velocity=velocity).positions[0]
    assert stopped == pytest.approx(cell.commands[-3].positions[0] - 0.02)
    assert cell.cycle(20, velocity=velocity).positions[0] == stopped


@pytest.mark.parametrize('settings', [{'trajectory_tolerance': {'a': 0.01}}, {'cmd_timeout': 0.01}])
def test_a_time_out_and_a_violation_decelerate_as_a_cancel_does(settings: dict[str, object]) -> None:
    cell = Cell(lag=0.05, decelerate_on_cancel=True, max_deceleration_on_cancel={'a': 5.0}, **settings)
    cell.send(message(point(50, 0.5)))
    for _ in range(20):
        measured = cell.position - cell.lag
        cell.cycle(velocity=0.5)
        if cell.controller.is_holding:
            break
    assert cell.controller.is_holding
    cell.cycle(30, velocity=0.0)
    assert cell.position == pytest.approx(measured + 0.5**2 / (2 * 5.0))


def test_tolerances_sent_with_a_goal_stay_active_for_later_topic_messages_until_the_next_goal() -> None:
    cell = Cell(lag=0.05)
    cell.controller.send_goal(message(point(100, 0.1)), cell.now, trajectory_tolerance={'a': 0.2})
    cell.cycle(20)
    cell.lag = 0.3
    cell.send(message(point(500, 0.5)))
    cell.cycle(3)
    assert cell.controller.is_holding, 'the topic message is judged by the tolerance of the goal before it'
    cell.controller.send_goal(message(point(500, 0.5)), cell.now)
    cell.cycle(3)
    assert not cell.controller.is_holding


def test_a_new_goal_preempts_and_aborts_the_old_one() -> None:
    cell = Cell()
    _, first = cell.controller.send_goal(message(point(1000, 1.0)), cell.now)
    cell.cycle(10)
    _, second = cell.controller.send_goal(message(point(1000, -1.0)), cell.now)
    assert first is not None and first.status is GoalStatus.INVALID_GOAL
    assert second is not None and second.status is GoalStatus.ACTIVE


def test_a_topic_message_does_not_abort_the_goal_which_then_succeeds_for_a_motion_it_did_not_ask_for() -> None:
    cell = Cell(goal_tolerance={'a': 0.05})
    _, goal = cell.controller.send_goal(message(point(1000, 1.0)), cell.now)
    cell.cycle(10)
    cell.send(message(point(100, -0.5)))
    cell.cycle(50)
    assert goal is not None and goal.status is GoalStatus.SUCCEEDED
    assert cell.position == -0.5


def test_a_rejected_goal_leaves_the_active_one_alone() -> None:
    cell = Cell()
    _, goal = cell.controller.send_goal(message(point(1000, 1.0)), cell.now)
    acceptance, none = cell.controller.send_goal(TrajectoryMessage(('a',), []), cell.now)
    assert not acceptance.accepted and none is None
    assert goal is not None and goal.status is GoalStatus.ACTIVE
