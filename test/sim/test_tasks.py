"""Tasks: their experts succeed in the physics, their sentences are true, their ends are judged as they should be."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from vla_policy_ros.sim.dataset import MIX, SCENE_SEED_BASE
from vla_policy_ros.sim.expert import ArmKinematics, step_towards
from vla_policy_ros.sim.instructions import parse_instruction
from vla_policy_ros.sim.mjcf import FINGER_OPEN
from vla_policy_ros.sim.scene import COLOURS, HELD_OUT_KINDS, HOME, SHAPES, Variation
from vla_policy_ros.sim.tasks import TASKS, Conditions, Episode, Outcome, Task, TaskState
from vla_policy_ros.sim.tasks.play import Unsteady, play_expert
from vla_policy_ros.sim.tasks.push import ARRIVED, CLEARANCE, SIGHTED, _turn
from vla_policy_ros.sim.tasks.reach import ATTEMPT_SHIFT
from vla_policy_ros.sim.world import TabletopWorld

PERIOD = 0.1


@pytest.fixture(scope='module')
def world() -> Iterator[TabletopWorld]:
    made = TabletopWorld(gripper=True)
    yield made
    made.close()


def play(task: Task, episode: Episode, world: TabletopWorld) -> Outcome:
    """The expert in the physics."""
    for _ in play_expert(task, episode, world, PERIOD, task.seconds):
        pass
    return task.measure(world, episode)


@pytest.mark.parametrize('name', TASKS)
def test_the_expert_succeeds_in_the_physics(name: str, world: TabletopWorld) -> None:
    ends = [play(TASKS[name], TASKS[name].sample(seed, Conditions()), world) for seed in range(12)]
    assert sum(end.success for end in ends) >= 11, [(end.failure, round(end.error, 3)) for end in ends if not end.success]
    assert all(end.failure == '' for end in ends if end.success)


@pytest.mark.parametrize('name', TASKS)
def test_episodes_are_their_seeds_and_training_draws_other_scenes(name: str) -> None:
    task = TASKS[name]
    first, again = (task.sample(3, Conditions()) for _ in range(2))
    assert first.instruction == again.instruction and first.targets == again.targets
    assert first.scene.objects == again.scene.objects and first.scene.fovy == again.scene.fovy
    made = task.training_episodes(SCENE_SEED_BASE + 5)
    assert all(episode.scene is made[0].scene for episode in made) and made[0].scene.seed == SCENE_SEED_BASE + 5
    assert name in MIX and made[0].task == name and all(episode.task in (name, 'reach') for episode in made)


def test_a_reach_names_its_target_and_no_other() -> None:
    for naming in ('any', 'full', 'colour', 'shape'):
        for seed in range(30):
            episode = TASKS['reach'].sample(seed, Conditions(naming=naming))
            named = parse_instruction(episode.instruction, episode.scene.objects).object
            assert named is episode.scene.objects[episode.targets[0]], episode.instruction
            if naming == 'shape':
                assert named.colour not in episode.instruction


def test_held_out_kinds_are_what_is_reached_for() -> None:
    episodes = [TASKS['reach'].sample(seed, Conditions(scene=Variation(kinds='held_out'))) for seed in range(30)]
    named = {(o.colour, o.shape) for e in episodes for o in (e.scene.objects[e.targets[0]],)}
    assert named == set(HELD_OUT_KINDS)


def test_held_out_sentences_are_none_of_the_trained_ones() -> None:
    for name, task in TASKS.items():
        naming = 'shape' if name == 'reach_shape' else 'full'
        trained, held_out = (
            {e.instruction.replace(e.scene.objects[e.targets[0]].name, '{}') for e in (task.sample(s, c) for s in range(150))}
            for c in (Conditions(naming=naming), Conditions(naming=naming, phrasing='held_out'))
        )
        assert not trained & held_out, name
        assert len(held_out) > 1


def test_scenes_of_small_seeds_stay_below_those_of_training() -> None:
    scenes = [TASKS['reach'].sample(seed, Conditions(naming='shape')).scene.seed for seed in range(200)]
    assert max(scenes) >= 1 << ATTEMPT_SHIFT, 'some scene had no shape of its own and another one was taken'
    assert max(scenes) < SCENE_SEED_BASE


def test_twins_count_both_and_a_neighbour_counts_as_wrong(world: TabletopWorld) -> None:
    task = TASKS['reach_any']
    episode = task.sample(1, Conditions())
    for wanted, failure in ((episode.targets[0], ''), (episode.targets[1], ''), (2, 'wrong_object')):
        aimed = Episode('reach', episode.scene, '', (wanted,))
        play(TASKS['reach'], aimed, world)
        assert task.measure(world, episode).failure == failure
    world.reset_to(episode.scene)
    assert task.measure(world, episode).failure == 'timed_out'


def test_a_push_is_judged_by_where_the_cube_is(world: TabletopWorld) -> None:
    task = TASKS['push']
    episode = task.sample(2, Conditions())
    (target,), zone = episode.targets, episode.scene.zone
    assert episode.scene.objects[target].shape == 'cube' and zone.colour in episode.instruction
    world.reset_to(episode.scene)
    assert task.measure(world, episode).failure == 'timed_out'
    places = np.stack([world.object_position(slot) for slot in range(3)])
    for slot, shift, failure in ((target, 0.03, ''), (target, 0.07, 'missed'), ((target + 1) % 3, 0.0, 'wrong_object')):
        moved = places.copy()
        moved[slot, :2] = [zone.x + shift, zone.y]
        world.put_objects(moved)
        outcome = task.measure(world, episode)
        assert outcome.failure == failure and outcome.success == (failure == ''), (slot, shift)


def test_a_pick_is_judged_by_what_is_in_the_air(world: TabletopWorld) -> None:
    task = TASKS['pick']
    episode = task.sample(2, Conditions())
    (target,) = episode.targets
    world.reset_to(episode.scene)
    assert task.measure(world, episode).failure == 'timed_out'
    places = np.stack([world.object_position(slot) for slot in range(3)])
    for slot, height, failure in ((target, 0.07, ''), ((target + 1) % 3, 0.07, 'wrong_object')):
        raised = places.copy()
        raised[slot, 2] += height
        world.put_objects(raised)
        assert task.measure(world, episode).failure == failure
    near = places.copy()
    near[target, :2] = world.tcp()[:2]
    world.put_objects(near)
    assert task.measure(world, episode).failure == 'missed', 'under the hand and still on the table'


def test_a_place_is_judged_by_where_what_was_let_go_stands(world: TabletopWorld) -> None:
    task = TASKS['place']
    episode = task.sample(2, Conditions())
    (target,), zone = episode.targets, episode.scene.place_to_go()
    world.reset_to(episode.scene)
    assert task.measure(world, episode).failure == 'timed_out'
    places = np.stack([world.object_position(slot) for slot in range(3)])
    for slot, shift, height, failure in (
        (target, 0.02, 0.0, ''),
        (target, 0.02, 0.05, 'missed'),
        (target, 0.08, 0.0, 'missed'),
        ((target + 1) % 3, 0.0, 0.0, 'wrong_object'),
    ):
        moved = places.copy()
        moved[slot] = [zone.x + shift, zone.y, places[slot, 2] + height]
        world.put_objects(moved)
        assert task.measure(world, episode).failure == failure, (slot == target, shift, height)
    held = places.copy()
    held[target, :2] = [zone.x, zone.y]
    world.put_objects(held)
    world.set_arm(episode.scene.start, episode.scene.objects[target].size[0])
    assert task.measure(world, episode).failure == 'missed', 'the fingers are still closed round it'


@pytest.mark.parametrize(
    ('name', 'conditions', 'message'),
    [
        ('push', Conditions(naming='shape'), 'names its objects in full'),
        ('reach_any', Conditions(naming='colour'), 'names its objects in full'),
        ('reach_any', Conditions(scene=Variation(kinds='held_out')), 'no held-out kinds'),
    ],
)
def test_conditions_that_do_not_fit_are_refused(name: str, conditions: Conditions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[name].sample(0, conditions)


def test_colours_without_names_tell_nothing_of_the_shape_and_stay_away_from_held_out_ones() -> None:
    task, hues = TASKS['reach_shape'], {shape: [] for shape in SHAPES}
    for seed in range(200):
        for episode in (task.sample(seed, Conditions()), *task.training_episodes(SCENE_SEED_BASE + seed)):
            named = episode.scene.objects[episode.targets[0]]
            assert parse_instruction(episode.instruction, episode.scene.objects).object is named
            assert not any(colour in episode.instruction for colour in COLOURS)
            hues[named.shape].append(colorsys.rgb_to_hsv(*named.rgb)[0])
    for shape, of_shape in hues.items():
        assert min(of_shape) < 0.05 and max(of_shape) > 0.95
        for colour, _ in HELD_OUT_KINDS:
            avoided = colorsys.rgb_to_hsv(*COLOURS[colour])[0]
            apart = np.abs((np.array(of_shape) - avoided + 0.5) % 1.0 - 0.5)
            assert 0.03 < apart.min() < 0.08, (colour, shape)


@pytest.mark.parametrize('name', ['push', 'pick', 'place'])
def test_an_expert_who_sees_everything_some_millimetres_wrong_mostly_succeeds(name: str, world: TabletopWorld) -> None:
    """What a policy learns from the expert is a little wrong everywhere; the expert must not have needed every millimetre."""
    task, rng = TASKS[name], np.random.default_rng(0)

    class Mistaken:
        """The task, as seen by somebody who is wrong about each place."""

        wrong = np.zeros((3, 3))

        def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
            return task.step(kinematics, replace(state, objects=state.objects + self.wrong), episode, period)

    ends, seer = [], Mistaken()
    for seed in range(8):
        episode, angle = task.sample(seed, Conditions()), rng.uniform(-np.pi, np.pi, 3)
        seer.wrong = 0.007 * np.stack([np.cos(angle), np.sin(angle), np.zeros(3)], axis=1)
        for _ in play_expert(seer, episode, world, PERIOD, task.seconds):
            pass
        ends.append(task.measure(world, episode))
    assert sum(end.success for end in ends) >= 6, [(end.failure, round(end.error, 3)) for end in ends]


@pytest.mark.parametrize(('name', 'unsteadiness', 'at_least'), [('push', 0.02, 9), ('pick', 0.012, 11), ('place', 0.012, 10)])
def test_an_expert_bears_an_unsteady_hand(name: str, unsteadiness: float, at_least: int, world: TabletopWorld) -> None:
    """A policy's joint targets are some hundredths of a radian off, and drift from look to look."""
    task, ends = TASKS[name], []
    expert = Unsteady(task, np.random.default_rng(0), hand=unsteadiness)
    for seed in range(16):
        episode = task.sample(seed, Conditions())
        for _ in play_expert(expert, episode, world, PERIOD, task.seconds):
            pass
        ends.append(task.measure(world, episode))
    assert sum(end.success for end in ends) >= at_least, [(end.failure, round(end.error, 3)) for end in ends]


