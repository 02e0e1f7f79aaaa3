"""Listens to a command topic of a live system, and to the joints it moves, for `vla-policy lint`.

Enters: topics. Leaves: the messages as they came, each with the time at which it arrived on the node's clock: that of `/clock`
where somebody publishes one, as a controller on simulated time has it, else the time of day. One node, spun on the caller's thread.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from trajectory_msgs.msg import JointTrajectory

from vla_policy_ros.ros.message_types import MessageTypeError, message_class, message_name

STATE_TYPES = ('sensor_msgs/msg/JointState', 'control_msgs/msg/JointTrajectoryControllerState')
# A best-effort subscription hears every publisher, and a long queue loses nothing while the machine is busy.
_LISTEN = QoSProfile(depth=1000, reliability=ReliabilityPolicy.BEST_EFFORT)
_DISCOVERY_S = 3.0
_LOOK_AGAIN_S = 0.5


class LiveTopicError(RuntimeError):
    """The topic cannot be listened to; the message names what there is instead."""


@dataclass
class Heard:
    """What came: (time of the node's clock in ns, message) in order.

    Attributes:
        trajectories: on the command topic.
        states: topic -> newest state before the first trajectory, or the first one after it.
    """

    trajectories: list[tuple[int, Any]] = field(default_factory=list)
    states: dict[str, Any] = field(default_factory=dict)


def listen(topic: str, state_topic: str, seconds: float, tell: Callable[[str], None]) -> Heard:
    """Listen for ``seconds`` of wall time, or until interrupted.

    Args:
        topic: command topic, trajectory_msgs/JointTrajectory.
        state_topic: of its controller; joint states are heard as well.
        tell: takes a line about what is going on.

    Raises:
        LiveTopicError: the topic is of another type, or nothing was sent on it.
    """
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node('vla_policy_lint', context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        listener = _Listener(node, topic, state_topic, tell)
        _spin(executor, _DISCOVERY_S, listener.look_around, enough=listener.is_published)
        tell(f'listening to {topic} for {seconds:g} s')
        _spin(executor, seconds, listener.look_around)
        listener.explain_silence()
        return listener.heard
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def _spin(
    executor: SingleThreadedExecutor, seconds: float, look_around: Callable[[], None], enough: Callable[[], bool] | None = None
) -> None:
    """Spin for ``seconds``, looking around now and then, and ending early where that is ``enough``. Ctrl-C ends it, too."""
    end = time.monotonic() + seconds
    look = time.monotonic()
    try:
        while (now := time.monotonic()) < end:
            if now >= look:
                look = now + _LOOK_AGAIN_S
                look_around()
                if enough is not None and enough():
                    return
            executor.spin_once(timeout_sec=max(0.0, min(end, look) - now))
    except (KeyboardInterrupt, ExternalShutdownException):
        return


class _Listener:
    """Subscriptions to the command topic and to every state that appears."""

    def __init__(self, node: Node, topic: str, state_topic: str, tell: Callable[[str], None]) -> None:
        self.heard = Heard()
        self._node, self._topic, self._state_topic, self._tell = node, topic, state_topic, tell
        self._subscribed: dict[str, Any] = {}
        self._simulated_time = False
        self._subscriptions = [node.create_subscription(JointTrajectory, topic, self._take_trajectory, _LISTEN)]

    def is_published(self) -> bool:
        """Whether somebody publishes the command topic."""
        return bool(self._node.get_publishers_info_by_topic(self._topic))

    def look_around(self) -> None:
        """Subscribe to states that have appeared, and take up simulated time. Raises LiveTopicError for a topic of another type."""
        for name, kinds in self._node.get_topic_names_and_types():
            if name == self._topic and kinds != [message_name(JointTrajectory)]:
                raise LiveTopicError(f'topic {name} is of type {", ".join(kinds)}, not {message_name(JointTrajectory)}')
            wanted = name == self._state_topic or name.rpartition('/')[2] == 'joint_states'
            if wanted and name not in self._subscribed and kinds[0] in STATE_TYPES:
                self._subscribe_to_state(name, kinds[0])
        if not self._simulated_time and self._node.get_publishers_info_by_topic('/clock'):
            self._node.set_parameters([Parameter('use_sim_time', value=True)])
            self._simulated_time = True
            # Discovery may bring the clock after the first commands: what came on the time of day cannot be judged on it.
            self.heard.trajectories.clear()
            self.heard.states.clear()
            self._tell('/clock is published: stamps are judged on its time, and what came before is left out')

    def explain_silence(self) -> None:
        """Raises LiveTopicError where nothing was heard, with what there is instead."""
        if self.heard.trajectories:
            return
        kind = message_name(JointTrajectory)
        others = sorted(name for name, kinds in self._node.get_topic_names_and_types() if kind in kinds and name != self._topic)
        if self.is_published():
            raise LiveTopicError(f'{self._topic} has a publisher that sent nothing: is the sender active, not in dry run?')
        near = difflib.get_close_matches(self._topic, others, n=1, cutoff=0.3)
        hint = f'; did you mean {near[0]}?' if near else ''
        listed = f' Trajectories are on: {", ".join(others)}' if others else f' There is no topic of {kind} in this ROS_DOMAIN_ID.'
        raise LiveTopicError(f'nobody publishes {self._topic}{hint}{listed}')

    def _subscribe_to_state(self, name: str, kind: str) -> None:
        try:
            message_type = message_class(kind)
        except MessageTypeError as error:
            self._node.get_logger().warning(f'{name} is not read: {error}')
            self._subscribed[name] = None
            return
        self._subscribed[name] = self._node.create_subscription(message_type, name, partial(self._take_state, name), _LISTEN)

    def _take_trajectory(self, message: Any) -> None:
        now_ns = self._node.get_clock().now().nanoseconds
        if now_ns > 0:  # simulated time that has not begun has no place for it
            self.heard.trajectories.append((now_ns, message))

    def _take_state(self, name: str, message: Any) -> None:
        if not self.heard.trajectories or name not in self.heard.states:
            self.heard.states[name] = message
