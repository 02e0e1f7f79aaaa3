"""Recorder and player over real DDS: what goes in comes out, with its bytes, its pace and its quality of service."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from builtin_interfaces.msg import Time
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rosbags.highlevel import AnyReader
from rosbags.interfaces import QosDurability, QosReliability
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Header, String
from trajectory_msgs.msg import JointTrajectory

from vla_policy_msgs.msg import InputStatus, PolicyStatus
from vla_policy_ros.observation.images import decode_compressed
from vla_policy_ros.ros import qos
from vla_policy_ros.ros.bag_player import PlaybackError, played_connections
from vla_policy_ros.ros.bag_qos import from_bag_qos, to_bag_qos
from vla_policy_ros.ros.message_types import MessageTypeError, message_class, message_name, typestore_for
from vla_policy_ros.ros.recorder import BagRecorder, RecordedTopic, compress
from vla_policy_ros.types import NS_PER_S

ROOT = Path(__file__).resolve().parents[2]
PLAYER = [sys.executable, '-m', 'vla_policy_ros.ros.bag_player']


class Ros:
    """One node on its own context and domain, spun by the test."""

    def __init__(self, domain: int) -> None:
        self.domain = domain
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.nodes: list[Any] = []

    def node(self, name: str, use_sim_time: bool = False) -> Any:
        overrides = [Parameter('use_sim_time', value=use_sim_time)]
        node = rclpy.create_node(name, context=self.context, parameter_overrides=overrides)
        self.executor.add_node(node)
        self.nodes.append(node)
        return node

    def spin_until(self, condition: Callable[[], bool], seconds: float = 15.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            self.executor.spin_once(timeout_sec=0.05)
        return condition()

    def close(self) -> None:
        for node in self.nodes:
            self.executor.remove_node(node)
            node.destroy_node()
        self.executor.shutdown()
        self.context.shutdown()


@pytest.fixture
def ros(ros_domain: int) -> Iterator[Ros]:
    ros = Ros(ros_domain)
    yield ros
    ros.close()


def picture() -> Image:
    """A 64x48 rgb8 image, smooth so that JPEG keeps it, with padded rows."""
    ramp = np.zeros((48, 64, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(64) * 3
    ramp[..., 2] = 200
    padded = np.zeros((48, 200), dtype=np.uint8)
    padded[:, :192] = ramp.reshape(48, 192)
    return Image(
        header=Header(stamp=Time(sec=3, nanosec=4), frame_id='lens'),
        height=48,
        width=64,
        encoding='rgb8',
        step=200,
        data=padded.tobytes(),
    )


@pytest.fixture
def recorded(ros: Ros, tmp_path: Path) -> Path:
    """A bag of one second: status, image, latched instruction, joint states and a command, made by the recorder."""
    sender = ros.node('sender')
    publishers = {
        '/status': sender.create_publisher(PolicyStatus, '/status', qos.REPORT),
        '/image': sender.create_publisher(Image, '/image', qos.SENSOR),
        '/instruction': sender.create_publisher(String, '/instruction', qos.LATCHED),
        '/joints': sender.create_publisher(JointState, '/joints', qos.REPORT),
        '/command': sender.create_publisher(JointTrajectory, '/command', qos.COMMAND),
    }
    types = {'/status': PolicyStatus, '/image': Image, '/instruction': String, '/joints': JointState, '/command': JointTrajectory}
    profiles = {'/image': qos.SENSOR, '/instruction': qos.LATCHED}
    recorder = BagRecorder(
        ros.node('recorder'), tmp_path / 'bag', [RecordedTopic(t, types[t], profiles.get(t, qos.REPORT)) for t in types]
    )
    assert ros.spin_until(lambda: all(publisher.get_subscription_count() == 1 for publisher in publishers.values()))
    publishers['/instruction'].publish(String(data='grüße den roten Würfel'))
    publishers['/command'].publish(JointTrajectory(joint_names=['a']))
    for step in range(10):
        publishers['/status'].publish(PolicyStatus(chunks=step, inputs=[InputStatus(name='state', rate=5.5)]))
        publishers['/image'].publish(picture())
        publishers['/joints'].publish(JointState(name=['a', 'b'], position=[float(step), -1.0]))
        ros.spin_until(lambda: False, 0.1)
    recorder.close()
    recorder.close()
    return tmp_path / 'bag'


def contents(bag: Path) -> dict[str, list[tuple[int, Any]]]:
    with AnyReader([bag]) as reader:
        found: dict[str, list[tuple[int, Any]]] = {}
        for connection, time_ns, raw in reader.messages():
            found.setdefault(connection.topic, []).append((time_ns, reader.deserialize(raw, connection.msgtype)))
        return found


@pytest.mark.dds
def test_a_recorded_bag_has_our_messages_with_their_definitions(recorded: Path) -> None:
    messages = contents(recorded)
    statuses = [message for _, message in messages['/status']]
    assert [status.chunks for status in statuses] == list(range(10))
    assert statuses[0].inputs[0].name == 'state' and statuses[0].inputs[0].rate == 5.5
    assert messages['/instruction'][0][1].data == 'grüße den roten Würfel'
    np.testing.assert_array_equal(messages['/joints'][4][1].position, [4.0, -1.0])


@pytest.mark.dds
def test_raw_images_are_stored_as_jpeg_with_their_header(recorded: Path) -> None:
    messages = contents(recorded)
    assert '/image' not in messages
    _, stored = messages['/image/compressed'][0]
    assert (stored.header.stamp.sec, stored.header.stamp.nanosec, stored.header.frame_id) == (3, 4, 'lens')
    rgb = decode_compressed(stored)
    assert rgb.shape == (48, 64, 3)
    expected = np.zeros((48, 64, 3))
    expected[..., 0], expected[..., 2] = np.arange(64) * 3, 200
    assert np.abs(rgb - expected).mean() < 3.0


@pytest.mark.dds
def test_a_bag_remembers_what_its_publishers_offered(recorded: Path) -> None:
    with AnyReader([recorded]) as reader:
        offered = {connection.topic: connection.ext.offered_qos_profiles[0] for connection in reader.connections}  # type: ignore[union-attr]
    assert offered['/instruction'].durability == QosDurability.TRANSIENT_LOCAL
    assert offered['/image/compressed'].reliability == QosReliability.BEST_EFFORT
    assert offered['/status'].reliability == QosReliability.RELIABLE


@pytest.mark.dds
def test_a_recorder_on_simulated_time_waits_for_the_clock(ros: Ros, tmp_path: Path) -> None:
    sender = ros.node('sender')
    joints, clock = sender.create_publisher(JointState, '/joints', qos.REPORT), sender.create_publisher(Clock, '/clock', 10)
    recorder = BagRecorder(
        ros.node('recorder', use_sim_time=True), tmp_path / 'bag', [RecordedTopic('/joints', JointState, qos.REPORT)]
    )
    assert ros.spin_until(lambda: joints.get_subscription_count() == 1 and clock.get_subscription_count() == 1)
    joints.publish(JointState(name=['early']))
    ros.spin_until(lambda: False, 0.3)
    clock.publish(Clock(clock=Time(sec=77)))
    ros.spin_until(lambda: False, 0.3)
    joints.publish(JointState(name=['later']))
    assert ros.spin_until(lambda: recorder.counts['/joints'] == 1)
    recorder.close()
    assert [(time_ns, message.name) for time_ns, message in contents(tmp_path / 'bag')['/joints']] == [(77 * NS_PER_S, ['later'])]


@pytest.mark.dds
def test_a_played_bag_keeps_pace_clock_and_latched_messages(ros: Ros, recorded: Path) -> None:
    listener = ros.node('listener')
    joints: list[tuple[float, JointState]] = []
    clocks: list[int] = []
    images: list[CompressedImage] = []
    commands: list[JointTrajectory] = []
    listener.create_subscription(JointState, '/joints', lambda m: joints.append((time.monotonic(), m)), qos.REPORT)
    listener.create_subscription(CompressedImage, '/image/compressed', images.append, qos.SENSOR)
    listener.create_subscription(JointTrajectory, '/command', commands.append, qos.REPORT)
    listener.create_subscription(Clock, '/clock', lambda m: clocks.append(m.clock.sec * NS_PER_S + m.clock.nanosec), 100)
    player = subprocess.Popen(
        [*PLAYER, str(recorded), '--rate', '0.5', '--wait-for', '/joints', '/image/compressed'],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert ros.spin_until(lambda: len(joints) >= 5, 30.0)
        instructions: list[String] = []
        listener.create_subscription(String, '/instruction', instructions.append, qos.LATCHED)
        assert ros.spin_until(lambda: len(joints) == 10 and bool(instructions), 30.0)
        assert ros.spin_until(lambda: player.poll() is not None, 30.0)
    finally:
        player.terminate()
        _, errors = player.communicate()
    assert player.returncode == 0, errors
    assert [message.position[0] for _, message in joints] == [float(step) for step in range(10)]
    # Ten messages, 0.1 s apart when recorded, at half speed.
    assert joints[-1][0] - joints[0][0] == pytest.approx(1.8, abs=0.5)
    assert instructions[0].data == 'grüße den roten Würfel'
    assert len(images) > 5
    assert commands == []
    with AnyReader([recorded]) as reader:
        assert reader.start_time <= clocks[0] and clocks == sorted(clocks)
        assert clocks[-1] >= reader.end_time


@pytest.mark.dds
def test_commands_are_played_when_they_are_named(ros: Ros, recorded: Path) -> None:
    commands: list[JointTrajectory] = []
    ros.node('listener').create_subscription(JointTrajectory, '/command', commands.append, qos.REPORT)
    player = subprocess.Popen([*PLAYER, str(recorded), '--topics', '/command', '--wait-for', '/command'], cwd=ROOT)
    try:
        assert ros.spin_until(lambda: len(commands) == 1, 30.0)
        assert player.wait(15) == 0
    finally:
        player.terminate()
        player.wait()


@pytest.mark.dds
@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--topics', '/nothing'], "the bag has no topic '/nothing'; it has /command, /image/compressed"),
        (['--rate', '0'], 'rate must be above 0'),
        # Not a topic of the bag: the recorder that made it may still be subscribed to those.
        (['--wait-for', '/unheard', '--wait-timeout', '0.5'], 'nobody subscribed to /unheard within 0.5 s'),
    ],
)
def test_a_bag_that_cannot_be_played_is_refused_in_a_sentence(recorded: Path, arguments: list[str], words: str) -> None:
    result = subprocess.run([*PLAYER, str(recorded), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert words in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.dds
def test_a_missing_bag_is_named(ros_domain: int, tmp_path: Path) -> None:
    result = subprocess.run([*PLAYER, str(tmp_path / 'absent')], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert 'absent does not exist' in result.stderr


def test_types_are_found_with_everything_they_contain() -> None:
    store = typestore_for(['vla_policy_msgs/msg/PolicyStatus'])
    assert {'vla_policy_msgs/msg/PolicyStatus', 'vla_policy_msgs/msg/InputStatus'} <= store.fielddefs.keys()
    assert store.hash_rihs01('vla_policy_msgs/msg/PolicyStatus').startswith('RIHS01_')


def test_a_type_and_its_name_belong_together() -> None:
    assert message_name(PolicyStatus) == 'vla_policy_msgs/msg/PolicyStatus'
    assert message_class('sensor_msgs/msg/JointState') is JointState


@pytest.mark.parametrize('name', ['absent_msgs/msg/Thing', 'std_msgs/msg/Thing'])
def test_a_type_that_is_not_installed_is_named(name: str) -> None:
    with pytest.raises(MessageTypeError, match=name):
        message_class(name)
    with pytest.raises(MessageTypeError, match=name):
        typestore_for([name])


@pytest.mark.parametrize('profile', [qos.SENSOR, qos.STATE, qos.COMMAND, qos.LATCHED, qos.REPORT])
def test_quality_of_service_survives_the_bag(profile: Any) -> None:
    back = from_bag_qos(to_bag_qos(profile))
    assert (back.reliability, back.durability, back.depth) == (profile.reliability, profile.durability, profile.depth)


def test_an_unknown_topic_is_an_error_and_commands_need_a_name() -> None:
    class Known:
        topic, msgtype = '/command', 'trajectory_msgs/msg/JointTrajectory'

    command: Any = Known()
    assert played_connections([command], []) == []
    assert played_connections([command], ['/command']) == [command]
    with pytest.raises(PlaybackError, match='no topic'):
        played_connections([command], ['/other'])


def test_an_image_that_is_not_a_colour_image_is_refused() -> None:
    depth = picture()
    depth.encoding = '32FC1'
    with pytest.raises(ValueError, match='32FC1'):
        compress(depth)
