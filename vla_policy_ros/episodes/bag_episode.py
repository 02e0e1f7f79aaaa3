"""A bag as an episode: its messages go, in the order of receipt and on its own clock, through the code of the live node.

A step is taken when every camera has delivered a new image since the last one and nothing keeps an observation from being made,
as the live node would judge at that moment: by the same slots, ages and skews. So training sees what the node would have seen,
with its latencies. The bag is read twice, once for everything but pixels, and again for the pixels that are asked for.

Actions come, controller by controller, from its commands; where there are none, from its reported reference; where there is none
either, from the joint states that followed.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rosbags.typesys.store import Typestore

from vla_policy_ros.bags.reading import (
    CLOCK_TYPE,
    STATE_TYPES,
    Bag,
    BagClock,
    BagError,
    DamagedBag,
    StoredMessage,
    clock_pair,
    damage_note,
)
from vla_policy_ros.bags.recording import positions_from_message, stamp_ns, trajectory_from_message
from vla_policy_ros.episodes.commands import CommandError, Commands, Targets, targets_of_rows, targets_of_trajectories
from vla_policy_ros.episodes.episode import Episode, EpisodeError, InputTimes, Provenance, Step, read_provenance
from vla_policy_ros.observation import ObservationAssembler, ObservationError, Snapshot
from vla_policy_ros.robot import Camera, Controller, Robot
from vla_policy_ros.runtime import without_numbers
from vla_policy_ros.types import NS_PER_S, Observation

IMAGE_TYPE = 'sensor_msgs/msg/Image'
COMPRESSED_TYPE = 'sensor_msgs/msg/CompressedImage'
INFO_TYPE = 'sensor_msgs/msg/CameraInfo'
JOINT_STATE_TYPE = 'sensor_msgs/msg/JointState'
STRING_TYPE = 'std_msgs/msg/String'
TRAJECTORY_TYPE = 'trajectory_msgs/msg/JointTrajectory'
ARRAY_TYPE = 'std_msgs/msg/Float64MultiArray'
COMPRESSED_SUFFIX = '/compressed'

Rows = list[tuple[int, NDArray[np.float64]]]


class BagEpisode(Episode):
    """One bag as one episode.

    Args:
        path: folder of a rosbag2 bag, or one of its storage files.
        robot: the robot file.
        instruction: in force during the whole episode, whatever the bag says; needed where it says none.

    Raises:
        EpisodeError: a topic is missing or of another type, or no observation can be made of the bag.
    """

    def __init__(self, path: Path, robot: Robot, instruction: str | None = None) -> None:
        self.path, self.name = path, path.name
        self._instruction = instruction
        self.notes = []
        try:
            try:
                self._scan(robot, salvage=False)
            except DamagedBag as error:
                self.notes = [damage_note(path, error)]
                self._scan(robot, salvage=True)
        except BagError as error:
            raise EpisodeError(str(error)) from error

    def observations(self, indices: Sequence[int] | None = None) -> Iterator[Observation]:
        """See `Episode.observations`: one pass over the bag, which holds the newest messages only."""
        wanted = self.checked(indices)
        if not len(wanted):
            return
        last = wanted[-1]
        chosen = wanted if isinstance(wanted, range) else frozenset(wanted)
        with self.open_bag() as bag:
            playback = self.replay(bag)
            for index, snapshot in enumerate(playback.snapshots()):
                if index in chosen:
                    try:
                        yield snapshot.decode()
                    except ObservationError as error:
                        raise EpisodeError(f'{self.name}, step {index}: {error}') from error
                if index == last:
                    return

    @property
    def recorded_robot(self) -> Robot:
        """The robot file with the topics and transports of the bag, which decode its messages."""
        return self._topics.robot

    def replay(self, bag: Bag) -> Playback:
        """A fresh pass over ``bag``, which `open_bag` has opened, with the topics and the clock of this episode."""
        return Playback(bag, self._topics, self._clock, self._instruction)

    def open_bag(self) -> Bag:
        """The bag, as it could be read; use it as a context manager."""
        return Bag(self.path, salvage=self._salvage, notes=self.notes)

    def _scan(self, robot: Robot, *, salvage: bool) -> None:
        self._salvage = salvage
        with self.open_bag() as bag:
            self._topics = resolve_topics(robot, bag.types, self.name, self._instruction)
            self._clock = _clock(bag, self.notes)
            playback = self.replay(bag)
            steps = [_step(snapshot) for snapshot in playback.snapshots()]
        self.robot, self.steps, self.skipped = robot, tuple(steps), playback.skipped
        self.notes += self._topics.notes
        if not steps:
            raise EpisodeError(f'no observation can be made of {self.name}: {_most_common(playback.skipped)}')
        self.commands = _commands(robot, playback, self.notes)
        self.inputs = playback.inputs()
        self.uncalibrated = tuple(name for name, c in self._topics.robot.cameras.items() if c.camera_info is None and c.K is None)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.provenance = Provenance.of(self.name, 'rosbag2', robot, read_provenance(folder))


@dataclass(frozen=True)
class BagTopics:
    """Where the inputs of a robot are in one bag.

    Attributes:
        robot: the robot file with the topics and transports of the bag.
        commands, references: controller name to topic, where the bag has it.
    """

    robot: Robot
    commands: Mapping[str, str]
    references: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Every topic to read."""
        cameras = self.robot.cameras.values()
        names = {camera.topic for camera in cameras} | {camera.camera_info for camera in cameras if camera.camera_info}
        return names | {self.robot.state.topic, self.robot.instruction.topic, *self.commands.values(), *self.references.values()}


