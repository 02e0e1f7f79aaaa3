"""Stored messages of a bag (rosbag2, mcap or sqlite3) in the order in which they were received, also of a damaged one.

`Bag` streams: it holds one message at a time. A damaged bag is read as far as it goes, through `mcap_recovery` and
`sqlite_recovery`; what is missing is said in its notes. `BagClock` brings receive times onto the clock that stamps speak of.

Enters: a path. Leaves: bytes with topic, type and receive time, and the definitions to decode them with. Caller's thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.interfaces.typing import RPath
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_policy_ros.bags import recording as messages
from vla_policy_ros.bags import ros1
from vla_policy_ros.bags.mcap_recovery import RecoveredMcap
from vla_policy_ros.bags.sqlite_recovery import RecoveredSqlite
from vla_policy_ros.types import NS_PER_S

CONTROLLER_STATE_TYPE = 'control_msgs/msg/JointTrajectoryControllerState'
STATE_TYPES = ('sensor_msgs/msg/JointState', CONTROLLER_STATE_TYPE)
CLOCK_TYPE = 'rosgraph_msgs/msg/Clock'

# Stamps further from the receive times than this are of another clock, not of a slow network.
_OTHER_CLOCK_NS = NS_PER_S

Choose = Callable[[Mapping[str, str]], Collection[str]]


class BagError(ValueError):
    """The bag cannot be used; the message says why and what to do."""


class DamagedBag(Exception):
    """The bag cannot be read to its end as it is; open it with ``salvage``."""


@dataclass(frozen=True)
class StoredMessage:
    """A stored message: ``data`` is CDR, ``receive_ns`` the recorder's time."""

    topic: str
    type: str
    receive_ns: int
    data: bytes


