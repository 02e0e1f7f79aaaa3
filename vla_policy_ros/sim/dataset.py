"""Training examples from the simulator: what the live node would see, and what the expert would do.

Episodes are not played. Each scene is one state on a perturbed expert path: the arm has travelled for a random time towards
the goal of a task, pushed about on the way, so that the examples include states off every clean path and states at and after
arrival, where the right answer is to come back or to stay. The two cameras are rendered once, and the expert's chunk is
computed for *every* episode of the scene: several examples share the pixels and differ in the sentence and the actions, which
makes the sentence matter.

Enters: a robot file, a seed. Leaves: `Example`s in the live node's `Observation` type. One thread (see `world`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.mjcf import FINGER_JOINTS, JOINT_NAMES
from vla_policy_ros.sim.scene import COLOURS, SHAPES, UNNAMED
from vla_policy_ros.sim.tasks import TASKS, Episode, Task, TaskState
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, CameraView, Observation

Pixel = tuple[float, float] | None

STATE_NOISE = 0.002
FINGER_NOISE = 0.0003
REST_SHARE = 0.12
LINGER = 0.5
PUSH_SHARE = 0.5
PUSH_SIZE = 0.06
WOBBLE_SIZE = 0.012
DEPTH_SIZE = (64, 48)
ATTEMPT_ENDS = 0.12
"""How far from its zone an attempt is meant to end at most, m."""

MIX: dict[str, float] = {'reach': 0.5, 'reach_any': 0.1, 'push': 0.4, 'pick': 0.5, 'place': 0.5, 'reach_shape': 0.0}
"""Shares of the tasks among training scenes, of those that the robot can do."""

# A tool that the expert moves by less than this in a period, m, and a hand that it turns by less, rad, have arrived; so long may
# they stand in between, periods.
_ARRIVED_STEP = 0.008
_ARRIVED_TURN = 0.03
_PAUSE = 8
# Height below which wobbles do not drive the finger tips, m.
_TABLE_CLEARANCE = 0.004


@dataclass(frozen=True)
class Sampling:
    """Which states the examples are drawn from.

    Attributes:
        mix: shares of the tasks among the scenes; None is `MIX`.
        arrived: share of the states in which the expert has arrived already; None: as time draws them, which is most.
        strays: share of the states that lie on the path of any of the scene's episodes rather than on the first one's, so that a
            sentence is also answered from where another one has led.
        attempted: share of the states of tasks with a zone that begin where an attempt ends (or nearly) that was meant for a place
            beside the zone, within `ATTEMPT_ENDS`. Otherwise experts, who succeed, leave hardly any such state, and that an attempt
            has been made would be all there is to know about whether it has succeeded. From there the path goes on, to the true
            zone.
        misled: only of `visited`: share of the rollouts in which the expert takes objects to lie elsewhere while it plays, so that
            it leaves them beside where they should go.
    """

    mix: Mapping[str, float] | None = None
    arrived: float | None = None
    strays: float = 0.0
    attempted: float = 0.0
    misled: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.mix or () if name not in TASKS]
        if unknown:
            raise ValueError(f'mix has the task {unknown[0]!r}; tasks are {", ".join(TASKS)}')
        if self.mix is not None and not (min(self.mix.values(), default=0.0) >= 0.0 and sum(self.mix.values()) > 0.0):
            raise ValueError(f'mix is {dict(self.mix)}; shares must not be negative, and one must be positive')


AS_TIME_GOES = Sampling()

LABELLED_SHAPES = (*SHAPES, 'zone')

SCENES_PER_SEED = 1 << 24
SCENE_SEED_BASE = 1 << 32
"""Scene seeds of the training stream start here, so that smaller ones, which demos, tests and evaluations use, are never seen."""


@dataclass(frozen=True)
class SceneLabels:
    """What the simulator knows about the pictures of one scene; the examples of the scene share it.

    Attributes:
        kinds: int64 ``[objects, 2]``, indices of colour (in `scene.COLOURS`, -1 where it has no name) and shape (in
            `LABELLED_SHAPES`). The last object is the zone; in a scene without one it is seen nowhere.
        pixels: camera name to float64 ``[objects, 2]``, pixel ``(u, v)`` of each object's centre, NaN where the camera does not see
            it there.
        points: float64 ``[objects, 3]``, centres of the objects in the frame of the arm's base, m.
        depth: camera name to float32 ``[48, 64]``, depth along the optical axis at the centres of equal tiles of the image, m.
        fixed: cameras whose pose does not depend on the arm.
    """

    kinds: NDArray[np.int64]
    pixels: Mapping[str, NDArray[np.float64]]
    points: NDArray[np.float64]
    depth: Mapping[str, NDArray[np.float32]]
    fixed: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        observation: what the policy sees; the examples of one scene share the image arrays. Its stamp is 1 s.
        actions: float64 ``[T, A]`` absolute joint positions in the order of ``robot.action.joints``; row ``i`` is the target
            at the observation's stamp plus ``(i + 1) * period``.
        target_pixels: per camera, the pixels ``(u, v)`` of the named object's centre and of the zone it shall go to, None where
            that camera does not see it there, several objects bear the name, or no zone is named.
        scene_id: the scene's seed, shared by its examples.
        labels: of the scene.
    """

    observation: Observation
    actions: NDArray[np.float64]
    target_pixels: dict[str, tuple[Pixel, Pixel]]
    scene_id: int
    labels: SceneLabels


