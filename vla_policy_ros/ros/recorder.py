"""Records topics into a bag (mcap) without rosbag2: any machine with rclpy and rosbags can write one, and any can read it.

Messages are stored as the bytes that arrived. Raw images are the exception: at 28 MB/s per camera they would make a bag that nobody
keeps, so they are stored as JPEG under `<topic>/compressed`, the name and type that image_transport uses for the same thing.

Enters: messages, on the thread of the executor that the node belongs to. Leaves: a bag that `ros2 bag` and rosbags' `AnyReader`
read.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import McapWriter
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from vla_policy_ros.observation.images import decode_image
from vla_policy_ros.robot import Robot
from vla_policy_ros.ros.bag_qos import to_bag_qos
from vla_policy_ros.ros.inputs import controller_state_type
from vla_policy_ros.ros.message_types import message_name, typestore_for

# Grey levels move by about one at this quality, and a 640x480 frame takes some 30 kB instead of 921 kB.
JPEG_QUALITY = 90
# A recorder falls behind for a moment without harm, so its queues are longer than those of a controller.
SENSORS = QoSProfile(depth=50, reliability=ReliabilityPolicy.BEST_EFFORT)
REPORTS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
_FLUSH_S = 1.0


@dataclass(frozen=True)
class RecordedTopic:
    """One topic to record: name, message class and the QoS to subscribe with."""

    name: str
    type: Any
    qos: QoSProfile

    @property
    def bag_name(self) -> str:
        """The topic's name in the bag."""
        return f'{self.name}/compressed' if self.type is Image else self.name

    @property
    def bag_type(self) -> Any:
        """The message class in the bag."""
        return CompressedImage if self.type is Image else self.type


def robot_topics(robot: Robot) -> list[RecordedTopic]:
    """What a robot file names: its inputs, the commands of its controllers, and their states."""
    topics = [RecordedTopic(robot.state.topic, JointState, SENSORS)]
    # A latched subscription does not match a volatile publisher (`ros2 topic pub`); a volatile one misses what was latched.
    topics += [RecordedTopic(robot.instruction.topic, String, profile) for profile in (LATCHED, REPORTS)]
    for camera in robot.cameras.values():
        topics.append(RecordedTopic(camera.topic, Image if camera.transport == 'raw' else CompressedImage, SENSORS))
        if camera.camera_info:
            topics.append(RecordedTopic(camera.camera_info, CameraInfo, SENSORS))
    for controller in robot.controllers.values():
        kind = JointTrajectory if controller.type == 'joint_trajectory' else Float64MultiArray
        topics.append(RecordedTopic(controller.topic, kind, REPORTS))
        if controller.state_topic:
            topics.append(RecordedTopic(controller.state_topic, controller_state_type(), SENSORS))
    return topics


class BagRecorder:
    """Subscribes to topics on ``node`` and writes them into a new bag at ``path``, a folder that must not exist.

    With no ``path`` it listens, and records from `begin` to `end`, into one bag after the other; what was latched before stands at
    the beginning of each. What is older than a second is on its way to the disk, so that little is lost when the process is killed.

    Log times are the node's clock: simulated time where the node uses it. Messages that arrive before that clock runs are not
    recorded, as they have no place on its time line. Topics that never speak do not appear in the bag.

    Attributes:
        counts: messages in the present or last bag, by its topics; ``heard``: all messages, by the topics of the node.
        refused: images that cannot be stored as JPEG, by topic.

    Raises:
        MessageTypeError: the definition of a message type is not installed.
        rosbags.rosbag2.WriterError: ``path`` exists.
    """

    def __init__(self, node: Node, path: Path | None, topics: Iterable[RecordedTopic]) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.heard: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._node = node
        topics = tuple(topics)
        self._types = typestore_for(message_name(topic.bag_type) for topic in topics)
        self._connections: dict[str, Connection] = {}
        self._latched: dict[str, tuple[RecordedTopic, bytes] | None] = {
            topic.name: None for topic in topics if topic.qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
        }
        self._lock = threading.Lock()
        self._writer: Writer | None = None
        if path is not None:
            self.begin(path)
        self._subscriptions = [self._subscribe(topic) for topic in topics]
        self._timer = node.create_timer(_FLUSH_S, self._flush, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def begin(self, path: Path) -> None:
        """Begin to record into a new bag. Raises rosbags.rosbag2.WriterError where ``path`` exists."""
        self.end()
        writer = Writer(path, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
        writer.open()
        with self._lock:
            self.path, self._writer, self._connections = path, writer, {}
            self.counts = Counter()
        for last in list(self._latched.values()):
            if last is not None:
                self._write(*last)

    def end(self) -> None:
        """Stop recording and finish the file. Any thread; a second call does nothing."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def close(self) -> None:
        """`end`, and stop listening."""
        self.end()
        self._timer.cancel()

    def _subscribe(self, topic: RecordedTopic) -> Any:
        if topic.type is Image:
            return self._node.create_subscription(Image, topic.name, lambda message: self._hear_image(topic, message), topic.qos)
        return self._node.create_subscription(topic.type, topic.name, lambda raw: self._hear(topic, raw), topic.qos, raw=True)

    def _hear_image(self, topic: RecordedTopic, message: Image) -> None:
        try:
            raw = serialize_message(compress(message))
        except ValueError:
            self.refused[topic.name] += 1
            return
        self._hear(topic, raw)

    def _hear(self, topic: RecordedTopic, raw: bytes) -> None:
        self.heard[topic.name] += 1
        if topic.name in self._latched:
            last = self._latched[topic.name]
            if last is not None and last[1] == raw and topic.qos.durability != DurabilityPolicy.TRANSIENT_LOCAL:
                return  # a latched message also reaches the subscription for those that are not
            self._latched[topic.name] = (topic, raw)
        self._write(topic, raw)

    def _write(self, topic: RecordedTopic, raw: bytes) -> None:
        now_ns = self._node.get_clock().now().nanoseconds
        if now_ns == 0:
            return
        with self._lock:
            if self._writer is None:
                return
            if topic.name not in self._connections:
                self._connections[topic.name] = self._connect(self._writer, topic)
            self._writer.write(self._connections[topic.name], now_ns, raw)
            self.counts[topic.bag_name] += 1

    def _connect(self, writer: Writer, topic: RecordedTopic) -> Connection:
        """A connection that remembers what its publishers offer, so that a player can offer the same."""
        offered = [to_bag_qos(publisher.qos_profile) for publisher in self._node.get_publishers_info_by_topic(topic.name)]
        return writer.add_connection(
            topic.bag_name, message_name(topic.bag_type), typestore=self._types, offered_qos_profiles=offered[:1]
        )

    def _flush(self) -> None:
        """Hand what the writer holds back to the operating system, which keeps it when this process dies."""
        with self._lock:
            storage = None if self._writer is None else self._writer.storage
            if isinstance(storage, McapWriter):
                if storage.chunk.msgs:
                    storage.close_chunk()
                storage.bio.flush()


def compress(image: Image) -> CompressedImage:
    """A raw image as JPEG with the same header. Raises ImageError for an encoding that is not a colour image."""
    pixels = cv2.cvtColor(decode_image(image), cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not encoded:
        raise ValueError(f'an image of {image.width}x{image.height} {image.encoding} could not be encoded as JPEG')
    return CompressedImage(header=image.header, format=f'{image.encoding}; jpeg compressed bgr8', data=np.asarray(data).tobytes())