def resolve_topics(robot: Robot, types: Mapping[str, str], name: str, instruction: str | None = None) -> BagTopics:
    """Find the robot's topics among those of a bag, ``types`` by topic.

    An image may be there in the other transport, under the name that image_transport gives it. A camera whose ``camera_info`` was
    not recorded is uncalibrated.

    Raises:
        EpisodeError: an input is missing or of another type; all are listed with the closest names.
    """
    problems: list[str] = []
    notes: list[str] = []

    def find(what: str, topic: str, *kinds: str) -> str | None:
        found = _named(topic, types)
        if found is None:
            problems.append(f'{what}: no topic {topic}{_closest(topic, [t for t, k in types.items() if k in kinds])}')
        elif types[found] not in kinds:
            problems.append(f'{what}: topic {found} is of type {types[found]}, not {" or ".join(kinds)}')
        return found

    cameras = {}
    for camera_name, camera in robot.cameras.items():
        stem = camera.topic.removesuffix(COMPRESSED_SUFFIX)
        there = next((t for t in (camera.topic, stem, stem + COMPRESSED_SUFFIX) if _named(t, types)), camera.topic)
        topic = find(f'camera {camera_name!r}', there, IMAGE_TYPE, COMPRESSED_TYPE)
        info = camera.camera_info and _named(camera.camera_info, types)
        if camera.camera_info and not info:
            notes.append(f'camera {camera_name!r} is uncalibrated: {camera.camera_info} was not recorded')
        cameras[camera_name] = _as_recorded(camera, topic, types, info)
    state = find('joint state', robot.state.topic, JOINT_STATE_TYPE)
    text = _named(robot.instruction.topic, types)
    if instruction is None:
        text = find('instruction (give one with --instruction)', robot.instruction.topic, STRING_TYPE)
    if problems:
        listed = ', '.join(f'{topic} ({kind})' for topic, kind in sorted(types.items())) or 'nothing'
        raise EpisodeError('\n  '.join([f'{name} does not have what robot {robot.name} needs:', *problems, f'it has {listed}']))
    in_bag = robot.model_copy(
        update={
            'cameras': cameras,
            'state': robot.state.model_copy(update={'topic': state}),
            'instruction': robot.instruction.model_copy(update={'topic': text or robot.instruction.topic}),
        }
    )
    commands = {key: _named(c.topic, types) for key, c in robot.controllers.items()}
    references = {key: c.state_topic and _named(c.state_topic, types) for key, c in robot.controllers.items()}
    return BagTopics(
        in_bag,
        MappingProxyType({key: topic for key, topic in commands.items() if topic}),
        MappingProxyType({key: topic for key, topic in references.items() if topic}),
        tuple(notes),
    )


def _as_recorded(camera: Camera, topic: str | None, types: Mapping[str, str], info: str | None) -> Camera:
    kind = types.get(topic or '')
    transport = 'compressed' if kind == COMPRESSED_TYPE else 'raw'
    return camera.model_copy(update={'topic': topic or camera.topic, 'transport': transport, 'camera_info': info or None})


def _named(topic: str, types: Mapping[str, str]) -> str | None:
    """The bag's name of a topic of the robot file; a relative one may be in any namespace, if only one has it."""
    if topic in types or topic.startswith('/'):
        return topic if topic in types else None
    ending = '/' + topic.removeprefix('~/')
    found = [name for name in types if name.endswith(ending)]
    return found[0] if len(found) == 1 else None


