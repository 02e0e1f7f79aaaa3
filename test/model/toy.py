"""A model small enough for tests, with weights large enough that a wrong mask cannot hide behind a tolerance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

ACTION_DIM, HORIZON, STATE_DIM, VOCAB, TOKENS_PER_VIEW = 3, 5, 4, 100, 4

VISION = {
    'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'patch_size': 14,
    'image_size': 28, 'vision_use_head': False,
}  # fmt: skip
GEOMETRY = {
    'encoder_dim': 32, 'encoder_heads': 2, 'encoder_layers': 1, 'info_dim': 24, 'info_heads': 2, 'info_layers': 2,
    'ray_dims': [8, 8, 12], 'pos_embed_grid': 2,
}  # fmt: skip
TEXT = {
    'model_type': 'llama', 'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 4, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'vocab_size': VOCAB, 'initializer_range': 0.3,
}  # fmt: skip
EXPERT = {
    'hidden_size': 48, 'intermediate_size': 64, 'action_dim': ACTION_DIM, 'action_horizon': HORIZON, 'state_dim': STATE_DIM,
    'use_state': True,
}  # fmt: skip


def toy_config(**changes: Any) -> MapAnythingLlava3DConfig:
    """The toy configuration; a dict value is merged into the sub-config of that name."""
    parts: dict[str, Any] = {'vision_config': dict(VISION), 'text_config': dict(TEXT)}
    if changes.get('use_geometric_branch', True):
        parts['geometry_config'] = dict(GEOMETRY)
    if changes.get('use_action_expert', True):
        parts['expert_config'] = dict(EXPERT)
    for name, value in changes.items():
        parts[name] = {**parts[name], **value} if isinstance(value, dict) and name in parts else value
    return MapAnythingLlava3DConfig(**parts)


def toy_model(seed: int = 0, **changes: Any) -> MapAnythingLlava3DForConditionalGeneration:
    """A toy model in which every matrix is random: nothing is zero or the identity at the start."""
    torch.manual_seed(seed)
    model = MapAnythingLlava3DForConditionalGeneration(toy_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                language = name.startswith('language_model')
                fan_in = parameter[0].numel()
                nn.init.normal_(parameter, std=0.3 if language else fan_in**-0.5)
            elif name.endswith('bias') or 'scale_token' in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def backbone_inputs(model: MapAnythingLlava3DForConditionalGeneration, pads: list[list[int]], seed: int = 1) -> dict[str, Tensor]:
    """Random prefix and suffix embeddings with their joint boolean mask and positions, for given prefix validity."""
    generator = torch.Generator().manual_seed(seed)
    pad = torch.tensor(pads, dtype=torch.bool)
    layout = model.action_expert.layout
    prefix = torch.randn(*pad.shape, model.config.hidden_size, generator=generator)
    suffix = torch.randn(len(pad), layout.length, model.config.expert_config.hidden_size, generator=generator)
    mask, positions, _ = model._build_joint_attention_inputs(prefix, layout.length, pad)
    return {'prefix': prefix, 'suffix': suffix, 'mask': mask, 'positions': positions, 'pad': pad}


def policy_inputs(batch: int = 2, views: int = 2, seed: int = 2) -> dict[str, Tensor]:
    """Model inputs with random pixels, intrinsics, words and state."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCAB, (batch, 4), generator=generator)
    image = torch.full((batch, views * TOKENS_PER_VIEW), -200)
    intrinsic = torch.tensor([[24.0, 0.0, 13.5], [0.0, 24.0, 13.5], [0.0, 0.0, 1.0]]).repeat(batch, views, 1, 1)
    intrinsic[..., 0, 0] += torch.rand(batch, views, generator=generator) * 4
    return {
        'input_ids': torch.cat((torch.ones(batch, 1, dtype=torch.long), image, words), dim=1),
        'pixel_values': torch.randint(0, 256, (batch, views, 3, 28, 28), dtype=torch.uint8, generator=generator),
        'intrinsic': intrinsic,
        'state': torch.randn(batch, STATE_DIM, generator=generator),
    }


def noise(batch: int = 2, seed: int = 3) -> Tensor:
    """Fixed start noise of a chunk."""
    return torch.randn(batch, HORIZON, ACTION_DIM, generator=torch.Generator().manual_seed(seed))
