"""Home and park over DDS: by service, when the node is stopped, and as a goal of an action where the robot file names one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy')

from fake_robot import FakeRobot  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from trajectory_msgs.msg import JointTrajectory  # noqa: E402

from vla_policy_ros.policy import new_checkpoint  # noqa: E402
from vla_policy_ros.robot import Robot, RobotFileError, parse_robot  # noqa: E402
from vla_policy_ros.ros import goals, qos  # noqa: E402
from vla_policy_ros.ros.policy_node import PolicyNode  # noqa: E402

pytestmark = pytest.mark.dds

OK, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
FILE = """
name: toy
cameras:
  left: {topic: /left, camera_info: /left/info}
state: {topic: /joint_states, joints: [a, b]}
action: {joints: [a, b], period: 0.1, horizon: 16}
limits:
  a: {position: [-1, 1], velocity: 1, acceleration: 4}
  b: {position: [-1, 1], velocity: 1, acceleration: 4}
controllers:
  arm: {topic: /arm_controller/joint_trajectory, joints: [a, b]}
home: {a: 0.5, b: -0.5}
park: {a: -0.7, b: 0.2}
timing: {max_state_age: 0.5, max_image_age: 1.0, max_state_skew: 1.0}
"""
ROBOT = parse_robot(FILE)
ACTION = parse_robot(
    FILE.replace('joints: [a, b]}\nhome', 'joints: [a, b], action: /arm_controller/follow_joint_trajectory}\nhome')
)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(ROBOT, 'tiny', tmp_path_factory.mktemp('checkpoint'))


class Bench:
    """A fake robot, the policy node, and the trajectories that its controller hears."""

    def __init__(self, robot: Robot, folder: Path, checkpoint: Path) -> None:
        self.robot, self._folder, self._checkpoint = FakeRobot(robot), folder, checkpoint
        self.heard: list[JointTrajectory] = []
        self.robot.node.create_subscription(JointTrajectory, '/arm_controller/joint_trajectory', self.heard.append, qos.COMMAND)

    def configure(self, **parameters: Any) -> PolicyNode:
        self.node = self.robot.start_policy(self._folder, self._checkpoint, check_controllers='skip', seed=1, **parameters)
        return self.node

    def run(self, **parameters: Any) -> PolicyNode:
        node = self.configure(**parameters)
        assert node.trigger_configure() == OK and node.trigger_activate() == OK
        self.robot.spin_until(lambda: node.runtime.inputs.state is not None)
        return node

    def wait_for_end(self, expected: list[float]) -> JointTrajectory:
        """The trajectory that ends at ``expected``, which must come."""
        self.robot.spin_until(lambda: self.heard and np.abs(np.array(self.heard[-1].points[-1].positions) - expected).max() < 2e-3)
        assert not any(self.heard[-1].points[-1].velocities)
        return self.heard[-1]


@pytest.fixture
def bench(ros_domain: int, tmp_path: Path, checkpoint: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(robot: Robot = ROBOT) -> Bench:
        made.append(Bench(robot, tmp_path, checkpoint))
        return made[-1]

    yield make
    for each in made:
        each.robot.close()


def test_home_and_park_are_services_that_send_one_trajectory_and_hold_the_policy(bench: Any) -> None:
    bench = bench()
    bench.run()
    bench.robot.instruct()
    bench.robot.wait_for_state('RUNNING')
    bench.robot.spin_until(lambda: bench.heard)
    assert bench.robot.trigger('home').success
    bench.wait_for_end([0.5, -0.5])
    bench.robot.wait_for_state('STOPPED')
    assert bench.robot.statuses[-1].reason == 'sent to home; call ~/reset to go on'
    count = len(bench.heard)
    bench.robot.spin(0.5)
    assert len(bench.heard) == count
    answer = bench.robot.trigger('reset')
    assert not answer.success and 'not there yet' in answer.message
    assert bench.robot.trigger('park').success
    bench.wait_for_end([-0.7, 0.2])


def test_a_move_of_an_inactive_node_is_refused_with_the_reason(bench: Any) -> None:
    bench = bench()
    assert bench.configure().trigger_configure() == OK
    answer = bench.robot.trigger('home')
    assert not answer.success and 'not active' in answer.message
    assert bench.heard == []


def test_with_stop_policy_park_deactivation_ends_at_the_park_pose(bench: Any) -> None:
    bench = bench()
    node = bench.run(stop_policy='park')
    assert node.trigger_deactivate() == OK
    bench.wait_for_end([-0.7, 0.2])


def test_a_robot_file_without_poses_offers_no_services_and_no_parking(bench: Any) -> None:
    data = ROBOT.model_dump() | {'home': None, 'park': None}
    bench = bench(Robot.model_validate(data))
    node = bench.configure(stop_policy='park')
    assert node.trigger_configure() == FAILURE
    assert 'no park pose' in node.fault
    assert node.set_parameters([rclpy.parameter.Parameter('stop_policy', value='brake')])[0].successful
    assert node.trigger_configure() == OK
    offered = {name for name, _ in node.get_service_names_and_types_by_node('policy_node', '/')}
    assert '/policy_node/stop' in offered and not {'/policy_node/home', '/policy_node/park'} & offered


def test_an_action_without_control_msgs_fails_at_configure(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'control_msgs', None)
    monkeypatch.setitem(sys.modules, 'control_msgs.action', None)
    node = bench(ACTION).configure()
    assert node.trigger_configure() == FAILURE
    assert 'controllers.arm.action needs the package control_msgs' in node.fault


class FollowJointTrajectory:
    """What stands in for the action type of control_msgs."""

    class Goal:
        def __init__(self, trajectory: JointTrajectory) -> None:
            self.trajectory = trajectory

    class Result:
        SUCCESSFUL = 0


class Promise:
    """A future that the test keeps."""

    def __init__(self) -> None:
        self._callbacks: list[Any] = []

    def add_done_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)

    def keep(self, value: Any) -> None:
        self.result = lambda: value
        for callback in self._callbacks:
            callback(self)


class FakeActionClient:
    """What stands in for rclpy's action client, which needs the compiled type."""

    made: list[FakeActionClient]

    def __init__(self, node: Any, kind: Any, name: str) -> None:
        self.kind, self.name, self.ready = kind, name, True
        self.goals: list[Any] = []
        self.answers: list[Promise] = []
        FakeActionClient.made.append(self)

    def server_is_ready(self) -> bool:
        return self.ready

    def send_goal_async(self, goal: Any) -> Promise:
        self.goals.append(goal)
        self.answers.append(Promise())
        return self.answers[-1]

    def destroy(self) -> None:
        self.ready = False


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> list[FakeActionClient]:
    module = ModuleType('control_msgs.action')
    module.FollowJointTrajectory = FollowJointTrajectory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'control_msgs', ModuleType('control_msgs'))
    monkeypatch.setitem(sys.modules, 'control_msgs.action', module)
    monkeypatch.setattr(goals, 'ActionClient', FakeActionClient)
    FakeActionClient.made = []
    return FakeActionClient.made


