"""What a live node answered, asked again: the same observations from the bag through the same code, answer by answer.

A node publishes with each chunk the stamps of the messages that it had looked at. Exactly those messages are taken from the bag,
the policy is asked, and its answer is laid beside the recorded one. With the node's checkpoint and seed they agree to the last
digits; where they do not, deployment and evaluation have drifted apart, or the bag does not hold what the node saw.

Messages are found by stamp and not by order: DDS keeps the order of one topic, not that of two, so that a node may have looked at
an image before the joint state that the recorder wrote down first.

Enters: an episode, a policy, recorded chunks. Leaves: a `Reproduction`. Caller's thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.typesys import get_types_from_msg

from vla_policy_ros.bags.reading import Bag, BagError
from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.observation import ObservationAssembler, Snapshot
from vla_policy_ros.replay.annotate import CHUNK_TYPE
from vla_policy_ros.resources import message_path
from vla_policy_ros.runtime import Infer
from vla_policy_ros.types import NS_PER_S

# How long what a node may still have looked at is kept, once a newer message of the same input was played; memory bounds it.
DISORDER_NS = 2 * NS_PER_S

Part = tuple[str, int]
Key = tuple[Part, ...]


@dataclass(frozen=True)
class LiveChunk:
    """A recorded vla_policy_msgs/ActionChunk, as far as it matters: ``actions`` float64 ``[T, A]``."""

    input_stamps: Mapping[str, int]
    instruction: str
    actions: NDArray[np.float64]
    checkpoint_hash: str
    stats_hash: str

    @classmethod
    def of(cls, message: Any) -> LiveChunk:
        """From a message of rclpy or rosbags. Raises ValueError where its sizes contradict each other."""
        stamps = [int(stamp.sec) * NS_PER_S + int(stamp.nanosec) for stamp in message.input_stamps]
        actions = np.asarray(message.actions, dtype=np.float64).reshape(int(message.horizon), len(message.joint_names))
        names = dict(zip(message.input_names, stamps, strict=True))
        return cls(names, message.instruction, actions, message.checkpoint_hash, message.stats_hash)

    @property
    def key(self) -> Key:
        """What identifies the observation that it answers."""
        return tuple(sorted(self.input_stamps.items()))


@dataclass(frozen=True)
class Reproduction:
    """How recorded answers compare with replayed ones.

    Attributes:
        recorded: chunks of the node; ``matched``: of those, how many observations the bag holds.
        largest: largest difference of an action, robot units; None where nothing matched.
        differences: per matched chunk, in order.
    """

    recorded: int
    matched: int
    largest: float | None
    differences: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {'recorded': self.recorded, 'matched': self.matched, 'largest_difference': self.largest}


def recorded_chunks(path: Path) -> list[LiveChunk]:
    """The chunks that were recorded in a bag.

    Raises:
        BagError: there is no such bag, or it has no topic of ActionChunk.
        DamagedBag: it is damaged.
    """
    with Bag(path) as bag:
        topics = [topic for topic, kind in bag.types.items() if kind == CHUNK_TYPE]
        if not topics:
            raise BagError(f'{path} has no topic of type {CHUNK_TYPE}: record the node\'s "~/chunk"')
        definitions = get_types_from_msg(message_path('ActionChunk').read_text(encoding='utf-8'), CHUNK_TYPE)
        bag.store.register({name: fields for name, fields in definitions.items() if name not in bag.store.fielddefs})
        return [LiveChunk.of(bag.store.deserialize_cdr(stored.data, stored.type)) for stored in bag.messages(topics)]


def reproduce(episode: BagEpisode, infer: Infer, chunks: Sequence[LiveChunk]) -> Reproduction:
    """Ask again what was asked for ``chunks``. ``infer`` must have the seed of the node."""
    differences = []
    for chunk, snapshot in _seen(episode, chunks):
        answer = infer(snapshot.decode(), None)
        same_shape = answer.actions.shape == chunk.actions.shape
        differences.append(float(np.abs(answer.actions - chunk.actions).max()) if same_shape else float('inf'))
    return Reproduction(len(chunks), len(differences), max(differences, default=None), tuple(differences))


def _seen(episode: BagEpisode, chunks: Sequence[LiveChunk]) -> Iterator[tuple[LiveChunk, Snapshot]]:
    """Every chunk of which the bag has all that was looked at, with that; as soon as the last message of it was played."""
    assembler = ObservationAssembler(episode.recorded_robot)
    waiting = {chunk.key: chunk for chunk in chunks}
    naming: dict[Part, set[Key]] = defaultdict(set)
    for key in waiting:
        for part in key:
            naming[part].add(key)
    held: dict[Part, tuple[int, Any]] = {}
    instructions: set[str] = set()
    with episode.open_bag() as bag:
        for fed in episode.replay(bag).feed(assembler):
            if not waiting:
                break
            newest = assembler.snapshot()
            instructions.add(newest.instruction)
            found = {part: (fed.now_ns, value) for part, value in _parts(newest).items() if part in naming}
            held = {part: kept for part, kept in (held | found).items() if fed.now_ns - kept[0] <= DISORDER_NS}
            complete = {key for part in held for key in naming[part] if key in waiting and held.keys() >= set(key)}
            for key in sorted(complete, key=lambda key: max(stamp for _, stamp in key)):
                whole = _snapshot(newest, {part: held[part][1] for part in key}, waiting[key].instruction)
                if whole is not None and whole.instruction in instructions:
                    yield waiting.pop(key), whole


def _parts(snapshot: Snapshot) -> dict[Part, Any]:
    """The images and the state of ``snapshot``, as far as there are any, by input and stamp."""
    parts = {(f'camera:{name}', stamp): message for name, (message, stamp, _) in snapshot.images.items()}
    parts['state', snapshot.state_stamp_ns] = snapshot.state
    return {part: value for part, value in parts.items() if value is not None}


def _snapshot(newest: Snapshot, parts: Mapping[Part, Any], instruction: str) -> Snapshot | None:
    """``newest`` with the images and the state of ``parts``; None where they are of other inputs, or a K is not known so far."""
    stamps = dict(parts.keys())
    if set(stamps) != set(newest.input_stamps):
        return None
    images = {}
    for name, (_, _, info) in newest.images.items():
        if info is None and newest.robot.cameras[name].camera_info:
            return None
        stamp = stamps[f'camera:{name}']
        images[name] = (parts[f'camera:{name}', stamp], stamp, info)
    state = parts['state', stamps['state']]
    return replace(newest, images=images, state=state, state_stamp_ns=stamps['state'], instruction=instruction)


def foreign(chunks: Iterable[LiveChunk], checkpoint_hash: str, stats_hash: str) -> int:
    """How many of ``chunks`` are of another checkpoint."""
    return sum((chunk.checkpoint_hash, chunk.stats_hash) != (checkpoint_hash, stats_hash) for chunk in chunks)
