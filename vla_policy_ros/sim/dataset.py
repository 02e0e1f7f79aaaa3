"""Training examples from the simulator: what the live node would see, and what the expert would do.

Episodes are not played. Each scene is one state on a perturbed expert path: the arm has travelled for a random time towards
one of the objects, pushed about on the way, so that the examples include states off every clean path and states at and after
arrival, where the right answer is to come back or to stay. The two cameras are rendered once, and the expert's chunk is
computed for *every* object of the scene: several examples share the pixels and differ in the sentence and the actions, which
makes the sentence matter.

Enters: a robot file, a seed. Leaves: `Example`s in the live node's `Observation` type. One thread (see `world`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.expert import ArmKinematics, expert_chunk, expert_step
from vla_policy_ros.sim.instructions import instruction_for
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, CameraView, Observation

STATE_NOISE = 0.002
REST_SHARE = 0.12
MAX_TRAVEL = 45
PUSH_SHARE = 0.5
PUSH_SIZE = 0.06
WOBBLE_SIZE = 0.012

# Scene seeds of the training stream start here, so that small seeds, which demos and tests use, are never trained on.
_SCENE_SEED_BASE = 1 << 32


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        observation: what the policy sees; the examples of one scene share the image arrays. Its stamp is 1 s.
        actions: float64 ``[T, A]`` absolute joint positions in the order of ``robot.action.joints``; row ``i`` is the target
            at the observation's stamp plus ``(i + 1) * period``.
        target_pixels: per camera, the pixel ``(u, v)`` of the named object's centre, None where that camera does not see it
            there.
        scene_id: the scene's seed, shared by its examples.
    """

    observation: Observation
    actions: NDArray[np.float64]
    target_pixels: dict[str, tuple[float, float] | None]
    scene_id: int


class RobotMismatch(ValueError):
    """The robot file describes something the simulated arm is not; the message names it."""


def examples(robot: Robot, seed: int, count: int) -> Iterator[Example]:
    """Yield ``count`` examples, scene by scene (`mjcf.OBJECT_SLOTS` of them per scene); the same seed yields the same ones.

    Raises:
        RobotMismatch: the robot file names a camera, a joint or a state field that the simulated arm does not have.
        ValueError: a negative seed or count.
    """
    if seed < 0 or count < 0:
        raise ValueError(f'examples needs seed >= 0 and count >= 0, got {seed} and {count}')
    check_robot(robot)
    return _stream(robot, seed, count)


def check_robot(robot: Robot) -> None:
    """Raise RobotMismatch unless the simulated arm can play ``robot``: its cameras, joints, and position or velocity state."""
    problems = [f'camera {name!r}' for name in robot.camera_names if name not in TabletopWorld.camera_names]
    known = TabletopWorld.joint_names
    problems += [f'joint {name!r}' for name in dict.fromkeys(robot.state.joints + robot.action.joints) if name not in known]
    problems += [f'state field {field!r}' for field in robot.state.fields if field == 'effort']
    problems += [f'joint {name!r} left out of action.joints' for name in known if name not in robot.action.joints]
    if problems:
        raise RobotMismatch(
            f'robot {robot.name!r} does not fit the simulated arm: {", ".join(problems)}; it has the cameras '
            f'{", ".join(TabletopWorld.camera_names)} and the joints {known[0]} to {known[-1]}'
        )


def _stream(robot: Robot, seed: int, count: int) -> Iterator[Example]:
    world, kinematics = TabletopWorld(), ArmKinematics()
    made = 0
    try:
        for scene in range(count):
            for example in _scene_examples(world, kinematics, robot, _SCENE_SEED_BASE + (seed << 24) + scene):
                if made == count:
                    return
                yield example
                made += 1
    finally:
        world.close()


def _scene_examples(world: TabletopWorld, kinematics: ArmKinematics, robot: Robot, scene_id: int) -> Iterator[Example]:
    rng = np.random.default_rng([scene_id, 1])
    world.reset(scene_id, jitter=True)
    q, velocity = _state_on_noisy_path(world, kinematics, robot.action.period, rng)
    world.set_arm(q)

    cameras = {}
    for name in robot.camera_names:
        view = world.render(name)
        cameras[name] = CameraView(view.rgb, view.K, NS_PER_S)
    measured = {'position': q + rng.normal(0.0, STATE_NOISE, size=7), 'velocity': velocity + rng.normal(0.0, 0.01, size=7)}
    state_columns = [world.joint_names.index(joint) for joint in robot.state.joints]
    state = np.concatenate([measured[field][state_columns] for field in robot.state.fields])
    action_columns = [world.joint_names.index(joint) for joint in robot.action.joints]

    for spec in world.objects:
        instruction = instruction_for(spec, world.objects, rng)
        chunk = expert_chunk(kinematics, q, world.goal_point(spec.name), robot.action.horizon, robot.action.period)
        yield Example(
            observation=Observation(NS_PER_S, cameras, state, NS_PER_S, instruction),
            actions=chunk[:, action_columns],
            target_pixels={name: world.visible_pixel(name, spec.name) for name in robot.camera_names},
            scene_id=scene_id,
        )


def _state_on_noisy_path(
    world: TabletopWorld, kinematics: ArmKinematics, period: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Joint positions and velocities ``[7]`` after travelling towards a random object for a random time, with pushes."""
    q = world.scene.start.copy()
    velocity = np.zeros(7)
    if rng.random() < REST_SHARE:
        return q, velocity
    goal = world.goal_point(world.objects[int(rng.integers(len(world.objects)))].name)
    steps = int(rng.integers(1, MAX_TRAVEL))
    pushed_at = int(rng.integers(steps)) if rng.random() < PUSH_SHARE else -1
    for index in range(steps):
        before = q
        q = expert_step(kinematics, q, goal, period)
        velocity = (q - before) / period
        q = q + rng.normal(0.0, WOBBLE_SIZE, size=7) * rng.random()
        if index == pushed_at:
            q = q + rng.normal(0.0, PUSH_SIZE, size=7)
        q = _above_table(kinematics, np.clip(q, kinematics.lower, kinematics.upper), before)
    return q, velocity


def _above_table(kinematics: ArmKinematics, q: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.float64]:
    """``q``, or ``before`` where a push would have driven the finger tips into the table."""
    return q if kinematics.place(q)[0][2] > 0.015 else before
