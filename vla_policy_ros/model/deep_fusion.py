"""Deep fusion of a language model and an action expert, in the shared-prefix form.

The prefix (image tokens and words) never looks at the suffix (state, noisy actions, time). One joint forward therefore equals a
prefix pass that leaves keys and values per layer, followed by a suffix pass that reads them next to its own. Training and
inference both use these two passes: there is no second code path that could disagree, and the cache is a tuple of tensors that
nothing ever writes to.

    prefix:  x_p -> [layer 0] -> [layer 1] -> ...            uses the language model's weights
                      |K,V         |K,V
    suffix:  x_s -> [layer 0] -> [layer 1] -> ... -> norm    uses the expert's weights (or, shared, the language model's)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_policy_ros.model.attention import (
    apply_rotary,
    block_attention_mask,
    boolean_mask,
    grouped_attention,
    position_ids_from_pad,
    prefix_block_starts,
)
from vla_policy_ros.model.configuration import ActionExpertConfig
from vla_policy_ros.model.initial import start_as


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, ``[B, kv_heads, Lp, dh]`` each."""

    key: Tensor
    value: Tensor


PrefixCache = tuple[LayerCache, ...]
"""One `LayerCache` per language layer. Read only."""


@dataclass(frozen=True)
class PrefixPass:
    """What a prefix pass leaves.

    Attributes:
        cache: keys and values of every layer.
        hidden_states: input of layer 0, then of each following layer, ``[B, Lp, D]`` each; followed by the normalised output
            when it was computed. Padded rows carry no information.
        output: normalised output ``[B, Lp, D]``, zero at padding; None where the pass stopped at the last layer's keys.
    """

    cache: PrefixCache
    hidden_states: tuple[Tensor, ...]
    output: Tensor | None


class ExpertLayers(nn.Module):
    """The suffix stream's own transformer layers, of the language model's family. They start as the identity."""

    def __init__(self, base_config: Any, layer_class: type[nn.Module], config: ActionExpertConfig, num_layers: int) -> None:
        super().__init__()
        narrow = copy.deepcopy(base_config)
        narrow.head_dim = head_width(base_config)
        narrow.hidden_size = config.hidden_size
        narrow.intermediate_size = config.intermediate_size
        narrow.num_hidden_layers = num_layers
        self.layers = nn.ModuleList(layer_class(narrow, index) for index in range(num_layers))
        layer: Any
        for layer in self.layers:
            start_as(layer.self_attn.o_proj, 0.0)
            start_as(layer.mlp.down_proj, 0.0)


def head_width(config: Any) -> int:
    """Attention head width of a Llama or Mistral configuration."""
    return int(getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads)


