"""What a replay would have published, as a bag (mcap) on the clock of the recording, for Foxglove or PlotJuggler beside it.

- ``/policy_node/chunk``: vla_policy_msgs/ActionChunk, as the live node in dry run publishes it;
- ``/policy_node/trajectory``: trajectory_msgs/JointTrajectory, what would have been sent;
- ``/policy_node/state``: std_msgs/String, the state and why, at each change.

Enters: a `Run`. Leaves: a bag. Needs no ROS: definitions come from the files of vla_policy_msgs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_policy_ros.episodes.bag_episode import STRING_TYPE, TRAJECTORY_TYPE, BagEpisode
from vla_policy_ros.replay.offline import ReplayedChunk, Run
from vla_policy_ros.resources import message_path
from vla_policy_ros.types import NS_PER_S, JointTrajectory

CHUNK_TOPIC, TRAJECTORY_TOPIC, STATE_TOPIC = '/policy_node/chunk', '/policy_node/trajectory', '/policy_node/state'
CHUNK_TYPE = 'vla_policy_msgs/msg/ActionChunk'
_DRY_RUN, _REJECTED = 1, 2

Entry = tuple[int, int, str, Any]  # time, order among equal times, topic, message


def write_annotated(run: Run, episode: BagEpisode, path: Path) -> None:
    """Write the bag into a new folder ``path``. Receive times are those of the replay, on the recording's stamps' clock.

    Raises:
        ResourceError: the definition of ActionChunk is not there.
    """
    messages = _Messages()
    streams = [messages.states(run), messages.chunks(run)]
    with Writer(path, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP) as writer:
        writer.set_custom_data('replay_of', episode.name)
        connections: dict[str, Connection] = {}
        for time_ns, _, topic, message in heapq.merge(*streams, key=lambda entry: entry[:2]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=messages.store)
            writer.write(connections[topic], time_ns, messages.store.serialize_cdr(message, message.__msgtype__))


class _Messages:
    def __init__(self) -> None:
        self.store: Typestore = get_typestore(Stores.ROS2_JAZZY)
        self.store.register(get_types_from_msg(message_path('ActionChunk').read_text(encoding='utf-8'), CHUNK_TYPE))

    def states(self, run: Run) -> Iterator[Entry]:
        for change in run.states:
            text = f'{change.state.name}: {change.reason}' if change.reason else change.state.name
            yield change.time_ns, 0, STATE_TOPIC, self._new(STRING_TYPE, data=text)

    def chunks(self, run: Run) -> Iterator[Entry]:
        for replayed in run.chunks:
            yield replayed.ready_ns, 1, CHUNK_TOPIC, self._chunk(replayed)
            if replayed.trajectory is not None:
                yield replayed.ready_ns, 2, TRAJECTORY_TOPIC, self._trajectory(replayed.trajectory)

    def _chunk(self, replayed: ReplayedChunk) -> Any:
        chunk, trajectory = replayed.chunk, replayed.trajectory
        return self._new(
            CHUNK_TYPE,
            header=self._header(chunk.observation_stamp_ns),
            sequence=chunk.sequence,
            instruction=chunk.instruction,
            joint_names=list(chunk.joint_names),
            action_stamp=self._time('Time', chunk.stamp_ns),
            dt=chunk.dt_ns / NS_PER_S,
            horizon=len(chunk.actions),
            actions=np.ascontiguousarray(chunk.actions, dtype=np.float64).ravel(),
            input_names=list(replayed.input_stamps),
            input_stamps=[self._time('Time', stamp) for stamp in replayed.input_stamps.values()],
            stage_names=list(replayed.stages_ms),
            stage_ms=np.array(list(replayed.stages_ms.values()), dtype=np.float32),
            latency_ms=(replayed.ready_ns - chunk.observation_stamp_ns) / 1e6,
            outcome=_REJECTED if trajectory is None else _DRY_RUN,
            rejection='' if trajectory is not None else replayed.outcome,
            reason=replayed.reason,
            trajectory_start=self._time('Time', 0 if trajectory is None else trajectory.start_ns),
            points_expired=replayed.points_expired,
            clamped_joints=list(replayed.clamped),
            seam_jump=replayed.seam_jump,
            checkpoint_hash=chunk.checkpoint_hash,
            stats_hash=chunk.stats_hash,
        )

    def _trajectory(self, trajectory: JointTrajectory) -> Any:
        none = np.zeros(0)
        points = [
            self._new(
                'trajectory_msgs/msg/JointTrajectoryPoint',
                positions=np.array(position),
                velocities=np.array(velocity),
                accelerations=none,
                effort=none,
                time_from_start=self._time('Duration', time_ns),
            )
            for time_ns, position, velocity in zip(
                trajectory.times_ns.tolist(), trajectory.positions, trajectory.velocities, strict=True
            )
        ]
        header = self._header(trajectory.start_ns)
        return self._new(TRAJECTORY_TYPE, header=header, joint_names=list(trajectory.joint_names), points=points)

    def _header(self, stamp_ns: int) -> Any:
        return self._new('std_msgs/msg/Header', stamp=self._time('Time', stamp_ns), frame_id='')

    def _time(self, kind: str, ns: int) -> Any:
        return self._new(f'builtin_interfaces/msg/{kind}', sec=ns // NS_PER_S, nanosec=ns % NS_PER_S)

    def _new(self, kind: str, **values: Any) -> Any:
        return self.store.types[kind](**values)
