"""The training file: strict, changeable by single values, and with an identity that a continued run must share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from squares import config, settings

from vla_policy_ros.strict_yaml import SchemaError
from vla_policy_ros.training.config import TrainingConfig, load_training


def written(folder: Path, **sections: Any) -> Path:
    file = folder / 'training.yaml'
    file.write_text(yaml.safe_dump(settings(folder, **sections)))
    return file


def test_single_values_and_whole_sections_can_be_changed(tmp_path: Path) -> None:
    changes = ['optimisation.learning_rates.vision=1e-5', 'lora={rank: 4}', 'freeze.vision=true', 'preset=tabletop', 'seed=7']
    made = load_training(written(tmp_path, optimisation={'learning_rates': {'expert': 2e-4}}), changes)
    assert made.optimisation.learning_rates == {'expert': 2e-4, 'vision': 1e-5} and made.optimisation.steps == 6
    assert made.lora is not None and (made.lora.rank, made.lora.alpha) == (4, 32)
    assert made.freeze.vision and made.preset == 'tabletop' and made.seed == 7


def test_muon_and_shards_are_refused_together(tmp_path: Path) -> None:
    file = written(tmp_path, optimisation={'optimizer': 'muon'})
    assert load_training(file).optimisation.optimizer == 'muon'
    with pytest.raises(SchemaError, match='set it to adamw, or sharding to none'):
        load_training(file, ['sharding=fsdp'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('optimisation.setps=3', "optimisation.setps: 'setps' is not a key here; did you mean 'steps'?"),
        ('data.file=[a]', "data.examples.file: 'file' is not a key here; did you mean 'files'?"),
        ('data.source=tabeltop', "data: Input tag 'tabeltop' found using 'source' does not match any of the expected tags"),
        ('freez={}', "'freez' is not a key here; did you mean 'freeze'?"),
        ('optimisation.learning_rates.eyes=1', 'optimisation.learning_rates.eyes.[key]: Input should be'),
        ('lora.targets=[]', 'lora.targets: Tuple should have at least 1 item'),
        ('preset=null', 'give preset (train from nothing) or start_from (a checkpoint)'),
        ('keep_statistics=true', 'keep_statistics needs start_from'),
        ('transfer_groups=[vision]', 'transfer_groups needs transfer_from'),
        ('transfer_groups=[]', 'transfer_groups: Tuple should have at least 1 item'),
        ('optimisation.ema=.nan', 'optimisation.ema'),
        ('seed=[', "change 'seed=[': the value is not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(SchemaError) as error:
        load_training(written(tmp_path), [change])
    assert message in str(error.value)


def test_weights_that_no_checkpoint_has_are_not_transferred(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match='transfer_groups names heads'):
        load_training(written(tmp_path), ['transfer_from=runs/other', 'transfer_groups=[vision, heads]'])


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r'nowhere.yaml: cannot be read .* give the path of a YAML training file'):
        load_training(tmp_path / 'nowhere.yaml')
    (tmp_path / 'list.yaml').write_text('- a\n')
    with pytest.raises(SchemaError, match=r'list.yaml: must be a mapping with the keys robot, preset'):
        load_training(tmp_path / 'list.yaml')


@pytest.mark.parametrize(
    ('same', 'sections'),
    [
        (True, {'optimisation': {'steps': 100}}),
        (True, {'logging': {'state_every': 1}, 'threads': 4, 'workers': 2, 'run': 'elsewhere', 'out': 'there', 'sharding': 'fsdp'}),
        (True, {'data': {'files': ['moved.safetensors']}}),
        (False, {'optimisation': {'warmup_steps': 3}}),
        (False, {'optimisation': {'learning_rates': {'vision': 1e-5}}}),
        (False, {'lora': {'rank': 4}}),
        (False, {'network': {'expert_config': {'num_layers': 1}}}),
        (False, {'precision': 'float32'}),
    ],
)
def test_what_the_result_depends_on_is_the_identity(tmp_path: Path, same: bool, sections: dict[str, Any]) -> None:
    assert (config(tmp_path).identity() == config(tmp_path, **sections).identity()) == same


def test_the_policy_whose_states_are_learnt_from_may_move(tmp_path: Path) -> None:
    """Its weights decide the examples, whose digest a continued run must share; its place does not matter."""

    def identity(by: str, strays: float = 0.0) -> dict[str, Any]:
        data = {'source': 'tabletop', 'visited': {'by': by, 'strays': strays}}
        return TrainingConfig.model_validate({**settings(tmp_path), 'data': data}).identity()

    assert identity('here') == identity('there') != identity('there', strays=0.5)
