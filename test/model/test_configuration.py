"""Configuration: presets build, and a value that cannot work is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_config
from transformers import AutoConfig

from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import FROM_NOTHING, PRESETS, fitted_config, preset_sizes

ROBOT = {'action_dim': 7, 'state_dim': 7, 'horizon': 10, 'vocab_size': 32000, 'bos': 1, 'eos': 2, 'pad': 0}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'fusion_mode': 'sum'}, "fusion_mode is 'sum'.*patch_add"),
        ({'prefix_attention': 'both'}, 'prefix_attention'),
        ({'image_token_index': 7}, 'image_token_index is 7'),
        ({'geometry_config': {'patch_size': 9}}, 'image_size.*28.*9'),
        ({'geometry_config': {'ray_dims': [1, 2]}}, 'ray_dims'),
        ({'geometry_config': {'encoder_heads': 5}}, 'encoder_dim'),
        ({'expert_config': {'mode': 'shared'}}, 'hidden_size is 48.*64'),
        ({'expert_config': {'num_layers': 3}}, 'num_layers'),
        ({'expert_config': {'fusion_depth': 'shallow'}}, 'fusion_depth'),
        ({'expert_config': {'state_dim': None}}, 'state_dim'),
        ({'expert_config': {'time_conditioning': 'none'}}, 'time_conditioning'),
        ({'expert_config': {'suffix_attention': 'causal'}}, 'time token'),
        ({'expert_config': {'action_horizon': 0}}, 'action_horizon is 0'),
        ({'expert_config': {'rtc_max_delay': 2}}, 'rtc_max_delay is 2.*adarms'),
        ({'expert_config': {'rtc_max_delay': 5, 'time_conditioning': 'adarms'}}, r'rtc_max_delay is 5.*0\.\.4'),
        ({'expert_config': {'solver': 'heun'}}, "solver is 'heun'.*midpoint"),
        ({'expert_config': {'time_offset': 0.1}}, 'time_offset 0.1 leave'),
        ({'expert_config': {'mode': 'shared', 'hidden_size': 64, 'num_layers': 2}}, 'num_layers is 2'),
        ({'expert_config': {'width': 64}}, "expert_config has no field 'width'"),
        ({'geometry_config': {'depth': 3}}, "geometry_config has no field 'depth'"),
        ({'fusion': 'tokens'}, "has no field 'fusion'"),
        ({'fusion_mode': 'tokens', 'geometry_tokens_per_view': 6}, 'geometry_tokens_per_view is 6.*square'),
        ({'projector_type': 'mlp3x'}, 'projector_type'),
        ({'stream_attention': 'flash'}, 'stream_attention'),
        ({'vision_feature_layer': -2}, 'vision_feature_layer is -2'),
        ({'vision_config': {'model_type': 'dinov2'}}, 'vision_config.model_type'),
        ({'text_config': {'model_type': 'qwen2'}}, "text_config.model_type is 'qwen2'"),
        ({'text_config': {'model_type': 'mistral', 'sliding_window': 4096}}, 'sliding_window is 4096'),
        ({'prefix_lang_dropout_prob': 1.0}, 'prefix_lang_dropout_prob is 1.0'),
        ({'use_spatial_token': True}, 'action_token_begin_idx'),
        (
            {'use_spatial_token': True, 'action_token_begin_idx': 90, 'spatial_token_num': 20},
            r'90\.\.109 leave the vocabulary of 100',
        ),
        ({'action_dim': 4}, 'action_dim is 4 but expert_config.action_dim is 3'),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_config(**changes)


def test_parts_are_switched_off_by_name() -> None:
    alone = toy_config(use_geometric_branch=False, use_action_expert=False)
    assert alone.geometry_config is None and alone.expert_config is None
    for switch, part in (('use_geometric_branch', {'geometry_config': {}}), ('use_action_expert', {'action_dim': 3})):
        with pytest.raises(ValueError, match=f'{switch} is False'):
            MapAnythingLlava3DConfig(**{switch: False}, **part)


def test_published_flat_names_reach_the_expert() -> None:
    config = MapAnythingLlava3DConfig(action_dim=14, action_horizon=50, state_dim=9, use_state=True, expert_hidden_size=512)
    expert = config.expert_config
    assert (expert.action_dim, expert.action_horizon, expert.state_dim, expert.use_state, expert.hidden_size) == (
        14,
        50,
        9,
        True,
        512,
    )
    assert expert.intermediate_size == 2048, 'expert_mlp_ratio is 4'
    assert (config.action_dim, config.expert_hidden_size, config.expert_num_layers) == (14, 512, None)
    with pytest.raises(AttributeError, match='hidden_dim'):
        _ = config.hidden_dim


def test_defaults_are_the_published_sizes() -> None:
    config = MapAnythingLlava3DConfig()
    assert (config.vision_config.intermediate_size, config.image_seq_length) == (4304, 256)
    assert (config.image_token_index, config.ignore_index, config.fusion_mode) == (-200, -100, 'patch_add')
    assert (config.action_dim, config.action_horizon, config.use_state, config.use_time_weight) == (7, 10, False, False)
    assert (config.expert_hidden_size, config.expert_mlp_ratio, config.num_inference_steps) == (1024, 4.0, 10)
    assert (config.use_spatial_token, config.spatial_token_num, config.action_token_begin_idx) == (False, 259, None)
    assert config.geometry_config.info_dim == 768 and config.use_geometric_branch and config.use_action_expert


def test_configuration_survives_a_file(tmp_path: Path) -> None:
    config = toy_config(
        vision_config={'model_type': 'clip_vision_model', 'num_hidden_layers': 3}, vision_feature_layer=-2, fusion_mode='tokens',
        geometry_tokens_per_view=4, expert_config={'time_conditioning': 'adarms', 'rtc_max_delay': 2}, use_geometric_branch=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MapAnythingLlava3DConfig)
    texts = [{**c.to_dict(), '_name_or_path': ''} for c in (config, again)]
    assert texts[0] == texts[1]


def count(model: torch.nn.Module | None) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6 if model is not None else 0.0


@pytest.mark.parametrize(
    ('preset', 'expert_millions', 'tokens'),
    [
        ('llava3d-7b', 0.004096, 256),
        ('llava3d-7b-expert', 939.6, 256),
        ('llava3d-7b-expert-512', 369.1, 256),
        ('llava3d-7b-expert-clip', 939.6, 576),
    ],
)
def test_large_presets_have_the_published_parameter_counts(preset: str, expert_millions: float, tokens: int) -> None:
    """On the meta device: nothing is allocated."""
    config = fitted_config(preset_sizes(preset), **ROBOT)
    with torch.device('meta'):
        model = MapAnythingLlava3DForConditionalGeneration(config)
    assert count(model.language_model) == pytest.approx(6738.4, abs=0.05)
    assert count(model.language_model.model.layers[0]) == pytest.approx(202.4, abs=0.05)
    assert count(model.language_model_with_expert) == pytest.approx(expert_millions, abs=0.05)
    assert count(model.geometry_encoder) == pytest.approx(1168.3, abs=0.05)
    if 'clip' not in preset:
        assert count(model.vision_tower) == pytest.approx(412.4, abs=0.1)
    assert config.image_seq_length == tokens
    layers = model.language_model_with_expert.expert_model
    if preset == 'llava3d-7b-expert':
        attention = layers.layers[0].self_attn
        assert attention.q_proj.weight.shape == (4096, 1024) and attention.o_proj.weight.shape == (1024, 4096)
    assert (layers is None) == (preset == 'llava3d-7b')


@pytest.mark.parametrize(
    ('expert', 'billions'),
    [
        ({'hidden_size': 4096, 'intermediate_size': 11008}, 6.48),
        ({'hidden_size': 2048, 'intermediate_size': 5504}, 2.16),
        ({'hidden_size': 1024, 'intermediate_size': 2752}, 0.81),
        ({'hidden_size': 1024, 'intermediate_size': 4096}, 0.94),
    ],
)
def test_separate_experts_cost_what_the_reference_says(expert: dict[str, int], billions: float) -> None:
    config = fitted_config(preset_sizes('llava3d-7b') | {'expert_config': expert}, **ROBOT)
    with torch.device('meta'):
        model = MapAnythingLlava3DForConditionalGeneration(config)
    assert count(model.language_model_with_expert) / 1e3 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize('preset', sorted(PRESETS))
@pytest.mark.parametrize(('actions', 'state', 'horizon'), [(7, 7, 16), (26, 26, 30), (1, 2, 1)])
def test_presets_fit_any_robot(preset: str, actions: int, state: int, horizon: int) -> None:
    robot = {**ROBOT, 'action_dim': actions, 'state_dim': state, 'horizon': horizon, 'vocab_size': 300}
    config = fitted_config(preset_sizes(preset), **robot)
    assert config.text_config.vocab_size == (300 if preset in FROM_NOTHING else 32000)
    with torch.device('meta'):
        model = MapAnythingLlava3DForConditionalGeneration(config)
    expert = model.action_expert
    assert expert.action_out_proj.out_features == actions
    assert expert.state_proj.in_features == state and expert.layout.horizon == horizon


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"'huge'.*tabletop.*llava3d-7b-expert-clip"):
        preset_sizes('huge')