class RobotMismatch(ValueError):
    """The robot file describes something the simulated arm is not; the message names it."""


def examples(robot: Robot, seed: int, count: int, sampling: Sampling = AS_TIME_GOES) -> Iterator[Example]:
    """Yield ``count`` examples, scene by scene (one per thing to do there); the same seed and sampling yield the same ones.

    Raises:
        RobotMismatch: the robot file names a camera, a joint or a state field that the simulated arm does not have.
        ValueError: a negative seed or count, or a mix of tasks that the robot cannot do.
    """
    if seed < 0 or count < 0:
        raise ValueError(f'examples needs seed >= 0 and count >= 0, got {seed} and {count}')
    check_robot(robot)
    for name in sampling.mix or ():
        check_task(TASKS[name], robot)
    return _stream(robot, seed, count, sampling)


def check_robot(robot: Robot) -> None:
    """Raise RobotMismatch unless the simulated arm can play ``robot``: its cameras, joints, and position or velocity state."""
    problems = [f'camera {name!r}' for name in robot.camera_names if name not in TabletopWorld.camera_names]
    known = (*JOINT_NAMES, FINGER_JOINTS[0])
    problems += [f'joint {name!r}' for name in dict.fromkeys(robot.state.joints + robot.action.joints) if name not in known]
    if FINGER_JOINTS[0] in robot.state.joints and not has_gripper(robot):
        problems.append(f'joint {FINGER_JOINTS[0]!r} in state.joints but not in action.joints')
    problems += [f'state field {field!r}' for field in robot.state.fields if field == 'effort']
    problems += [f'joint {name!r} left out of action.joints' for name in JOINT_NAMES if name not in robot.action.joints]
    if problems:
        raise RobotMismatch(
            f'robot {robot.name!r} does not fit the simulated arm: {", ".join(problems)}; it has the cameras '
            f'{", ".join(TabletopWorld.camera_names)} and the joints {known[0]} to {known[6]}, and {known[7]} of its gripper'
        )


def has_gripper(robot: Robot) -> bool:
    """Whether ``robot`` moves the fingers of the simulated arm."""
    return FINGER_JOINTS[0] in robot.action.joints


def check_task(task: Task, robot: Robot) -> None:
    """Raise RobotMismatch where ``robot`` cannot do ``task``."""
    if task.needs_gripper and not has_gripper(robot):
        raise RobotMismatch(
            f'task {task.name!r} needs a gripper, and robot {robot.name!r} has no joint {FINGER_JOINTS[0]!r} among action.joints: '
            'use the robot file tabletop_gripper'
        )


def _stream(robot: Robot, seed: int, count: int, sampling: Sampling) -> Iterator[Example]:
    world, kinematics = TabletopWorld(gripper=has_gripper(robot)), ArmKinematics()
    shares, made = task_shares(robot, sampling.mix), 0
    try:
        for scene in range(count):
            scene_id = SCENE_SEED_BASE + seed * SCENES_PER_SEED + scene
            for example in _scene_examples(world, kinematics, robot, shares, sampling, scene_id):
                if made == count:
                    return
                yield example
                made += 1
    finally:
        world.close()


