"""Examples from where a policy leads: the states are the policy's, the answers the expert's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim import visited
from vla_policy_ros.sim.dataset import SCENE_SEED_BASE, SCENES_PER_SEED, RobotMismatch, Sampling, expert_actions
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.scene import sample_scene
from vla_policy_ros.sim.tasks.base import TRAINING, TaskState
from vla_policy_ros.sim.tasks.push import ARRIVED
from vla_policy_ros.sim.visited import _PER_ROLLOUT, visited_examples
from vla_policy_ros.types import ActionChunk, Observation

ROBOTS = Path(__file__).parents[2] / 'config/robots'
ROBOT = load_robot(ROBOTS / 'tabletop.yaml')
REACH = Sampling(mix={'reach': 1.0})


class Turning:
    """A policy that turns the arm's base to ``angle`` (rad), whatever it is asked for."""

    def __init__(self, angle: float) -> None:
        self.angle, self.sentences = angle, set[str]()

    def __call__(self, observation: Observation) -> ActionChunk:
        self.sentences.add(observation.instruction)
        joints, period = ROBOT.action.joints, ROBOT.action.period_ns
        actions = np.tile(observation.state[: len(joints)], (ROBOT.action.horizon, 1))
        actions[:, 0] = self.angle
        stamp = observation.stamp_ns
        return ActionChunk(stamp + period, period, joints, actions, stamp, observation.instruction)


@pytest.fixture(scope='module')
def to_the_right():
    policy = Turning(-0.9)
    return policy, list(visited_examples(ROBOT, policy, seed=3, count=60, sampling=REACH))


def test_the_policy_decides_where_examples_are(to_the_right) -> None:
    policy, right = to_the_right
    left = list(visited_examples(ROBOT, Turning(0.9), seed=3, count=60, sampling=REACH))
    turned = [np.mean([example.observation.state[0] for example in side]) for side in (right, left)]
    assert turned[0] < turned[1] - 0.3, turned
    assert len(policy.sentences) > 1


def test_the_expert_answers_for_every_sentence(to_the_right) -> None:
    kinematics, towards = ArmKinematics(), []
    for example in to_the_right[1]:
        start, end = example.observation.state[:7], example.actions[-1]
        assert example.actions.shape == (ROBOT.action.horizon, 7) and np.abs(example.actions[0] - start).max() < 0.1
        goals = example.labels.points[:3] + np.array([0.0, 0.0, 0.05])
        before, after = (np.linalg.norm(kinematics.place(q)[0] - goals, axis=1) for q in (start, end))
        towards.append((after < before + 0.01).any())
    assert np.mean(towards) == 1.0
    scenes = [list(group) for _, group in itertools.groupby(to_the_right[1], key=lambda example: example.scene_id)]
    for scene in scenes[:-1]:
        assert len({example.observation.instruction for example in scene}) == 3
        assert all(example.observation.cameras is scene[0].observation.cameras for example in scene)
    assert len({scene[0].scene_id for scene in scenes}) == len(scenes)


def test_the_same_seed_repeats_and_stays_in_its_block(to_the_right) -> None:
    again = list(visited_examples(ROBOT, Turning(-0.9), seed=3, count=12, sampling=REACH))
    for one, other in zip(to_the_right[1], again, strict=False):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.observation.cameras['scene'].rgb, other.observation.cameras['scene'].rgb)
    first = SCENE_SEED_BASE + 3 * SCENES_PER_SEED
    assert all(first < example.scene_id < first + SCENES_PER_SEED for example in to_the_right[1])


def test_pushed_things_are_where_physics_puts_them() -> None:
    sampling = Sampling(mix={'push': 1.0})
    made = list(visited_examples(ROBOT, Turning(0.0), seed=1, count=240, sampling=sampling))
    moved = 0.0
    for _, group in itertools.groupby(made, key=lambda example: example.scene_id // 64):
        places = np.stack([example.labels.points[:3, :2] for example in group])
        moved = max(moved, float(np.ptp(places, axis=0).max()))
    assert moved > 0.05, 'the expert takes its turns, so that something is pushed'


@pytest.mark.parametrize(('misled', 'least', 'most'), [(0.0, 0.0, 0.001), (1.0, 0.005, 0.06)])
def test_only_a_misled_expert_plays_on_places_that_are_wrong(
    misled: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    believed: list[np.ndarray] = []

    def watched(kinematics: ArmKinematics, state: TaskState, *more: Any) -> np.ndarray:
        believed.append(state.objects[:, :2])
        return expert_actions(kinematics, state, *more)

    monkeypatch.setattr(visited, 'expert_actions', watched)
    made = list(visited_examples(ROBOT, Turning(0.9), seed=3, count=45, sampling=Sampling(mix={'reach': 1.0}, misled=misled)))
    true = [example.labels.points[:3, :2] for example in made]
    # Nobody moves anything in a reach, so that the nearest scene is the one that was played.
    wrong = [min(np.abs(objects - places).max() for places in true) for objects in believed]
    kept = [value for value in wrong if value < 0.06]
    assert len(kept) > 20 and least <= np.median(kept) <= most, sorted(wrong)


@pytest.mark.parametrize('misled', [0.0, 1.0])
def test_a_misled_expert_answers_rightly(misled: float) -> None:
    """Over a pushed cube another attempt comes down where it is needed, and only there: the hand turns meanwhile."""
    kinematics, needed = ArmKinematics(), []
    for example in visited_examples(ROBOT, Turning(0.0), seed=5, count=480, sampling=Sampling(mix={'push': 1.0}, misled=misled)):
        sentence, points = example.observation.instruction, example.labels.points
        scene = sample_scene(example.scene_id // _PER_ROLLOUT * _PER_ROLLOUT, replace(TRAINING.scene, zone=True))
        start, end = (kinematics.place(q[:7])[0][2] for q in (example.observation.state, example.actions[-1]))
        for slot, spec in enumerate(scene.objects):
            away, gone = (np.linalg.norm(points[slot, :2] - place) for place in (points[3, :2], [spec.x, spec.y]))
            if spec.name in sentence and ('zone' in sentence or 'circle' in sentence) and start > 0.12 and gone > 0.05 > away:
                needed.append(bool(away > ARRIVED))
                assert (end < start - 0.035) == needed[-1], (away, start, end)
    # An expert that is never wrong hardly leaves a cube where another attempt is needed.
    assert len(needed) > 3 and set(needed) >= ({True, False} if misled else {False}), needed


def test_what_cannot_be_played_is_refused() -> None:
    with pytest.raises(ValueError, match='seed >= 0'):
        visited_examples(ROBOT, Turning(0.0), seed=-1, count=1)
    with pytest.raises(RobotMismatch, match='needs a gripper'):
        visited_examples(ROBOT, Turning(0.0), seed=0, count=1, sampling=Sampling(mix={'pick': 1.0}))
