"""The node ``simulator``: the simulated robot on ROS 2 topics, with the names that the robot file gives them.

Enters: trajectories for the controllers, the instruction. Leaves: ``/clock``, images with camera info, joint states, controller
states, and a JSON report on ``~/status``. One thread does everything: a single-threaded executor is spun in the pauses of the
control loop. Simulated time follows the wall clock times ``realtime_factor`` and never runs ahead of it; on a machine that is
too slow it falls behind, and nothing else changes, because every cycle steps the physics by the same period.
"""

from __future__ import annotations

import array
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import rclpy
from builtin_interfaces.msg import Time
from rcl_interfaces.msg import FloatingPointRange, ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMessage

from vla_policy_ros.control.jtc import TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.resources import ResourceError, robot_path
from vla_policy_ros.robot import RobotFileError, load_robot
from vla_policy_ros.sim.controller import SimulatedRobot
from vla_policy_ros.sim.dataset import RobotMismatch, check_task
from vla_policy_ros.sim.engine import RenderError
from vla_policy_ros.sim.requests import requested_episode
from vla_policy_ros.sim.tasks import Episode, Task
from vla_policy_ros.types import NS_PER_S, CameraView

try:
    from control_msgs.msg import JointTrajectoryControllerState
except ImportError:  # not among the ROS 2 wheels; a JointState carries what a planner needs of it
    JointTrajectoryControllerState = None

RELIABLE = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
CLOCK = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)

# A pause longer than this is not caught up by running faster than the wall clock: simulated time then stays behind.
MAX_CATCH_UP_NS = 50_000_000


# Parameters of the emulated controllers that their nodes offer under the same name.
_CONTROLLER_PARAMETERS = (
    'interpolate_from_desired_state',
    'allow_partial_joints_goal',
    'allow_nonzero_velocity_at_trajectory_end',
    'allow_integration_in_goal_trajectories',
    'interpolation_method',
    'cmd_timeout',
)


class SimulatorError(RuntimeError):
    """The node cannot start as it is configured; the message names the parameter and the remedy."""


