"""Command topics of a bag (rosbag2, mcap or sqlite3) as recordings on the clock of the controller.

A bag stores when its recorder received a message. The controller judges stamps on its own clock, which is another one where the
controller runs on simulated time and the recorder did not. So receive times are brought onto the controller's clock through what
the bag says of it: `/clock` where it was recorded, else the stamps of the joint or controller states where they are further from
the receive times than any transport is.

A damaged bag is read as far as it goes; what is missing is said in the notes of the recordings.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rosbags.typesys.store import Typestore

from vla_policy_ros.bags import recording as messages
from vla_policy_ros.bags.reading import CLOCK_TYPE, STATE_TYPES, BagClock, BagError, StoredMessage, clock_pair, read_all
from vla_policy_ros.bags.recording import JointPositions, Received, Recording

__all__ = ['BagError', 'read_recordings']

TRAJECTORY_TYPE = 'trajectory_msgs/msg/JointTrajectory'


def read_recordings(bag: Path, topic: str | None = None, preferred: Sequence[str] = ()) -> list[Recording]:
    """The command topics of ``bag``.

    Args:
        bag: folder of a rosbag2 bag, or one of its storage files.
        topic: the one to read.
        preferred: without ``topic``, those of these that the bag has; without them, every topic of trajectories.

    Raises:
        BagError: there is no such bag, it cannot be read at all, or what was asked for is not in it.
    """
    chosen: list[str] = []

    def choose(types: Mapping[str, str]) -> Collection[str]:
        chosen[:] = _command_topics(bag, types, topic, preferred)
        useful = {name for name, kind in types.items() if kind == CLOCK_TYPE or kind in STATE_TYPES}
        return useful.union(chosen)

    notes: list[str] = []
    raws, types_store = read_all(bag, choose, notes)
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


# ---- from stored messages to recordings -----------------------------------------------------------------------------------------


def _recordings(
    bag: Path, topics: Sequence[str], raws: Sequence[StoredMessage], store: Typestore, notes: list[str]
) -> list[Recording]:
    decoded: list[tuple[StoredMessage, Any]] = []
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


def _states(first_ns: int, decoded: Iterable[tuple[StoredMessage, Any]]) -> Iterable[JointPositions]:
    """The state of each state topic that was newest at ``first_ns``, or the first one after it."""
    found: dict[str, JointPositions] = {}
    for raw, content in decoded:
        if raw.type not in STATE_TYPES or (raw.receive_ns > first_ns and raw.topic in found):
            continue
        state = messages.positions_from_message(raw.topic, content)
        if state is not None:
            found[raw.topic] = state
    return found.values()


def _controller_clock(decoded: Sequence[tuple[StoredMessage, Any]], notes: list[str]) -> BagClock:
    ticks = [clock_pair(raw, content) for raw, content in decoded if raw.type == CLOCK_TYPE]
    stamped = [clock_pair(raw, content) for raw, content in decoded if raw.type in STATE_TYPES]
    return BagClock.of(ticks, stamped, notes)
