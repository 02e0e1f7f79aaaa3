"""The controllers' own parameters decide whether the node may move the robot, over DDS and without ever waiting for an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

rclpy = pytest.importorskip('rclpy')

from fake_robot import FakeRobot  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402

from vla_policy_ros.control.planner import Emission  # noqa: E402
from vla_policy_ros.demo.processes import Child  # noqa: E402
from vla_policy_ros.policy import new_checkpoint  # noqa: E402
from vla_policy_ros.resources import robot_path  # noqa: E402
from vla_policy_ros.robot import Controller, load_robot, parse_robot  # noqa: E402
from vla_policy_ros.ros import controllers, qos  # noqa: E402
from vla_policy_ros.ros.controllers import judge_controller, to_parameters  # noqa: E402
from vla_policy_ros.ros.policy_node import PolicyNode  # noqa: E402

pytestmark = pytest.mark.dds

OK, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
ROBOT = parse_robot("""
name: toy
cameras:
  left: {topic: /left, camera_info: /left/info}
state: {topic: /joint_states, joints: [a, b]}
action: {joints: [a, b], period: 0.1, horizon: 16}
limits:
  a: {position: [-1, 1], velocity: 1, acceleration: 4}
  b: {position: [-1, 1], velocity: 1, acceleration: 4}
controllers:
  arm: {topic: /arm_controller/joint_trajectory, state_topic: /arm_controller/controller_state, joints: [a, b]}
