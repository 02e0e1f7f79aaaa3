"""Windows of recordings mean what chunks mean, wherever the recording has gaps, other rates or an end; and they train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from episode_recordings import FPS, ROBOT, ROBOT_TEXT, entries, number_of, record, target

from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.episodes.errors import HOLD, POLICY, REPEAT_LAST, OpenLoopError, baselines
from vla_policy_ros.policy.checkpoint import new_model, new_processor
from vla_policy_ros.robot import parse_robot
from vla_policy_ros.training.open_loop import measure, to_dict
from vla_policy_ros.training.recorded import open_recorded
from vla_policy_ros.training.recorded_config import Augmentation, RecordedData
from vla_policy_ros.training.scenes import Draw
from vla_policy_ros.training.windows import plan_windows, windows
from vla_policy_ros.types import ActionChunk, Observation


def test_action_i_is_the_target_one_period_and_i_after_the_stamp(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'bag', entries(12)), ROBOT)
    made = list(windows(episode, number=2, stride=3))
    assert [number_of(w.observation.cameras['top'].rgb) for w in made] == [0, 3, 6, 9]
    assert [w.scene_id for w in made] == [2_000_000, 2_000_003, 2_000_006, 2_000_009]
    for window, first in zip(made, (0, 3, 6, 9), strict=True):
        expected = [target(min(first + i + 1, 12)) for i in range(4)]
        np.testing.assert_allclose(window.actions, expected, atol=1e-9)
        assert window.action_is_pad.tolist() == [first + i + 1 > 12 for i in range(4)]


def test_actions_are_looked_up_by_time_at_another_rate(tmp_path: Path) -> None:
    slow = parse_robot(ROBOT_TEXT.replace('period: 0.1', 'period: 0.25'))
    episode = BagEpisode(record(tmp_path / 'bag', entries(12)), slow)
    np.testing.assert_allclose(plan_windows(episode).actions[0], [target(i) for i in (2.5, 5, 7.5, 10)], atol=1e-6)


def test_a_dropped_picture_moves_no_action(tmp_path: Path) -> None:
    full = BagEpisode(record(tmp_path / 'a', entries(12)), ROBOT)
    dropped = [e for e in entries(12) if not (e[0] == '/top' and 0.35 < e[1] < 0.65)]
    episode = BagEpisode(record(tmp_path / 'b', dropped), ROBOT)
    kept = [step.stamp_ns for step in episode.steps]
    rows = [i for i, step in enumerate(full.steps) if step.stamp_ns in kept]
    assert len(rows) == 9
    np.testing.assert_array_equal(plan_windows(episode).actions, plan_windows(full).actions[rows])


def test_steps_without_any_known_action_begin_no_window(tmp_path: Path) -> None:
    some = [e for e in entries(12) if e[0] != '/arm/joint_trajectory' or 0.25 < e[1] < 0.75]
    plan = plan_windows(BagEpisode(record(tmp_path / 'bag', some), ROBOT))
    assert plan.steps == (3, 4, 5, 6, 7)  # targets are at 0.4 to 0.8 s
    assert plan.action_is_pad.sum(axis=1).tolist() == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match='stride'):
        plan_windows(BagEpisode(tmp_path / 'bag', ROBOT), 0)


class Says:
    """Answers every observation with the same function of it."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def infer(self, observation: Observation) -> ActionChunk:
        actions = self.answer(observation)  # type: ignore[operator]
        return ActionChunk(0, 1, ROBOT.action.joints, np.asarray(actions, dtype=np.float64), 0, '')


def test_errors_are_those_of_counted_actions_and_baselines_look_at_nothing(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'bag', entries(12)), ROBOT)
    off = np.array([0.1, -0.2])
    perfect = measure(Says(lambda o: [target(round((o.stamp_ns / 1e9 - 100) * FPS) + i + 1) for i in range(4)]), episode)
    assert perfect.errors[POLICY].mae == pytest.approx(0.0, abs=1e-9)  # padding does not count
    shifted = measure(
        Says(lambda o: [np.array(target(round((o.stamp_ns / 1e9 - 100) * FPS) + i + 1)) + off for i in range(4)]), episode
    )
    error = shifted.errors[POLICY]
    np.testing.assert_allclose(error.joint_mae, [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(error.step_mae, [0.15] * 4, rtol=1e-6)
    assert (error.mae, error.rmse) == pytest.approx((0.15, np.sqrt((0.01 + 0.04) / 2)))
    # The arm moves on by 0.05 and 0.02 a step, and the target is 0.01 and 0.03 ahead of it.
    np.testing.assert_allclose(perfect.errors[HOLD].joint_mae[0], np.average([0.06, 0.11, 0.16, 0.21], weights=[12, 11, 10, 9]))
    step = episode.steps[5]
    made = baselines(ROBOT, step.state[None], np.array([step.stamp_ns]), episode.commands, 4)
    np.testing.assert_allclose(made[REPEAT_LAST], [[target(5)] * 4], atol=1e-9)
    assert to_dict([shifted], ROBOT)['episodes'][0][HOLD]['joint_mae']['a'] > 0


def test_an_action_that_every_window_lacks_has_no_error() -> None:
    counted = np.array([[True, False], [True, False]])
    error = OpenLoopError.of(np.ones((2, 2, 1)), counted)
    assert np.isnan(error.step_mae[1]) and error.to_dict(['a'])['step_mae'] == [1.0, None]


def test_recordings_are_data_of_the_trainer(tmp_path: Path) -> None:
    for name, steps in (('a', 6), ('b', 5), ('c', 4)):
        record(tmp_path / 'bags' / name, entries(steps))
    (tmp_path / 'bags' / 'd.mcap').write_text('no bag')
    model = new_model(ROBOT, 'tiny', 0)
    processor = new_processor(ROBOT, 'tiny', model.config)
    told: list[str] = []
    data = RecordedData(source='episodes', path=tmp_path / 'bags', validation_episodes=(1,), skip_damaged=True)
    training, held_out = open_recorded(data, ROBOT, processor, told.append)
    assert held_out is not None and (len(training), len(held_out)) == (10, 5)
    assert 'd.mcap is left out after 0 windows' in told[2]
    scene = training[Draw(5, 0)]
    assert scene.own['action_is_pad'].shape == (1, 4) and scene.instructions == ['pick up the cup']
    assert bool(scene.own['action_is_pad'][0, -1])  # the last step of the first bag
    damaged = data.model_copy(update={'skip_damaged': False})
    with pytest.raises(EpisodeError, match='begin as an MCAP'):
        open_recorded(damaged, ROBOT, processor, told.append)
    with pytest.raises(EpisodeError, match='has no bag 7'):
        open_recorded(data.model_copy(update={'episodes': (7,)}), ROBOT, processor, told.append)
    with pytest.raises(ValueError, match='episode 1 is both trained on and held out'):
        RecordedData(source='episodes', path=tmp_path, episodes=(0, 1), validation_episodes=(1,))
    changed, _ = open_recorded(data.model_copy(update={'augmentation': Augmentation()}), ROBOT, processor, told.append)
    assert not torch.equal(changed[Draw(0, 1)].shared['pixel_values'], changed[Draw(0, 2)].shared['pixel_values'])
    assert torch.equal(changed[Draw(0, 1)].shared['pixel_values'], changed[Draw(0, 1)].shared['pixel_values'])
    assert changed.digest() == training.digest()
