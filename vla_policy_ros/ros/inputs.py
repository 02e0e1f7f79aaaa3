"""Subscriptions of the policy node: messages go into the runtime's slots, refused ones are told to the operator once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import String

from vla_policy_ros.robot import Controller, Robot
from vla_policy_ros.ros import qos
from vla_policy_ros.runtime import PolicyRuntime

_REPEAT_AFTER_S = 10.0


class OperatorLog:
    """Warnings to the operator: each kind at once, then at most every ten seconds. A kind is the sentence without its numbers."""

    def __init__(self, node: LifecycleNode) -> None:
        self._node = node
        self._last: dict[str, float] = {}

    def warn(self, sentence: str | None) -> None:
        """Log ``sentence`` unless its kind was logged a moment ago."""
        if not sentence:
            return
        kind = ''.join(c for c in sentence if not c.isdigit())
        if monotonic() - self._last.get(kind, float('-inf')) >= _REPEAT_AFTER_S:
            self._last[kind] = monotonic()
            self._node.get_logger().warning(sentence)


def controller_state_type() -> type:
    """control_msgs/JointTrajectoryControllerState where control_msgs is installed, else sensor_msgs/JointState."""
    try:
        from control_msgs.msg import JointTrajectoryControllerState
    except ImportError:
        return JointState
    return JointTrajectoryControllerState


class Inputs:
    """All subscriptions of one configured node.

    Args:
        node: owns the subscriptions.
        robot: names the topics.
        runtime: takes the messages.
        now: the node's time in ns; 0 while simulated time has not begun, when nothing can be judged.
    """

    def __init__(self, node: LifecycleNode, robot: Robot, runtime: PolicyRuntime, now: Callable[[], int]) -> None:
        self._node, self._robot, self._runtime, self._now = node, robot, runtime, now
        self._log = OperatorLog(node)
        self._handles: list[Any] = []
        self._references: dict[str, float] = {}
        for name, camera in robot.cameras.items():
            image_type = Image if camera.transport == 'raw' else CompressedImage
            self._subscribe(image_type, camera.topic, qos.SENSOR, partial(runtime.inputs.put_image, name))
            if camera.camera_info:
                self._subscribe(CameraInfo, camera.camera_info, qos.SENSOR, partial(runtime.inputs.put_camera_info, name))
        self._subscribe(JointState, robot.state.topic, qos.STATE, runtime.inputs.put_joint_state)
        # A latched subscription does not match a volatile publisher (`ros2 topic pub`); a volatile one misses what was latched.
        for profile in (qos.LATCHED, qos.COMMAND):
            self._subscribe(String, robot.instruction.topic, profile, self._put_instruction, needs_clock=False)
        for controller in robot.controllers.values():
            if controller.state_topic:
                put = partial(self._put_controller_state, controller)
                self._subscribe(controller_state_type(), controller.state_topic, qos.STATE, put)

    def close(self) -> None:
        """Destroy the subscriptions."""
        for subscription in self._handles:
            self._node.destroy_subscription(subscription)
        self._handles = []

    def _subscribe(
        self, kind: type, topic: str, profile: Any, put: Callable[[Any, int], str | None], needs_clock: bool = True
    ) -> None:
        def callback(message: Any) -> None:
            now_ns = self._now()
            if now_ns > 0 or not needs_clock:  # a latched instruction comes once, possibly before simulated time begins
                self._log.warn(put(message, now_ns))

        self._handles.append(self._node.create_subscription(kind, topic, callback, profile))

    def _put_instruction(self, message: Any, now_ns: int) -> str | None:
        return self._runtime.instruct(message.data, now_ns)

    def _put_controller_state(self, controller: Controller, message: Any, now_ns: int) -> str | None:
        """Gather the reference positions of all controllers; hand them on when every action joint has one."""
        if isinstance(message, JointState):
            names, positions = list(message.name), list(message.position)
        else:
            names, positions = list(message.joint_names), list(message.reference.positions)
        if len(names) != len(positions) or not np.isfinite(positions).all():
            return f'controller state on {controller.state_topic} refused: {len(names)} names, positions {positions}'
        self._references.update(zip(names, positions, strict=True))
        joints = self._robot.action.joints
        if all(joint in self._references for joint in joints):
            self._runtime.put_controller_reference(np.array([self._references[joint] for joint in joints]), now_ns)
        return None
