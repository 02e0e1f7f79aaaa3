"""A forward_command controller is streamed exactly the commanded motion, and hears nothing once that rests.

The test is the controller: its joints are where the last message put them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy')

from fake_robot import FakeRobot  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from std_msgs.msg import Float64MultiArray  # noqa: E402
from trajectory_msgs.msg import JointTrajectory  # noqa: E402

from vla_policy_ros.control.commanded import CommandedMotion  # noqa: E402
from vla_policy_ros.policy import new_checkpoint  # noqa: E402
from vla_policy_ros.robot import Robot, RobotFileError, parse_robot  # noqa: E402
from vla_policy_ros.ros import qos  # noqa: E402
from vla_policy_ros.ros.controllers import judge_controller  # noqa: E402
from vla_policy_ros.ros.policy_node import PolicyNode  # noqa: E402
from vla_policy_ros.ros.streaming import CommandStream  # noqa: E402
from vla_policy_ros.types import NS_PER_S  # noqa: E402
from vla_policy_ros.types import JointTrajectory as Trajectory  # noqa: E402

pytestmark = pytest.mark.dds

OK, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
FILE = """
name: toy
cameras:
  left: {topic: /left, camera_info: /left/info}
state: {topic: /joint_states, joints: [a, b, grip]}
action: {joints: [a, b, grip], period: 0.1, horizon: 16}
limits:
  a: {position: [-1, 1], velocity: 1, acceleration: 4}
  b: {position: [-1, 1], velocity: 1, acceleration: 4}
  grip: {position: [0, 0.08], velocity: 0.1, acceleration: 0.5}
controllers:
  arm: {type: forward_command, topic: /arm_controller/commands, joints: [b, a], update_rate: 100}
  hand: {topic: /hand_controller/joint_trajectory, joints: [grip]}
