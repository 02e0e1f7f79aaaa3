"""What leaves for the controllers: every trajectory as a preview, and as a command if it is to move the robot.

A joint_trajectory controller gets the trajectory itself, a forward_command controller the commanded motion, sampled. Runs on the
thread of the node's executor.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.planner import Emission
from vla_policy_ros.robot import Robot
from vla_policy_ros.ros import qos
from vla_policy_ros.ros.goals import GoalSender
from vla_policy_ros.ros.messages import to_trajectory
from vla_policy_ros.ros.streaming import CommandStream
from vla_policy_ros.types import NS_PER_S, JointTrajectory

_FINISH_WITHIN_S = 5.0
_DELIVERY_PATIENCE_S = 0.5


class Outputs:
    """The publishers of one configured node.

    Args:
        node: owns the publishers; trajectories are sent only while it is active.
        robot: names the controllers.
        emission: how trajectories are timed.
        live: the commanded motion, or None where there is none.
        now: the node's time, ns.
        tell: takes sentences for the operator.

    Raises:
        ValueError: the robot file names an action, and control_msgs is not installed.
    """

    def __init__(
        self,
        node: LifecycleNode,
        robot: Robot,
        emission: Emission,
        live: Callable[[], CommandedMotion | None],
        now: Callable[[], int],
        tell: Callable[[str], None],
    ) -> None:
        self._node, self._robot, self._emission = node, robot, emission
        self._previews: dict[str, Any] = {}
        self._commands: dict[str, Any] = {}
        self.streams: dict[str, CommandStream] = {}
        self._goals: dict[str, GoalSender] = {}
        for name, controller in robot.controllers.items():
            self._previews[name] = node.create_publisher(JointTrajectoryMsg, f'~/preview/{name}', qos.COMMAND)
            if controller.type == 'forward_command':
                self.streams[name] = CommandStream(node, controller, live, now)
            else:
                self._commands[name] = node.create_lifecycle_publisher(JointTrajectoryMsg, controller.topic, qos.COMMAND)
            if controller.action is not None:
                self._goals[name] = GoalSender(node, name, controller.action, tell)

    def send(self, trajectory: JointTrajectory, *, actuate: bool, move: bool = False) -> None:
        """Publish ``trajectory`` to each controller's preview, and to the controllers if ``actuate``.

        A ``move`` goes to a controller's action, where the robot file names one. When it is to move the robot, it must be part of
        the commanded motion already, from which the streams take it.
        """
        for name, controller in self._robot.controllers.items():
            message = to_trajectory(trajectory.select(controller.joints), self._emission.header_stamp_ns(trajectory))
            if actuate and name in self.streams:
                self.streams[name].wake()
            elif actuate and not (move and name in self._goals and self._goals[name].send(message)):
                self._commands[name].publish(message)
                if name in self._goals:
                    self._goals[name].leave()
            self._previews[name].publish(message)

    def wait_for_delivery(self) -> None:
        """Return once the controllers have the last trajectory, or after half a second."""
        for publisher in self._commands.values():
            publisher.wait_for_all_acked(Duration(seconds=_DELIVERY_PATIENCE_S))

    def close(self) -> None:
        """Let streamed motions come to rest, then destroy the publishers."""
        self._finish()
        for goals in self._goals.values():
            goals.close()
        for stream in self.streams.values():
            stream.close()
        for publisher in self._commands.values():
            self._node.destroy_lifecycle_publisher(publisher)
        for publisher in self._previews.values():
            self._node.destroy_publisher(publisher)
        self._commands, self._previews, self.streams, self._goals = {}, {}, {}, {}

    def _finish(self) -> None:
        """Stream what moves until it rests, on this thread and in wall time: when the node ends, nobody spins it any more."""
        left = [stream for stream in self.streams.values() if stream.running]
        for stream in left:
            stream.step()
        began = monotonic()
        while left and monotonic() - began < _FINISH_WITHIN_S:
            sleep(min(stream.period_ns for stream in left) / NS_PER_S)
            elapsed_ns = round((monotonic() - began) * NS_PER_S)
            left = [stream for stream in left if stream.go_on(elapsed_ns)]
