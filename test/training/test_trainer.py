"""Training: examples as tensors, baselines, the auxiliary loss, and a loop that learns and resumes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_policy_ros.model.configuration import ActionExpertConfig
from vla_policy_ros.policy.checkpoint import new_model, new_processor
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.training.baselines import unconditional_loss, zero_velocity_loss
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.grounding import GroundingHead
from vla_policy_ros.training.trainer import Trainer, TrainingOptions, fit_statistics, learning_rate
from vla_policy_ros.types import CameraView, Observation

K = np.array([[70.0, 0.0, 39.5], [0.0, 70.0, 29.5], [0.0, 0.0, 1.0]])
WORDS = ('red', 'blue')


@dataclass
class Sample:
    """A scene of two coloured squares; the arm should move by where the named one is."""

    observation: Observation
    actions: np.ndarray
    target_pixels: dict[str, tuple[float, float] | None]
    scene_id: int


def samples(scenes: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for scene in range(scenes):
        image = np.full((60, 80, 3), 90, dtype=np.uint8)
        centres = {'red': (int(rng.integers(8, 36)), int(rng.integers(8, 52))), 'blue': (int(rng.integers(46, 72)), 30)}
        for word, (u, v) in centres.items():
            image[v - 6 : v + 7, u - 6 : u + 7] = (220, 30, 30) if word == 'red' else (30, 30, 220)
        views = {name: CameraView(image, K, 0) for name in ('scene', 'wrist')}
        state = rng.normal(size=7) * 0.1
        for word in WORDS:
            u, v = centres[word]
            goal = np.array([u / 40 - 1, v / 30 - 1, 0, 0, 0, 0, 0.3])
            actions = state + (goal - state) * np.linspace(0.1, 1.0, 16)[:, None]
            made.append(Sample(Observation(0, views, state, 0, f'go to the {word} one'), actions, {'scene': (u, v)}, scene))
    return made


@pytest.fixture(scope='module')
def robot() -> Robot:
    return load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')


def make_trainer(robot: Robot, data: ExampleSet, folder: Path, **options: object) -> Trainer:
    model = new_model(robot, 'tiny')
    processor = new_processor(robot, 'tiny', model.config)
    processor = new_processor(robot, 'tiny', model.config, fit_statistics(data, processor))
    return Trainer(model, processor, data, TrainingOptions(**options), folder, data)  # type: ignore[arg-type]


@pytest.fixture(scope='module')
def data(robot: Robot) -> ExampleSet:
    model = new_model(robot, 'tiny')
    return ExampleSet.build(samples(24), new_processor(robot, 'tiny', model.config))


def test_examples_of_a_scene_share_their_pixels(data: ExampleSet) -> None:
    assert len(data) == 48 and len(data.pixel_values) == 24
    assert data.scene.tolist() == [index // 2 for index in range(48)]
    first = samples(1)[0].target_pixels['scene']
    expected = [(first[0] + 0.5) * 56 / 80 - 0.5, (first[1] + 0.5) * 56 / 60 - 0.5]
    np.testing.assert_allclose(data.target_pixels[0, 0].numpy(), expected, rtol=1e-6)
    assert torch.isnan(data.target_pixels[:, 1]).all(), 'the wrist camera has no target'
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


def test_grounding_finds_the_patch_that_holds_the_pixel() -> None:
    head = GroundingHead(width=8, patch_size=14, grid=4)
    tokens = torch.zeros(3, 1, 16, 8)
    pixels = torch.tensor([[[14.0, 28.0]], [[float('nan'), 3.0]], [[55.4, 0.0]]])
    for row, cell in ((0, 2 * 4 + 1), (2, 3)):
        tokens[row, 0, cell] = torch.tensor([5.0, -5.0] * 4)
    with torch.no_grad():
        head.logit.weight.copy_(torch.tensor([[9.0, -9.0] * 4]))
        head.offset.weight.zero_()
        head.offset.bias.zero_()
    loss = head(tokens, pixels)
    assert float(loss.accuracy) == 1.0 and float(loss.patch.detach()) < 1e-6
    offsets = [((14.5 / 14) % 1 - 0.5, (28.5 / 14) % 1 - 0.5), ((55.9 / 14) % 1 - 0.5, 0.5 / 14 - 0.5)]
    assert float(loss.offset.detach()) == pytest.approx(np.mean(np.square(offsets)), abs=1e-5)
    nowhere = head(tokens, torch.full((3, 1, 2), float('nan')))
    assert float(nowhere.total.detach()) == 0.0


def test_learning_rate_rises_then_falls() -> None:
    options = TrainingOptions(steps=1000, warmup_steps=100, learning_rate=1.0, final_fraction=0.1)
    rates = [learning_rate(step, options) for step in (0, 49, 99, 100, 550, 1000)]
    np.testing.assert_allclose(rates, [0.01, 0.5, 1.0, 1.0, 0.55, 0.1], atol=1e-9)


def test_an_interrupted_run_continues_as_if_it_had_not_stopped(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    options = {'steps': 6, 'scenes_per_step': 4, 'repeats': 2, 'save_every': 3, 'validate_every': 100, 'log_every': 3}
    whole = make_trainer(robot, data, tmp_path / 'whole', **options)
    whole.run()
    first = make_trainer(robot, data, tmp_path / 'parts', **options)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(on_save=interrupt)
    assert first.step == 3
    second = make_trainer(robot, data, tmp_path / 'parts', **options)
    assert second.resume() and second.step == 3
    second.run()
    mine, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with whole.averaged_weights(), second.averaged_weights():
        mine, theirs = second.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not make_trainer(robot, data, tmp_path / 'new', **options).resume()


def test_the_loop_learns_and_saves_the_average(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    trainer = make_trainer(
        robot,
        data,
        tmp_path,
        steps=80,
        scenes_per_step=8,
        warmup_steps=10,
        learning_rate=3e-3,
        ema=0.9,
        log_every=20,
        validate_every=1000,
        save_every=1000,
        bfloat16=False,
    )
    saved: list[torch.Tensor] = []
    trainer.run(on_save=lambda: saved.append(trainer.model.action_expert.action_out_proj.weight.detach().clone()))
    rows = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert rows[0]['baselines'] == trainer.baselines
    train = [row for row in rows if row['event'] == 'train']
    assert train[-1]['flow'] < 0.7 * trainer.baselines['zero_velocity'] < train[0]['flow']
    assert train[-1]['grounding'] < 1.0, 'chance over 16 patches is 2.77'
    validation = next(row for row in rows if row['event'] == 'validation')
    assert validation['flow'] < 0.7 * trainer.baselines['zero_velocity']
    assert len(saved) == 1 and not torch.equal(saved[0], trainer.model.action_expert.action_out_proj.weight), 'the average is saved'
