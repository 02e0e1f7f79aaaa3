"""What is trained, with what rate, and what becomes of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from squares import config, example_set, make_trainer, tabletop_robot

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.policy.checkpoint import new_model
from vla_policy_ros.training.config import Optimisation
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.objective import Objective, with_draws
from vla_policy_ros.training.optimizer import RunOptimizer, muon_matrices
from vla_policy_ros.training.parameters import choose_trainable, group_of, optimizer_groups, plain_weights, trained
from vla_policy_ros.training.scenes import Draw, ExampleScenes

LORA = {'lora': {'rank': 4}}
CLIP = {
    'vision_config': {'model_type': 'clip_vision_model', 'num_hidden_layers': 2, 'vision_use_head': None},
    'vision_feature_layer': -2,
    'projector_type': 'mlp2x_gelu',
}


@pytest.fixture(scope='module')
def data() -> ExampleSet:
    return example_set(4)


def objective(folder: Path, **sections: Any) -> Objective:
    options = config(folder, **sections)
    model = new_model(tabletop_robot(), 'tiny', changes=options.network)
    made = Objective(model, options.losses.weights(), 2, 0, options.losses.grounding_layer)
    choose_trainable(made, options)
    return made


@pytest.mark.parametrize(
    'network',
    [
        {},
        {'expert_config': {'num_layers': 1}},
        {'expert_config': {'fusion_depth': 'late'}},
        {'expert_config': {'mode': 'shared', 'hidden_size': 64}},
        {'expert_config': {'time_conditioning': 'adarms'}},
        {'expert_config': {'time_conditioning': 'concat_mlp', 'rtc_max_delay': 3}},
        {'use_rays': False},
        {'fusion_mode': 'tokens'},
        {'fusion_mode': 'patch_concat'},
        {'fusion_mode': 'global_concat'},
        {'use_geometric_branch': False, 'geometry_config': None},
        {'geometry_config': {'use_class_tokens': True, 'ffn': 'swiglu', 'encoder_final_norm': False, 'info_layer_scale': True}},
        CLIP,
    ],
    ids=lambda network: ','.join(network) + str(network.get('expert_config', network.get('fusion_mode', ''))),
)
@pytest.mark.parametrize('sections', [{}, LORA], ids=['full', 'lora'])
def test_what_is_trained_is_what_has_a_gradient(
    data: ExampleSet, tmp_path: Path, network: dict[str, Any], sections: dict[str, Any]
) -> None:
    trainer = make_trainer(tabletop_robot(), data, tmp_path, network=network, precision='float32', **sections)
    batch = with_draws(trainer.collate([trainer.scenes[Draw(0, 1)]]), trainer.model.action_expert, 2)
    trainer.objective(batch)['loss'].backward()
    given = {name for name, parameter in trainer.objective.named_parameters() if parameter.grad is not None}
    assert given == set(trainer.parameters)
    assert len(given) > 20


@pytest.mark.parametrize('group', ['vision', 'geometry', 'connectors', 'language', 'embeddings', 'expert'])
def test_a_frozen_group_keeps_its_weights(data: ExampleSet, tmp_path: Path, group: str) -> None:
    trainer = make_trainer(tabletop_robot(), data, tmp_path, freeze={group: True}, optimisation={'steps': 2, 'learning_rate': 0.01})
    before = {name: value.clone() for name, value in trainer.objective.named_parameters()}
    trainer.run()
    changed = {group_of(name) for name, value in trainer.objective.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {'vision', 'geometry', 'connectors', 'language', 'embeddings', 'expert', 'heads'} - {group}


def test_groups_have_their_own_peak_rates_and_vectors_no_decay(tmp_path: Path) -> None:
    options = config(tmp_path, optimisation={'learning_rate': 1e-3, 'learning_rates': {'vision': 1e-5}, 'weight_decay': 0.1})
    parameters = trained(objective(tmp_path))
    groups = optimizer_groups(parameters, options.optimisation)
    assert sum(len(group['params']) for group in groups) == len(parameters)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in groups:
        members = [names[id(parameter)] for parameter in group['params']]
        assert {group_of(name) == 'vision' for name in members} == {group['peak'] == 1e-5}
        assert {parameters[name].dim() > 1 for name in members} == {group['weight_decay'] == 0.1}


def test_muon_moves_the_matrices_inside_layers_and_no_other(tmp_path: Path) -> None:
    options = config(tmp_path, optimisation={'optimizer': 'muon'}).optimisation
    parameters = trained(objective(tmp_path, network={'expert_config': {'time_conditioning': 'adarms'}}))
    chosen = muon_matrices(parameters, options)
    assert {group_of(name) for name in chosen} == {'vision', 'geometry', 'language', 'expert'}
    expert = 'model.language_model_with_expert.'
    assert f'{expert}expert_model.layers.0.self_attn.q_proj.weight' in chosen
    assert 'model.language_model.model.layers.0.mlp.down_proj.weight' in chosen
    rest = {name for name, parameter in parameters.items() if parameter.dim() == 2 and name not in chosen}
    assert f'{expert}expert_modulation.layers.0.weight' in rest, 'it reads the time, and begins at zero'
    assert {'model.language_model.model.embed_tokens.weight', 'model.action_expert.action_out_proj.weight'} <= rest
    optimizer = RunOptimizer(parameters, options)
    assert sum(len(group['params']) for group in optimizer.groups) == len(parameters)
    assert not muon_matrices(parameters, config(tmp_path).optimisation)


def test_muon_leaves_adapters_alone(tmp_path: Path) -> None:
    options = config(tmp_path, optimisation={'optimizer': 'muon'}).optimisation
    parameters = trained(objective(tmp_path, **LORA))
    chosen = muon_matrices(parameters, options)
    assert chosen and any('.lora_A.' in name for name in parameters) and not any('.lora_' in name for name in chosen)


def test_a_step_of_muon_turns_every_direction_of_a_gradient_alike() -> None:
    """Newton-Schulz, whose singular values end between 0.7 and 1.2, times the size of an AdamW step (0.2 per element)."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    weight.grad = torch.linalg.qr(torch.randn(24, 16))[0] @ torch.diag(torch.logspace(0, -1.5, 16))
    other = torch.nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    options = Optimisation(optimizer='muon', learning_rate=1e-2, weight_decay=0.0)
    RunOptimizer({'model.language_model.model.layers.0.mlp.up_proj.weight': weight, 'heads.grounding.bias': other}, options).step()
    torch.testing.assert_close(other.detach(), torch.full((3,), -1e-2))
    values = torch.linalg.svdvals(weight.detach()) / (1e-2 * 0.2 * 24**0.5)
    assert values.min() > 0.6 and values.max() < 1.3


