"""Training examples from where a policy leads: what the expert would do there (DAgger; Ross, Gordon and Bagnell, AISTATS 2011).

A scene is played in physics, by a policy that is not done learning and by the expert in turns. At some of its looks the picture
is kept, and the expert's chunk is computed for every episode of the scene, as in `dataset`. So a policy learns what to do about
its own mistakes, which the paths of an expert do not show, and about how objects really move when they are pushed. Where the expert
plays, it may be misled about where things lie (`Sampling.misled`); what it answers never is.

Enters: a robot file, a policy, a seed. Leaves: `Example`s. One thread (see `world`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.dataset import (
    AS_TIME_GOES,
    SCENE_SEED_BASE,
    SCENES_PER_SEED,
    Example,
    Sampling,
    check_task,
    draw_episodes,
    examples_at,
    expert_actions,
    object_places,
    task_shares,
)
from vla_policy_ros.sim.driven import DrivenArm, Infer
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.mjcf import FINGER_OPEN
from vla_policy_ros.sim.tasks import TASKS, Episode, TaskState

EXECUTED = 4
"""Actions between two looks."""
KEPT_SHARE = 0.3
"""Of the looks, those whose picture is kept."""
LOOKS_AFTER_SUCCESS = 3
MISLED = 0.015
"""How far from its place a misled expert takes an object to lie, m, standard deviation per axis, the same for a whole rollout."""
# Beyond its table a robot meets nothing that it could learn from, m.
_REACH = 0.9
# Scene seeds of one rollout; the first is that of the scene, and its kept looks have the ones after it as their ids.
_PER_ROLLOUT = 64


def visited_examples(robot: Robot, infer: Infer, seed: int, count: int, sampling: Sampling = AS_TIME_GOES) -> Iterator[Example]:
    """Yield ``count`` examples, rollout by rollout; the same policy, seed and sampling yield the same ones.

    ``sampling.strays`` is the share of the rollouts that follow any of a scene's episodes rather than the first; its ``arrived``
    and ``attempted`` have no meaning here.

    Raises:
        RobotMismatch: the simulated arm cannot play the robot.
        ValueError: a negative seed or count, or a mix of tasks that the robot cannot do.
    """
    if seed < 0 or count < 0:
        raise ValueError(f'visited_examples needs seed >= 0 and count >= 0, got {seed} and {count}')
    for name in sampling.mix or ():
        check_task(TASKS[name], robot)
    return _stream(robot, infer, seed, count, sampling)


def _stream(robot: Robot, infer: Infer, seed: int, count: int, sampling: Sampling) -> Iterator[Example]:
    kinematics, shares, made = ArmKinematics(), task_shares(robot, sampling.mix), 0
    with DrivenArm(robot) as arm:
        for first in range(0, SCENES_PER_SEED, _PER_ROLLOUT):
            scene_id = SCENE_SEED_BASE + seed * SCENES_PER_SEED + first
            rng = np.random.default_rng([scene_id, 1])
            episodes, played = draw_episodes(shares, sampling.strays, scene_id, rng)
            rollout = _Rollout(arm, kinematics, robot, infer, episodes, played, scene_id, sampling.misled)
            for example in rollout.examples(rng):
                if made == count:
                    return
                yield example
                made += 1


@dataclass(frozen=True)
class _Rollout:
    arm: DrivenArm
    kinematics: ArmKinematics
    robot: Robot
    infer: Infer
    episodes: Sequence[Episode]
    played: Episode
    scene_id: int
    misled: float

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        arm, task, kept, done = self.arm, TASKS[self.played.task], 0, 0
        # From all by the policy to all by the expert, so that states late in a task are visited before the policy can do it.
        expert_share = rng.random()
        wrong = np.zeros((len(self.played.scene.objects), 3))
        if self.misled > 0.0 and rng.random() < self.misled:
            wrong[:, :2] = rng.normal(0.0, MISLED, wrong[:, :2].shape)
        arm.reset(self.played.scene)
        for _ in range(round(task.seconds / (EXECUTED * self.robot.action.period))):
            state, velocity = self._state()
            if not self._on_the_table(state):
                return
            if rng.random() < KEPT_SHARE:
                kept += 1
                yield from examples_at(
                    arm.world, self.kinematics, self.robot, self.episodes, state, velocity, rng, self.scene_id + kept
                )
            done = done + 1 if task.measure(arm.world, self.played).success else 0
            if done > LOOKS_AFTER_SUCCESS:
                return
            seen = replace(state, objects=state.objects + wrong)
            for action in self._actions(seen, rng.random() < expert_share):
                arm.follow(action)

    def _state(self) -> tuple[TaskState, NDArray[np.float64]]:
        """What the expert is told, and the joint velocities ``[7]``."""
        position, velocity = self.arm.world.joint_state()
        fingers = (float(position[7]), float(self.arm.commanded[7])) if len(position) > 7 else (FINGER_OPEN, FINGER_OPEN)
        return TaskState(position[:7], object_places(self.arm.world), *fingers), velocity[:7]

    def _on_the_table(self, state: TaskState) -> bool:
        places = state.objects[list(self.played.targets)]
        return bool((places[:, 2] > 0.0).all() and (np.hypot(places[:, 0], places[:, 1]) < _REACH).all())

    def _actions(self, state: TaskState, by_expert: bool) -> NDArray[np.float64]:
        if by_expert:
            actions = expert_actions(self.kinematics, state, self.played, self.robot)
            joints = self.arm.world.joint_names
            actions = actions[:, [joints.index(joint) for joint in self.robot.action.joints]]
        else:
            actions = self.infer(self.arm.observe(self.played.instruction, self.scene_id)).actions
        kept, _ = self.arm.allowed(actions)
        return kept[:EXECUTED]
