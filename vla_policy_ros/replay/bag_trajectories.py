"""Command topics of a bag (rosbag2, mcap or sqlite3) as recordings on the clock of the controller.

A bag stores when its recorder received a message. The controller judges stamps on its own clock, which is another one where the
controller runs on simulated time and the recorder did not. So receive times are brought onto the controller's clock through what
the bag says of it: `/clock` where it was recorded, else the stamps of the joint or controller states where they are further from
the receive times than any transport is.

A damaged bag is read as far as it goes; what is missing is said in the notes of the recordings.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.interfaces.typing import RPath
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_policy_ros.replay import recording as messages
from vla_policy_ros.replay.mcap_recovery import RecoveredMcap
from vla_policy_ros.replay.recording import JointPositions, Received, Recording
from vla_policy_ros.replay.sqlite_recovery import RecoveredSqlite
from vla_policy_ros.types import NS_PER_S

TRAJECTORY_TYPE = 'trajectory_msgs/msg/JointTrajectory'
CONTROLLER_STATE_TYPE = 'control_msgs/msg/JointTrajectoryControllerState'
STATE_TYPES = ('sensor_msgs/msg/JointState', CONTROLLER_STATE_TYPE)
CLOCK_TYPE = 'rosgraph_msgs/msg/Clock'

# Stamps further from the receive times than this are of another clock, not of a slow network.
_OTHER_CLOCK_NS = NS_PER_S

Choose = Callable[[Mapping[str, str]], Collection[str]]


class BagError(ValueError):
    """The bag cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class _Raw:
    """A stored message."""

    topic: str
    type: str
    receive_ns: int
    data: bytes


def read_recordings(bag: Path, topic: str | None = None, preferred: Sequence[str] = ()) -> list[Recording]:
    """The command topics of ``bag``.

    Args:
        bag: folder of a rosbag2 bag, or one of its storage files.
        topic: the one to read.
        preferred: without ``topic``, those of these that the bag has; without them, every topic of trajectories.

    Raises:
        BagError: there is no such bag, it cannot be read at all, or what was asked for is not in it.
    """
    if not bag.exists():
        raise BagError(f'bag {bag} does not exist; give the folder of a rosbag2 bag, or its .mcap or .db3 file')
    chosen: list[str] = []

    def choose(types: Mapping[str, str]) -> Collection[str]:
        chosen[:] = _command_topics(bag, types, topic, preferred)
        useful = {name for name, kind in types.items() if kind == CLOCK_TYPE or kind in STATE_TYPES}
        return useful.union(chosen)

    notes: list[str] = []
    raws, types_store = _gather(bag, choose, notes)
    raws.sort(key=lambda raw: raw.receive_ns)
    return _recordings(bag, chosen, raws, types_store, notes)


def _command_topics(bag: Path, types: Mapping[str, str], topic: str | None, preferred: Sequence[str]) -> list[str]:
    commands = sorted(name for name, kind in types.items() if kind == TRAJECTORY_TYPE)
    listed = 'it has ' + (', '.join(f'{name} ({kind})' for name, kind in sorted(types.items())) or 'no topics')
    if topic is not None:
        if topic not in types:
            near = difflib.get_close_matches(topic, commands, n=1, cutoff=0.3) or commands[:1]
            hint = f'; did you mean {near[0]}?' if near else ''
            raise BagError(f'{bag} has no topic {topic!r}{hint} {listed[0].upper()}{listed[1:]}')
        if types[topic] != TRAJECTORY_TYPE:
            hint = f'; of that type it has {", ".join(commands)}' if commands else ', and it has no topic of that type'
            raise BagError(f'topic {topic} is of type {types[topic]}, not {TRAJECTORY_TYPE}{hint}')
        return [topic]
    if not commands:
        raise BagError(f'{bag} has no topic of type {TRAJECTORY_TYPE}; {listed}')
    if preferred and not set(preferred) & set(commands):
        raise BagError(
            f'{bag} has no command topic of the robot ({", ".join(preferred)}); name one with --topic: {", ".join(commands)}'
        )
    return [name for name in commands if not preferred or name in preferred]


