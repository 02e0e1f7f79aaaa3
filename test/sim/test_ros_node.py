"""The simulator over real DDS: what arrives on the topics is a robot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np
import pytest
import rclpy
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_policy_ros.ros.controllers import ParameterReader
from vla_policy_ros.ros.inputs import controller_state_type
from vla_policy_ros.sim.mjcf import JOINT_NAMES
from vla_policy_ros.sim.requests import episode_request
from vla_policy_ros.sim.tasks import TASKS, Conditions
from vla_policy_ros.sim.world import TabletopWorld

LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TOPIC = '/joint_trajectory_controller/joint_trajectory'
SEED = 3


def seconds(stamp):
    return stamp.sec + stamp.nanosec * 1e-9


class Listener:
    """A node beside the simulator that keeps what it hears."""

    def __init__(self, domain):
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = Node('listener', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.heard, self.topics = defaultdict(list), []
        best_effort = QoSProfile(depth=20, reliability=ReliabilityPolicy.BEST_EFFORT)
        for camera in ('scene', 'wrist'):
            self._listen(Image, f'/{camera}_camera/image_raw', qos_profile_sensor_data)
            self._listen(CameraInfo, f'/{camera}_camera/camera_info', qos_profile_sensor_data)
        self._listen(Clock, '/clock', best_effort)
        self._listen(JointState, '/joint_states', best_effort)
        self._listen(controller_state_type(), '/joint_trajectory_controller/controller_state', best_effort)
        self._listen(String, '/simulator/status', LATCHED)
        self.trajectories = self.node.create_publisher(JointTrajectory, TOPIC, 1)
        self.instructions = self.node.create_publisher(String, '/instruction', LATCHED)
        self.reset = self.node.create_client(Trigger, '/simulator/reset')
        self.parameters = self.node.create_client(SetParameters, '/simulator/set_parameters')

    def _listen(self, kind, topic, qos):
        self.topics.append(topic)
        self.node.create_subscription(kind, topic, self.heard[topic].append, qos)

    def until(self, condition, timeout=20.0):
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, (
                f'waited {timeout} s; last status: {self.status() if self.heard["/simulator/status"] else None}'
            )
            self.executor.spin_once(timeout_sec=0.05)

    def hear_everything(self):
        """Forget what was heard, and wait until every topic has spoken."""
        for messages in self.heard.values():
            messages.clear()
        self.until(lambda: all(self.heard[topic] for topic in self.topics))

    def run_for(self, simulated_s):
        end = self.status()['simulated_s'] + simulated_s
        self.until(lambda: self.status()['simulated_s'] >= end)

    def status(self):
        return json.loads(self.heard['/simulator/status'][-1].data)

    def call(self, client, request):
        assert client.wait_for_service(timeout_sec=15.0)
        future = client.call_async(request)
        self.until(future.done)
        return future.result()

    def disable(self, *cameras):
        value = ParameterValue(type=ParameterType.PARAMETER_STRING_ARRAY, string_array_value=list(cameras))
        return self._set('disabled_cameras', value)

    def begin(self, episode):
        return self._set('episode', ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=episode))

    def _set(self, name, value):
        request = SetParameters.Request(parameters=[Parameter(name=name, value=value)])
        return self.call(self.parameters, request).results[0]

    def close(self):
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def start(*arguments):
    command = [sys.executable, '-m', 'vla_policy_ros.sim.ros_node', '--ros-args', *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def simulator(ros_domain, tmp_path):
    process = start('-p', f'seed:={SEED}', '-p', f'report_file:={tmp_path / "report.json"}')
    listener = Listener(ros_domain)
    try:
        listener.hear_everything()
        yield listener, process, tmp_path / 'report.json'
    finally:
        listener.close()
        process.kill()
        process.communicate()


def trajectory(names, positions, seconds_from_start, velocity=None):
    point = JointTrajectoryPoint(positions=list(positions))
    point.time_from_start.sec = int(seconds_from_start)
    point.time_from_start.nanosec = int(seconds_from_start % 1 * 1e9)
    if velocity is not None:
        point.velocities = [velocity] * len(positions)
    return JointTrajectory(joint_names=list(names), points=[point])


@pytest.mark.timeout(90)
def test_sensors_arrive_at_their_rates_with_simulated_stamps_and_true_calibration(simulator):
    listener, _, _ = simulator
    listener.hear_everything()
    before = listener.status()
    listener.run_for(3.0)
    after = listener.status()
    clock = [seconds(message.clock) for message in listener.heard['/clock']]
    span = clock[-1] - clock[0]
    assert span > 2.0 and np.diff(clock).min() > 0.0
    assert np.diff(clock).min() == pytest.approx(0.01, abs=1e-6)
    assert listener.status()['realtime_factor'] < 1.06

    world = TabletopWorld()
    world.reset(SEED)
    for camera in ('scene', 'wrist'):
        images = listener.heard[f'/{camera}_camera/image_raw']
        stamps = [seconds(image.header.stamp) for image in images]
        sent = after['images'][camera] - before['images'][camera]
        assert sent / (after['simulated_s'] - before['simulated_s']) == pytest.approx(15.0, abs=0.7), camera
        assert len(images) > 0.6 * sent, camera  # best effort: a busy listener may miss some
        assert 0.059 < np.diff(stamps).min() < 0.071
        assert clock[0] - 0.1 <= stamps[0] and stamps[-1] <= clock[-1] + 0.1
        image, info = images[-1], listener.heard[f'/{camera}_camera/camera_info'][-1]
        assert (image.height, image.width, image.encoding, image.step) == (480, 640, 'rgb8', 1920)
        assert len(image.data) == 480 * 1920 and image.header.frame_id == f'{camera}_optical_frame' == info.header.frame_id
        assert np.allclose(np.reshape(info.k, (3, 3)), world.intrinsics(camera)) and (info.height, info.width) == (480, 640)
        assert np.array_equal(np.reshape(info.p, (3, 4))[:, :3], np.reshape(info.k, (3, 3)))
        shown = np.frombuffer(image.data, np.uint8).reshape(480, 640, 3).astype(float)
        assert np.abs(shown - world.render(camera).rgb).mean() < 1.0, camera
    world.close()

    states = listener.heard['/joint_states']
    assert len(states) / span == pytest.approx(100.0, rel=0.4)
    assert list(states[-1].name) == list(JOINT_NAMES)
    assert len(states[-1].position) == len(states[-1].velocity) == len(states[-1].effort) == 7
    assert len(listener.heard['/joint_trajectory_controller/controller_state']) / span == pytest.approx(50.0, rel=0.4)


@pytest.mark.timeout(90)
def test_bad_trajectory_is_refused_with_the_reason_and_a_good_one_is_executed(simulator):
    listener, process, report_file = simulator
    listener.until(lambda: listener.trajectories.get_subscription_count() == 1)
    names, q = JOINT_NAMES, np.array(listener.heard['/joint_states'][-1].position)

    listener.trajectories.publish(trajectory([*names[:6], 'elbow'], q + 0.2, 1.0))
    listener.until(lambda: listener.status()['trajectories']['rejected'] == 1)
    assert "joint 'elbow' is not one of" in listener.status()['trajectories']['last_rejection']
    listener.run_for(0.5)
    assert np.abs(np.array(listener.heard['/joint_states'][-1].position) - q).max() < 2e-3

    listener.trajectories.publish(trajectory(names, q + 0.2, 1.0))
    listener.until(lambda: listener.status()['trajectories']['accepted'] == 1)
    listener.run_for(1.5)
    assert np.abs(np.array(listener.heard['/joint_states'][-1].position) - (q + 0.2)).max() < 3e-3
    status = listener.status()
    assert status['since_last_trajectory']['at_rest']
    assert status['commands']['max_step_rad'] > 0.001 and status['commands']['max_step_ratio'] <= 1.0
    state = listener.heard['/joint_trajectory_controller/controller_state'][-1]
    reference = state.position if isinstance(state, JointState) else state.reference.positions
    assert np.allclose(reference, q + 0.2, atol=2e-3)

    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=15) == 0
    report = json.loads(report_file.read_text())
    assert report['trajectories']['accepted'] == 1 and report['trajectories']['rejections'] == {'UNKNOWN_JOINT': 1}


@pytest.mark.timeout(90)
def test_controllers_tell_their_parameters_as_those_of_a_robot_do(simulator):
    listener, _, _ = simulator
    heard = {}
    for name in ('joint_trajectory_controller', 'controller_manager'):
        reader = ParameterReader(listener.node, f'/{name}', lambda parameter: parameter != 'use_sim_time')
        listener.until(lambda reader=reader: reader.poll() or reader.values is not None)
        heard[name] = reader.values
        reader.close()
    assert heard['controller_manager']['update_rate'] == 100
    values = heard['joint_trajectory_controller']
    assert values['joints'] == list(JOINT_NAMES)
    assert values['interpolate_from_desired_state'] is True and values['interpolation_method'] == 'splines'
    assert values['allow_nonzero_velocity_at_trajectory_end'] is False and values['constraints.goal_time'] == 0.0


@pytest.mark.timeout(90)
def test_instruction_reset_and_a_camera_that_dies_and_returns(simulator):
    listener, process, _ = simulator
    name = listener.status()['objects'][0]
    listener.instructions.publish(String(data=f'reach the {name}'))
    listener.until(lambda: listener.status()['target'] == name)
    assert 0.05 < listener.status()['distance_m'] < 1.0

    assert listener.disable('scene').successful
    listener.until(lambda: listener.status()['disabled_cameras'] == ['scene'])
    count = listener.status()['images']
    listener.run_for(0.5)
    later = listener.status()['images']
    assert later['scene'] == count['scene'] and later['wrist'] >= count['wrist'] + 5
    assert listener.disable('').successful
    listener.until(lambda: listener.status()['images']['scene'] > later['scene'])
    refused = listener.disable('nose')
    assert not refused.successful and 'scene, wrist' in refused.reason

    before = np.array(listener.heard['/joint_states'][-1].position)
    answer = listener.call(listener.reset, Trigger.Request())
    assert answer.success and answer.message.startswith('scene ')
    listener.until(lambda: listener.status()['seed'] != SEED)
    assert np.abs(np.array(listener.heard['/joint_states'][-1].position) - before).max() < 2e-3
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0


@pytest.mark.timeout(90)
def test_an_episode_is_begun_on_request_and_judged_in_the_report(simulator):
    listener, _, _ = simulator
    refused = listener.begin('{"task": "juggle", "seed": 1}')
    assert not refused.successful and 'choose among reach' in refused.reason
    assert listener.status()['episode'] is None and listener.status()['seed'] == SEED
    episode = TASKS['reach'].sample(99, Conditions())
    before = listener.status()['simulated_s']
    assert listener.begin(episode_request('reach', 99, Conditions())).successful
    listener.until(lambda: listener.status()['episode'] is not None)
    report = listener.status()
    assert report['seed'] == episode.scene.seed and report['objects'] == [spec.name for spec in episode.scene.objects]
    assert report['episode']['begun_s'] > before and report['simulated_s'] > before
    assert report['episode']['success'] is False and report['episode']['error'] > 0.03
    listener.hear_everything()
    assert np.abs(np.array(listener.heard['/joint_states'][-1].position) - episode.scene.start).max() < 2e-3
    stamps = [seconds(message.clock) for message in listener.heard['/clock']]
    assert all(np.diff(stamps) > 0.0), 'time goes on'


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ('argument', 'text'),
    [
        ('robot_file:=no_such_robot', 'no shipped robot of that name'),
        ('realtime_factor:=0.0', 'realtime_factor out of range'),
        ('report_file:=/no/such/folder/r.json', 'no folder'),
    ],
)
def test_a_start_that_cannot_succeed_says_why(ros_domain, argument, text):
    process = start('-p', argument)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 1 and text in errors and 'Traceback' not in errors, errors
