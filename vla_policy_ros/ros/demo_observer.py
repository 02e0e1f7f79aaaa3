"""The demo's ears and mouth on ROS: hears the policy node and the simulator, gives instructions, records everything.

Enters: topics. Leaves: the newest status and report, instructions, a bag. The node lives on one single-threaded executor in a
thread of its own; other threads read whole messages, which are never changed once they are there.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Log
from rcl_interfaces.srv import SetParameters
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from vla_policy_msgs.msg import ActionChunk, PolicyStatus
from vla_policy_ros.robot import Robot
from vla_policy_ros.ros import qos
from vla_policy_ros.ros.recorder import LATCHED, REPORTS, BagRecorder, RecordedTopic, robot_topics

STATUS_TOPIC = '/policy_node/status'
CHUNK_TOPIC = '/policy_node/chunk'
REPORT_TOPIC = '/simulator/status'


def recorded_topics(robot: Robot) -> list[RecordedTopic]:
    """Everything that explains a run: inputs, commands, previews, and what node and simulator say about themselves."""
    return [
        *robot_topics(robot),
        RecordedTopic(CHUNK_TOPIC, ActionChunk, REPORTS),
        RecordedTopic(STATUS_TOPIC, PolicyStatus, LATCHED),
        RecordedTopic(REPORT_TOPIC, String, LATCHED),
        RecordedTopic('/diagnostics', DiagnosticArray, REPORTS),
        RecordedTopic('/rosout', Log, REPORTS),
        *(RecordedTopic(f'/policy_node/preview/{name}', JointTrajectory, REPORTS) for name in robot.controllers),
    ]


class DemoObserver:
    """The node ``demo`` on a thread of its own, from construction to `close`. Use it as a context manager.

    Attributes:
        status: the newest PolicyStatus, or None.
        report: the newest report of the simulator, or None.
    """

    def __init__(self, robot: Robot) -> None:
        # Signals stay with the main thread, which decides in which order things stop.
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        self.status: Any = None
        self.report: dict[str, Any] | None = None
        overrides = [Parameter('use_sim_time', value=True)]
        self._node = rclpy.create_node('demo', parameter_overrides=overrides)
        self._instructions = self._node.create_publisher(String, robot.instruction.topic, qos.LATCHED)
        self._node.create_subscription(PolicyStatus, STATUS_TOPIC, self._on_status, qos.LATCHED)
        self._node.create_subscription(String, REPORT_TOPIC, self._on_report, qos.LATCHED)
        self._stop = self._node.create_client(Trigger, '/policy_node/stop')
        self._set_parameters = self._node.create_client(SetParameters, '/simulator/set_parameters')
        self._robot = robot
        self._recorder: BagRecorder | None = None
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name='demo observer', daemon=True)
        self._thread.start()

    def __enter__(self) -> DemoObserver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def record(self, bag: Path) -> None:
        """Begin to record into a new bag at ``bag``."""
        self._recorder = BagRecorder(self._node, bag, recorded_topics(self._robot))

    def unheard(self) -> list[str]:
        """The camera topics of which the recorder has not heard a message yet."""
        cameras = [camera.topic for camera in self._robot.cameras.values()]
        counts = {} if self._recorder is None else self._recorder.counts
        return [topic for topic in cameras if topic not in counts and f'{topic}/compressed' not in counts]

    def instruct(self, instruction: str) -> None:
        """Give an instruction, as any operator would: on the robot's instruction topic."""
        self._instructions.publish(String(data=instruction))

    def set_realtime_factor(self, factor: float) -> None:
        """Ask the simulator to run at most this many simulated seconds per wall second, without waiting for its answer."""
        parameter = Parameter('realtime_factor', value=factor).to_parameter_msg()
        self._set_parameters.call_async(SetParameters.Request(parameters=[parameter]))

    def request_stop(self, patience: float = 5.0) -> bool:
        """Ask the policy node for a soft stop; whether it answered within ``patience`` seconds."""
        if not self._stop.service_is_ready():
            return False
        answered = threading.Event()
        self._stop.call_async(Trigger.Request()).add_done_callback(lambda _: answered.set())
        return answered.wait(patience)

    def wait_until_stopped(self, patience: float = 5.0) -> None:
        """Wait until the node says STOPPED and its last trajectory has ended, at most ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if self.status is not None and self.status.state == PolicyStatus.STOPPED and self.status.commanded_until == 0.0:
                return
            time.sleep(0.05)

    def close(self) -> None:
        """Finish the bag and leave ROS; a second call does nothing."""
        if self._recorder is not None:
            self._recorder.close()
        if self._thread.is_alive():
            self._executor.shutdown(timeout_sec=2.0)
            rclpy.try_shutdown()
            self._thread.join(2.0)

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def _on_status(self, message: PolicyStatus) -> None:
        self.status = message

    def _on_report(self, message: String) -> None:
        self.report = json.loads(message.data)
