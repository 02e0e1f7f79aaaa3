"""Examples as tensors, baselines, and the grounding loss."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from squares import example_set, samples

from vla_policy_ros.model.configuration import ActionExpertConfig
from vla_policy_ros.policy.checkpoint import new_checkpoint, new_model, new_processor
from vla_policy_ros.robot import load_robot
from vla_policy_ros.training.baselines import unconditional_loss, zero_velocity_loss
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.grounding import GroundingHead
from vla_policy_ros.training.tabletop import SHARDS_PER_SEED, VALIDATION_SHARD, VISITED_SHARD, ExampleMaker

ROBOT = Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml'


@pytest.fixture(scope='module')
def data() -> ExampleSet:
    return example_set(24)


def test_examples_of_a_scene_share_their_pixels(data: ExampleSet) -> None:
    assert len(data) == 48 and len(data.pixel_values) == 24
    assert data.scene.tolist() == [index // 2 for index in range(48)]
    first = samples(1)[0].target_pixels['scene'][0]
    expected = [(first[0] + 0.5) * 56 / 80 - 0.5, (first[1] + 0.5) * 56 / 60 - 0.5]
    np.testing.assert_allclose(data.target_pixels[0, 0, 0].numpy(), expected, rtol=1e-6)
    assert torch.isnan(data.target_pixels[:, 1]).all(), 'the wrist camera has no target'
    assert torch.isnan(data.target_pixels[:, :, 1]).all(), 'nothing is to be brought anywhere'
    assert data.intrinsic_mask.all() and data.image_masks.all()


def test_examples_survive_a_file_and_joining(data: ExampleSet, tmp_path: Path) -> None:
    data.save(tmp_path / 'x.safetensors')
    again = ExampleSet.load(tmp_path / 'x.safetensors')
    both = ExampleSet.join([again, again])
    assert both.instructions == data.instructions * 2 and len(both) == 96
    assert both.scene[48:].tolist() == (data.scene + 24).tolist()
    assert torch.equal(both.pixel_values[24:], data.pixel_values) and torch.equal(both.actions[:48], data.actions)
    with pytest.raises(ValueError, match='no examples'):
        ExampleSet.build([], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(('sampling', 'expected'), [('beta', 0.8333), ('uniform', np.pi * np.sqrt(0.35) / 2)])
def test_unconditional_baseline_of_independent_elements_is_the_closed_form(sampling: str, expected: float) -> None:
    config = ActionExpertConfig(time_sampling=sampling)
    actions = np.random.default_rng(0).normal(size=(20_000, 2, 2)) * np.sqrt(0.35)
    assert unconditional_loss(actions, config) == pytest.approx(expected, rel=0.01)
    assert zero_velocity_loss(actions) == pytest.approx(1.35, rel=0.01)


def test_correlated_chunks_are_easier_without_looking() -> None:
    config = ActionExpertConfig()
    independent = np.random.default_rng(0).normal(size=(5000, 8, 1))
    repeated = np.repeat(independent[:, :1], 8, axis=1)
    assert unconditional_loss(repeated, config) < 0.5 * unconditional_loss(independent, config)


def test_actions_beyond_the_end_do_not_count_in_the_baseline() -> None:
    actions = np.zeros((2, 3, 1))
    actions[1, 2] = 100.0
    assert zero_velocity_loss(actions, np.array([[False] * 3, [False, False, True]])) == 1.0


def test_grounding_finds_the_patch_that_holds_the_pixel() -> None:
    head, nan = GroundingHead(width=8, patch_size=14, grid=4), float('nan')
    tokens = torch.zeros(3, 1, 16, 8)
    # Of the object and of the place to bring it to: one of each, and neither.
    pixels = torch.tensor([[[[14.0, 28.0], [nan, nan]]], [[[nan, 3.0], [nan, 3.0]]], [[[nan, nan], [55.4, 0.0]]]])
    for row, cell in ((0, 2 * 4 + 1), (2, 3)):
        tokens[row, 0, cell] = torch.tensor([5.0, -5.0] * 4 if row == 0 else [-5.0, 5.0] * 4)
    with torch.no_grad():
        head.logit.weight.copy_(torch.tensor([[9.0, -9.0] * 4, [-9.0, 9.0] * 4]))
        head.offset.weight.zero_()
        head.offset.bias.zero_()
    loss = head(tokens, pixels)
    assert float(loss.accuracy) == 1.0 and float(loss.patch.detach()) < 1e-6
    offsets = [((14.5 / 14) % 1 - 0.5, (28.5 / 14) % 1 - 0.5), ((55.9 / 14) % 1 - 0.5, 0.5 / 14 - 0.5)]
    assert float(loss.offset.detach()) == pytest.approx(np.mean(np.square(offsets)), abs=1e-5)
    nowhere = head(tokens, torch.full((3, 1, 2, 2), nan))
    assert float(nowhere.total.detach()) == 0.0


def test_no_training_seed_has_the_scenes_of_another_or_of_the_validation() -> None:
    assert SHARDS_PER_SEED > VISITED_SHARD > VALIDATION_SHARD
    most = SHARDS_PER_SEED - VISITED_SHARD
    blocks = [range(VALIDATION_SHARD, VALIDATION_SHARD + 1)]
    for seed in range(4):
        first = seed * SHARDS_PER_SEED
        blocks += [range(first, first + most), range(first + VISITED_SHARD, first + VISITED_SHARD + most)]
    ends = sorted((block.start, block.stop) for block in blocks)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))


@pytest.fixture(scope='module')
def maker(tmp_path_factory: pytest.TempPathFactory) -> ExampleMaker:
    robot = load_robot(ROBOT)
    return ExampleMaker(robot, new_processor(robot, 'tiny', new_model(robot, 'tiny').config), tmp_path_factory.mktemp('examples'))


def test_example_files_are_named_after_what_they_depend_on(maker: ExampleMaker) -> None:
    action = maker.robot.action.model_copy(update={'period': 0.2})
    files = len(list(maker.cache.iterdir()))
    maker.training(3)
    maker.training(3)
    assert len(list(maker.cache.iterdir())) == files + 1, 'the second call reads what the first one made'
    replace(maker, robot=maker.robot.model_copy(update={'action': action})).training(3)
    assert len(list(maker.cache.iterdir())) == files + 2
    with pytest.raises(ValueError, match='examples of one seed'):
        maker.training(10**9)


def test_examples_from_where_a_policy_leads_belong_to_that_policy(maker: ExampleMaker, tmp_path: Path) -> None:
    for seed in (0, 1):
        new_checkpoint(maker.robot, 'tiny', tmp_path / str(seed), seed=seed)
        visited = replace(maker, visited_by=tmp_path / str(seed))
        before = set(maker.cache.iterdir())
        found = visited.training(7)
        (file,) = set(maker.cache.iterdir()) - before
        assert f'_{VISITED_SHARD}_7_' in file.name
        assert len(found) == 7 and torch.equal(visited.training(7).state, found.state) and found.actions.isfinite().all()
        assert set(maker.cache.iterdir()) == before | {file}
