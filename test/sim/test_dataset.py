"""Training examples are what the live node would see, and what they say about the target is true of the pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.sim.dataset import RobotMismatch, Sampling, _after_an_attempt, examples
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.instructions import parse_instruction
from vla_policy_ros.sim.scene import COLOURS, Variation, sample_scene
from vla_policy_ros.sim.tasks import TASKS, TaskState

ROBOT = load_robot(Path(__file__).parents[2] / 'config/robots/tabletop.yaml')


@pytest.fixture(scope='module')
def batch():
    return list(examples(ROBOT, seed=1, count=90))


def test_shapes_and_units(batch):
    for example in batch:
        observation = example.observation
        assert tuple(observation.cameras) == ROBOT.camera_names
        for view in observation.cameras.values():
            assert view.rgb.shape == (480, 640, 3) and view.rgb.dtype == np.uint8 and view.rgb.flags.c_contiguous
            assert view.K.shape == (3, 3) and view.stamp_ns == observation.stamp_ns
        assert observation.state.shape == (len(ROBOT.state.names),)
        assert example.actions.shape == (ROBOT.action.horizon, 7) and example.actions.dtype == np.float64


def scenes_of(batch):
    return [list(group) for _, group in itertools.groupby(batch, key=lambda example: example.scene_id)]


def test_examples_of_a_scene_differ_in_sentence_and_actions_on_the_same_pixels(batch):
    sizes = set()
    for scene in scenes_of(batch)[:-1]:
        sizes.add(len(scene))
        assert all(e.observation.cameras['scene'].rgb is scene[0].observation.cameras['scene'].rgb for e in scene)
        assert all(e.labels is scene[0].labels for e in scene)
        assert len({e.observation.instruction for e in scene}) == len(scene)
        assert len(scene) == 1 or not np.allclose(scene[0].actions[-1], scene[1].actions[-1])
    assert sizes >= {2, 3}, 'three objects to reach, or twins and one other'


def test_labels_are_true_of_the_pictures(batch):
    for scene in scenes_of(batch):
        labels, view = scene[0].labels, scene[0].observation.cameras['scene']
        for slot, (kind, pixel, point) in enumerate(zip(labels.kinds, labels.pixels['scene'], labels.points, strict=True)):
            if not np.isfinite(pixel).all():
                continue
            u, v = pixel.round().astype(int)
            shown = view.rgb[v, u].astype(float)
            wanted = np.array(list(COLOURS.values())[kind[0]])
            assert (shown - shown.mean()) @ (wanted - wanted.mean()) > 0, (slot, shown)
            depth = labels.depth['scene'][v // 10, u // 10]
            assert 0.3 < depth < 1.4 and 0.2 < point[0] < 0.8 and 0.0 <= point[2] < 0.06


def test_target_pixel_shows_the_named_colour(batch):
    checked = 0
    for example in batch:
        target = parse_instruction(example.observation.instruction, sample_scene(example.scene_id).objects).object
        if target is None:
            continue  # twins, or a zone whose colour is said, too
        wanted = np.array(COLOURS[target.colour]) - np.mean(COLOURS[target.colour])
        for camera, (pixel, _) in example.target_pixels.items():
            if pixel is None:
                continue
            u, v = (round(value) for value in pixel)
            shown = example.observation.cameras[camera].rgb[v, u].astype(float)
            chroma = shown - shown.mean()
            cosine = chroma @ wanted / (np.linalg.norm(chroma) * np.linalg.norm(wanted) + 1e-9)
            assert cosine > 0.9, (example.observation.instruction, camera, pixel, shown)
            checked += 1
    assert checked > 60


def test_the_zone_is_a_target_where_the_sentence_names_it(batch):
    def says_zone(example):
        return any(word in example.observation.instruction for word in ('zone', 'circle'))

    named = [example for example in batch if says_zone(example)]
    assert all(pixels[1] is None for e in batch if not says_zone(e) for pixels in e.target_pixels.values())
    zones = [(example, pixel) for example in named if (pixel := example.target_pixels['scene'][1]) is not None]
    bare = [e for e in named if np.linalg.norm(e.labels.points[:-1] - e.labels.points[-1], axis=1).min() > 0.06]
    assert len(zones) >= 0.5 * len(bare) > 2, 'neither a cube nor the hand is over most zones that nothing was pushed to'
    for example, (u, v) in zones:
        zone = sample_scene(example.scene_id, Variation(camera='jitter', surroundings=True, zone=True)).place_to_go()
        wanted = np.array(COLOURS[zone.colour])
        shown = example.observation.cameras['scene'].rgb[round(v), round(u)].astype(float)
        assert (shown - shown.mean()) @ (wanted - wanted.mean()) > 0, example.observation.instruction


def test_every_camera_sees_most_targets(batch):
    for camera, least in (('scene', 0.85), ('wrist', 0.35)):
        assert np.mean([example.target_pixels[camera][0] is not None for example in batch]) > least


def test_actions_continue_the_state_and_respect_the_speed_promise(batch):
    speed = 0.45 * min(limit.velocity for limit in ROBOT.limits.values()) * ROBOT.action.period
    for example in batch:
        assert np.abs(example.actions[0] - example.observation.state).max() < speed + 0.012  # plus measurement noise
        assert np.abs(np.diff(example.actions, axis=0)).max() <= speed


def test_some_examples_rest_at_the_goal_and_some_travel(batch):
    travel = np.array([np.abs(example.actions[-1] - example.observation.state).max() for example in batch])
    assert (travel < 0.08).mean() > 0.08
    assert (travel > 0.3).mean() > 0.3


def test_the_stream_is_reproducible_and_seeds_differ(batch):
    again = list(examples(ROBOT, seed=1, count=4))
    for a, b in zip(batch, again, strict=False):
        assert a.observation.instruction == b.observation.instruction
        assert np.array_equal(a.actions, b.actions) and np.array_equal(a.observation.state, b.observation.state)
        assert np.array_equal(a.observation.cameras['wrist'].rgb, b.observation.cameras['wrist'].rgb)
    other = next(iter(examples(ROBOT, seed=2, count=1)))
    assert other.scene_id not in {example.scene_id for example in batch}


def test_joint_and_camera_order_follow_the_robot_file(batch):
    data = ROBOT.model_dump()
    data['state']['joints'] = data['state']['joints'][::-1]
    data['action']['joints'] = data['action']['joints'][::-1]
    data['cameras'] = {'wrist': data['cameras']['wrist']}
    data['state']['fields'] = ('position', 'velocity')
    example = next(iter(examples(Robot.model_validate(data), seed=1, count=1)))
    assert tuple(example.observation.cameras) == ('wrist',) == tuple(example.target_pixels)
    assert np.array_equal(example.actions, batch[0].actions[:, ::-1])
    assert np.array_equal(example.observation.state[:7], batch[0].observation.state[::-1])


def test_a_robot_that_the_arm_cannot_play_is_named():
    data = ROBOT.model_dump()
    data['cameras']['left'] = data['cameras'].pop('wrist')
    data['state']['fields'] = ('position', 'effort')
    with pytest.raises(RobotMismatch, match=r"camera 'left'.*state field 'effort'.*scene, wrist"):
        examples(Robot.model_validate(data), seed=0, count=1)
    with pytest.raises(ValueError, match='seed >= 0'):
        examples(ROBOT, seed=-1, count=1)


def test_more_of_one_task_and_fewer_states_after_arrival():
    sampling = Sampling(mix={'push': 1.0}, arrived=0.0, strays=0.5)
    busy, drawn = (list(examples(ROBOT, seed=3, count=60, sampling=each)) for each in (sampling, Sampling(mix={'push': 1.0})))
    assert all(np.isfinite(example.labels.points[-1]).all() for example in busy), 'every scene has a zone'

    def resting(batch):
        firsts = [scene[0] for scene in scenes_of(batch)]
        return np.mean([np.abs(np.diff(example.actions, axis=0)).sum() < 0.1 for example in firsts])

    assert resting(busy) <= resting(drawn)
    again = next(iter(examples(ROBOT, seed=3, count=1, sampling=sampling)))
    assert np.array_equal(again.actions, busy[0].actions)


def test_states_after_an_attempt_show_what_lies_near_its_zone():
    kinematics, sampling, short = ArmKinematics(), Sampling(mix={'push': 1.0}, arrived=0.0), []
    for each in (sampling, replace(sampling, attempted=1.0)):
        firsts = [scene[0] for scene in scenes_of(list(examples(ROBOT, seed=3, count=150, sampling=each)))]
        away = [np.linalg.norm(first.labels.points[:3, :2] - first.labels.points[3, :2], axis=1).min() for first in firsts]
        heights = [kinematics.place(first.observation.state[:7])[0][2] for first in firsts]
        short.append(np.mean([0.04 < distance < 0.1 and height > 0.1 for distance, height in zip(away, heights, strict=True)]))
    assert short[0] < 0.02 and short[1] > 0.05, short


def test_no_attempt_ends_while_its_hand_still_turns_before_the_push():
    """A half turn behind the cube takes seconds in which the tool stands as it does after arrival."""
    kinematics, moved = ArmKinematics(), []
    for seed in range(40):
        episode = TASKS['push'].training_episodes(seed)[0]
        if episode.task != 'push':
            continue
        start = np.array([[spec.x, spec.y, spec.half_height] for spec in episode.scene.objects])
        state = TaskState(episode.scene.start, start)
        end = _after_an_attempt(episode, kinematics, state, ROBOT.action.period, np.random.default_rng(seed))
        moved.append(np.linalg.norm(end.objects[episode.targets[0]] - start[episode.targets[0]]))
    assert len(moved) > 20 and min(moved) > 0.005, sorted(moved)[:5]


@pytest.mark.parametrize(
    ('mix', 'words'), [({'pusch': 1.0}, "task 'pusch'"), ({'push': -1.0}, 'must not be negative'), ({'push': 0.0}, 'be positive')]
)
def test_a_mix_that_means_nothing_is_refused(mix, words):
    with pytest.raises(ValueError, match=words):
        Sampling(mix=mix)


def test_a_mix_of_tasks_that_the_robot_cannot_do_is_refused():
    with pytest.raises(RobotMismatch, match="task 'pick' needs a gripper"):
        examples(ROBOT, seed=0, count=1, sampling=Sampling(mix={'pick': 1.0}))