# ---- reading --------------------------------------------------------------------------------------------------------------------


def _gather(bag: Path, choose: Choose, notes: list[str]) -> tuple[list[_Raw], Typestore]:
    """Everything stored on the chosen topics. Damaged bags make the library raise anything, hence the broad excepts."""
    try:
        with Reader(bag) as reader:
            types, store = _types(reader.connections), _typestore(reader.connections)
            connections = _chosen(reader.connections, choose(types))
            promised = sum(connection.msgcount for connection in connections)
            raws = [_Raw(c.topic, c.msgtype, time_ns, bytes(data)) for c, time_ns, data in reader.messages(connections)]
            if len(raws) < promised:
                notes.append(f'the bag announces {promised} messages on the topics that were read, but holds {len(raws)}')
            return raws, store
    except BagError:
        raise
    except Exception as error:
        notes.append(f'{bag} is damaged or was not finished ({_sentence(error)}); what can be read of it was read')
    return _salvage(bag, choose, notes)


def _salvage(bag: Path, choose: Choose, notes: list[str]) -> tuple[list[_Raw], Typestore]:
    files = sorted(path for path in bag.iterdir() if path.suffix in ('.mcap', '.db3')) if bag.is_dir() else [bag]
    if not files:
        raise BagError(f'{notes[-1]}: but the folder holds no .mcap or .db3 file')
    readers: list[Reader | RecoveredSqlite] = []
    try:
        for file in files:
            try:
                readers.append(_open_damaged(file, notes))
            except Exception as error:
                notes.append(f'{file.name} is not readable: {_sentence(error)}')
        connections = [connection for reader in readers for connection in reader.connections]
        if not connections:
            raise BagError('; '.join([*notes, 'nothing is left to judge']))
        wanted = choose(_types(connections))
        raws = [raw for reader in readers for raw in _read_damaged(reader, wanted, notes)]
        return raws, _typestore(connections)
    finally:
        for reader in readers:
            reader.close()


def _open_damaged(file: Path, notes: list[str]) -> Reader | RecoveredSqlite:
    if file.suffix != '.mcap':
        return RecoveredSqlite(file)
    recovered = RecoveredMcap(file)
    notes += recovered.lost
    reader = Reader(cast(RPath, recovered))
    reader.open()
    return reader


def _read_damaged(reader: Reader | RecoveredSqlite, wanted: Collection[str], notes: list[str]) -> list[_Raw]:
    """Topic by topic, so that damage to one does not end the others."""
    raws: list[_Raw] = []
    for connection in _chosen(reader.connections, wanted):
        before = len(raws)
        try:
            for _, time_ns, data in reader.messages([connection]):
                raws.append(_Raw(connection.topic, connection.msgtype, time_ns, bytes(data)))
        except Exception as error:
            notes.append(f'{connection.topic} is read for {len(raws) - before} messages, then: {_sentence(error)}')
    if isinstance(reader, RecoveredSqlite):
        notes += reader.lost
    return raws


def _types(connections: Iterable[Connection]) -> dict[str, str]:
    return {connection.topic: connection.msgtype for connection in connections}


def _chosen(connections: Iterable[Connection], topics: Collection[str]) -> list[Connection]:
    return [connection for connection in connections if connection.topic in topics]


def _typestore(connections: Iterable[Connection]) -> Typestore:
    """ROS 2's own definitions, which are the same in every release for what is read here, and the bag's of control_msgs."""
    store = get_typestore(Stores.ROS2_JAZZY)
    for connection in connections:
        definition = connection.msgdef
        known = CONTROLLER_STATE_TYPE in store.fielddefs
        if connection.msgtype == CONTROLLER_STATE_TYPE and definition.format is MessageDefinitionFormat.MSG and not known:
            found = get_types_from_msg(definition.data, CONTROLLER_STATE_TYPE)
            store.register({name: fields for name, fields in found.items() if name not in store.fielddefs})
    return store


def _sentence(error: Exception) -> str:
    return f'{type(error).__name__}: {error}' if str(error) else type(error).__name__