class LLaVA3DWithActionExpertModel(nn.Module):
    """Prefix-only, suffix-only and joint passes over a language model and an action expert.

    The language model is borrowed: it is not registered here, so that its parameters have exactly one name in the owner's state
    dict. The owner moves and saves it.

    Args:
        base_llava: a Llama or Mistral model for causal language modelling (``.model.layers``, ``.model.norm``,
            ``.model.rotary_emb``).
        expert_config: sizes and mode of the expert.
        prefix_attention: mask among prefix tokens when only padding is given.
    """

    def __init__(self, base_llava: Any, expert_config: ActionExpertConfig, prefix_attention: str = 'bidirectional') -> None:
        super().__init__()
        self._borrowed = (base_llava,)
        text = base_llava.config
        self.prefix_attention = prefix_attention
        self.knowledge_insulation = expert_config.knowledge_insulation
        self.shared = expert_config.mode == 'shared'
        self.num_layers = int(text.num_hidden_layers)
        self.num_heads = int(text.num_attention_heads)
        self.head_dim = head_width(text)
        self.hidden_size = int(text.hidden_size)
        self.expert_hidden_size = int(expert_config.hidden_size)
        expert_layers = self.num_layers if self.shared else expert_config.num_layers or self.num_layers
        if self.num_layers % expert_layers:
            raise ValueError(f'{self.num_layers} language layers cannot be paired with {expert_layers} expert layers')
        self.layer_stride = self.num_layers // expert_layers
        layer_class = type(self.base.layers[0])
        self.expert_model = None if self.shared else ExpertLayers(text, layer_class, expert_config, expert_layers)
        self.expert_norm = type(self.base.norm)(self.expert_hidden_size, eps=text.rms_norm_eps)

    @property
    def base(self) -> Any:
        """The borrowed decoder stack."""
        return self._borrowed[0].model

    def rotary(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables ``[B, L, dh]`` of the language model for ``position_ids`` ``[B, L]``."""
        return self.base.rotary_emb(like, position_ids)

    def forward(
        self,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: PrefixCache | None = None,
        inputs_embeds: tuple[Tensor | None, Tensor | None] = (None, None),
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[tuple[Tensor | None, Tensor | None], PrefixCache | None]:
        """Run the streams that are given.

        Args:
            attention_mask: prefix only: validity ``[B, Lp]`` or a mask ``[B, 1, Lp, Lp]``. With a suffix: the joint mask
                ``[B, 1, Lp + Ls, Lp + Ls]``, or, for the cached pass, its last Ls rows. Boolean, or additive with 0 = may look.
            position_ids: ``[B, L]`` of all streams or, for the cached pass, of the suffix; None derives them from a validity mask.
            past_key_values: the prefix cache, for the suffix-only pass. It is left as it is.
            inputs_embeds: prefix ``[B, Lp, D]`` and suffix ``[B, Ls, E]`` embeddings; either may be None.
            use_cache: return the prefix cache.

        Returns:
            ``((prefix_out or None, suffix_out or None), cache or None)``.

        Raises:
            ValueError: neither stream is given, a suffix comes without prefix or cache, or the mask has a wrong shape.
        """
        prefix, suffix = inputs_embeds
        if prefix is None and suffix is None:
            raise ValueError('give prefix embeddings, suffix embeddings or both')
        prefix_out: Tensor | None = None
        cache = past_key_values
        if prefix is not None:
            done = self.prefix_pass(prefix, attention_mask, position_ids)
            prefix_out, cache = done.output, done.cache
        if suffix is None:
            return (prefix_out, None), cache if use_cache else None
        if cache is None:
            raise ValueError('a suffix needs prefix embeddings or past_key_values to look at')
        if position_ids is None:
            raise ValueError('a suffix needs position_ids')
        length = suffix.shape[1]
        suffix_out = self.suffix_pass(
            suffix,
            cache,
            boolean_mask(attention_mask)[:, :, -length:],
            self.rotary(suffix, position_ids[:, -length:]),
        )
        return (prefix_out, suffix_out), cache if use_cache else None

    def prefix_pass(
        self, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, *, cache_only: bool = False
    ) -> PrefixPass:
        """Run the language model over the prefix.

        Args:
            embeds: ``[B, Lp, D]``.
            attention_mask: validity ``[B, Lp]``, or a mask of at least ``[B, 1, Lp, Lp]`` whose top left block is used.
            position_ids: ``[B, >= Lp]``; None derives them from the validity.
            cache_only: stop at the last layer's keys and values, which is all that a suffix reads.
        """
        length = embeds.shape[1]
        mask = boolean_mask(attention_mask)
        if mask.dim() == 2:
            allowed = block_attention_mask(mask, prefix_block_starts(self.prefix_attention, mask, None))
            position_ids = position_ids_from_pad(mask) if position_ids is None else position_ids
        else:
            allowed = mask[:, :, :length, :length]
        if position_ids is None:
            raise ValueError('a prefix with a four-dimensional mask needs position_ids')
        if allowed.shape[-2:] != (length, length):
            raise ValueError(f'attention_mask is {tuple(attention_mask.shape)}; the prefix has {length} tokens')
        rotary = self.rotary(embeds, position_ids[:, :length])
        hidden, states, cache = embeds, [embeds], []
        last = self.num_layers - 1
        for index, layer in enumerate(self.base.layers):
            normed = layer.input_layernorm(hidden)
            key, value = self._heads(layer.self_attn.k_proj(normed)), self._heads(layer.self_attn.v_proj(normed))
            cache.append(LayerCache(apply_rotary(key, rotary), value))
            if cache_only and index == last:
                return PrefixPass(tuple(cache), tuple(states), None)
            query = apply_rotary(self._heads(layer.self_attn.q_proj(normed)), rotary)
            mixed = grouped_attention(query, [cache[-1]], allowed)
            hidden = self._finish_layer(layer, hidden, mixed)
            if index != last:
                states.append(hidden)
        valid = allowed.any(dim=-1)[:, 0, :, None]
        output = torch.where(valid, self.base.norm(hidden), 0.0)
        return PrefixPass(tuple(cache), (*states, output), output)

    def suffix_pass(self, embeds: Tensor, cache: PrefixCache, allowed: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Run the expert over the suffix against the prefix cache.

        Args:
            embeds: ``[B * R, Ls, E]``; rows ``b * R .. b * R + R - 1`` belong to prefix b.
            cache: prefix keys and values of batch B. Read only; never copied or extended.
            allowed: boolean ``[B, 1, Ls, Lp + Ls]``.
            rotary: tables ``[B, Ls, dh]`` of the suffix positions, from `rotary`.

        Returns:
            normalised suffix output ``[B * R, Ls, E]``.
        """
        length, seen = embeds.shape[1], cache[0].key.shape[2] + embeds.shape[1]
        if allowed.shape[-2:] != (length, seen):
            raise ValueError(f'suffix mask is {tuple(allowed.shape)}; {length} suffix tokens see {seen} keys')
        repeats = len(embeds) // len(cache[0].key)
        if repeats > 1:
            rotary = (rotary[0].repeat_interleave(repeats, dim=0), rotary[1].repeat_interleave(repeats, dim=0))
        hidden = embeds
        layers = self.base.layers if self.expert_model is None else self.expert_model.layers
        for index, layer in enumerate(layers):
            past = cache[index * self.layer_stride]
            if self.knowledge_insulation:
                past = LayerCache(past.key.detach(), past.value.detach())
            normed = layer.input_layernorm(hidden)
            query = apply_rotary(self._heads(layer.self_attn.q_proj(normed)), rotary)
            key = apply_rotary(self._heads(layer.self_attn.k_proj(normed)), rotary)
            own = LayerCache(key, self._heads(layer.self_attn.v_proj(normed)))
            hidden = self._finish_layer(layer, hidden, grouped_attention(query, [past, own], allowed))
        return self.expert_norm(hidden)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @staticmethod
    def _finish_layer(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(mixed)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