def test_a_move_is_a_goal_of_the_action_and_the_policy_stays_on_the_topic(bench: Any, actions: list[FakeActionClient]) -> None:
    bench = bench(ACTION)
    bench.run()
    bench.robot.instruct()
    bench.robot.spin_until(lambda: bench.heard)
    bench.robot.trigger('stop')
    bench.robot.spin(0.3)
    count = len(bench.heard)
    assert bench.robot.trigger('home').success
    (client,) = actions
    assert (client.kind, client.name) == (FollowJointTrajectory, '/arm_controller/follow_joint_trajectory')
    (goal,) = client.goals
    np.testing.assert_allclose(goal.trajectory.points[-1].positions, [0.5, -0.5], atol=2e-3)
    bench.robot.spin(0.3)
    assert len(bench.heard) == count


def answer(code: int, text: str) -> Any:
    return SimpleNamespace(result=SimpleNamespace(error_code=code, error_string=text))


@pytest.mark.parametrize(
    ('accepted', 'code', 'told'),
    [(True, 0, ''), (True, -5, 'did not finish the move: error -5, too late'), (False, 0, 'refused the move as a goal')],
)
def test_how_a_goal_ended_is_told_unless_it_ended_well(
    bench: Any, actions: list[FakeActionClient], accepted: bool, code: int, told: str
) -> None:
    bench = bench(ACTION)
    bench.run()
    assert bench.robot.trigger('home').success
    result = Promise()
    actions[0].answers[0].keep(SimpleNamespace(accepted=accepted, get_result_async=lambda: result))
    if accepted:
        result.keep(answer(code, 'too late'))
    sentences = [sentence for sentence in bench.robot.told if sentence.startswith("controller 'arm'")]
    assert [told in sentence for sentence in sentences] == ([True] if told else [])


def test_a_goal_that_a_brake_replaced_is_no_news(bench: Any, actions: list[FakeActionClient]) -> None:
    bench = bench(ACTION)
    bench.run()
    assert bench.robot.trigger('home').success
    bench.robot.spin(0.3)
    assert bench.robot.trigger('stop').success
    bench.robot.spin_until(lambda: bench.heard)
    result = Promise()
    actions[0].answers[0].keep(SimpleNamespace(accepted=True, get_result_async=lambda: result))
    result.keep(answer(-4, 'goal tolerance'))
    assert not [sentence for sentence in bench.robot.told if sentence.startswith("controller 'arm'")]


def test_without_a_server_the_move_goes_to_the_topic_and_the_operator_knows(bench: Any, actions: list[FakeActionClient]) -> None:
    bench = bench(ACTION)
    bench.run()
    actions[0].ready = False
    assert bench.robot.trigger('home').success
    bench.wait_for_end([0.5, -0.5])
    assert [sentence for sentence in bench.robot.told if 'nobody serves the action' in sentence]


def test_an_action_of_a_forward_controller_is_refused() -> None:
    with pytest.raises(RobotFileError, match='has no action: remove action /x'):
        parse_robot(FILE.replace('joints: [a, b]}\nhome', 'joints: [a, b], type: forward_command, action: /x}\nhome'))
