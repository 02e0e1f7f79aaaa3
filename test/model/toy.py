"""A model small enough for tests, with weights large enough that a wrong mask cannot hide behind a tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vla_policy_ros.model.attention import boolean_mask
from vla_policy_ros.model.configuration import SOLVERS, TIME_CONDITIONING, MapAnythingLlava3DConfig
from vla_policy_ros.model.deep_fusion import PrefixCache
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

ACTION_DIM, HORIZON, STATE_DIM, VOCAB, TOKENS_PER_VIEW = 3, 5, 4, 100, 4

# Validity of two prefixes of unequal length, padded behind and in front.
RIGHT = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]
LEFT = [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
FULL = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]

padded_on_either_side = pytest.mark.parametrize('pads', [RIGHT, LEFT], ids=['right', 'left'])
every_conditioning = pytest.mark.parametrize('conditioning', TIME_CONDITIONING)
every_solver = pytest.mark.parametrize('solver', SOLVERS)

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


@torch.no_grad()
def mild(model: MapAnythingLlava3DForConditionalGeneration) -> MapAnythingLlava3DForConditionalGeneration:
    """The same model with a small velocity: a solver of few steps follows its field, and amplifies no rounding a hundredfold."""
    model.action_expert.action_out_proj.weight.mul_(0.2)
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


def fixed_state(batch: int = 2) -> Tensor:
    """A state that is neither zero nor the same for every sample."""
    return torch.linspace(-1.0, 1.0, batch * STATE_DIM).view(batch, STATE_DIM)


def joint_pass(model: MapAnythingLlava3DForConditionalGeneration, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Prefix and suffix outputs of one pass over both streams."""
    streams = (given['prefix'], given['suffix'])
    (prefix, suffix), _ = model.language_model_with_expert(given['mask'], given['positions'], None, streams)
    return prefix, suffix


def flow_loss(model: MapAnythingLlava3DForConditionalGeneration, given: dict[str, Tensor], **options: Any) -> Tensor:
    """Loss of fixed targets on `backbone_inputs`; ``options`` are those of `compute_loss`."""
    batch = len(given['prefix'])
    state = fixed_state(batch) if model.action_expert.use_state else None
    targets = options.pop('actions', None)
    targets = noise(batch, seed=9) if targets is None else targets
    return model.action_expert.compute_loss(given['prefix'], targets, state, given['mask'], given['positions'], **options)


@torch.no_grad()
def sampled(
    model: MapAnythingLlava3DForConditionalGeneration,
    given: dict[str, Tensor],
    steps: int = 4,
    cache: PrefixCache | None = None,
    **options: Any,
) -> Tensor:
    """A chunk from fixed noise on `backbone_inputs`; ``options`` are those of `sample_actions`."""
    batch = len(given['prefix'])
    options.setdefault('noise', noise(batch))
    state = fixed_state(batch) if model.action_expert.use_state else None
    prefix = given['prefix'] if cache is None else None
    return model.action_expert.sample_actions(prefix, state, steps, given['mask'], given['positions'], cache, **options)