# ---- from stored messages to recordings -----------------------------------------------------------------------------------------


class _ControllerClock:
    """Brings receive times onto the clock of the controller.

    Args:
        pairs: (receive time, time of the controller's clock), both ns, in order of the first; empty where they are the same.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._origin = pairs[0] if pairs else (0, 0)
        self._receive = np.array([receive - self._origin[0] for receive, _ in pairs], dtype=np.float64)
        self._clock = np.array([clock - self._origin[1] for _, clock in pairs], dtype=np.float64)

    def at(self, receive_ns: int) -> int:
        """The controller's time; before the first pair and after the last it goes at the pace of the receive times."""
        if not self._receive.size:
            return receive_ns
        offset_ns = receive_ns - self._origin[0]
        outside = min(0.0, offset_ns - self._receive[0]) + max(0.0, offset_ns - self._receive[-1])
        return self._origin[1] + round(float(np.interp(offset_ns, self._receive, self._clock)) + outside)


def _recordings(bag: Path, topics: Sequence[str], raws: Sequence[_Raw], store: Typestore, notes: list[str]) -> list[Recording]:
    decoded: list[tuple[_Raw, Any]] = []
    undecoded: dict[str, int] = {}
    for raw in raws:
        try:
            content = store.deserialize_cdr(raw.data, raw.type)
            decoded.append((raw, messages.trajectory_from_message(content) if raw.type == TRAJECTORY_TYPE else content))
        except Exception:  # damaged bytes, or a type whose definition the bag does not have
            undecoded[raw.topic] = undecoded.get(raw.topic, 0) + 1
    notes += [f'{count} messages of {name} cannot be decoded and are left out' for name, count in undecoded.items()]
    clock = _controller_clock(decoded, notes)
    begin_ns = clock.at(decoded[0][0].receive_ns) if decoded else 0
    recordings = []
    for topic in topics:
        commands = [(raw.receive_ns, content) for raw, content in decoded if raw.topic == topic]
        if not commands:
            continue
        received = tuple(Received(clock.at(receive_ns), message) for receive_ns, message in commands)
        states = messages.controller_first(topic, _states(commands[0][0], decoded))
        recordings.append(Recording(topic, received, *states, begin_ns, tuple(notes)))
    if not recordings:
        raise BagError(
            '; '.join([*notes, f'{bag} holds no message on {", ".join(topics)}: was the sender active, not in dry run?'])
        )
    return recordings


def _states(first_ns: int, decoded: Iterable[tuple[_Raw, Any]]) -> Iterable[JointPositions]:
    """The state of each state topic that was newest at ``first_ns``, or the first one after it."""
    found: dict[str, JointPositions] = {}
    for raw, content in decoded:
        if raw.type not in STATE_TYPES or (raw.receive_ns > first_ns and raw.topic in found):
            continue
        state = messages.positions_from_message(raw.topic, content)
        if state is not None:
            found[raw.topic] = state
    return found.values()


def _controller_clock(decoded: Sequence[tuple[_Raw, Any]], notes: list[str]) -> _ControllerClock:
    ticks = [(raw.receive_ns, messages.clock_ns(content)) for raw, content in decoded if raw.type == CLOCK_TYPE]
    if ticks:
        if _distance(ticks) > _OTHER_CLOCK_NS:
            notes.append('receive times are brought onto the /clock of the bag')
        return _ControllerClock(ticks)
    stamped = [(raw.receive_ns, messages.stamp_ns(content)) for raw, content in decoded if raw.type in STATE_TYPES]
    stamped = [(receive, stamp) for receive, stamp in stamped if stamp > 0]
    if stamped and _distance(stamped) > _OTHER_CLOCK_NS:
        notes.append(
            f'the stamps of joint and controller states are {_distance(stamped) / NS_PER_S:.1f} s from the receive times: '
            'receive times are brought onto the clock of those stamps'
        )
        return _ControllerClock(stamped)
    return _ControllerClock(())


def _distance(pairs: Sequence[tuple[int, int]]) -> float:
    """Median distance of the two times, ns."""
    return abs(float(np.median([float(receive - other) for receive, other in pairs])))
