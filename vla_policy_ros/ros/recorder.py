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
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import serialize_message
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from sensor_msgs.msg import CompressedImage, Image

from vla_policy_ros.observation.images import decode_image
from vla_policy_ros.ros.bag_qos import to_bag_qos
from vla_policy_ros.ros.message_types import message_name, typestore_for

# Grey levels move by about one at this quality, and a 640x480 frame takes some 30 kB instead of 921 kB.
JPEG_QUALITY = 90


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


class BagRecorder:
    """Subscribes to topics on ``node`` and writes them into a new bag at ``path``, a folder that must not exist.

    Log times are the node's clock: simulated time where the node uses it. Messages that arrive before that clock runs are not
    recorded, as they have no place on its time line. Topics that never speak do not appear in the bag.

    Raises:
        MessageTypeError: the definition of a message type is not installed.
        rosbags.rosbag2.WriterError: ``path`` exists.
    """

    def __init__(self, node: Node, path: Path, topics: Iterable[RecordedTopic]) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._node = node
        topics = tuple(topics)
        self._types = typestore_for(message_name(topic.bag_type) for topic in topics)
        self._connections: dict[str, Connection] = {}
        self._lock = threading.Lock()
        self._writer: Writer | None = Writer(path, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._subscriptions = [self._subscribe(topic) for topic in topics]

    def close(self) -> None:
        """Stop recording and finish the file. Any thread; a second call does nothing."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _subscribe(self, topic: RecordedTopic) -> Any:
        if topic.type is Image:
            return self._node.create_subscription(
                Image, topic.name, lambda message: self._write(topic, serialize_message(compress(message))), topic.qos
            )
        return self._node.create_subscription(topic.type, topic.name, lambda raw: self._write(topic, raw), topic.qos, raw=True)

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


def compress(image: Image) -> CompressedImage:
    """A raw image as JPEG with the same header. Raises ImageError for an encoding that is not a colour image."""
    pixels = cv2.cvtColor(decode_image(image), cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not encoded:
        raise ValueError(f'an image of {image.width}x{image.height} {image.encoding} could not be encoded as JPEG')
    return CompressedImage(header=image.header, format=f'{image.encoding}; jpeg compressed bgr8', data=np.asarray(data).tobytes())
