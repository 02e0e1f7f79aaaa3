"""A robot on DDS for tests of the policy node: sensors, a controller's node with its parameters, and what it hears.

Everything is spun by the test's own thread, the policy node included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_srvs.srv import Trigger

from vla_policy_msgs.msg import PolicyStatus
from vla_policy_msgs.srv import SetInstruction
from vla_policy_ros.control.jtc_rules import ControllerParameters
from vla_policy_ros.robot import Robot
from vla_policy_ros.ros import qos
from vla_policy_ros.ros.messages import to_time
from vla_policy_ros.ros.policy_node import PolicyNode

HEIGHT, WIDTH = 48, 64


class FakeRobot:
    """Sensors of ``robot`` in wall time. ``positions`` are what the joint states report.

    The camera is K = 60 px; images change all the time.
    """

    def __init__(self, robot: Robot) -> None:
        self.robot = robot
        self.context = rclpy.Context()
        self.context.init()
        self.executor = SingleThreadedExecutor(context=self.context)
        self.node = self.add(Node('fake_robot', context=self.context))
        self.positions = np.array([np.mean(robot.limits[joint].position) for joint in robot.state.joints])
        self.statuses: list[PolicyStatus] = []
        self.told: list[str] = []
        self.policy: PolicyNode | None = None
        self._nodes = [self.node]
        self._images = {}
        for name, camera in robot.cameras.items():
            self._images[name] = (
                self.node.create_publisher(Image, camera.topic, qos.SENSOR),
                self.node.create_publisher(CameraInfo, camera.camera_info, qos.SENSOR),
            )
        self._states = self.node.create_publisher(JointState, robot.state.topic, qos.STATE)
        self.node.create_subscription(PolicyStatus, '/policy_node/status', self.statuses.append, qos.LATCHED)
        self.node.create_timer(0.1, self._publish_images)
        self.node.create_timer(0.02, self._publish_state)

    def add(self, node: Any) -> Any:
        """Spin ``node`` too."""
        self.executor.add_node(node)
        return node

    def add_controller(self, name: str = 'arm', spun: bool = True, **changes: Any) -> Node:
        """The node of a joint_trajectory_controller with the parameters that a real one has, ``changes`` applied."""
        controller = self.robot.controllers[name]
        assert controller.parameter_node is not None
        node = Node(controller.parameter_node.lstrip('/'), context=self.context)
        self._nodes.append(node)
        if controller.type == 'forward_command':
            for parameter, value in ({'joints': list(controller.joints), 'interface_name': 'position'} | changes).items():
                node.declare_parameter(parameter, value)
            return self.add(node)
        safe = ControllerParameters(controller.joints)
        values: dict[str, Any] = {
            'joints': list(controller.joints),
            'command_interfaces': ['position'],
            'interpolate_from_desired_state': True,
            'constraints.goal_time': 0.0,
            **{field: getattr(safe, field) for field in ('allow_partial_joints_goal', 'interpolation_method', 'cmd_timeout')},
        }
        for parameter, value in (values | changes).items():
            node.declare_parameter(parameter, value)
        return self.add(node) if spun else node

    def start_policy(self, folder: Path, checkpoint: Path, **parameters: Any) -> PolicyNode:
        """The policy node with this robot; what it tells the operator is in ``told``."""
        robot_file = folder / 'robot.yaml'
        robot_file.write_text(self.robot.model_dump_json())  # JSON is YAML
        given = {'robot_file': str(robot_file), 'checkpoint': str(checkpoint), **parameters}
        overrides = [Parameter(name, value=value) for name, value in given.items()]
        self.policy = PolicyNode(context=self.context, parameter_overrides=overrides)
        tell = self.policy._log.tell

        def remember(sentence: str | None, *, warn: bool = True) -> None:
            if sentence:
                self.told.append(sentence)
            tell(sentence, warn=warn)

        self.policy._log.tell = remember  # type: ignore[method-assign]
        return self.add(self.policy)

    def spin_until(self, condition: Callable[[], Any], patience: float = 20.0) -> None:
        """Spin until ``condition``, or fail with what the node said."""
        deadline = time.monotonic() + patience
        while not condition():
            self.executor.spin_once(timeout_sec=0.02)
            assert time.monotonic() < deadline, f'waited {patience} s; status: {self.statuses[-1:]}, told: {self.told}'

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.spin_until(lambda: time.monotonic() >= end, seconds + 20.0)

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, f'/policy_node/{name}')
        self.spin_until(client.service_is_ready)
        future = client.call_async(request)
        self.spin_until(future.done)
        return future.result()

    def instruct(self, text: str = 'go') -> None:
        assert self.call(SetInstruction, 'set_instruction', SetInstruction.Request(instruction=text)).success

    def trigger(self, name: str) -> Trigger.Response:
        return self.call(Trigger, name, Trigger.Request())

    def wait_for_state(self, name: str) -> None:
        self.spin_until(lambda: self.statuses and self.statuses[-1].state_name == name)

    def close(self) -> None:
        if self.policy is not None:
            self.policy.brake_and_release()
            self.policy.destroy_node()
        for node in self._nodes:
            node.destroy_node()
        self.executor.shutdown()
        self.context.shutdown()

    def _publish_images(self) -> None:
        stamp = self.node.get_clock().now().nanoseconds
        pixels = np.random.default_rng(stamp).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        image = Image(height=HEIGHT, width=WIDTH, encoding='rgb8', step=3 * WIDTH, data=pixels.tobytes())
        info = CameraInfo(height=HEIGHT, width=WIDTH, k=[60.0, 0.0, WIDTH / 2, 0.0, 60.0, HEIGHT / 2, 0.0, 0.0, 1.0])
        image.header.stamp = info.header.stamp = to_time(stamp)
        for publisher, info_publisher in self._images.values():
            publisher.publish(image)
            info_publisher.publish(info)

    def _publish_state(self) -> None:
        message = JointState(name=list(self.robot.state.joints), position=self.positions.tolist())
        message.header.stamp = self.node.get_clock().now().to_msg()
        self._states.publish(message)
