"""The ears and the hand of an evaluation over ROS: what a demo hears, and asking for episodes and motion.

Enters: topics. Leaves: episodes asked of the simulator, instructions, stop and reset of the policy node. Threads as in
`demo_observer`.
"""

from __future__ import annotations

import threading
from typing import Any

from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from vla_policy_ros.robot import Robot
from vla_policy_ros.ros.demo_observer import DemoObserver


class EvaluationObserver(DemoObserver):
    """A `DemoObserver` that also lays out episodes and lets the policy node go on."""

    def __init__(self, robot: Robot) -> None:
        super().__init__(robot)
        self._reset = self._node.create_client(Trigger, '/policy_node/reset')

    def __enter__(self) -> EvaluationObserver:
        return self

    @property
    def time_ns(self) -> int:
        """Simulated time, ns; 0 before it has begun."""
        return int(self._node.get_clock().now().nanoseconds)

    def ask_for_episode(self, request: str, patience: float = 10.0) -> str:
        """Have the simulator begin an episode (`sim.requests`). Returns why it does not, or ''."""
        parameter = Parameter('episode', value=request).to_parameter_msg()
        answer = self._answer(self._set_parameters, SetParameters.Request(parameters=[parameter]), patience)
        if answer is None:
            return f'the simulator has not answered within {patience:g} s'
        return '' if answer.results[0].successful else str(answer.results[0].reason)

    def resume(self, patience: float = 10.0) -> str:
        """Let the policy node go on after a stop. Returns why it does not, or ''."""
        answer = self._answer(self._reset, Trigger.Request(), patience)
        if answer is None:
            return f'the policy node has not answered within {patience:g} s'
        return '' if answer.success else str(answer.message)

    def _answer(self, client: Any, request: Any, patience: float) -> Any:
        """The answer of a service, or None where there is none in time."""
        if not client.service_is_ready():
            return None
        answered = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: answered.set())
        return future.result() if answered.wait(patience) else None
