"""Reaching: the tool comes to rest above the named object. In `ReachAny` two objects carry the name, and either is right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla_policy_ros.sim.expert import ArmKinematics, expert_step
from vla_policy_ros.sim.instructions import TEMPLATES, can_name, instruction_for
from vla_policy_ros.sim.scene import Scene, sample_scene
from vla_policy_ros.sim.tasks.base import TRAINING, Conditions, Episode, Outcome, TaskState
from vla_policy_ros.sim.world import GOAL_CLEARANCE, SUCCESS_DISTANCE, TabletopWorld

NEAR = 0.06
"""Distance to a goal, m, within which an end is a miss of that goal and not a time-out."""

ATTEMPT_SHIFT = 26
"""An episode whose scene does not fit its conditions takes the scene ``1 << 26`` further on: seeds below that stay apart, and all
of their scenes below the seeds of training scenes."""

# Stream of a seed's generator; the scene has the plain seed.
_EPISODE = 7
_SCENES = 64


class Reach:
    """Reach the named object; two others are distractors."""

    name = 'reach'
    seconds = 4.0
    needs_gripper = False
    needs_zone = False
    training_scene = TRAINING.scene

    def sample(self, seed: int, conditions: Conditions) -> Episode:
        for attempt in range(_SCENES):
            scene = sample_scene(seed + (attempt << ATTEMPT_SHIFT), conditions.scene)
            rng = np.random.default_rng([seed, _EPISODE])
            nameable = [slot for slot, spec in enumerate(scene.objects) if can_name(spec, scene.objects, conditions.naming)]
            if conditions.scene.kinds == 'held_out':
                nameable = [slot for slot in nameable if slot == 0]
            if nameable:
                slot = nameable[int(rng.integers(len(nameable)))]
                return self._episode(scene, slot, rng, conditions)
        raise ValueError(f'no scene in {_SCENES} has an object that its {conditions.naming} names; choose other conditions')

    def training_episodes(self, seed: int) -> list[Episode]:
        scene = sample_scene(seed, self.training_scene)
        rng = np.random.default_rng([seed, _EPISODE])
        return [self._episode(scene, int(slot), rng, TRAINING) for slot in rng.permutation(len(scene.objects))]

    def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
        slot = episode.targets[0]
        goal = state.objects[slot].copy()
        goal[2] += episode.scene.objects[slot].half_height + GOAL_CLEARANCE
        return state.moved(expert_step(kinematics, state.q, goal, period))

    def measure(self, world: TabletopWorld, episode: Episode) -> Outcome:
        distance = [world.distance(slot) for slot in range(len(episode.scene.objects))]
        error = min(distance[slot] for slot in episode.targets)
        if error < SUCCESS_DISTANCE:
            return Outcome(True, error, '')
        nearest = int(np.argmin(distance))
        if nearest not in episode.targets and distance[nearest] < NEAR:
            return Outcome(False, error, 'wrong_object')
        return Outcome(False, error, 'missed' if error < NEAR else 'timed_out')

    def _episode(self, scene: Scene, slot: int, rng: np.random.Generator, conditions: Conditions) -> Episode:
        sentence = instruction_for(
            scene.objects[slot],
            scene.objects,
            rng,
            naming=conditions.naming,
            templates=conditions.templates(TEMPLATES),
        )
        return Episode(self.name, scene, sentence, (slot,))


class ReachAny(Reach):
    """Reach one of two objects of the same name: two right answers, and a wrong one between them.

    The expert goes to the first of ``targets``; in training that is either of the two, by chance.
    """

    name = 'reach_any'

    def sample(self, seed: int, conditions: Conditions) -> Episode:
        if conditions.naming not in ('any', 'full') or conditions.scene.kinds == 'held_out':
            raise ValueError('reach_any names its objects in full and has no held-out kinds; leave naming and kinds alone')
        scene = sample_scene(seed, replace(conditions.scene, twins=True))
        return self._twins(scene, np.random.default_rng([seed, _EPISODE]), conditions)

    def training_episodes(self, seed: int) -> list[Episode]:
        scene = sample_scene(seed, replace(TRAINING.scene, twins=True))
        rng = np.random.default_rng([seed, _EPISODE])
        return [self._twins(scene, rng, TRAINING), self._episode(scene, 2, rng, TRAINING)]

    def _twins(self, scene: Scene, rng: np.random.Generator, conditions: Conditions) -> Episode:
        episode = self._episode(scene, 0, rng, replace(conditions, naming='full'))
        return replace(episode, targets=tuple(int(slot) for slot in rng.permutation(2)))


class ReachShape(Reach):
    """Reach the object of the named shape; all three have colours that no word names."""

    name = 'reach_shape'
    training_scene = replace(TRAINING.scene, unnamed_colours=True)

    def sample(self, seed: int, conditions: Conditions) -> Episode:
        asked = conditions.scene
        if conditions.naming not in ('any', 'shape') or asked.kinds == 'held_out' or asked.shared_colour is not None:
            raise ValueError('reach_shape names its objects by their shape, and their colours have no names; leave both alone')
        scene = sample_scene(seed, replace(conditions.scene, unnamed_colours=True))
        rng = np.random.default_rng([seed, _EPISODE])
        return self._episode(scene, int(rng.integers(len(scene.objects))), rng, replace(conditions, naming='shape'))
