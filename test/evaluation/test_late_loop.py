"""Episodes through the runtime on simulated time: late answers are late, and nothing else is random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expert_policy import Expert

pytest.importorskip('mujoco')

from vla_policy_ros.evaluation.late_loop import LateLoop, LateSettings
from vla_policy_ros.evaluation.seeds import scene_seeds
from vla_policy_ros.evaluation.variations import conditions_of
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim.tasks import TASKS

ROBOT = load_robot(robot_path('tabletop'))
SEED = scene_seeds(2, 1, 'choice')[0]
NOMINAL = conditions_of('nominal')
EPISODE = TASKS['reach'].sample(SEED, NOMINAL)


def play(policy: Any, **settings: Any) -> Any:
    with LateLoop(policy, ROBOT, LateSettings(**settings)) as loop:
        return loop.run(TASKS['reach'], SEED, NOMINAL)


@pytest.mark.parametrize('chunking', ['replace', 'ensemble'])
def test_the_expert_arrives_with_the_latency_of_a_large_network(chunking: Any) -> None:
    expert = Expert(ROBOT, EPISODE)
    result = play(expert, latency_ms=200, chunking=chunking, seconds=5.0)
    assert result.success and result.error < 0.02, result
    # One request in flight: with an answer after 200 ms at most one look per 200 ms.
    assert 15 <= len(expert.seen) <= 25


def test_a_robot_with_two_controllers_picks_in_the_runtimes_loop() -> None:
    robot, task = load_robot(robot_path('tabletop_gripper')), TASKS['pick']
    expert = Expert(robot, task.sample(SEED, NOMINAL))
    with LateLoop(expert, robot, LateSettings(latency_ms=50)) as loop:
        expert.watch(loop.world)
        result = loop.run(task, SEED, NOMINAL)
    assert result.success, result


def test_an_answer_that_comes_after_the_end_moves_nothing() -> None:
    expert = Expert(ROBOT, EPISODE)
    still, moved = play(expert, latency_ms=1000, seconds=0.8), play(Expert(ROBOT, EPISODE), latency_ms=0, seconds=0.8)
    assert len(expert.seen) == 1
    assert moved.error < still.error - 0.05


def test_looks_become_rarer_with_the_latency_and_stamps_tell_scenes_apart() -> None:
    quick, slow = Expert(ROBOT, EPISODE), Expert(ROBOT, EPISODE)
    play(quick, latency_ms=0, seconds=2.0)
    play(slow, latency_ms=500, seconds=2.0)
    assert len(quick.seen) == 10 and len(slow.seen) == 4
    with LateLoop(other := Expert(ROBOT, EPISODE), ROBOT, LateSettings(seconds=0.3)) as loop:
        loop.run(TASKS['reach'], SEED + 1, NOMINAL)
    assert other.seen[0].stamp_ns != quick.seen[0].stamp_ns


def test_an_episode_does_not_depend_on_those_before_it() -> None:
    first, second = Expert(ROBOT, EPISODE), Expert(ROBOT, EPISODE)
    alone = play(first, latency_ms=100, seconds=1.5)
    with LateLoop(second, ROBOT, LateSettings(100, seconds=1.5)) as loop:
        loop.run(TASKS['reach'], SEED + 1, NOMINAL)
        begin = len(second.seen)
        again = loop.run(TASKS['reach'], SEED, NOMINAL)
    assert again == alone
    for before, after in zip(first.seen, second.seen[begin:], strict=True):
        assert before.stamp_ns == after.stamp_ns
        np.testing.assert_array_equal(before.state, after.state)
        np.testing.assert_array_equal(before.cameras['wrist'].rgb, after.cameras['wrist'].rgb)


def test_a_policy_that_answers_nonsense_fails_at_the_limits() -> None:
    result = play(Expert(ROBOT, EPISODE, lambda actions: np.full_like(actions, np.nan)), seconds=0.6)
    assert (result.success, result.failure) == (False, 'limit')


def test_a_policy_that_fails_ends_the_motion_and_not_the_evaluation() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError('no memory')

    assert play(broken, seconds=0.6).failure == 'limit'


def test_a_latency_that_nobody_has_is_refused() -> None:
    with pytest.raises(ValueError, match='-5 ms'):
        LateSettings(latency_ms=-5)