def _closest(topic: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(topic, candidates, n=1, cutoff=0.3) or list(candidates[:1])
    return f'; closest: {near[0]}' if near else ''


# ---- playing a bag through the assembler -----------------------------------------------------------------------------------------


class Sink(Protocol):
    """Who is told the messages of a robot's inputs, as an `ObservationAssembler` is: each answers why it was refused, or None."""

    def put_image(self, camera: str, message: Any, now_ns: int) -> str | None: ...

    def put_camera_info(self, camera: str, message: Any, now_ns: int) -> str | None: ...

    def put_joint_state(self, message: Any, now_ns: int) -> str | None: ...

    def put_instruction(self, text: str, now_ns: int) -> str | None: ...

    @property
    def state(self) -> tuple[NDArray[np.float64], int] | None: ...


@dataclass(frozen=True)
class Fed:
    """A message that a sink was told: its topic, the camera if it is an image, and whether it was refused."""

    topic: str
    camera: str | None
    message: Any
    now_ns: int
    refused: bool


@dataclass
class Playback:
    """One pass over a bag. After it, what was heard beside the pixels."""

    bag: Bag
    topics: BagTopics
    clock: BagClock
    instruction: str | None
    skipped: Counter[str] = field(default_factory=Counter)
    times: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    trajectories: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    arrays: dict[str, Rows] = field(default_factory=dict)
    references: dict[str, Rows] = field(default_factory=dict)
    states: Rows = field(default_factory=list)

    def snapshots(self) -> Iterator[Snapshot]:
        """The snapshots of the steps, undecoded."""
        robot = self.topics.robot
        assembler = ObservationAssembler(robot)
        last, fresh = dict.fromkeys(robot.cameras, 0), set[str]()
        for fed in self.feed(assembler):
            camera = fed.camera
            if camera is None or fed.refused:
                continue
            if stamp_ns(fed.message) == last[camera]:
                self.skipped[f'camera {camera!r}: an image of the same stamp again'] += 1
                continue
            fresh.add(camera)
            if len(fresh) < len(robot.cameras):
                continue
            problems = assembler.problems(fed.now_ns)
            if problems:
                self.skipped[f'no step: {_kind(problems[0])}'] += 1
                continue
            snapshot = assembler.snapshot()
            last.update({name: stamp for name, (_, stamp, _) in snapshot.images.items()})
            fresh.clear()
            yield snapshot

    def feed(self, sink: Sink) -> Iterator[Fed]:
        """Tell ``sink`` every message, in the order of receipt; each is yielded once it was told."""
        if self.instruction is not None:
            refused = sink.put_instruction(self.instruction, 1)
            if refused:
                raise EpisodeError(refused)
        cameras = {camera.topic: name for name, camera in self.topics.robot.cameras.items()}
        for stored in self.bag.messages(self.topics.names):
            now_ns = self.clock.at(stored.receive_ns)
            message = self._decoded(self.bag.store, stored)
            if message is None:
                continue
            refused = self._put(sink, stored.topic, message, now_ns)
            if refused:
                self.skipped[_kind(refused)] += 1
            yield Fed(stored.topic, cameras.get(stored.topic), message, now_ns, refused is not None)

    def inputs(self) -> tuple[InputTimes, ...]:
        """Times of all messages that were played."""
        return tuple(
            InputTimes(name, np.array([s for s, _ in pairs], dtype=np.int64), np.array([r for _, r in pairs], dtype=np.int64))
            for name, pairs in self.times.items()
        )

    def _decoded(self, store: Typestore, stored: StoredMessage) -> Any | None:
        try:
            return store.deserialize_cdr(stored.data, stored.type)
        except Exception as error:  # damaged bytes, or a type whose definition the bag does not have
            self.skipped[f'{stored.topic}: a message cannot be decoded ({type(error).__name__})'] += 1
            return None

    def _put(self, sink: Sink, topic: str, message: Any, now_ns: int) -> str | None:
        robot = self.topics.robot
        for name, camera in robot.cameras.items():
            if topic == camera.topic:
                self._note_time(f'camera:{name}', stamp_ns(message), now_ns)
                return sink.put_image(name, message, now_ns)
            if topic == camera.camera_info:
                return sink.put_camera_info(name, message, now_ns)
        if topic == robot.state.topic:
            self._note_time('state', stamp_ns(message), now_ns)
            refused = sink.put_joint_state(message, now_ns)
            if not refused and sink.state is not None:
                vector, when_ns = sink.state
                self.states.append((when_ns, robot.action_positions(vector)))
            return refused
        if topic == robot.instruction.topic:
            return None if self.instruction is not None else sink.put_instruction(message.data, now_ns)
        return self._put_command(topic, message, now_ns)

    def _put_command(self, topic: str, message: Any, now_ns: int) -> str | None:
        for name, controller in self.topics.robot.controllers.items():
            if topic == self.topics.commands.get(name):
                if controller.type == 'joint_trajectory':
                    self._note_time(f'command:{name}', stamp_ns(message) or now_ns, now_ns)
                    trajectory = trajectory_from_message(message)
                    if not trajectory.points:
                        return None  # a request to hold
                    self.trajectories.setdefault(name, []).append((now_ns, trajectory))
                    return _not_finite(topic, *(point.positions for point in trajectory.points))
                values = np.asarray(message.data, dtype=np.float64)
                self._note_time(f'command:{name}', now_ns, now_ns)
                if values.shape != (len(controller.joints),) or not np.isfinite(values).all():
                    return f'message on {topic} refused: it needs {len(controller.joints)} finite values'
                self.arrays.setdefault(name, []).append((now_ns + round(NS_PER_S / controller.update_rate), values))
                return None
            if topic == self.topics.references.get(name):
                reported = positions_from_message(topic, message)
                if reported is None or any(joint not in reported.positions for joint in controller.joints):
                    return f'controller state on {topic} refused: it does not name all joints of {name} with finite positions'
                values = np.array([reported.positions[joint] for joint in controller.joints])
                self.references.setdefault(name, []).append((stamp_ns(message) or now_ns, values))
        return None

    def _note_time(self, name: str, made_ns: int, now_ns: int) -> None:
        self.times.setdefault(name, []).append((made_ns, now_ns))


def _not_finite(topic: str, *positions: NDArray[np.float64]) -> str | None:
    if all(np.isfinite(np.asarray(values)).all() for values in positions):
        return None
    return f'command on {topic} refused: a position is not finite'


def _clock(bag: Bag, notes: list[str]) -> BagClock:
    """The clock that the bag's stamps are of."""
    ticking = [topic for topic, kind in bag.types.items() if kind == CLOCK_TYPE]
    stamped = [topic for topic, kind in bag.types.items() if kind in STATE_TYPES]
    pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for stored in bag.messages(ticking or stamped):
        try:
            pairs[stored.type == CLOCK_TYPE].append(clock_pair(stored, bag.store.deserialize_cdr(stored.data, stored.type)))
        except DamagedBag:
            raise
        except Exception:  # damaged bytes; the playback counts them
            continue
    return BagClock.of(pairs[True], pairs[False], notes)


def _step(snapshot: Snapshot) -> Step:
    stamps = {name: stamp for name, (_, stamp, _) in snapshot.images.items()}
    return Step(snapshot.stamp_ns, MappingProxyType(stamps), snapshot.state, snapshot.state_stamp_ns, snapshot.instruction)


# ---- what was commanded ----------------------------------------------------------------------------------------------------------


def _commands(robot: Robot, playback: Playback, notes: list[str]) -> Commands:
    streams = []
    for name, controller in robot.controllers.items():
        found = _commanded(robot, name, controller, playback, notes) or _reported(name, controller, playback)
        streams.append(found or _measured(robot, name, controller, playback, notes))
    try:
        return Commands(robot.action.joints, tuple(streams))
    except CommandError as error:
        raise EpisodeError(str(error)) from error


def _commanded(robot: Robot, name: str, controller: Controller, playback: Playback, notes: list[str]) -> Targets | None:
    source = f'commands on {playback.topics.commands.get(name)}'
    try:
        if playback.arrays.get(name):
            return targets_of_rows(controller.joints, playback.arrays[name], source)
        if playback.trajectories.get(name):
            start = _at(robot, controller, playback, playback.trajectories[name][0][0])
            return targets_of_trajectories(controller, playback.trajectories[name], start, source)
    except CommandError as error:
        notes.append(f'commands of {name} are not used: {error}')
    return None


def _reported(name: str, controller: Controller, playback: Playback) -> Targets | None:
    rows = playback.references.get(name)
    return targets_of_rows(controller.joints, rows, f'reference on {playback.topics.references[name]}') if rows else None


def _measured(robot: Robot, name: str, controller: Controller, playback: Playback, notes: list[str]) -> Targets:
    notes.append(f'no commands of {name} were recorded: the joint states that followed are taken for actions')
    columns = [robot.action.joints.index(joint) for joint in controller.joints]
    rows = [(when_ns, positions[columns]) for when_ns, positions in playback.states]
    return targets_of_rows(controller.joints, rows, f'joint states on {playback.topics.robot.state.topic}')


def _at(robot: Robot, controller: Controller, playback: Playback, now_ns: int) -> NDArray[np.float64]:
    """Measured positions ``[J]`` of the controller's joints at a time: the newest state then, or else the first."""
    columns = [robot.action.joints.index(joint) for joint in controller.joints]
    before = [positions for when_ns, positions in playback.states if when_ns <= now_ns]
    return (before[-1] if before else playback.states[0][1])[columns]


def _kind(sentence: str) -> str:
    return without_numbers(sentence)


def _most_common(skipped: Counter[str]) -> str:
    if not skipped:
        return 'it holds no image'
    return '; '.join(f'{reason} ({count} times)' for reason, count in skipped.most_common(4))
