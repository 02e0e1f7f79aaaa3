"""Named sizes of the network, as functions of the robot's action and state widths.

``tiny`` is for tests and for trying a robot file: it runs in milliseconds on one core and knows nothing. ``tabletop`` is the size
that learns the simulated reaching task from nothing in minutes on one core. The ``llava3d-7b`` family has the sizes of the public
base checkpoints, which `weights` loads: with the language model's own layers as expert (the published description), or with a
narrow expert of width 1024 or 512, which costs 3 to 5 times less per chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vla_policy_ros.model.configuration import GEOMETRY_RELEASES, MapAnythingLlava3DConfig
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

_TINY: dict[str, Any] = {
    'vision_config': {
        'hidden_size': 64,
        'intermediate_size': 128,
        'num_hidden_layers': 1,
        'num_attention_heads': 2,
        'image_size': 56,
        'patch_size': 14,
        'vision_use_head': False,
    },
    'geometry_config': {
        'patch_size': 14,
        'pos_embed_grid': 4,
        'encoder_dim': 48,
        'encoder_heads': 2,
        'encoder_layers': 1,
        'mlp_ratio': 2.0,
        'ray_dims': [16, 16, 32],
        'info_dim': 32,
        'info_heads': 2,
        'info_layers': 2,
    },
    'text_config': {
        'model_type': 'llama',
        'hidden_size': 64,
        'intermediate_size': 128,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'head_dim': 16,
        'rms_norm_eps': 1e-5,
    },
    'expert_config': {'hidden_size': 32, 'intermediate_size': 64},
}

_TABLETOP: dict[str, Any] = {
    'vision_config': {
        'hidden_size': 192,
        'intermediate_size': 512,
        'num_hidden_layers': 2,
        'num_attention_heads': 3,
        'image_size': 160,
        'patch_size': 20,
        'vision_use_head': False,
    },
    'geometry_config': {
        'patch_size': 20,
        'pos_embed_grid': 8,
        'encoder_dim': 96,
        'encoder_heads': 3,
        'encoder_layers': 1,
        'mlp_ratio': 2.0,
        'ray_dims': [32, 48, 64],
        'info_dim': 96,
        'info_heads': 3,
        'info_layers': 2,
        'initializer_range': 0.07,
    },
    'text_config': {
        'model_type': 'llama',
        'hidden_size': 192,
        'intermediate_size': 512,
        'num_hidden_layers': 4,
        'num_attention_heads': 3,
        'num_key_value_heads': 3,
        'head_dim': 64,
        'rms_norm_eps': 1e-5,
        'initializer_range': 0.07,
    },
    'expert_config': {'hidden_size': 128, 'intermediate_size': 352, 'num_inference_steps': 5},
    'fusion_init_std': 0.1,
}

_LLAVA3D_7B: dict[str, Any] = {
    'vision_config': {
        'model_type': 'siglip_vision_model',
        'hidden_size': 1152,
        'intermediate_size': 4304,
        'num_hidden_layers': 27,
        'num_attention_heads': 16,
        'image_size': 224,
        'patch_size': 14,
        'vision_use_head': False,
    },
    'geometry_config': GEOMETRY_RELEASES['v1.1'],
    'text_config': {
        'model_type': 'llama',
        'hidden_size': 4096,
        'intermediate_size': 11008,
        'num_hidden_layers': 32,
        'num_attention_heads': 32,
        'num_key_value_heads': 32,
        'head_dim': 128,
        'vocab_size': 32000,
        'max_position_embeddings': 4096,
        'rms_norm_eps': 1e-5,
    },
    'expert_config': {'mode': 'shared', 'hidden_size': 4096, 'intermediate_size': 11008},
    'vision_model_name_or_path': 'google/siglip-so400m-patch14-224',
    'language_model_name_or_path': 'ChaimZhu/LLaVA-3D-7B',
    'mapanything_model_name_or_path': 'facebook/map-anything-apache',
}

# LLaVA's own eyes: features of the last layer but one, and a projector that the language model was trained with.
_CLIP_336: dict[str, Any] = {
    'vision_config': {
        'model_type': 'clip_vision_model',
        'hidden_size': 1024,
        'intermediate_size': 4096,
        'num_hidden_layers': 24,
        'num_attention_heads': 16,
        'image_size': 336,
        'patch_size': 14,
    },
    'vision_feature_layer': -2,
    'projector_type': 'mlp2x_gelu',
    'vision_model_name_or_path': 'openai/clip-vit-large-patch14-336',
}

_EXPERT_1024 = {'expert_config': {'hidden_size': 1024, 'intermediate_size': 4096}}
_EXPERT_512 = {'expert_config': {'hidden_size': 512, 'intermediate_size': 2048}}

PRESETS: dict[str, dict[str, Any]] = {
    'tiny': _TINY,
    'tabletop': _TABLETOP,
    'llava3d-7b': _LLAVA3D_7B,
    'llava3d-7b-expert': {**_LLAVA3D_7B, **_EXPERT_1024},
    'llava3d-7b-expert-512': {**_LLAVA3D_7B, **_EXPERT_512},
    'llava3d-7b-expert-clip': {**_LLAVA3D_7B, **_EXPERT_1024, **_CLIP_336},
}

FROM_NOTHING = ('tiny', 'tabletop')
"""Presets that are trained without pretrained parts, from `initialise_from_nothing`."""


def preset_sizes(preset: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The network sizes of a preset, without what depends on a robot, with ``changes`` merged in part by part.

    Raises ValueError where the preset is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f'preset {preset!r} is unknown; choose one of {", ".join(PRESETS)}')
    return _merged(PRESETS[preset], changes or {})


def _merged(sizes: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(sizes)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def fitted_config(
    sizes: Mapping[str, Any], *, action_dim: int, state_dim: int, horizon: int, vocab_size: int, bos: int, eos: int, pad: int
) -> MapAnythingLlava3DConfig:
    """The configuration of given network sizes for a robot with A actions, S state elements and T actions per chunk.

    The word embedding has a row for every word of the tokenizer, and keeps the sizes' own number of rows where that is larger.

    Raises:
        ValueError: a size cannot work; the message names the field.
    """
    parts: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in sizes.items()}
    rows = max(vocab_size, parts['text_config'].get('vocab_size', 0))
    parts['text_config'] |= {'vocab_size': rows, 'bos_token_id': bos, 'eos_token_id': eos, 'pad_token_id': pad}
    parts['expert_config'] |= {'action_dim': action_dim, 'action_horizon': horizon, 'state_dim': state_dim, 'use_state': True}
    return MapAnythingLlava3DConfig(**parts)


@torch.no_grad()
def initialise_from_nothing(model: MapAnythingLlava3DForConditionalGeneration) -> None:
    """Give a small model without pretrained parts the start it needs to learn quickly: a strong two-dimensional position code.

    Both towers' position embeddings become sines and cosines of row and column at unit scale; with the usual weak random start,
    training spends its budget on finding out where a patch is. Word embeddings get a scale comparable to the image tokens'.
    """
    grid = model.config.image_grid
    embedding = model.vision_tower.embeddings.position_embedding.weight
    embedding[-(grid**2) :] = _grid_code(grid, embedding.shape[1])  # behind a CLIP tower's class token
    if model.geometry_encoder is not None:
        table = model.geometry_encoder.encoder.model.pos_embed
        table[:, 1:] = _grid_code(model.config.geometry_config.pos_embed_grid, table.shape[2])
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)


def _grid_code(side: int, width: int) -> Tensor:
    """``[side * side, width]``: sines and cosines of the row in the first half, of the column in the second, zero padded."""
    bands = width // 4
    frequency = 0.5 * torch.pi * (2.0 ** torch.linspace(-3.0, 1.0, bands))
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency
    line = torch.cat((angle.sin(), angle.cos()), dim=-1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    code = torch.zeros(side, side, width)
    code[..., : 2 * bands] = rows
    code[..., 2 * bands : 4 * bands] = columns
    return code.reshape(side * side, width)