def test_what_nobody_asked_for_is_put_down_before_it_is_let_go(world: TabletopWorld) -> None:
    """Who for a moment takes the right object in the fingers for a wrong one must not have dropped it then."""
    task, heights, ends = TASKS['pick'], [], []

    class SecondThoughts:
        """The task, for somebody who for five seconds wants the object beside the named one."""

        looks = 0

        def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
            self.looks += 1
            wanted = episode if self.looks > 50 else replace(episode, targets=((episode.targets[0] + 1) % 3,))
            return task.step(kinematics, state, wanted, period)

    for seed in range(1, 5):
        episode = task.sample(seed, Conditions())
        other = (episode.targets[0] + 1) % 3
        heights.append([world.object_position(other)[2] for _ in play_expert(SecondThoughts(), episode, world, PERIOD, 13.0)])
        ends.append(task.measure(world, episode))
    assert all(height[50] > 0.1 and height[-1] < 0.05 for height in heights)
    assert min(np.diff(height).min() for height in heights) > -0.045, 'm in a tenth of a second: it was dropped'
    assert sum(end.success for end in ends) >= 3, [(end.failure, round(end.error, 3)) for end in ends]


def test_the_wrist_camera_sees_what_is_pushed(world: TabletopWorld) -> None:
    """Whichever way the push goes: a policy without memory cannot push what its cameras do not show."""
    task, begun, seen, outward = TASKS['push'], [], [], []
    for seed in range(8):
        episode = task.sample(seed, Conditions())
        slot, zone = episode.targets[0], episode.scene.place_to_go()
        spec, looks = episode.scene.objects[slot], []
        for _ in play_expert(task, episode, world, PERIOD, task.seconds):
            centre = world.object_position(slot)
            pushed, left = np.hypot(centre[0] - spec.x, centre[1] - spec.y), np.hypot(centre[0] - zone.x, centre[1] - zone.y)
            if pushed > 0.01 and left > ARRIVED:
                looks.append((world.project('wrist', centre) is not None, world.visible_pixel('wrist', slot) is not None))
        begun.append(looks[0][0])
        seen.append(np.mean([visible for _, visible in looks]))
        outward.append(np.hypot(zone.x, zone.y) > np.hypot(spec.x, spec.y))
    assert all(begun), begun
    assert min(seen) > 0.5 and np.mean(seen) > 0.8, seen
    assert any(outward) and not all(outward), 'pushes away from the arm and towards it'