class Bag:
    """An open bag. Use it as a context manager.

    Args:
        path: folder of a rosbag2 bag, one of its storage files, or a ROS 1 bag (`ros1`).
        salvage: read what is left of a damaged bag. Without it, damage raises `DamagedBag`.
        notes: sentences about what was lost are added here.

    Attributes:
        types: topic to type name.
        store: definitions of ROS 2's own messages, and the bag's of control_msgs.

    Raises:
        BagError: there is no such bag, or nothing of it can be read.
        DamagedBag: it cannot be opened as it is.
    """

    def __init__(self, path: Path, *, salvage: bool = False, notes: list[str] | None = None) -> None:
        if not path.exists():
            raise BagError(f'bag {path} does not exist; give the folder of a rosbag2 bag, or its .mcap or .db3 file')
        if path.suffix == ros1.SUFFIX and path.is_file():
            try:
                path = ros1.as_rosbag2(path)
            except ValueError as error:
                raise BagError(str(error)) from error
        self.path = path
        self.salvage = salvage
        self.notes = [] if notes is None else notes
        self._readers: list[Reader | RecoveredSqlite] = []
        self._files: list[Path] = []
        try:
            if salvage:
                self._open_damaged()
            else:
                self._open_intact()
            connections = [connection for reader in self._readers for connection in reader.connections]
            self.types = _types(connections)
            self.store = _typestore(connections)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        readers, self._readers = self._readers, []
        for reader in readers:
            reader.close()

    def messages(self, topics: Collection[str]) -> Iterator[StoredMessage]:
        """The messages of ``topics`` in the order in which they were received.

        Raises:
            DamagedBag: the file is damaged and ``salvage`` was not asked for.
        """
        return self._salvaged(topics) if self.salvage else self._intact(topics)

    def _open_intact(self) -> None:
        # The library raises anything at damaged files.
        try:
            reader = Reader(self.path)
            reader.open()
        except Exception as error:
            raise DamagedBag(_sentence(error)) from error
        self._readers.append(reader)

    def _intact(self, topics: Collection[str]) -> Iterator[StoredMessage]:
        (reader,) = self._readers
        connections = _chosen(reader.connections, topics)
        promised = sum(connection.msgcount for connection in connections)
        count = 0
        source = iter(reader.messages(connections)) if connections else iter(())
        while True:
            try:
                connection, time_ns, data = next(source)
            except StopIteration:
                break
            except Exception as error:
                raise DamagedBag(_sentence(error)) from error
            count += 1
            yield StoredMessage(connection.topic, connection.msgtype, time_ns, bytes(data))
        if count < promised:
            self.note(f'the bag announces {promised} messages on the topics that were read, but holds {count}')

    def _open_damaged(self) -> None:
        is_folder = self.path.is_dir()
        files = sorted(path for path in self.path.iterdir() if path.suffix in ('.mcap', '.db3')) if is_folder else [self.path]
        if not files:
            raise BagError('; '.join([*self.notes[-1:], 'the folder holds no .mcap or .db3 file']))
        for file in files:
            try:
                self._readers.append(self._open_file(file, tell=True))
                self._files.append(file)
            except Exception as error:
                self.note(f'{file.name} is not readable: {_sentence(error)}')
        if not any(reader.connections for reader in self._readers):
            raise BagError('; '.join([*self.notes, 'nothing is left to read']))

    def _open_file(self, file: Path, *, tell: bool) -> Reader | RecoveredSqlite:
        if file.suffix != '.mcap':
            return RecoveredSqlite(file)
        recovered = RecoveredMcap(file)
        if tell:
            for sentence in recovered.lost:
                self.note(sentence)
        reader = Reader(cast(RPath, recovered))
        reader.open()
        return reader

    def _salvaged(self, topics: Collection[str]) -> Iterator[StoredMessage]:
        """File by file; in each, every topic by a reader of its own, so that damage to one does not end the others."""
        for file, reader in zip(self._files, self._readers, strict=True):
            streams = [self._topic_of(file, topic) for topic in sorted({c.topic for c in _chosen(reader.connections, topics)})]
            yield from heapq.merge(*streams, key=lambda message: message.receive_ns)

    def _topic_of(self, file: Path, topic: str) -> Iterator[StoredMessage]:
        reader = self._open_file(file, tell=False)
        count = 0
        try:
            for connection, time_ns, data in reader.messages(_chosen(reader.connections, [topic])):
                yield StoredMessage(connection.topic, connection.msgtype, time_ns, bytes(data))
                count += 1
        except GeneratorExit:
            raise
        except Exception as error:
            self.note(f'{topic} is read for {count} messages, then: {_sentence(error)}')
        finally:
            if isinstance(reader, RecoveredSqlite):
                for sentence in reader.lost:
                    self.note(sentence)
            reader.close()

    def note(self, sentence: str) -> None:
        """Note what the operator should know, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


def damage_note(path: Path, error: DamagedBag) -> str:
    """What the operator is told where a bag has to be salvaged."""
    return f'{path} is damaged or was not finished ({error}); what can be read of it was read'


def read_all(path: Path, choose: Choose, notes: list[str]) -> tuple[list[StoredMessage], Typestore]:
    """Every stored message of the topics that ``choose`` picks from topic and type, in memory, sorted by receive time.

    Raises:
        BagError: nothing can be read, or whatever ``choose`` raises.
    """
    found: list[str] = list(notes)
    try:
        with Bag(path, notes=found) as bag:
            stored = list(bag.messages(choose(bag.types)))
            store = bag.store
    except DamagedBag as error:
        found = [*notes, damage_note(path, error)]
        with Bag(path, salvage=True, notes=found) as bag:
            stored = list(bag.messages(choose(bag.types)))
            store = bag.store
    notes[:] = found
    return sorted(stored, key=lambda message: message.receive_ns), store


class BagClock:
    """Brings receive times onto another clock.

    Args:
        pairs: (receive time, time of the other clock), both ns, in order of the first; empty where they are the same.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]] = ()) -> None:
        self._origin = pairs[0] if pairs else (0, 0)
        self._receive = np.array([receive - self._origin[0] for receive, _ in pairs], dtype=np.float64)
        self._clock = np.array([clock - self._origin[1] for _, clock in pairs], dtype=np.float64)

    def at(self, receive_ns: int) -> int:
        """The other clock's time; before the first pair and after the last it goes at the pace of the receive times."""
        if not self._receive.size:
            return receive_ns
        offset_ns = receive_ns - self._origin[0]
        outside = min(0.0, offset_ns - self._receive[0]) + max(0.0, offset_ns - self._receive[-1])
        return self._origin[1] + round(float(np.interp(offset_ns, self._receive, self._clock)) + outside)

    @classmethod
    def of(cls, ticks: Sequence[tuple[int, int]], stamped: Sequence[tuple[int, int]], notes: list[str]) -> BagClock:
        """The clock that a recording's stamps are of.

        Args:
            ticks: (receive time, time) of `/clock`.
            stamped: (receive time, stamp) of joint and controller states, which count where there are no ticks and they are
                further from the receive times than any transport is.
            notes: what is done is added here.
        """
        if ticks:
            if _distance(ticks) > _OTHER_CLOCK_NS:
                notes.append('receive times are brought onto the /clock of the bag')
            return cls(ticks)
        stamped = [(receive, stamp) for receive, stamp in stamped if stamp > 0]
        if stamped and _distance(stamped) > _OTHER_CLOCK_NS:
            notes.append(
                f'the stamps of joint and controller states are {_distance(stamped) / NS_PER_S:.1f} s from the receive times: '
                'receive times are brought onto the clock of those stamps'
            )
            return cls(stamped)
        return cls()


def clock_pair(message: StoredMessage, content: Any) -> tuple[int, int]:
    """(receive time, what the message says of the time) of a Clock or of a stamped message."""
    said = messages.clock_ns(content) if message.type == CLOCK_TYPE else messages.stamp_ns(content)
    return message.receive_ns, said


def _distance(pairs: Sequence[tuple[int, int]]) -> float:
    """Median distance of the two times, ns."""
    return abs(float(np.median([float(receive - other) for receive, other in pairs])))


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
