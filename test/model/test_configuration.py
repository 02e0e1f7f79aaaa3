"""Configuration: presets build, and a value that cannot work is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import toy_config

from vla_policy_ros.model.configuration import ActionExpertConfig, GeometryConfig, MapAnythingLlava3DConfig
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import PRESETS, preset_config


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
        ({'expert_config': {'state_dim': None}}, 'state_dim'),
        ({'expert_config': {'time_conditioning': 'none'}}, 'time_conditioning'),
        ({'expert_config': {'suffix_attention': 'causal'}}, 'time token'),
        ({'expert_config': {'action_horizon': 0}}, 'action_horizon is 0'),
        ({'use_spatial_token': True}, 'action_token_begin_idx'),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_config(**changes)


def test_defaults_are_the_published_sizes() -> None:
    config = MapAnythingLlava3DConfig(geometry_config=GeometryConfig(), expert_config=ActionExpertConfig())
    assert (config.vision_config.intermediate_size, config.image_seq_length) == (4304, 256)
    assert (config.image_token_index, config.ignore_index, config.fusion_mode) == (-200, -100, 'patch_add')
    assert (config.expert_config.action_dim, config.expert_config.action_horizon) == (7, 10)


@pytest.mark.parametrize('preset', sorted(PRESETS))
@pytest.mark.parametrize(('actions', 'state', 'horizon'), [(7, 7, 16), (26, 26, 30), (1, 2, 1)])
def test_presets_fit_any_robot(preset: str, actions: int, state: int, horizon: int) -> None:
    config = preset_config(preset, action_dim=actions, state_dim=state, horizon=horizon, vocab_size=300, bos=1, eos=2, pad=0)
    with torch.device('meta'):
        model = MapAnythingLlava3DForConditionalGeneration(config)
    expert = model.action_expert
    assert expert.action_out_proj.out_features == actions
    assert expert.state_proj.in_features == state and expert.layout.horizon == horizon
    with pytest.raises(ValueError, match='tabletop'):
        preset_config('huge', action_dim=1, state_dim=1, horizon=1, vocab_size=9, bos=1, eos=2, pad=0)
