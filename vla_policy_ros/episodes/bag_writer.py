"""Episodes to bags (rosbag2, mcap), one each, with the topics and types of the robot file.

Images are stored as JPEG, as `vla-policy record` does, raw ones under the name that image_transport gives them. Messages carry the
episode's stamps. What a step needs is received at the newest of its stamps, the images last, so that whoever plays the bag makes
the same steps of it. Each target of a controller is one message, which leads to it in the usual distance of targets.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_policy_ros.episodes.bag_episode import (
    ARRAY_TYPE,
    COMPRESSED_SUFFIX,
    COMPRESSED_TYPE,
    INFO_TYPE,
    JOINT_STATE_TYPE,
    STRING_TYPE,
    TRAJECTORY_TYPE,
)
from vla_policy_ros.episodes.episode import Episode, EpisodeError
from vla_policy_ros.robot import Controller, Robot
from vla_policy_ros.types import NS_PER_S, CameraView, Observation

# Levels move by less than one on average.
JPEG_QUALITY = 95
_INFINITE = QosTime(9223372036, 854775807)

Entry = tuple[int, int, str, Any]  # time of receipt, order among equal times, topic, message


def write_bag(episode: Episode, path: Path, on_observation: Callable[[Observation], None] = lambda _: None) -> None:
    """Write an episode into a new bag at ``path``, a folder that must not exist; ``on_observation`` sees each observation.

    Raises:
        EpisodeError: an image cannot be decoded.
    """
    messages = _Messages(episode.robot)
    with Writer(path, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP) as writer:
        connections: dict[str, Connection] = {}
        streams = [_commands(episode, name, messages) for name in episode.robot.controllers]
        for time_ns, _, topic, message in heapq.merge(*streams, _inputs(episode, messages, on_observation), key=lambda e: e[:2]):
            if topic not in connections:
                latched = [_LATCHED] if topic == messages.topic_of(episode.robot.instruction.topic) else []
                connections[topic] = writer.add_connection(
                    topic, message.__msgtype__, typestore=messages.store, offered_qos_profiles=latched
                )
            writer.write(connections[topic], time_ns, messages.store.serialize_cdr(message, message.__msgtype__))


def _inputs(episode: Episode, messages: _Messages, on_observation: Callable[[Observation], None]) -> Iterator[Entry]:
    robot = episode.robot
    instruction, state_ns, received_ns = None, -1, 0
    for observation in episode.observations():
        on_observation(observation)
        received_ns = max(received_ns, observation.stamp_ns, observation.state_stamp_ns)
        if observation.instruction != instruction:
            instruction = observation.instruction
            yield received_ns, 0, messages.topic_of(robot.instruction.topic), messages.text(instruction)
        if observation.state_stamp_ns != state_ns:
            state_ns = observation.state_stamp_ns
            yield received_ns, 1, messages.topic_of(robot.state.topic), messages.joint_state(observation)
        for name, view in observation.cameras.items():
            camera = robot.cameras[name]
            if view.K is not None and camera.camera_info:
                yield received_ns, 2, messages.topic_of(camera.camera_info), messages.camera_info(name, view)
        for name, view in observation.cameras.items():
            topic = robot.cameras[name].topic.removesuffix(COMPRESSED_SUFFIX) + COMPRESSED_SUFFIX
            yield received_ns, 3, messages.topic_of(topic), messages.image(name, view)


def _commands(episode: Episode, name: str, messages: _Messages) -> Iterator[Entry]:
    controller = episode.robot.controllers[name]
    for stream in episode.commands.streams:
        if not set(controller.joints) <= set(stream.joints):
            continue
        lead_ns = stream.spacing_ns or round(NS_PER_S / controller.update_rate)
        columns = [stream.joints.index(joint) for joint in controller.joints]
        for time_ns, positions in zip(stream.stamps_ns.tolist(), stream.positions[:, columns], strict=True):
            if controller.type == 'joint_trajectory':
                message = messages.trajectory(controller, time_ns - lead_ns, lead_ns, positions)
                yield time_ns - lead_ns, 4, messages.topic_of(controller.topic), message
            else:
                received_ns = time_ns - round(NS_PER_S / controller.update_rate)
                yield received_ns, 4, messages.topic_of(controller.topic), messages.array(positions)
        return
    raise EpisodeError(f'{episode.name}: no stream of commands has all joints of controller {name!r}')


class _Messages:
    """Messages of a robot, with the definitions of ROS 2's own types."""

    def __init__(self, robot: Robot) -> None:
        self._robot = robot
        self.store = get_typestore(Stores.ROS2_JAZZY)

    def topic_of(self, topic: str) -> str:
        """The absolute name of a topic of the robot file."""
        return topic if topic.startswith('/') else '/' + topic.removeprefix('~/')

    def text(self, data: str) -> Any:
        return self._new(STRING_TYPE, data=data)

    def array(self, positions: Any) -> Any:
        layout = self._new('std_msgs/msg/MultiArrayLayout', dim=[], data_offset=0)
        return self._new(ARRAY_TYPE, layout=layout, data=np.array(positions, dtype=np.float64))

    def joint_state(self, observation: Observation) -> Any:
        state, count = self._robot.state, len(self._robot.state.joints)
        blocks = {field: observation.state[i * count : (i + 1) * count] for i, field in enumerate(state.fields)}
        none = np.zeros(0)
        return self._new(
            JOINT_STATE_TYPE,
            header=self._header(observation.state_stamp_ns),
            name=list(state.joints),
            position=np.array(blocks.get('position', none)),
            velocity=np.array(blocks.get('velocity', none)),
            effort=np.array(blocks.get('effort', none)),
        )

    def camera_info(self, name: str, view: CameraView) -> Any:
        assert view.K is not None
        height, width = view.rgb.shape[:2]
        roi = self._new('sensor_msgs/msg/RegionOfInterest', x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
        return self._new(
            INFO_TYPE,
            header=self._header(view.stamp_ns, f'{name}_optical_frame'),
            height=height,
            width=width,
            distortion_model='plumb_bob',
            d=np.zeros(5),
            k=view.K.ravel().astype(np.float64),
            r=np.eye(3).ravel(),
            p=np.hstack([view.K, np.zeros((3, 1))]).ravel(),
            binning_x=0,
            binning_y=0,
            roi=roi,
        )

    def image(self, name: str, view: CameraView) -> Any:
        encoded, data = cv2.imencode('.jpg', cv2.cvtColor(view.rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if not encoded:
            raise EpisodeError(f'an image of camera {name!r} of shape {view.rgb.shape} could not be encoded as JPEG')
        header = self._header(view.stamp_ns, f'{name}_optical_frame')
        return self._new(COMPRESSED_TYPE, header=header, format='rgb8; jpeg compressed bgr8', data=data.ravel())

    def trajectory(self, controller: Controller, stamp_ns: int, lead_ns: int, positions: Any) -> Any:
        none = np.zeros(0)
        point = self._new(
            'trajectory_msgs/msg/JointTrajectoryPoint',
            positions=np.array(positions, dtype=np.float64),
            velocities=none,
            accelerations=none,
            effort=none,
            time_from_start=self._time('Duration', lead_ns),
        )
        return self._new(TRAJECTORY_TYPE, header=self._header(stamp_ns), joint_names=list(controller.joints), points=[point])

    def _header(self, stamp_ns: int, frame: str = '') -> Any:
        return self._new('std_msgs/msg/Header', stamp=self._time('Time', stamp_ns), frame_id=frame)

    def _time(self, kind: str, ns: int) -> Any:
        return self._new(f'builtin_interfaces/msg/{kind}', sec=ns // NS_PER_S, nanosec=ns % NS_PER_S)

    def _new(self, kind: str, **values: Any) -> Any:
        return self.store.types[kind](**values)


_LATCHED = Qos(
    history=QosHistory.KEEP_LAST,
    depth=1,
    reliability=QosReliability.RELIABLE,
    durability=QosDurability.TRANSIENT_LOCAL,
    deadline=_INFINITE,
    lifespan=_INFINITE,
    liveliness=QosLiveliness.AUTOMATIC,
    liveliness_lease_duration=_INFINITE,
    avoid_ros_namespace_conventions=False,
)
