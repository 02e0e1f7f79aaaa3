"""Subscriptions of the policy node: messages go into the runtime's slots, refused ones are told to the operator once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import String

from vla_policy_ros.robot import Controller, Robot
from vla_policy_ros.ros import qos
from vla_policy_ros.runtime import PolicyRuntime, without_numbers
from vla_policy_ros.types import NS_PER_S

_REPEAT_AFTER_S = 10.0
_SAME_POSITION = 0.02  # of a joint's range


class OperatorLog:
    """Sentences for the operator: each kind at once, then at most every ten seconds. A kind is the sentence without its numbers."""

    def __init__(self, node: LifecycleNode) -> None:
        self._node = node
        self._last: dict[str, float] = {}

    def tell(self, sentence: str | None, *, warn: bool = True) -> None:
        """Log ``sentence``, if there is one, unless its kind was logged a moment ago."""
        kind = without_numbers(sentence or '')
        if not sentence or monotonic() - self._last.get(kind, float('-inf')) < _REPEAT_AFTER_S:
            return
        self._last[kind] = monotonic()
        if warn:
            self._node.get_logger().warning(sentence)
        else:
            self._node.get_logger().info(sentence)


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
        log: takes refusals.
    """

    def __init__(self, node: LifecycleNode, robot: Robot, runtime: PolicyRuntime, now: Callable[[], int], log: OperatorLog) -> None:
        self._node, self._robot, self._runtime, self._now, self._log = node, robot, runtime, now, log
        self._handles: list[Any] = []
        self._expected: dict[str, str] = {}
        self._references: dict[str, tuple[int, dict[str, float]]] = {}
        for name, camera in robot.cameras.items():
            image_type = Image if camera.transport == 'raw' else CompressedImage
            self._subscribe(image_type, camera.topic, qos.SENSOR, partial(runtime.inputs.put_image, name))
            if camera.camera_info:
                self._subscribe(CameraInfo, camera.camera_info, qos.SENSOR, partial(runtime.inputs.put_camera_info, name))
        self._subscribe(JointState, robot.state.topic, qos.STATE, runtime.inputs.put_joint_state)
        # A latched subscription does not match a volatile publisher (`ros2 topic pub`); a volatile one misses what was latched.
        for profile in (qos.LATCHED, qos.COMMAND):
            self._subscribe(String, robot.instruction.topic, profile, self._put_instruction, needs_clock=False)
        for name, controller in robot.controllers.items():
            if controller.state_topic:
                put = partial(self._put_controller_state, name, controller)
                self._subscribe(controller_state_type(), controller.state_topic, qos.STATE, put)

    def close(self) -> None:
        """Destroy the subscriptions."""
        for subscription in self._handles:
            self._node.destroy_subscription(subscription)
        self._handles = []

    def explain_silence(self) -> None:
        """Tell the slots of inputs that have no message whether somebody publishes their topic, and as which type."""
        for slot in self._runtime.inputs.silent_slots():
            topic = self._node.resolve_topic_name(slot.topic)
            types = {info.topic_type for info in self._node.get_publishers_info_by_topic(topic)}
            wrong = types - {self._expected[slot.topic]}
            if wrong:
                published = ', '.join(sorted(wrong))
                slot.remedy = f'it is published as {published}, not as {self._expected[slot.topic]}: mend the robot file'
            elif not types:
                slot.remedy = slot.remedy_without_publisher

    def _subscribe(
        self, kind: type, topic: str, profile: Any, put: Callable[[Any, int], str | None], needs_clock: bool = True
    ) -> None:
        def callback(message: Any) -> None:
            now_ns = self._now()
            if now_ns > 0 or not needs_clock:  # a latched instruction comes once, possibly before simulated time begins
                self._log.tell(put(message, now_ns))

        self._expected[topic] = kind.__module__.split('.')[0] + '/msg/' + kind.__name__
        self._handles.append(self._node.create_subscription(kind, topic, callback, profile))

    def _put_instruction(self, message: Any, now_ns: int) -> str | None:
        return self._runtime.instruct(message.data, now_ns)

    def _put_controller_state(self, name: str, controller: Controller, message: Any, now_ns: int) -> str | None:
        """What a controller commands: it anchors motions, and shows whether it follows."""
        reference = message if isinstance(message, JointState) else message.reference
        names = list(message.name if isinstance(message, JointState) else message.joint_names)
        positions = list(reference.position if isinstance(message, JointState) else reference.positions)
        if len(names) != len(positions) or not np.isfinite(positions).all():
            return f'controller state on {controller.state_topic} refused: {len(names)} names, positions {positions}'
        stamp_ns = min(message.header.stamp.sec * NS_PER_S + message.header.stamp.nanosec, now_ns)
        reported = dict(zip(names, positions, strict=True))
        self._references[name] = (stamp_ns, reported)
        if all(joint in reported for joint in controller.joints):
            self._runtime.watch_acceptance(name, np.array([reported[j] for j in controller.joints]), stamp_ns, now_ns)
        self._offer_reference()
        return None

    def put_held(self, name: str, positions: NDArray[np.float64], now_ns: int) -> None:
        """``positions [J]`` were streamed last to controller ``name``, which reports no reference. It holds them, unless the robot
        was moved since, which shows in the measured state."""
        state = self._runtime.inputs.state
        if state is None:
            return
        joints = self._robot.controllers[name].joints
        measured = dict(zip(self._robot.action.joints, self._robot.action_positions(state[0]), strict=True))
        for joint, position in zip(joints, positions, strict=True):
            low, high = self._robot.limits[joint].position
            if abs(measured[joint] - position) > _SAME_POSITION * (high - low):
                self._references.pop(name, None)
                return
        self._references[name] = (now_ns, dict(zip(joints, positions.tolist(), strict=True)))
        self._offer_reference()

    def _offer_reference(self) -> None:
        """Where the controllers hold the robot, dated by the oldest report; measured for joints of which none is reported."""
        state, joints = self._runtime.inputs.state, self._robot.action.joints
        known = {joint: value for _, values in self._references.values() for joint, value in values.items()}
        stamps = [stamp_ns for stamp_ns, _ in self._references.values()]
        if any(joint not in known for joint in joints):
            if state is None or not known:
                return
            known = dict(zip(joints, self._robot.action_positions(state[0]), strict=True)) | known
            stamps.append(state[1])
        self._runtime.put_controller_reference(np.array([known[joint] for joint in joints]), min(stamps))