def _scene_examples(
    world: TabletopWorld, kinematics: ArmKinematics, robot: Robot, shares: Mapping[str, float], sampling: Sampling, scene_id: int
) -> Iterator[Example]:
    rng = np.random.default_rng([scene_id, 1])
    episodes, taken = draw_episodes(shares, sampling.strays, scene_id, rng)
    world.reset_to(episodes[0].scene)
    start = TaskState(episodes[0].scene.start, object_places(world))
    if sampling.attempted > 0.0 and rng.random() < sampling.attempted and TASKS[episodes[0].task].needs_zone:
        start = _after_an_attempt(episodes[0], kinematics, start, robot.action.period, rng)
    state, velocity = _state_on_noisy_path(taken, kinematics, start, robot.action.period, sampling.arrived, rng)
    world.put_objects(state.objects)
    world.set_arm(state.q, state.finger)
    yield from examples_at(world, kinematics, robot, episodes, state, velocity, rng, scene_id)


def _after_an_attempt(
    episode: Episode, kinematics: ArmKinematics, state: TaskState, period: float, rng: np.random.Generator
) -> TaskState:
    """Where an expert comes to who takes the zone to be elsewhere, at a time in the last part of that; ``period`` in s."""
    angle, distance = rng.uniform(-np.pi, np.pi), rng.uniform(0.0, ATTEMPT_ENDS)
    zone = episode.scene.place_to_go()
    elsewhere = replace(zone, x=zone.x + distance * np.cos(angle), y=zone.y + distance * np.sin(angle))
    misled = replace(episode, scene=replace(episode.scene, zone=elsewhere))
    longest = round(TASKS[episode.task].seconds / period)
    path, travelling = [state], 0
    for passed, _, moves in islice(_noisy_path(misled, kinematics, state, period, -1, rng), longest):
        path.append(passed)
        travelling = len(path) if moves else travelling
        if len(path) > travelling + _PAUSE:
            break
    return path[int(rng.integers(max(0, len(path) - 2 * _PAUSE), len(path)))]


def task_shares(robot: Robot, mix: Mapping[str, float] | None) -> dict[str, float]:
    """The shares of ``mix`` (None is `MIX`) that the robot can do."""
    able = has_gripper(robot)
    return {name: share for name, share in (MIX if mix is None else mix).items() if able or not TASKS[name].needs_gripper}


def draw_episodes(
    shares: Mapping[str, float], strays: float, scene_id: int, rng: np.random.Generator
) -> tuple[list[Episode], Episode]:
    """What there is to do in a scene, and the one of it whose path the state lies on."""
    share = np.array(list(shares.values()))
    episodes = TASKS[str(rng.choice(list(shares), p=share / share.sum()))].training_episodes(scene_id)
    stray = strays > 0.0 and rng.random() < strays
    return episodes, episodes[int(rng.integers(len(episodes)))] if stray else episodes[0]


def object_places(world: TabletopWorld) -> NDArray[np.float64]:
    """Centres of the objects as they lie now, ``[slots, 3]`` m."""
    return np.stack([world.object_position(slot) for slot in range(len(world.objects))])


def examples_at(
    world: TabletopWorld,
    kinematics: ArmKinematics,
    robot: Robot,
    episodes: Sequence[Episode],
    state: TaskState,
    velocity: NDArray[np.float64],
    rng: np.random.Generator,
    scene_id: int,
) -> Iterator[Example]:
    """An example for each episode, of the world as it is; ``state`` and the joint velocities ``[7]`` describe it to the expert."""
    cameras = {name: _view(world, name) for name in robot.camera_names}
    labels = _labels(world, robot.camera_names)
    # The fingers' noise is drawn last, so that the arm's does not depend on whether there is a gripper.
    position, speed = state.q + rng.normal(0.0, STATE_NOISE, size=7), velocity + rng.normal(0.0, 0.01, size=7)
    measured = {'position': np.append(position, state.finger + rng.normal(0.0, FINGER_NOISE)), 'velocity': np.append(speed, 0.0)}
    columns = [world.joint_names.index(joint) for joint in robot.state.joints]
    vector = np.concatenate([measured[name][columns] for name in robot.state.fields])
    columns = [world.joint_names.index(joint) for joint in robot.action.joints]
    for episode in episodes:
        yield Example(
            observation=Observation(NS_PER_S, cameras, vector, NS_PER_S, episode.instruction),
            actions=expert_actions(kinematics, state, episode, robot)[:, columns],
            target_pixels={name: _target_pixels(world, name, episode) for name in robot.camera_names},
            scene_id=scene_id,
            labels=labels,
        )


def _view(world: TabletopWorld, name: str) -> CameraView:
    view = world.render(name)
    return CameraView(view.rgb, view.K, NS_PER_S)


