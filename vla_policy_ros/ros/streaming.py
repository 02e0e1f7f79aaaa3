"""Commands for controllers that execute single positions: the commanded motion, sampled once per controller period.

A forward_command_controller writes each message to the hardware as it arrives and holds the last one. So the motion that a
joint_trajectory_controller would interpolate from a trajectory is sampled here instead, braking and resting tail included. If the
node dies in the middle of a motion, the hardware is left with the last position: a stop without a deceleration.

Runs on the thread of the node's executor.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from std_msgs.msg import Float64MultiArray

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.robot import Controller
from vla_policy_ros.ros import qos
from vla_policy_ros.types import NS_PER_S

REST_NS = NS_PER_S


class CommandStream:
    """Streams one controller's part of a motion until it has rested for a second.

    Args:
        node: owns publisher and timer. The publisher is no lifecycle publisher: a deactivated node still has to brake.
        controller: names topic, joints and rate.
        live: the commanded motion, or None where there is none (any more).
        now: the node's time, ns.
    """

    def __init__(
        self, node: Node, controller: Controller, live: Callable[[], CommandedMotion | None], now: Callable[[], int]
    ) -> None:
        self.period_ns = round(NS_PER_S / controller.update_rate)
        self.held: NDArray[np.float64] | None = None
        self._node, self._joints, self._live, self._now = node, controller.joints, live, now
        self._motion: CommandedMotion | None = None
        self._time_ns = 0
        self._publisher = node.create_publisher(Float64MultiArray, controller.topic, qos.COMMAND)
        self._timer = node.create_timer(self.period_ns / NS_PER_S, self.step)
        self._timer.cancel()

    @property
    def running(self) -> bool:
        """Whether it streams."""
        return not self._timer.is_canceled()

    def wake(self) -> None:
        """The commanded motion has changed: stream it."""
        if not self.running:
            self._timer.reset()

    def go_on(self, elapsed_ns: int) -> bool:
        """Without the executor: publish what is due ``elapsed_ns`` after the last `step`. False once the motion rests."""
        if self._motion is None or not self.running:
            return False
        time_ns = self._time_ns + elapsed_ns
        self._publish(self._motion, time_ns)
        return not self._motion.at_rest(time_ns)

    def close(self) -> None:
        """Stream no more."""
        self._node.destroy_timer(self._timer)
        self._node.destroy_publisher(self._publisher)

    def step(self) -> None:
        """Publish what is due now, and end once that has been the same for a second. The timer calls it."""
        live = self._live()
        if live is not None:
            self._motion, self._time_ns = live, self._now()
        else:  # after a clock jump the old motion goes on to its end, as it does in a joint_trajectory_controller
            self._time_ns += self.period_ns
        if self._motion is None or self._motion.at_rest(self._time_ns - REST_NS):
            self._timer.cancel()
            return
        self._publish(self._motion, self._time_ns)

    def _publish(self, motion: CommandedMotion, time_ns: int) -> None:
        positions, _ = motion.sample(time_ns + self.period_ns)
        self.held = positions[[motion.names.index(joint) for joint in self._joints]]
        self._publisher.publish(Float64MultiArray(data=array('d', self.held.tobytes())))