def test_frozen_matrices_may_be_stored_in_half_the_memory(tmp_path: Path) -> None:
    made = objective(tmp_path, freeze={'vision': True}, frozen_dtype='bfloat16', **LORA)
    for name, parameter in made.named_parameters():
        half = not parameter.requires_grad and parameter.dim() > 1
        assert parameter.dtype == (torch.bfloat16 if half else torch.float32), name
    assert made.model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_merged_adapters_answer_like_adapters(data: ExampleSet, tmp_path: Path) -> None:
    trainer = make_trainer(
        tabletop_robot(),
        data,
        tmp_path,
        precision='float32',
        optimisation={'steps': 4, 'learning_rate': 0.01, 'warmup_steps': 1},
        **LORA,
    )
    trainer.run()
    batch = with_draws(trainer.collate([trainer.scenes[Draw(1, 1)]]), trainer.model.action_expert, 2)
    wanted = trainer.objective.sample(batch)
    merged = dict(plain_weights(trainer.model, trainer.model.state_dict(), torch.float32))
    plain = MapAnythingLlava3DForConditionalGeneration(trainer.model.config).eval()
    assert any('lora' in name for name in trainer.parameters)
    assert not any('lora' in name or 'base_layer' in name for name in merged)
    before = dict(new_model(tabletop_robot(), 'tiny').named_parameters())
    name = 'language_model.model.layers.0.mlp.up_proj.weight'
    assert not torch.allclose(merged[name], before[name], atol=1e-4), 'the adapters have learned something'
    plain.load_state_dict(merged)
    torch.testing.assert_close(Objective(plain, {'flow': 1.0}, 2, 0).sample(batch), wanted, atol=2e-5, rtol=1e-4)


def test_adapters_start_from_the_seed_and_change_nothing_at_first(data: ExampleSet, tmp_path: Path) -> None:
    first, second = (objective(tmp_path, **LORA) for _ in range(2))
    torch.rand(3)  # the global generator has no part in it
    third = objective(tmp_path, seed=1, **LORA)
    name = 'model.language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight'
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), third.get_parameter(name))
    assert not any(value.any() for key, value in first.named_parameters() if '.lora_B.' in key)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    everything = dict.fromkeys(['vision', 'geometry', 'connectors', 'language', 'embeddings', 'expert'], True)
    with pytest.raises(ValueError, match='freeze leaves nothing to train'):
        objective(tmp_path, freeze=everything)
    with pytest.raises(ValueError, match=r'lora adapts the language layers, freeze.language keeps them'):
        config(tmp_path, freeze={'language': True}, **LORA)
    with pytest.raises(ValueError, match='frozen_dtype bfloat16 needs precision bfloat16'):
        config(tmp_path, frozen_dtype='bfloat16', precision='float32')


def test_grounding_looks_at_the_layer_it_is_told(data: ExampleSet, tmp_path: Path) -> None:
    """Gradients of the loss alone end at the layer that is asked; layers above it have none."""
    moved = {}
    for layer in (0, -1):
        losses = {'flow': 0.0, 'grounding': 1.0, 'grounding_layer': layer}
        trainer = make_trainer(tabletop_robot(), data, tmp_path / str(layer), losses=losses, precision='float32')
        batch = with_draws(trainer.collate([trainer.scenes[Draw(1, 1)]]), trainer.model.action_expert, 2)
        trainer.objective(batch)['loss'].backward()
        moved[layer] = trainer.objective.get_parameter('model.language_model.model.layers.0.mlp.up_proj.weight').grad
    assert moved[0] is None or not moved[0].any()
    assert moved[-1] is not None and moved[-1].any()
    with pytest.raises(ValueError, match=r'losses.grounding_layer is 7; the network has the language layers 0 to 1'):
        objective(tmp_path, losses={'grounding_layer': 7})


def test_examples_without_labels_are_refused_by_a_loss_that_needs_them(data: ExampleSet, tmp_path: Path) -> None:
    scene = ExampleScenes(data)
    del scene._own['target_pixels']
    made = objective(tmp_path)
    with pytest.raises(ValueError, match=r'losses.grounding needs target_pixels, .* set losses.grounding to 0'):
        made.check_labels(dict.fromkeys([*scene._own, *scene._shared]))