timing: {max_state_age: 0.5, max_image_age: 1.0, max_state_skew: 1.0}
"""
ROBOT = parse_robot(FILE)
PERIOD_NS = NS_PER_S // 100


class Arm:
    """A forward_command_controller of joints b, a, and the previews of what the node plans."""

    def __init__(self, robot: FakeRobot) -> None:
        self.robot = robot
        self.commands: list[tuple[int, np.ndarray]] = []
        self.hand: list[JointTrajectory] = []
        self.planned: CommandedMotion | None = None
        robot.node.create_subscription(Float64MultiArray, '/arm_controller/commands', self._on_command, 100)
        robot.node.create_subscription(JointTrajectory, '/policy_node/preview/arm', self._on_preview, 100)
        robot.node.create_subscription(JointTrajectory, '/hand_controller/joint_trajectory', self.hand.append, qos.COMMAND)

    def _on_command(self, message: Float64MultiArray) -> None:
        self.commands.append((self.robot.node.get_clock().now().nanoseconds, np.array(message.data)))
        self.robot.positions[[1, 0]] = message.data

    def _on_preview(self, message: JointTrajectory) -> None:
        stamp = message.header.stamp
        trajectory = Trajectory(
            stamp.sec * NS_PER_S + stamp.nanosec,
            tuple(message.joint_names),
            np.array([p.time_from_start.sec * NS_PER_S + p.time_from_start.nanosec for p in message.points]),
            np.array([p.positions for p in message.points]),
            np.array([p.velocities for p in message.points]),
        )
        if self.planned is None:
            self.planned = CommandedMotion.from_rest(('b', 'a'), trajectory.positions[0], trajectory.start_ns)
        self.planned.accept(trajectory)

    def times(self, first: int = 0) -> np.ndarray:
        """When the planned motion passes each command, ns; fails for one that it does not pass at about that time."""
        assert self.planned is not None
        found = []
        for arrived, data in self.commands[first:]:
            grid = arrived + PERIOD_NS + np.arange(-100_000_000, 10_000_000, 100_000)
            distance = np.array([np.abs(self.planned.sample(int(t))[0] - data).max() for t in grid])
            # At rest every moment fits: the one that is due at the time of arrival is taken.
            best = int(np.flatnonzero(distance <= distance.min() + 1e-12)[-1])
            assert distance[best] < 1e-4, (arrived, data, distance[best])
            found.append(int(grid[best]))
        return np.array(found)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(ROBOT, 'tiny', tmp_path_factory.mktemp('checkpoint'))


@pytest.fixture
def robot(ros_domain: int) -> Iterator[FakeRobot]:
    robot = FakeRobot(ROBOT)
    yield robot
    robot.close()


@pytest.fixture
def start(robot: FakeRobot, tmp_path: Path, checkpoint: Path) -> Callable[..., tuple[PolicyNode, Arm]]:
    def running(**parameters: Any) -> tuple[PolicyNode, Arm]:
        arm = Arm(robot)
        node = robot.start_policy(tmp_path, checkpoint, seed=1, check_controllers='skip', **parameters)
        assert node.trigger_configure() == OK and node.trigger_activate() == OK
        robot.instruct()
        return node, arm

    return running


def until_moving(robot: FakeRobot, arm: Arm) -> None:
    robot.spin_until(lambda: len(arm.commands) > 2 and np.abs(arm.commands[-1][1] - arm.commands[-2][1]).max() > 2e-3)


def test_the_stream_is_the_planned_motion_at_the_controllers_rate_and_within_limits(robot: FakeRobot, start: Any) -> None:
    _, arm = start()
    until_moving(robot, arm)
    first = len(arm.commands)
    robot.spin(1.5)
    times = arm.times(first)
    steps = np.diff(times) * 1e-9
    assert steps.min() > -1e-6 and np.median(steps) == pytest.approx(0.01, rel=0.1)
    moved = np.abs(np.diff([data for _, data in arm.commands[first:]], axis=0))
    assert moved.max() > 2e-3, 'it must be moving'
    assert (moved <= 1.0 * steps[:, None] + 2e-4).all(), 'no faster than the velocity limit'
    assert arm.hand, 'the hand is another controller, with trajectories of its own joint'
    assert set(arm.hand[-1].joint_names) == {'grip'} and arm.hand[-1].points


def test_the_first_command_is_where_the_robot_is(robot: FakeRobot, start: Any) -> None:
    before = robot.positions[[1, 0]].copy()
    _, arm = start()
    robot.spin_until(lambda: arm.commands)
    np.testing.assert_allclose(arm.commands[0][1], before, atol=1e-3)


def test_after_deactivation_it_brakes_and_then_is_silent(robot: FakeRobot, start: Any) -> None:
    node, arm = start()
    until_moving(robot, arm)
    began = time.monotonic()
    assert node.trigger_deactivate() == OK
    first = len(arm.commands)
    robot.spin_until(lambda: not node._outputs.streams['arm'].running)
    assert 1.0 <= time.monotonic() - began < 2.5, 'a second after it has come to rest'
    data = np.array([data for _, data in arm.commands[first:]])
    moving = np.flatnonzero(np.abs(np.diff(data, axis=0)).max(axis=1) > 0)
    assert len(moving) and moving[-1] < 60, 'braking is streamed, and takes no longer than a brake'
    robot.spin(0.1)  # what was on its way
    count = len(arm.commands)
    robot.spin(0.5)
    assert len(arm.commands) == count
    np.testing.assert_array_equal(arm.commands[-1][1], arm.planned.sample(arm.planned.until_ns)[0])


def test_a_node_that_is_ended_while_moving_streams_the_brake_first(robot: FakeRobot, start: Any) -> None:
    node, arm = start()
    until_moving(robot, arm)
    first = len(arm.commands)
    node.brake_and_release()
    robot.spin(0.3)
    streamed = np.array([data for _, data in arm.commands[first:]])
    np.testing.assert_array_equal(streamed[-1], arm.planned.sample(arm.planned.until_ns)[0])
    # All of it arrives when the test spins again, so only the way counts, not the time.
    way = np.array([arm.planned.sample(arm.planned.until_ns - ago * 1_000_000)[0] for ago in range(1500, -1, -1)])
    nearest = [int(np.argmin(np.abs(way - data).max(axis=1))) for data in streamed]
    assert all(np.abs(way[index] - data).max() < 1e-3 for index, data in zip(nearest, streamed, strict=True))
    assert len(streamed) > 5 and nearest == sorted(nearest)


def test_cleaning_up_while_it_parks_brakes_instead_of_stopping_short(ros_domain: int, tmp_path: Path, checkpoint: Path) -> None:
    robot = FakeRobot(Robot.model_validate(ROBOT.model_dump() | {'park': {'a': 0.9}}))
    try:
        arm = Arm(robot)
        node = robot.start_policy(tmp_path, checkpoint, seed=1, check_controllers='skip', stop_policy='park')
        assert node.trigger_configure() == OK and node.trigger_activate() == OK
        robot.spin_until(lambda: node.runtime.inputs.state is not None)
        assert node.trigger_deactivate() == OK
        robot.spin_until(lambda: len(arm.commands) > 2 and arm.commands[-1][1][1] > 0.2)
        first = len(arm.commands)
        began = time.monotonic()
        assert node.trigger_cleanup() == OK
        assert time.monotonic() - began < 2.0
        robot.spin(0.3)
        steps = np.diff([data[1] for _, data in arm.commands[first - 1 :]])
        assert steps.max() > 2e-3 and steps[-1] < 1e-3, 'it slows down'
        assert arm.commands[-1][1][1] < 0.8
        np.testing.assert_array_equal(arm.commands[-1][1], arm.planned.sample(arm.planned.until_ns)[0])
    finally:
        robot.close()


def test_in_dry_run_nothing_is_streamed(robot: FakeRobot, start: Any) -> None:
    _, arm = start(dry_run=True)
    robot.spin_until(lambda: arm.planned is not None)
    robot.spin(0.5)
    assert arm.commands == [] and arm.hand == []


def test_a_motion_after_a_pause_begins_at_the_held_command_not_where_the_arm_sags_to(robot: FakeRobot, start: Any) -> None:
    node, arm = start()
    until_moving(robot, arm)
    assert robot.trigger('stop').success
    robot.spin_until(lambda: not node._outputs.streams['arm'].running)
    held = arm.commands[-1][1]
    robot.positions[:2] -= 0.01
    robot.spin(0.5)
    count = len(arm.commands)
    assert robot.trigger('reset').success
    robot.spin_until(lambda: len(arm.commands) > count)
    np.testing.assert_allclose(arm.commands[count][1], held, atol=1e-3)


def test_a_motion_after_others_moved_the_arm_begins_where_it_is(robot: FakeRobot, start: Any) -> None:
    node, arm = start()
    until_moving(robot, arm)
    assert robot.trigger('stop').success
    robot.spin_until(lambda: not node._outputs.streams['arm'].running)
    robot.positions[:2] = [0.5, -0.5]
    robot.spin(1.0)
    count = len(arm.commands)
    assert robot.trigger('reset').success
    robot.spin_until(lambda: len(arm.commands) > count)
    np.testing.assert_allclose(arm.commands[count][1], [-0.5, 0.5], atol=1e-3)


def test_after_a_clock_jump_the_old_motion_goes_on_to_its_end(robot: FakeRobot) -> None:
    motion = CommandedMotion.from_rest(('a', 'b'), np.zeros(2), 0)
    times = np.arange(0, 1_100_000_000, 100_000_000)
    s = times[:, None] * 1e-9
    motion.accept(Trajectory(0, ('a', 'b'), times, (3 * s**2 - 2 * s**3) * [1.0, -1.0], (6 * s - 6 * s**2) * [1.0, -1.0]))
    now, live, sent = 300_000_000, motion, []
    stream = CommandStream(robot.node, ROBOT.controllers['arm'], lambda: live, lambda: now)
    stream._publisher = SimpleNamespace(publish=lambda message: sent.append(np.array(message.data)))
    stream.wake()
    stream.step()
    now, live = 5, None
    for _ in range(200):
        if stream.running:
            stream.step()
    expected = [motion.sample(300_000_000 + k * PERIOD_NS)[0][::-1] for k in range(1, len(sent) + 1)]
    np.testing.assert_allclose(sent, expected, atol=1e-12)
    np.testing.assert_array_equal(sent[-1], [-1.0, 1.0])
    assert not stream.running and len(sent) == 170, 'to the end, and a second of rest'
    robot.node.destroy_timer(stream._timer)


def test_a_forward_controller_must_have_the_same_joints_in_the_same_order_and_take_positions() -> None:
    arm = ROBOT.controllers['arm']
    assert arm.parameter_node == '/arm_controller'
    assert judge_controller('arm', arm, {'joints': ['b', 'a'], 'interface_name': 'position'}, None, None).refusals == ()
    (order,) = judge_controller('arm', arm, {'joints': ['a', 'b']}, None, None).refusals
    assert 'its joints are a, b' in order and 'in that order' in order
    (interface,) = judge_controller('arm', arm, {'joints': ['b', 'a'], 'interface_name': 'velocity'}, None, None).refusals
    assert 'interface_name' in interface


def test_a_state_topic_of_a_forward_controller_is_refused() -> None:
    with pytest.raises(RobotFileError, match=r'reports no reference: remove state_topic /arm/state'):
        parse_robot(FILE.replace('joints: [b, a],', 'joints: [b, a], state_topic: /arm/state,'))
