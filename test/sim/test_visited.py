"""Examples from where a policy leads: the states are the policy's, the answers the expert's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim import visited
from vla_policy_ros.sim.dataset import SCENE_SEED_BASE, SCENES_PER_SEED, RobotMismatch, Sampling
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.scene import sample_scene
from vla_policy_ros.sim.tasks.base import TRAINING
from vla_policy_ros.sim.tasks.push import ARRIVED
from vla_policy_ros.sim.visited import visited_examples
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


def test_some_cubes_are_left_beside_their_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert knows when it has arrived, and who learns from it alone never sees what to do about having been wrong."""
    monkeypatch.setattr(visited, 'MISLED_SHARE', 1.0)
    kinematics, left = ArmKinematics(), [0.0]
    for example in visited_examples(ROBOT, Turning(0.0), seed=5, count=300, sampling=Sampling(mix={'push': 1.0})):
        sentence, points = example.observation.instruction, example.labels.points
        scene = sample_scene(example.scene_id // 64 * 64, replace(TRAINING.scene, zone=True))
        for slot, spec in enumerate(scene.objects):
            away, gone = (np.linalg.norm(points[slot, :2] - place) for place in (points[3, :2], [spec.x, spec.y]))
            high = kinematics.place(example.observation.state[:7])[0][2] > 0.12
            if spec.name in sentence and high and gone > 0.05 and away < 0.1:
                left.append(float(away))
    assert max(left) > ARRIVED, left


def test_what_cannot_be_played_is_refused() -> None:
    with pytest.raises(ValueError, match='seed >= 0'):
        visited_examples(ROBOT, Turning(0.0), seed=-1, count=1)
    with pytest.raises(RobotMismatch, match='needs a gripper'):
        visited_examples(ROBOT, Turning(0.0), seed=0, count=1, sampling=Sampling(mix={'pick': 1.0}))
