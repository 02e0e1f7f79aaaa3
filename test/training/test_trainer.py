"""The loop: it learns, it measures, and it resumes as if it had not stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from squares import example_set, make_trainer, rows, tabletop_robot

from vla_policy_ros.robot import Robot
from vla_policy_ros.training.config import Optimisation
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.scenes import Draw, ExampleScenes, StepPlan
from vla_policy_ros.training.state import StateError
from vla_policy_ros.training.trainer import learning_rate


@pytest.fixture(scope='module')
def robot() -> Robot:
    return tabletop_robot()


@pytest.fixture(scope='module')
def data() -> ExampleSet:
    return example_set(24)


def test_learning_rate_rises_then_falls() -> None:
    options = Optimisation(steps=1000, warmup_steps=100, final_fraction=0.1)
    rates = [learning_rate(step, 1.0, options) for step in (0, 49, 99, 100, 550, 1000)]
    np.testing.assert_allclose(rates, [0.01, 0.5, 1.0, 1.0, 0.55, 0.1], atol=1e-9)


def test_every_scene_comes_once_per_pass_whatever_the_number_of_processes() -> None:
    plan = StepPlan(scenes=10, per_step=4, seed=3)
    taken = [draw for step in range(5) for draw in plan.step(step)]
    assert sorted(draw.scene for draw in taken[:10]) == list(range(10)) == sorted(draw.scene for draw in taken[10:])
    assert [draw.scene for draw in taken[:10]] != [draw.scene for draw in taken[10:]], 'each pass has an order of its own'
    assert len({draw.seed for draw in taken}) == 20, 'and draws of its own'
    shared = [list(plan.parts(0, 5, part, 2, 2)) for part in range(2)]
    assert [len(batches) for batches in shared] == [10, 10]
    for step in range(5):
        mine = [draw for part in shared for batch in part[2 * step : 2 * step + 2] for draw in batch]
        assert sorted(mine) == sorted(plan.step(step))
    later = list(plan.parts(3, 5, 1, 2, 2))
    assert later == shared[1][6:], 'a continued run takes what the whole one would'


def test_examples_of_a_scene_come_together(data: ExampleSet) -> None:
    scene = ExampleScenes(data)[Draw(5, 1)]
    assert scene.instructions == ['go to the red one', 'go to the blue one']
    assert torch.equal(scene.shared['pixel_values'], data.pixel_values[5]) and torch.equal(scene.own['state'], data.state[10:12])


def test_the_loop_learns_measures_and_saves_the_average(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    trainer = make_trainer(
        robot,
        data,
        tmp_path,
        optimisation={'steps': 80, 'scenes_per_step': 8, 'repeats': 4, 'warmup_steps': 10, 'learning_rate': 3e-3, 'ema': 0.9},
        logging={'log_every': 20, 'validate_every': 1000, 'state_every': 1000, 'tensorboard': True},
        precision='float32',
    )
    saved: list[torch.Tensor] = []
    trainer.run(on_checkpoint=lambda _: saved.append(trainer.model.action_expert.action_out_proj.weight.detach().clone()))
    assert rows(tmp_path, 'start')[0]['baselines'] == trainer.baselines
    train, zero = rows(tmp_path, 'train'), trainer.baselines['zero_velocity']
    assert train[-1]['flow'] < 0.7 * zero < train[0]['flow']
    assert train[-1]['grounding_patch'] < 1.0, 'chance over 16 patches is 2.77'
    assert train[-1]['ratio'] == pytest.approx(train[-1]['flow'] / zero)
    assert np.mean(train[-1]['loss_per_dim']) == pytest.approx(train[-1]['flow'], rel=1e-5)
    assert len(train[-1]['cosine']) == 4 and np.mean(train[-1]['cosine']) > 0.6 > np.mean(train[0]['cosine'])
    assert train[-1]['lr'] == pytest.approx(learning_rate(79, 3e-3, trainer.options)) and train[-1]['samples_per_s'] > 0
    validation = rows(tmp_path, 'validation')[0]
    assert validation['flow'] < 0.7 * zero and validation['action_error'] < 0.2
    assert len(saved) == 1 and not torch.equal(saved[0], trainer.model.action_expert.action_out_proj.weight), 'the average is saved'
    assert list((tmp_path / 'tensorboard').glob('events*'))


def test_accumulated_parts_of_a_step_are_the_whole_step(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    losses = []
    for parts in (1, 2, 4):
        folder = tmp_path / str(parts)
        sections = {'optimisation': {'steps': 3, 'gradient_accumulation': parts}, 'logging': {'log_every': 1}}
        make_trainer(robot, data, folder, precision='float32', **sections).run()
        losses.append([(row['flow'], row['grad_norm']) for row in rows(folder, 'train')])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_processes_that_prepare_examples_change_nothing(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    flows = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        make_trainer(robot, data, folder, workers=workers, logging={'log_every': 1}).run()
        flows.append([row['flow'] for row in rows(folder, 'train')])
    assert flows[0] == flows[1] and len(flows[0]) == 6


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_an_interrupted_run_continues_as_if_it_had_not_stopped(
    robot: Robot, data: ExampleSet, tmp_path: Path, optimizer: str
) -> None:
    sections = {'logging': {'checkpoint_every': 3}, 'optimisation': {'optimizer': optimizer}}
    whole = make_trainer(robot, data, tmp_path / 'whole', **sections)
    whole.run()
    first = make_trainer(robot, data, tmp_path / 'parts', **sections)

    def interrupt(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(on_checkpoint=interrupt)
    assert first.step == 3
    second = make_trainer(robot, data, tmp_path / 'parts', **sections)
    assert second.resume() and second.step == 3
    second.run()
    mine, theirs = second._tensors(), whole._tensors()
    momenta = {name.removeprefix('momentum_buffer/') for name in mine if name.startswith('momentum_buffer/')}
    assert len(mine) == 5 * len(second.parameters) - 2 * len(momenta) and bool(momenta) == (optimizer == 'muon')
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with whole.averaged_weights(), second.averaged_weights():
        mine, theirs = second.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not make_trainer(robot, data, tmp_path / 'new').resume()


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        ({'optimisation': {'learning_rate': 2e-3}}, r'optimisation.learning_rate is 0.002; the run in .* has 0.001'),
        ({'losses': {'grounding': 0.5}}, r'losses.grounding is 0.5'),
        ({'seed': 1}, r'seed is 1'),
        ({'optimisation': {'steps': 2}}, r'has 3 steps behind it, optimisation.steps is 2'),
    ],
)
def test_a_run_is_not_continued_with_another_recipe(
    robot: Robot, data: ExampleSet, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    trainer = make_trainer(robot, data, tmp_path, optimisation={'steps': 3})
    trainer.run()
    with pytest.raises(StateError, match=message):
        make_trainer(robot, data, tmp_path, **sections).resume()
    longer = make_trainer(robot, data, tmp_path, optimisation={'steps': 9}, logging={'log_every': 1}, threads=2)
    assert longer.resume(), 'how long and how often may change'


def test_a_run_from_before_there_was_a_choice_of_optimizer_continues(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    make_trainer(robot, data, tmp_path).run()
    for file in (tmp_path / 'state').glob('*/state.json'):
        note = json.loads(file.read_text())
        assert note['run'].pop('optimisation.optimizer') == 'adamw'
        file.write_text(json.dumps(note))
    assert make_trainer(robot, data, tmp_path, optimisation={'steps': 7}).resume()
    with pytest.raises(StateError, match=r"optimizer is 'muon'; the run in .* has 'adamw'"):
        make_trainer(robot, data, tmp_path, optimisation={'steps': 7, 'optimizer': 'muon'}).resume()


def test_a_run_is_not_continued_on_other_data(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    make_trainer(robot, data, tmp_path, optimisation={'steps': 3}).run()
    with pytest.raises(StateError, match='the examples is'):
        make_trainer(robot, example_set(24, seed=1), tmp_path).resume()


@pytest.mark.parametrize('damage', ['short', 'flipped', 'missing', 'manifest'])
def test_a_damaged_state_is_named_and_the_one_before_it_is_whole(
    robot: Robot, data: ExampleSet, tmp_path: Path, damage: str
) -> None:
    make_trainer(robot, data, tmp_path).run()
    states = sorted((tmp_path / 'state').iterdir())
    assert [state.name for state in states] == ['step_00000003', 'step_00000006']
    file = states[1] / 'part_000.safetensors'
    content = bytearray(file.read_bytes())
    if damage == 'short':
        file.write_bytes(content[:-100])
    elif damage == 'flipped':
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == 'missing':
        file.unlink()
    else:
        (states[1] / 'state.json').write_text('{"format": 1, "st')
    with pytest.raises(StateError, match=r'step_00000006 is damaged .* delete that folder to go on from step_00000003'):
        make_trainer(robot, data, tmp_path).resume()
    for part in states[1].iterdir():
        part.unlink()
    states[1].rmdir()
    again = make_trainer(robot, data, tmp_path)
    assert again.resume() and again.step == 3


def test_a_step_that_diverges_is_named(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    trainer = make_trainer(robot, data, tmp_path)
    with torch.no_grad():
        trainer.model.action_expert.action_out_proj.bias.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match=r'step 0: the norm of the gradient is nan; lower the learning rate'):
        trainer.run()


def test_scenes_that_cannot_be_shared_out_are_refused(robot: Robot, data: ExampleSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='scenes_per_step 4 is not a multiple of gradient_accumulation 3'):
        make_trainer(robot, data, tmp_path, optimisation={'gradient_accumulation': 3})
