"""The dry run counts what a training has, and estimates what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from squares import ROOT, config, example_set, make_trainer, tabletop_robot
from typer.testing import CliRunner

from vla_policy_ros.cli import app
from vla_policy_ros.model.presets import preset_sizes
from vla_policy_ros.model.tokenizer import small_tokenizer
from vla_policy_ros.policy.checkpoint import robot_config
from vla_policy_ros.training import memory
from vla_policy_ros.training.config import load_training
from vla_policy_ros.training.objective import with_draws
from vla_policy_ros.training.scenes import Draw
from vla_policy_ros.training.trainer import Trainer

EXPERT_ALONE = {'freeze': dict.fromkeys(['vision', 'geometry', 'connectors', 'language', 'embeddings'], True)}
MUON = {'optimisation': {'steps': 1, 'optimizer': 'muon'}}
LORA = {'lora': {'rank': 4}, 'freeze': {'vision': True, 'geometry': True, 'embeddings': True}}


def kept_for_backward(trainer: Trainer, scenes: int) -> tuple[float, int]:
    """Bytes that autograd keeps of one pass beside weights and inputs, and tokens of a prefix."""
    batch = with_draws(
        trainer.collate([trainer.scenes[Draw(index, 1)] for index in range(scenes)]),
        trainer.model.action_expert,
        trainer.options.repeats,
    )
    given = [*trainer.objective.parameters(), *trainer.objective.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.parallel(batch)
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values())), batch['input_ids'].shape[1]


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    'sections',
    [{}, LORA, EXPERT_ALONE, {'network': {'fusion_mode': 'tokens'}, 'optimisation': {'repeats': 6}}],
    ids=['all', 'lora', 'expert', 'tokens'],
)
def test_activations_are_estimated_within_a_fifth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, sections: dict[str, Any]
) -> None:
    data = example_set(4, preset='tabletop')
    made = {'losses': {'grounding': 0.0}, 'precision': precision, 'frozen_dtype': precision, **sections}
    trainer = make_trainer(tabletop_robot(), data, tmp_path, preset='tabletop', **made)
    trainer.objective.train()
    measured, words = kept_for_backward(trainer, 4)
    cameras = data.pixel_values.shape[1]
    monkeypatch.setattr(memory, 'PROMPT_WORDS', words - cameras * trainer.model.config.image_seq_length)
    way = memory.Way('', trainer.config, trainer.objective)
    taken = memory.memory(way, 1, cameras, 2, eager=True)
    assert taken.copies + taken.activations == pytest.approx(measured, rel=0.2)


def test_checkpointing_keeps_less_and_is_estimated_so(tmp_path: Path) -> None:
    data = example_set(4, preset='tabletop')
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tabletop_robot(), data, tmp_path, preset='tabletop', precision='float32', gradient_checkpointing=checkpointing
        )
        trainer.objective.train()
        way = memory.Way('', trainer.config, trainer.objective)
        results.append((kept_for_backward(trainer, 4)[0], memory.activation_bytes(way, 4, 2, 2, eager=True)))
    (whole, estimated_whole), (less, estimated_less) = results
    assert less < 0.4 * whole
    # The estimate has one layer that is computed again, which is not yet there when the forward pass ends.
    assert less < estimated_less < 0.5 * estimated_whole


@pytest.mark.parametrize('sections', [{}, LORA, EXPERT_ALONE, MUON], ids=['all', 'lora', 'expert', 'muon'])
def test_everything_else_is_what_a_trainer_has(tmp_path: Path, sections: dict[str, Any]) -> None:
    trainer = make_trainer(
        tabletop_robot(), example_set(4), tmp_path, **{'frozen_dtype': 'bfloat16', 'optimisation': {'steps': 1}, **sections}
    )
    trainer.run()
    network = robot_config(tabletop_robot(), preset_sizes('tiny'), small_tokenizer())
    made = memory.Way('', trainer.config, memory._on_meta(trainer.config, network))
    assert made.trained == sum(parameter.numel() for parameter in trainer.parameters.values())
    counted = memory.memory(made, 1, 2, 2)
    sizes = {
        'weights': trainer.objective.parameters(),
        'average': trainer.average.values,
        'optimizer': [value for name, value in trainer._tensors().items() if name.startswith(('exp_avg', 'momentum'))],
        'gradients': [parameter.grad for parameter in trainer.objective.parameters() if parameter.grad is not None],
    }
    for name, tensors in sizes.items():
        assert getattr(counted, name) == sum(tensor.numel() * tensor.element_size() for tensor in tensors), name


def test_shards_divide_what_can_be_divided(tmp_path: Path) -> None:
    network = robot_config(tabletop_robot(), preset_sizes('tiny'), small_tokenizer())
    way = memory.ways(config(tmp_path, sharding='fsdp'), network)[0]
    one, four = memory.memory(way, 1, 2, 2), memory.memory(way, 4, 2, 2)
    for name in ('weights', 'gradients', 'optimizer', 'average', 'activations'):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4), name
    copied = memory.memory(memory.ways(config(tmp_path), network)[0], 4, 2, 2)
    assert copied.weights == one.weights and copied.copies > one.copies


def test_the_file_of_the_7b_model_says_what_fits_where() -> None:
    settings = load_training(ROOT / 'config' / 'training' / 'llava3d_7b_lora.yaml')
    assert settings.sharding == 'fsdp' and settings.lora is not None and settings.preset is not None
    robot = tabletop_robot()
    network = robot_config(robot, preset_sizes(settings.preset), small_tokenizer())
    made = {way.name: way for way in memory.ways(settings, network)}
    assert list(made) == ['all weights', 'LoRA + expert', 'expert alone']
    language = sum(p.numel() for p in made['all weights'].objective.model.language_model.parameters())
    assert language == 6_738_415_616, 'the published size of Llama 2 7B'
    fits = {(name, count): memory.memory(way, count, 1, 1).fits(80e9) for name, way in made.items() for count in (1, 4, 8)}
    assert not fits['all weights', 1] and fits['all weights', 8]
    assert fits['LoRA + expert', 1] and fits['expert alone', 1]
    # Adam with float32 weights, gradients, two averages and a moving average: 20 bytes per trained weight.
    whole = memory.memory(made['all weights'], 1, 1, 1)
    assert whole.gradients + whole.optimizer + whole.average == 16 * made['all weights'].trained


def test_the_command_prints_the_tables_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    invoke = CliRunner().invoke
    result = invoke(app, ['train', 'llava3d_7b_lora', '--dry-run', '--gpus', '2'])
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if line.startswith('│ all weights')]
    assert len(rows) == 1 and rows[0].split('│')[2].strip() == '2'
    words = ' '.join(result.output.split())
    assert 'sharded (fsdp)' in words and 'activations' in words, 'whole words, though the output is no terminal'
    assert not list(tmp_path.iterdir())
    result = invoke(app, ['train', 'llava3d_7b_lora', '--dry-run', '--gpus', '1,x'])
    assert result.exit_code == 2 and "--gpus '1,x' is not numbers of devices joined by commas" in result.output
    result = invoke(app, ['train', 'llava3d_7b_lora', '--dry-run', '--set', 'preset=null'])
    assert result.exit_code == 2 and "start_from 'base' does not exist yet: add preset" in result.output


@pytest.mark.parametrize('file', sorted((ROOT / 'config' / 'training').glob('*.yaml')), ids=lambda file: file.stem)
def test_every_shipped_training_file_is_valid(file: Path) -> None:
    assert load_training(file).robot