class SimulatorNode(Node):
    """The node. Construct it, then call `run` on the same thread.

    Raises:
        SimulatorError, RobotFileError, ResourceError, RobotMismatch: a parameter or the robot file cannot be used.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__('simulator', **arguments)
        self._declare_parameters()
        robot = load_robot(robot_path(self._value('robot_file')))
        compressed = [name for name, camera in robot.cameras.items() if camera.transport != 'raw']
        if compressed:
            raise SimulatorError(f'the simulator publishes raw images only: set transport: raw for camera {", ".join(compressed)}')
        streamed = [name for name, controller in robot.controllers.items() if controller.type != 'joint_trajectory']
        if streamed:
            raise SimulatorError(
                f'the simulator has trajectory controllers only: set type: joint_trajectory for {", ".join(streamed)}'
            )
        self.robot = SimulatedRobot(
            robot, self._value('seed'), interpolate_from_desired_state=self._value('interpolate_from_desired_state')
        )
        report_folder = Path(self._value('report_file')).absolute().parent
        if not report_folder.is_dir():
            raise SimulatorError(f'report_file: there is no folder {report_folder}; make it or name another file')
        self.images = dict.fromkeys(robot.camera_names, 0)
        self._wall = Clock(clock_type=ClockType.STEADY_TIME)
        self._real_time_factor = 0.0
        self._stopped = False
        self._asked: tuple[Task, Episode] | None = None
        self._due = {'images': 0, 'joint_states': 0, 'controller_states': 0, 'status': 0}
        self._periods = {
            'images': NS_PER_S / self._value('camera_rate'),
            'joint_states': NS_PER_S / self._value('joint_state_rate'),
            'controller_states': NS_PER_S / 50.0,
            'status': NS_PER_S / 10.0,
        }
        self._create_interfaces()
        self.controller_nodes = [self._controller_node(name) for name in robot.controllers]
        self.controller_nodes += [self._manager_node(namespace) for namespace in {n.get_namespace() for n in self.controller_nodes}]
        self.add_on_set_parameters_callback(self._check_parameters)
        self.get_logger().info(self._describe_scene())

    # -- parameters -----------------------------------------------------------------------------------------------------------

    def _declare_parameters(self) -> None:
        def declare(name: str, default: Any, text: str, low: float | None = None, high: float = 0.0, **options: Any) -> None:
            ranges = [] if low is None else [FloatingPointRange(from_value=low, to_value=high)]
            options.setdefault('read_only', True)
            descriptor = ParameterDescriptor(description=text, floating_point_range=ranges, **options)
            self.declare_parameter(name, default, descriptor)

        declare('robot_file', 'tabletop', 'Path of a robot file, or the name of a shipped one.')
        declare('seed', 0, 'Seed of the first scene.')
        declare('realtime_factor', 1.0, 'Simulated seconds per wall second, at most.', 0.01, 100.0, read_only=False)
        declare('camera_rate', 15.0, 'Images per simulated second and camera, Hz.', 0.1, 100.0)
        declare('joint_state_rate', 100.0, 'Joint states per simulated second, Hz.', 1.0, 500.0)
        declare('interpolate_from_desired_state', True, 'Parameter of that name of the emulated controllers.')
        declare('report_file', '', 'JSON file that the report is written to at shutdown; empty for none.')
        text = 'JSON with task, seed and conditions: begin that episode; what commands the arm must be stopped. Empty for none.'
        declare('episode', '', text, read_only=False)
        # An empty list has no element type in a parameter file or on a command line, hence the dynamic type and the empty name.
        text = 'Cameras that publish nothing, by their name in the robot file; change it to make one fail or return.'
        declare('disabled_cameras', [''], text, read_only=False, dynamic_typing=True)

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _disabled(self) -> set[str]:
        return {name for name in self._value('disabled_cameras') or () if name}

    def _check_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        asked = None
        for parameter in parameters:
            if parameter.name == 'episode' and parameter.value:
                try:
                    asked = requested_episode(parameter.value)
                    check_task(asked[0], self.robot.robot)
                except ValueError as error:
                    return SetParametersResult(successful=False, reason=f'episode: {error}')
            if parameter.name != 'disabled_cameras':
                continue
            value = parameter.value
            unknown = [] if value is None else [str(name) for name in value if name and name not in self.images]
            if isinstance(value, (str, int, float)) or unknown:
                return SetParametersResult(
                    successful=False,
                    reason=f'disabled_cameras: {value!r} must be a list of camera names out of {", ".join(self.images)}',
                )
        self._asked = asked or self._asked
        return SetParametersResult(successful=True)

    # -- interfaces -----------------------------------------------------------------------------------------------------------

    def _create_interfaces(self) -> None:
        robot = self.robot.robot
        self._clock_publisher = self.create_publisher(ClockMessage, '/clock', CLOCK)
        self._image_publishers, self._info_publishers = {}, {}
        for name, camera in robot.cameras.items():
            self._image_publishers[name] = self.create_publisher(Image, camera.topic, qos_profile_sensor_data)
            if camera.camera_info:
                self._info_publishers[name] = self.create_publisher(CameraInfo, camera.camera_info, qos_profile_sensor_data)
        self._joint_publisher = self.create_publisher(JointState, robot.state.topic, RELIABLE)
        self._controller_publishers = {}
        for name, controller in robot.controllers.items():
            if controller.state_topic:
                kind = JointTrajectoryControllerState or JointState
                self._controller_publishers[name] = self.create_publisher(kind, controller.state_topic, RELIABLE)
            self.create_subscription(
                JointTrajectoryMessage, controller.topic, lambda message, name=name: self._on_trajectory(name, message), RELIABLE
            )
        if self._controller_publishers and JointTrajectoryControllerState is None:
            self.get_logger().info('control_msgs is not installed: controller states are published as sensor_msgs/JointState')
        # A latched subscription does not match a volatile publisher, and a volatile one misses what was latched.
        for profile in (LATCHED, RELIABLE):
            self.create_subscription(String, robot.instruction.topic, self._on_instruction, profile)
        self._status_publisher = self.create_publisher(String, '~/status', LATCHED)
        self.create_service(Trigger, '~/reset', self._on_reset)

    def _controller_node(self, name: str) -> Node:
        """The node of a controller, which on a robot lives in the controller manager, with the parameters that it runs with."""
        node = self._sub_node(self.resolve_topic_name(self.robot.robot.controllers[name].parameter_node or name))
        parameters = self.robot.controllers[name].parameters
        values = {field: getattr(parameters, field) for field in _CONTROLLER_PARAMETERS}
        for parameter, value in (
            values | {'joints': list(parameters.joints), 'constraints.goal_time': parameters.goal_time}
        ).items():
            node.declare_parameter(parameter, value, ParameterDescriptor(read_only=True))
        return node

    def _manager_node(self, namespace: str) -> Node:
        """The controller manager of the controllers in ``namespace``."""
        node = self._sub_node(f'{namespace.rstrip("/")}/controller_manager')
        node.declare_parameter('update_rate', round(NS_PER_S / self.robot.period_ns), ParameterDescriptor(read_only=True))
        return node

    def _sub_node(self, name: str) -> Node:
        """A node of this process that has the full name ``name`` whatever the command line says about this one."""
        namespace, _, base = name.rpartition('/')
        return Node(base, namespace=namespace or '/', context=self.context, use_global_arguments=False, enable_rosout=False)

    def _on_trajectory(self, controller: str, message: JointTrajectoryMessage) -> None:
        acceptance = self.robot.receive(controller, from_message(message))
        if not acceptance.accepted:
            self.get_logger().warning(f'controller {controller}: trajectory {acceptance.reason}', throttle_duration_sec=1.0)

    def _on_instruction(self, message: String) -> None:
        if message.data == self.robot.instruction:
            return
        target = self.robot.set_instruction(message.data)
        named = f'names the {target.object.name}' if target.object else f'names no target: {target.reason}'
        self.get_logger().info(f'instruction {message.data!r} {named}')

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.robot.lay_out_next_scene()
        response.success, response.message = True, self._describe_scene()
        self.get_logger().info(response.message)
        return response

    def _describe_scene(self) -> str:
        scene = self.robot.world.scene
        return f'scene {scene.seed}: {", ".join(spec.name for spec in scene.objects)}'

    # -- the loop -------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Tick, publish and serve until `stop`."""
        executor = SingleThreadedExecutor(context=self.context)
        for node in (self, *self.controller_nodes):
            executor.add_node(node)
        due_ns = self._wall.now().nanoseconds
        measured_from = (due_ns, self.robot.time_ns)
        try:
            while not self._stopped:
                if self._asked is not None:
                    self.robot.begin_episode(*self._asked)
                    self._asked = None
                    self.get_logger().info(self._describe_scene())
                self.publish()
                self.robot.tick()
                now_ns = self._wall.now().nanoseconds
                pause_ns = round(self.robot.period_ns / self._value('realtime_factor'))
                due_ns = max(due_ns + pause_ns, now_ns - MAX_CATCH_UP_NS)
                executor.spin_once(timeout_sec=0.0)
                while not self._stopped and (left_ns := due_ns - self._wall.now().nanoseconds) > 0:
                    executor.spin_once(timeout_sec=left_ns / NS_PER_S)
                if now_ns - measured_from[0] > NS_PER_S:
                    self._real_time_factor = (self.robot.time_ns - measured_from[1]) / (now_ns - measured_from[0])
                    measured_from = (now_ns, self.robot.time_ns)
        finally:
            executor.shutdown()

    def destroy_node(self) -> None:
        """Destroy the nodes of the controllers too."""
        for node in self.controller_nodes:
            node.destroy_node()
        super().destroy_node()

    def stop(self) -> None:
        """Make `run` return after the present tick. Any thread, and signal handlers."""
        self._stopped = True

    def publish(self) -> None:
        """Publish the clock, and whatever else is due at the present simulated time."""
        stamp = stamp_of(self.robot.time_ns)
        self._clock_publisher.publish(ClockMessage(clock=stamp))
        if self._is_due('joint_states'):
            self._publish_joint_state(stamp)
        if self._is_due('controller_states'):
            self._publish_controller_states(stamp)
        if self._is_due('images'):
            disabled = self._disabled()
            for name in self.images:
                if name not in disabled:
                    self._publish_image(name, stamp)
        if self._is_due('status'):
            self._status_publisher.publish(String(data=json.dumps(self.report())))

    def _is_due(self, what: str) -> bool:
        """Whether it is time for ``what``; its schedule keeps the average rate though times fall on whole ticks."""
        now_ns = self.robot.time_ns
        if now_ns < self._due[what]:
            return False
        self._due[what] = max(self._due[what] or now_ns, now_ns - round(self._periods[what])) + round(self._periods[what])
        return True

    def _publish_joint_state(self, stamp: Time) -> None:
        positions, velocities = self.robot.world.joint_state()
        message = JointState(name=list(self.robot.world.joint_names))
        message.header.stamp = stamp
        message.position = doubles(positions)
        message.velocity = doubles(velocities)
        message.effort = doubles(self.robot.world.joint_efforts())
        self._joint_publisher.publish(message)

    def _publish_controller_states(self, stamp: Time) -> None:
        for name, publisher in self._controller_publishers.items():
            command = self.robot.commands.get(name)
            if command is None:
                continue
            # The reference belongs to the update that computed it, one period before the present time.
            when, joints = stamp_of(command.stamp_ns), list(self.robot.robot.controllers[name].joints)
            positions, velocities = doubles(command.reference_positions), doubles(command.reference_velocities)
            if JointTrajectoryControllerState is None:
                message = JointState(name=joints, position=positions, velocity=velocities)
            else:
                message = JointTrajectoryControllerState(joint_names=joints)
                message.reference.positions, message.reference.velocities = positions, velocities
                columns = self.robot.columns[name]
                measured, speeds = self.robot.world.joint_state()
                message.feedback.positions, message.feedback.velocities = doubles(measured[columns]), doubles(speeds[columns])
                message.output.positions = doubles(command.positions)
                message.output.velocities = doubles(command.velocities)
            message.header.stamp = when
            publisher.publish(message)

    def _publish_image(self, name: str, stamp: Time) -> None:
        view = self.robot.render(name)
        frame = f'{name}_optical_frame'
        self._image_publishers[name].publish(image_message(view, stamp, frame))
        if name in self._info_publishers:
            self._info_publishers[name].publish(camera_info_message(view, stamp, frame))
        self.images[name] += 1

    # -- report ---------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The robot's report, with what the node adds: images per camera, cameras switched off, the real-time factor."""
        extra = {
            'images': self.images,
            'disabled_cameras': sorted(self._disabled()),
            'realtime_factor': round(self._real_time_factor, 3),
        }
        return self.robot.report() | extra

    def write_report(self) -> None:
        """Write the report to ``report_file``, if one is named. Raises OSError where it cannot be written."""
        path = self._value('report_file')
        if path:
            text = json.dumps(self.report(), indent=2)
            part = Path(f'{path}.part')
            part.write_text(text, encoding='utf-8')
            os.replace(part, path)