def velocity_field(
    model: MapAnythingLlava3DForConditionalGeneration, given: dict[str, Tensor]
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """``v(x, t)`` of the network on `backbone_inputs`, with everything but x and t fixed; t is a number or ``[B]``."""
    expert, batch = model.action_expert, len(given['prefix'])
    state = fixed_state(batch) if expert.use_state else None

    def velocity(x: Tensor, time: float | Tensor) -> Tensor:
        condition = expert.prepare(given['prefix'], state, given['mask'], given['positions'], None, batch)
        times = time if isinstance(time, Tensor) else torch.tensor([time])
        return expert.velocity(x, expert.time_features(times), condition)

    return velocity


def single_stream(
    model: MapAnythingLlava3DForConditionalGeneration, given: dict[str, Tensor], condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both fusions written the slow way: one sequence, every layer projects each stream with its own weights, then attends once.

    ``condition`` ``[B or 1, E]`` is the time condition of adaptive norms.
    """
    backbone = model.language_model_with_expert
    mask, length = boolean_mask(given['mask']), given['prefix'].shape[1]
    cosine, sine = backbone.base.rotary_emb(given['prefix'], given['positions'])
    experts = backbone.base.layers if backbone.expert_model is None else backbone.expert_model.layers
    streams: list[Tensor] = [given['prefix'], given['suffix']]

    def rotated(x: Tensor) -> Tensor:
        first, second = x[..., : backbone.head_dim // 2], x[..., backbone.head_dim // 2 :]
        cos, sin = (table[:, None, : x.shape[2]] for table in (cosine, sine))
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def adapted(normed: Tensor, table: Tensor | None, norm: int) -> tuple[Tensor, Tensor | float]:
        if table is None:
            return normed, 1.0
        scale, shift, gate = table[:, None].unflatten(-1, (2, 3, -1))[..., norm, :, :].unbind(dim=-2)
        return normed * (1.0 + scale) + shift, gate

    for base, number, advances in _pairs(model, len(experts)):
        if number is None:
            # Nobody pairs with this layer: the prefix advances alone, the suffix passes by.
            layers, present, keys = (base,), streams[:1], length
        else:
            layers, present, keys = (base, experts[number]), streams, mask.shape[-1]
        tables: list[Tensor | None] = [None, None]
        if condition is not None and number is not None:
            tables[1] = backbone.expert_modulation.layers[number](condition)
        normed = [
            adapted(layer.input_layernorm(hidden), table, 0) for layer, hidden, table in zip(layers, present, tables, strict=False)
        ]
        projected = [
            [
                linear(part).unflatten(-1, (-1, backbone.head_dim)).transpose(1, 2)
                for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            ]
            for layer, (part, _) in zip(layers, normed, strict=True)
        ]
        query, key, value = (torch.cat([stream[i] for stream in projected], dim=2) for i in range(3))
        query, key = rotated(query), rotated(key)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(-1, -2) / backbone.head_dim**0.5
        weights = torch.softmax(scores.masked_fill(~mask[:, :, :keys, :keys], float('-inf')), dim=-1).nan_to_num(0.0)
        mixed = (weights @ value).transpose(1, 2).flatten(2).split([part.shape[1] for part in present], dim=1)
        for i, layer in enumerate(layers):
            if i == 0 and not advances:
                continue
            hidden = present[i] + normed[i][1] * layer.self_attn.o_proj(mixed[i])
            second, gate = adapted(layer.post_attention_layernorm(hidden), tables[i], 1)
            streams[i] = hidden + gate * layer.mlp(second)
    suffix = backbone.expert_norm(streams[1])
    if condition is not None:
        scale, shift = backbone.expert_modulation.final(condition)[:, None].chunk(2, dim=-1)
        suffix = suffix * (1.0 + scale) + shift
    return backbone.base.norm(streams[0]), suffix


def _pairs(model: MapAnythingLlava3DForConditionalGeneration, experts: int) -> list[tuple[nn.Module, int | None, bool]]:
    """In order: a language layer, the number of the suffix layer that attends with it or None, and whether the prefix advances."""
    base = list(model.language_model_with_expert.base.layers)
    if model.config.expert_config.fusion_depth == 'late':
        return [(layer, None, True) for layer in base[:-1]] + [(base[-1], index, index == experts - 1) for index in range(experts)]
    stride = len(base) // experts
    return [(layer, None if index % stride else index // stride, True) for index, layer in enumerate(base)]


def policy_inputs(batch: int = 2, views: int = 2, seed: int = 2, tokens: int = TOKENS_PER_VIEW) -> dict[str, Tensor]:
    """Model inputs with random pixels, intrinsics, words and state, and ``tokens`` image positions per camera."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCAB, (batch, 4), generator=generator)
    image = torch.full((batch, views * tokens), -200)
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