""")
Start = Callable[..., PolicyNode]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(ROBOT, 'tiny', tmp_path_factory.mktemp('checkpoint'))


@pytest.fixture(scope='module')
def tabletop_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(load_robot(robot_path('tabletop')), 'tiny', tmp_path_factory.mktemp('tabletop'))


@pytest.fixture
def robot(ros_domain: int) -> Iterator[FakeRobot]:
    robot = FakeRobot(ROBOT)
    yield robot
    robot.close()


@pytest.fixture
def start(robot: FakeRobot, tmp_path: Path, checkpoint: Path) -> Start:
    def configured(**parameters: Any) -> PolicyNode:
        node = robot.start_policy(tmp_path, checkpoint, **parameters)
        assert node.trigger_configure() == OK
        return node

    return configured


def until_read(robot: FakeRobot, node: PolicyNode) -> None:
    robot.spin_until(lambda: node._check is not None and not node._check.unread)


def test_unsafe_parameters_keep_the_node_from_activating_until_they_are_mended(robot: FakeRobot, start: Start) -> None:
    controller = robot.add_controller(interpolation_method='none')
    node = start()
    until_read(robot, node)
    assert node.trigger_activate() == FAILURE
    assert node.refusal.startswith("controller 'arm': ") and 'interpolation_method' in node.refusal
    robot.spin_until(lambda: robot.statuses and robot.statuses[-1].lifecycle_state == 'inactive')
    robot.spin_until(lambda: robot.statuses[-1].reason == node.refusal)
    controller.set_parameters([Parameter('interpolation_method', value='splines')])
    robot.spin_until(lambda: not node._check.judge().refusals)
    assert node.trigger_activate() == OK
    assert node.runtime is not None and node.runtime.active and node.refusal == ''


def test_safe_parameters_let_it_activate_at_once(robot: FakeRobot, start: Start) -> None:
    robot.add_controller()
    node = start()
    until_read(robot, node)
    assert node.trigger_activate() == OK
    assert node.runtime is not None and node.runtime.active
    assert not [sentence for sentence in robot.told if 'could not be read' in sentence]


@pytest.mark.parametrize(
    ('joints', 'text'),
    [
        (['a'], 'it lacks b'),
        (['a', 'b', 'c'], 'it also has c'),
        (['a', 'x'], 'it lacks b and it also has x'),
        ([''], 'it lacks a, b'),
    ],
)
def test_other_joints_than_those_of_the_robot_file_are_refused(robot: FakeRobot, start: Start, joints: Any, text: str) -> None:
    robot.add_controller(joints=joints)
    node = start()
    until_read(robot, node)
    assert node.trigger_activate() == FAILURE
    assert text in node.refusal and 'make them the same' in node.refusal


def test_an_activation_that_follows_at_once_waits_for_the_answers_before_anything_moves(robot: FakeRobot, start: Start) -> None:
    robot.add_controller()
    node = start()
    assert node.trigger_activate() == OK
    assert node.runtime is not None and not node.runtime.active, 'nothing may be planned before the controllers have answered'
    robot.spin_until(lambda: node.runtime.active)


def test_an_activation_that_followed_at_once_is_taken_back_when_the_answer_is_bad(robot: FakeRobot, start: Start) -> None:
    robot.add_controller(interpolation_method='none')
    node = start()
    assert node.trigger_activate() == OK
    robot.spin_until(lambda: robot.statuses and 'interpolation_method' in robot.statuses[-1].reason)
    robot.spin_until(lambda: robot.statuses[-1].lifecycle_state == 'inactive')
    assert node.runtime is not None and not node.runtime.active


@pytest.mark.parametrize('present', [False, True])
def test_a_controller_that_does_not_answer_is_a_warning_and_never_blocks(
    robot: FakeRobot, start: Start, monkeypatch: pytest.MonkeyPatch, present: bool
) -> None:
    monkeypatch.setattr(controllers, 'PATIENCE_S', 1.5)
    if present:
        robot.add_controller(spun=False)  # its services are there, but nobody serves them
    node = start()
    beats: list[float] = []
    robot.node.create_timer(0.02, lambda: beats.append(robot.node.get_clock().now().nanoseconds * 1e-9))
    assert node.trigger_activate() == OK
    robot.spin_until(lambda: node.runtime.active)
    assert max(b - a for a, b in pairwise(beats)) < 0.5, 'the executor must go on all the time'
    sentence = next(sentence for sentence in robot.told if 'could not be read' in sentence)
    assert '/arm_controller does not answer' in sentence and 'controllers.arm.node' in sentence


def test_a_controller_that_comes_late_with_unsafe_parameters_ends_the_motion(
    robot: FakeRobot, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controllers, 'PATIENCE_S', 0.2)
    node = start()
    assert node.trigger_activate() == OK
    robot.spin_until(lambda: node.runtime.active)
    robot.add_controller(joints=['a'])
    robot.spin_until(lambda: not node.runtime.active)
    assert 'it lacks b' in node.refusal


@pytest.mark.parametrize('given', [{'check_controllers': 'warn'}, {'dry_run': True}])
def test_where_it_may_only_warn_the_sentence_is_told(robot: FakeRobot, start: Start, given: dict[str, Any]) -> None:
    robot.add_controller(interpolation_method='none')
    node = start(**given)
    until_read(robot, node)
    assert node.trigger_activate() == OK
    assert node.runtime is not None and node.runtime.active
    assert [sentence for sentence in robot.told if 'interpolation_method' in sentence]


def test_where_it_is_switched_off_no_one_is_asked(robot: FakeRobot, start: Start) -> None:
    robot.add_controller(interpolation_method='none')
    node = start(check_controllers='skip')
    assert node.trigger_activate() == OK
    assert node.runtime is not None and node.runtime.active
    robot.spin(1.0)
    assert node._check is not None and node._check._readers['arm'].answers == 0
    assert not [sentence for sentence in robot.told if 'controller' in sentence]


def test_autostart_waits_for_the_controllers_and_stays_inactive_where_one_is_unsafe(
    robot: FakeRobot, tmp_path: Path, checkpoint: Path
) -> None:
    controller = robot.add_controller(interpolation_method='none')
    node = robot.start_policy(tmp_path, checkpoint)
    node.autostart()
    robot.spin_until(lambda: node.refusal)
    assert node.runtime is not None and not node.runtime.active
    controller.set_parameters([Parameter('interpolation_method', value='splines')])
    robot.spin(2.5)
    assert not node.runtime.active, 'the operator activates it'
    assert node.trigger_activate() == OK


def test_a_choice_that_does_not_exist_is_refused(robot: FakeRobot, tmp_path: Path, checkpoint: Path) -> None:
    node = robot.start_policy(tmp_path, checkpoint, check_controllers='maybe')
    assert node.trigger_configure() == FAILURE
    assert "check_controllers is 'maybe'; use one of refuse, warn, skip" in node.fault
    answer = node.set_parameters([Parameter('check_controllers', value='perhaps')])[0]
    assert not answer.successful and 'use one of' in answer.reason


def test_a_controller_that_reports_a_reference_and_takes_nothing_stops_the_node(robot: FakeRobot, start: Start) -> None:
    """It has the right parameters, and drops every message all the same."""
    robot.add_controller()
    reports = robot.node.create_publisher(JointState, '/arm_controller/controller_state', qos.STATE)

    def report() -> None:
        message = JointState(name=list(ROBOT.action.joints), position=robot.positions.tolist())
        message.header.stamp = robot.node.get_clock().now().to_msg()
        reports.publish(message)

    robot.node.create_timer(0.02, report)
    node = start(seed=1)
    until_read(robot, node)
    assert node.trigger_activate() == OK
    robot.instruct()
    robot.wait_for_state('STOPPED')
    assert "controller 'arm' does not follow the trajectory" in robot.statuses[-1].reason
    assert robot.statuses[-1].trajectories_not_accepted >= 3
    assert robot.trigger('reset').success


@pytest.mark.parametrize(('stamp', 'answer'), [('zero', FAILURE), ('start', OK)])
def test_the_simulated_controller_is_judged_by_what_it_runs_with(
    ros_domain: int, tmp_path: Path, tabletop_checkpoint: Path, stamp: str, answer: TransitionCallbackReturn
) -> None:
    """One that starts from the measured state is safe with a start stamp and not without."""
    arguments = ['--ros-args', '-p', 'interpolate_from_desired_state:=false']
    simulator = Child('simulator', 'vla_policy_ros.sim.ros_node', arguments, tmp_path / 'simulator.log')
    robot = FakeRobot(ROBOT)  # its sensors are on other topics; it spins the node
    try:
        parameters = {'robot_file': 'tabletop', 'trajectory_stamp': stamp}
        node = robot.start_policy(tmp_path, tabletop_checkpoint, **parameters)
        assert node.trigger_configure() == OK
        robot.spin_until(lambda: not node._check.unread, 60.0)
        assert node.trigger_activate() == answer
        assert ('interpolate_from_desired_state' in node.refusal) is (answer == FAILURE)
    finally:
        robot.close()
        simulator.stop()


ARM = ROBOT.controllers['arm']
VALUES = {'joints': ['b', 'a'], 'interpolate_from_desired_state': True, 'constraints.goal_time': 0.5, 'cmd_timeout': 1.0}
EMISSION = Emission.for_controller(100.0, 'start')


def test_reported_parameters_arrive_by_their_names() -> None:
    values = VALUES | {
        'constraints.a.trajectory': 0.2, 'constraints.b.goal': 0.1, 'command_interfaces': ['position'],
        'interpolation_method': 'none', 'allow_partial_joints_goal': True,
        'constraints.decelerate_on_cancel': True, 'speed_scaling.initial_scaling_factor': 0.5,
    }  # fmt: skip
    parameters = to_parameters(values, ARM, 250)
    assert parameters.joints == ('b', 'a')
    assert parameters.trajectory_tolerance == {'a': 0.2} and parameters.goal_tolerance == {'b': 0.1}
    assert parameters.goal_time == 0.5 and parameters.cmd_timeout == 1.0 and parameters.update_rate == 250.0
    assert parameters.interpolate_from_desired_state and parameters.allow_partial_joints_goal
    assert parameters.interpolation_method == 'none' and not parameters.effort_command_interface
    assert parameters.decelerate_on_cancel and parameters.speed_scaling == 0.5


def test_a_controller_that_runs_its_trajectories_slower_is_refused() -> None:
    (refusal,) = judge_controller('arm', ARM, VALUES | {'speed_scaling.initial_scaling_factor': 0.5}, 100, EMISSION).refusals
    assert 'speed_scaling.initial_scaling_factor is 0.5' in refusal


def test_the_update_rate_is_the_controllers_own_then_the_managers_then_that_of_the_robot_file() -> None:
    assert to_parameters(VALUES | {'update_rate': 50}, ARM, 250).update_rate == 50.0
    assert to_parameters(VALUES | {'update_rate': 0}, ARM, 250).update_rate == 250.0
    assert to_parameters(VALUES, ARM, None).update_rate == ARM.update_rate


def test_another_update_rate_than_in_the_robot_file_is_a_warning() -> None:
    found = judge_controller('arm', ARM, VALUES, 50, EMISSION)
    assert found.refusals == ()
    assert any('updated at 50 Hz, but update_rate in the robot file is 100' in sentence for sentence in found.warnings)
    assert not any('update_rate' in sentence for sentence in judge_controller('arm', ARM, VALUES, 100, EMISSION).warnings)


def test_a_parameter_of_another_distribution_asks_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    values = VALUES | {'allow_trajectory_replacement': True}
    monkeypatch.setenv('ROS_DISTRO', 'jazzy')
    (refusal,) = judge_controller('arm', ARM, values, 100, EMISSION).refusals
    assert 'allow_trajectory_replacement' in refusal and 'controllers.arm.distro' in refusal
    rolling = Controller.model_validate(ARM.model_dump() | {'distro': 'rolling'})
    assert (
        to_parameters(values, rolling, 100).distro == 'rolling' and to_parameters(values, rolling, 100).allow_trajectory_replacement
    )
    monkeypatch.setenv('ROS_DISTRO', 'a_later_one')
    assert to_parameters(values, ARM, 100).distro == 'rolling'


def test_the_name_of_the_node_comes_from_the_topic_or_the_robot_file() -> None:
    assert ARM.parameter_node == '/arm_controller'
    assert Controller(topic='/arm/commands', joints=('a',)).parameter_node is None
    assert Controller(topic='/arm/commands', joints=('a',), node='/arm').parameter_node == '/arm'