def test_the_hand_can_be_turned_to_every_push() -> None:
    """The last joint lacks 0.7 rad of a full circle: near its ends it takes the other way, or the camera stays a little off."""
    kinematics = ArmKinematics()
    for last in np.linspace(kinematics.lower[-1], kinematics.upper[-1], 23):
        q = np.array([*HOME[:6], last])
        kinematics.place(q)
        for direction in np.linspace(-np.pi, np.pi, 37):
            off, turn = _turn(kinematics, q, 0.2 * np.array([np.cos(direction), np.sin(direction)]))
            assert kinematics.lower[-1] < last - turn < kinematics.upper[-1], (last, direction)
            # That a turn to the left lowers the last joint is what the arm itself says.
            kinematics.place(np.array([*HOME[:6], last - turn]))
            heading = kinematics.heading()
            left = direction - np.arctan2(heading[1], heading[0])
            assert abs((left + np.pi) % (2 * np.pi) - np.pi) < SIGHTED[0], (last, direction, left)
            assert -np.pi <= off < np.pi
            kinematics.place(q)


def test_a_cube_left_short_of_its_zone_asks_for_another_attempt_that_no_one_can_miss() -> None:
    """Where the tool ends after a push, leaving the cube and pushing it again are answers far apart."""
    kinematics, task, ways = ArmKinematics(), TASKS['push'], {}
    for short in (0.02, 0.055):
        episode = task.sample(0, Conditions())
        spec, zone = episode.scene.objects[episode.targets[0]], episode.scene.place_to_go()
        objects = np.array([(other.x, other.y, other.half_height) for other in episode.scene.objects])
        ahead = np.array([zone.x - spec.x, zone.y - spec.y])
        objects[episode.targets[0], :2] = np.array([zone.x, zone.y]) - short * ahead / np.linalg.norm(ahead)
        q = np.array(episode.scene.start)
        over = objects[episode.targets[0]] + [0.0, 0.0, spec.half_height + CLEARANCE]
        for _ in range(100):
            q = step_towards(kinematics, q, over - kinematics.place(q)[0], PERIOD)
        state, path = TaskState(q, objects, FINGER_OPEN, FINGER_OPEN), [kinematics.place(q)[0]]
        for _ in range(8):
            state = task.step(kinematics, state, episode, PERIOD)
            path.append(kinematics.place(state.q)[0])
        ways[short] = np.linalg.norm(path[-1] - path[0])
    assert ways[0.02] < 0.01 and ways[0.055] > 0.1, ways
