"""Bags for tests, written with rosbags: one call per recording, times in seconds of the recorder's clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

S = 10**9
T0 = 1_700_000_000 * S
COMMAND = '/arm_controller/joint_trajectory'
STATE = '/arm_controller/controller_state'

TYPES = get_typestore(Stores.ROS2_JAZZY)
TYPES.register(
    get_types_from_msg(
        'std_msgs/Header header\nstring[] joint_names\ntrajectory_msgs/JointTrajectoryPoint reference\n'
        'trajectory_msgs/JointTrajectoryPoint feedback\n',
        'control_msgs/msg/JointTrajectoryControllerState',
    )
)

Entry = tuple[str, float, Any]  # topic, time of receipt, message


def stamp(seconds: float) -> Any:
    ns = round(seconds * S)
    return TYPES.types['builtin_interfaces/msg/Time'](sec=ns // S, nanosec=ns % S)


def header(seconds: float = 0.0) -> Any:
    return TYPES.types['std_msgs/msg/Header'](stamp=stamp(seconds), frame_id='')


def point(time: float, positions: Sequence[float], velocities: Sequence[float] = (), accelerations: Sequence[float] = ()) -> Any:
    ns = round(time * S)
    return TYPES.types['trajectory_msgs/msg/JointTrajectoryPoint'](
        positions=np.array(positions, dtype=np.float64),
        velocities=np.array(velocities, dtype=np.float64),
        accelerations=np.array(accelerations, dtype=np.float64),
        effort=np.zeros(0),
        time_from_start=TYPES.types['builtin_interfaces/msg/Duration'](sec=ns // S, nanosec=ns % S),
    )


def trajectory(points: Sequence[Any], joints: Sequence[str] = ('a', 'b'), at: float = 0.0) -> Any:
    return TYPES.types['trajectory_msgs/msg/JointTrajectory'](header=header(at), joint_names=list(joints), points=list(points))


def move(target: float, duration: float = 1.0, at: float = 0.0) -> Any:
    """Both joints to ``target``, at rest there, and a little longer at rest."""
    rest = [0.0, 0.0]
    return trajectory([point(duration, [target] * 2, rest), point(duration + 0.1, [target] * 2, rest)], at=at)


def joint_state(positions: Sequence[float], joints: Sequence[str] = ('a', 'b'), at: float = 0.0) -> Any:
    return TYPES.types['sensor_msgs/msg/JointState'](
        header=header(at), name=list(joints), position=np.array(positions), velocity=np.zeros(0), effort=np.zeros(0)
    )


def controller_state(reference: Sequence[float], feedback: Sequence[float], joints: Sequence[str] = ('a', 'b')) -> Any:
    return TYPES.types['control_msgs/msg/JointTrajectoryControllerState'](
        header=header(), joint_names=list(joints), reference=point(0.0, reference), feedback=point(0.0, feedback)
    )


def clock(seconds: float) -> Any:
    return TYPES.types['rosgraph_msgs/msg/Clock'](clock=stamp(seconds))


def text(data: str) -> Any:
    return TYPES.types['std_msgs/msg/String'](data=data)


def write_bag(
    path: Path,
    entries: Sequence[Entry],
    sqlite: bool = False,
    compressed: bool = False,
    silent: Sequence[tuple[str, str]] = (),
    begin_ns: int = T0,
) -> Path:
    """A bag of ``entries``; ``silent`` are (topic, type) without messages, ``begin_ns`` is the receive time of second 0."""
    plugin = StoragePlugin.SQLITE3 if sqlite else StoragePlugin.MCAP
    writer = Writer(path, version=Writer.VERSION_LATEST, storage_plugin=plugin)
    if compressed:
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        connections = {topic: writer.add_connection(topic, kind, typestore=TYPES) for topic, kind in silent}
        for topic, time, message in entries:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=TYPES)
            writer.write(connections[topic], begin_ns + round(time * S), TYPES.serialize_cdr(message, message.__msgtype__))
    return path


def arm_bag(path: Path, messages: int = 10, **options: Any) -> Path:
    """A smooth recording: the arm at rest, then every 0.2 s a message that moves it on by 0.05 rad and ends at rest."""
    entries: list[Entry] = [('/joint_states', 0.05, joint_state([0.0, 0.0]))]
    for index in range(messages):
        entries.append((COMMAND, 0.1 + 0.2 * index, move(0.05 * (index + 1), 0.15)))
        entries.append(('/joint_states', 0.2 + 0.2 * index, joint_state([0.05 * (index + 1)] * 2)))
    return write_bag(path, entries, **options)