def stamp_of(time_ns: int) -> Time:
    """builtin_interfaces/Time of a time in ns."""
    return Time(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def doubles(values: Any) -> array.array[float]:
    """A float64 array as the array type that message fields take without a per-element check."""
    return array.array('d', values.tobytes())


def from_message(message: JointTrajectoryMessage) -> TrajectoryMessage:
    """The controller's form of a trajectory_msgs/JointTrajectory."""
    points = [
        TrajectoryPoint(
            point.time_from_start.sec * NS_PER_S + point.time_from_start.nanosec,
            point.positions,
            point.velocities,
            point.accelerations,
            point.effort,
        )
        for point in message.points
    ]
    stamp = message.header.stamp
    return TrajectoryMessage(tuple(message.joint_names), points, stamp.sec * NS_PER_S + stamp.nanosec)


def image_message(view: CameraView, stamp: Time, frame_id: str) -> Image:
    """sensor_msgs/Image, rgb8, of a view."""
    height, width, channels = view.rgb.shape
    message = Image(height=height, width=width, encoding='rgb8', is_bigendian=0, step=width * channels)
    message.header.stamp, message.header.frame_id = stamp, frame_id
    data = array.array('B')
    data.frombytes(view.rgb.data.cast('B'))
    message.data = data
    return message


def camera_info_message(view: CameraView, stamp: Time, frame_id: str) -> CameraInfo:
    """sensor_msgs/CameraInfo of a view without distortion."""
    assert view.K is not None
    message = CameraInfo(height=view.rgb.shape[0], width=view.rgb.shape[1], distortion_model='plumb_bob')
    message.header.stamp, message.header.frame_id = stamp, frame_id
    message.d = [0.0] * 5
    message.k = view.K.ravel()
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    rows = view.K.tolist()
    message.p = [value for row in rows for value in (*row, 0.0)]
    return message


def main(args: list[str] | None = None) -> int:
    """Run the simulator until it is interrupted; 1 where it cannot start. Call it on the main thread."""
    # rclpy's own handlers would invalidate the context in the middle of a tick; ours let the tick end.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    node = None
    try:
        node = SimulatorNode()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: node.stop())
        node.run()
    except (SimulatorError, RobotFileError, ResourceError, RobotMismatch, RenderError, ParameterException) as error:
        print(f'simulator: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the handlers were there
        return 0
    finally:
        if node is not None:
            node.write_report()
            node.robot.world.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