def _target_pixels(world: TabletopWorld, camera: str, episode: Episode) -> tuple[Pixel, Pixel]:
    target = world.visible_pixel(camera, episode.targets[0]) if len(episode.targets) == 1 else None
    return target, world.visible_zone(camera) if TASKS[episode.task].needs_zone else None


def _labels(world: TabletopWorld, cameras: tuple[str, ...]) -> SceneLabels:
    slots, zone = range(len(world.objects)), world.scene.zone
    nowhere = (np.nan, np.nan)
    word_of = {UNNAMED: -1} | {colour: index for index, colour in enumerate(COLOURS)}
    kinds = [[word_of[spec.colour], LABELLED_SHAPES.index(spec.shape)] for spec in world.objects]
    seen = {name: [world.visible_pixel(name, slot) for slot in slots] + [world.visible_zone(name)] for name in cameras}
    return SceneLabels(
        kinds=np.array([*kinds, [0 if zone is None else word_of[zone.colour], LABELLED_SHAPES.index('zone')]]),
        pixels={name: np.array([pixel or nowhere for pixel in pixels]) for name, pixels in seen.items()},
        points=np.stack([*map(world.object_position, slots), np.full(3, np.nan) if zone is None else world.zone_position()]),
        depth={name: world.render_depth(name, *DEPTH_SIZE) for name in cameras},
        fixed=tuple(name for name in cameras if name == 'scene'),
    )


def expert_actions(kinematics: ArmKinematics, state: TaskState, episode: Episode, robot: Robot) -> NDArray[np.float64]:
    """The expert's next targets ``[T, 8]``, the fingers' last."""
    task, rows = TASKS[episode.task], []
    for _ in range(robot.action.horizon):
        state = task.step(kinematics, state, episode, robot.action.period)
        rows.append(np.append(state.q, state.finger_target))
    return np.stack(rows)


def _state_on_noisy_path(
    episode: Episode, kinematics: ArmKinematics, state: TaskState, period: float, arrived: float | None, rng: np.random.Generator
) -> tuple[TaskState, NDArray[np.float64]]:
    """The state, and joint velocities ``[7]``, after a random time of the episode, with pushes."""
    if rng.random() < REST_SHARE:
        return state, np.zeros(7)
    longest = round((TASKS[episode.task].seconds + LINGER) / period)
    steps = longest if arrived is not None else int(rng.integers(1, longest))
    pushed_at = int(rng.integers(steps)) if rng.random() < PUSH_SHARE else -1
    path, travelling = [], 0
    for index, (passed, velocity, moves) in enumerate(_noisy_path(episode, kinematics, state, period, pushed_at, rng)):
        path.append((passed, velocity))
        travelling = index + 1 if moves else travelling
        if len(path) == steps or (arrived is not None and len(path) > travelling + 3 * _PAUSE):
            break
    if arrived is None:
        return path[-1]
    # A path ends a while after arrival, so that what comes then is drawn from, too.
    standing = rng.random() < arrived and travelling < len(path)
    return path[int(rng.integers(travelling, len(path)) if standing else rng.integers(max(1, travelling)))]


def _noisy_path(
    episode: Episode, kinematics: ArmKinematics, state: TaskState, period: float, pushed_at: int, rng: np.random.Generator
) -> Iterator[tuple[TaskState, NDArray[np.float64], bool]]:
    """States, joint velocities ``[7]`` and whether the expert has not arrived, period by period, with a push at one of them."""
    task, index = TASKS[episode.task], 0
    while True:
        before, stood = state.q, kinematics.place(state.q)[0]
        state = task.step(kinematics, state, episode, period)
        step, way = state.q - before, float(np.linalg.norm(kinematics.place(state.q)[0] - stood))
        # A hand that waits behind a cube until its camera sees it stands, and turns about the last joint.
        moves = way > _ARRIVED_STEP or abs(float(step[-1])) > _ARRIVED_TURN
        q = state.q + rng.normal(0.0, WOBBLE_SIZE, size=7) * rng.random()
        if index == pushed_at:
            q = q + rng.normal(0.0, PUSH_SIZE, size=7)
        q = np.clip(q, kinematics.lower, kinematics.upper)
        # A wobble or a push that would have driven the finger tips into the table does not happen.
        state = state.moved(q if kinematics.place(q)[0][2] > _TABLE_CLEARANCE else before)
        yield state, step / period, moves
        index += 1
