"""Episodes in process: a policy that does the right thing succeeds, others fail in the class they belong to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expert_policy import Expert

pytest.importorskip('mujoco')

from vla_policy_ros.evaluation.closed_loop import ClosedLoop, LoopSettings
from vla_policy_ros.evaluation.probes import Probe
from vla_policy_ros.evaluation.seeds import scene_seeds
from vla_policy_ros.evaluation.variations import conditions_of
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.sim.tasks import TASKS, Episode

SEED = scene_seeds(1, 1)[0]
NOMINAL = conditions_of('nominal')


@pytest.fixture(scope='module')
def robot() -> Robot:
    return load_robot(robot_path('tabletop'))


def play(robot: Robot, policy: Any, **settings: Any) -> Any:
    with ClosedLoop(policy, robot, LoopSettings(**settings)) as loop:
        return loop.run(TASKS['reach'], SEED, NOMINAL)


@pytest.fixture(scope='module')
def episode() -> Episode:
    return TASKS['reach'].sample(SEED, NOMINAL)


@pytest.mark.parametrize(('executed', 'looks'), [(8, 5), (16, 3), (3, 14)])
def test_the_expert_succeeds_and_looks_as_often_as_asked(robot: Robot, episode: Episode, executed: int, looks: int) -> None:
    expert = Expert(robot, episode)
    result = play(robot, expert, executed=executed)
    assert result.success and result.error < 0.01 and result.failure == ''
    assert len(expert.seen) == looks
    assert {observation.instruction for observation in expert.seen} == {episode.instruction} == {result.instruction}
    assert len({observation.stamp_ns for observation in expert.seen}) == looks


@pytest.mark.parametrize('task', TASKS)
def test_the_expert_of_every_task_succeeds_where_it_sees_what_it_does(task: str) -> None:
    robot = load_robot(robot_path('tabletop_gripper' if TASKS[task].needs_gripper else 'tabletop'))
    results = []
    for seed in scene_seeds(1, 3, 'choice'):
        expert = Expert(robot, TASKS[task].sample(seed, NOMINAL))
        with ClosedLoop(expert, robot, LoopSettings(executed=4)) as loop:
            results.append(loop.run(TASKS[task], seed, NOMINAL, expert.watch))
    assert sum(result.success for result in results) >= 2, results


def test_a_task_that_needs_a_gripper_is_refused_without_one(robot: Robot, episode: Episode) -> None:
    with ClosedLoop(Expert(robot, episode), robot, LoopSettings()) as loop, pytest.raises(ValueError, match='needs a gripper'):
        loop.run(TASKS['pick'], SEED, NOMINAL)


def test_who_goes_to_another_object_is_at_the_wrong_object(robot: Robot, episode: Episode) -> None:
    (other, *_) = (slot for slot in range(3) if slot not in episode.targets)
    result = play(robot, Expert(robot, replace(episode, targets=(other,))))
    assert (result.success, result.failure) == (False, 'wrong_object') and result.error > 0.05


def test_who_stays_is_out_of_time(robot: Robot, episode: Episode) -> None:
    result = play(robot, Expert(robot, episode), seconds=0.1)
    assert (result.success, result.failure) == (False, 'timed_out')


@pytest.mark.parametrize('spoil', [lambda a: np.full_like(a, np.nan), lambda a: a + np.eye(7)[6] * 9.0])
def test_who_asks_for_what_the_robot_may_not_do_fails_at_the_limits(robot: Robot, episode: Episode, spoil: Any) -> None:
    worlds: list[float] = []
    with ClosedLoop(Expert(robot, episode, spoil), robot, LoopSettings(seconds=1.0)) as loop:
        result = loop.run(TASKS['reach'], SEED, NOMINAL, lambda world: worlds.append(float(np.abs(world.joint_state()[0]).max())))
    assert (result.success, result.failure) == (False, 'limit')
    assert np.isfinite(worlds).all() and max(worlds) < 4.0, 'the arm stays within its limits'


def test_no_joint_is_driven_faster_than_it_may(robot: Robot, episode: Episode) -> None:
    start = episode.scene.start
    places: list[np.ndarray] = []
    policy = Expert(robot, episode, lambda actions: np.tile(start + np.eye(7)[0], (len(actions), 1)))
    with ClosedLoop(policy, robot, LoopSettings(seconds=0.5)) as loop:
        loop.run(TASKS['reach'], SEED, NOMINAL, lambda world: places.append(world.joint_state()[0]))
    travelled = places[-1][0] - start[0]
    assert 0.5 * 1.5 * 0.8 < travelled <= 0.5 * 1.5 * 1.02


def test_a_false_sentence_is_told_and_judged_both_ways(robot: Robot, episode: Episode) -> None:
    blind = play(robot, Expert(robot, episode), probe=Probe(wrong_instruction=True))
    assert blind.success and blind.followed is False and blind.instruction != episode.instruction


def test_a_false_K_reaches_the_policy_with_the_true_picture(robot: Robot, episode: Episode) -> None:
    true, false = Expert(robot, episode), Expert(robot, episode)
    play(robot, true, seconds=0.1)
    play(robot, false, seconds=0.1, probe=Probe(focal_scale=1.3))
    for name in robot.camera_names:
        seen, wrong = true.seen[0].cameras[name], false.seen[0].cameras[name]
        np.testing.assert_array_equal(seen.rgb, wrong.rgb)
        assert wrong.K[0, 0] == pytest.approx(1.3 * seen.K[0, 0]) and wrong.K[0, 2] == seen.K[0, 2]


def test_an_episode_does_not_depend_on_those_before_it(robot: Robot, episode: Episode) -> None:
    first, expert = Expert(robot, episode), Expert(robot, episode)
    alone = play(robot, first, seconds=1.0)
    with ClosedLoop(expert, robot, LoopSettings(seconds=1.0)) as loop:
        loop.run(TASKS['reach'], SEED + 1, NOMINAL)
        begin = len(expert.seen)
        again = loop.run(TASKS['reach'], SEED, NOMINAL)
    assert again == alone
    for before, after in zip(first.seen, expert.seen[begin:], strict=True):
        assert before.stamp_ns == after.stamp_ns
        np.testing.assert_array_equal(before.cameras['scene'].rgb, after.cameras['scene'].rgb)


def test_more_actions_than_a_chunk_has_are_refused(robot: Robot, episode: Episode) -> None:
    with pytest.raises(ValueError, match='has 16 actions'):
        play(robot, Expert(robot, episode), executed=17)


@pytest.mark.parametrize('settings', [{'executed': 0}, {'seconds': 0.0}, {'seconds': float('nan')}])
def test_settings_that_cannot_be_run_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'executed|seconds'):
        LoopSettings(**settings)
