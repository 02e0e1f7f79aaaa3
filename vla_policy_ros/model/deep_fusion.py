"""Deep fusion of a language model and an action expert, in the shared-prefix form.

The prefix (image tokens and words) never looks at the suffix (state, noisy actions, time). One joint forward therefore equals a
prefix pass that leaves keys and values per layer, followed by a suffix pass that reads them next to its own. Training and
inference both use these two passes: there is no second code path that could disagree, and no pass ever changes the prefix part of
the cache.

    prefix:  x_p -> [layer 0] -> [layer 1] -> ...            uses the language model's weights
                      |K,V         |K,V
    suffix:  x_s -> [layer 0] -> [layer 1] -> ... -> norm    uses the expert's weights (or, shared, the language model's)

Late fusion, which deep fusion is compared with, differs in one thing: all suffix layers read keys and values of the prefix's last
layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_policy_ros.model.attention import (
    apply_rotary,
    attend,
    block_attention_mask,
    boolean_mask,
    position_ids_from_pad,
    prefix_block_starts,
    simplified_mask,
)
from vla_policy_ros.model.configuration import ActionExpertConfig
from vla_policy_ros.model.initial import start_as

CALL_BACK = 'run_in_stream'
"""Name of the method ``(function, *arguments) -> function(layer, *arguments)`` that sharding gives to a layer."""


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, ``[B, kv_heads, Lp + room, dh]`` each."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class PrefixCache:
    """What a suffix needs of a prefix: one `LayerCache` per language layer.

    Immutable form (``room`` 0): the tensors hold the prefix and are only read. Preallocated form (``room`` = suffix tokens): behind
    the prefix lies room into which every suffix pass writes its own keys and values, so that each layer is one contiguous segment
    at a fixed address; for inference without gradients and one suffix per prefix.

    Attributes:
        layers: per language layer.
        length: prefix tokens Lp.
        room: free slots behind the prefix.
    """

    layers: tuple[LayerCache, ...]
    length: int
    room: int = 0

    @property
    def batch(self) -> int:
        """Prefixes B."""
        return self.layers[0].key.shape[0]

    @property
    def key(self) -> Tensor:
        """Keys of the first layer; gives device and dtype."""
        return self.layers[0].key


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


@dataclass(frozen=True)
class Modulation:
    """Adaptive norms of the suffix: per layer ``[n, 6 E]`` (scale, shift, gate of both norms), for the end ``[n, 2 E]``."""

    layers: tuple[Tensor, ...]
    final: Tensor

    def at(self, index: Tensor | slice) -> Modulation:
        """Rows ``index``: a slice, or long of any shape ``[...]`` for tables ``[..., 6 E]``."""
        return Modulation(tuple(table[index] for table in self.layers), self.final[index])


class ExpertModulation(nn.Module):
    """Time condition ``[n, E]`` to `Modulation` (adaRMS of pi0.5). All zero at first: gates closed, norms plain."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(start_as(nn.Linear(width, 6 * width), 0.0) for _ in range(num_layers))
        self.final = start_as(nn.Linear(width, 2 * width), 0.0)

    def forward(self, condition: Tensor) -> Modulation:
        return Modulation(tuple(layer(condition) for layer in self.layers), self.final(condition))


class ExpertLayers(nn.Module):
    """The suffix stream's own transformer layers, of the language model's family.

    They start as the identity: by zero output projections, or, where adaptive norms gate them, by closed gates (both together
    would leave no gradient).
    """

    def __init__(self, base_config: Any, layer_class: type[nn.Module], config: ActionExpertConfig, num_layers: int) -> None:
        super().__init__()
        narrow = copy.deepcopy(base_config)
        narrow.head_dim = head_width(base_config)
        narrow.hidden_size = config.hidden_size
        narrow.intermediate_size = config.intermediate_size
        narrow.num_hidden_layers = num_layers
        self.layers = nn.ModuleList(layer_class(narrow, index) for index in range(num_layers))
        if config.time_conditioning == 'adarms':
            return
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
    dict. The owner moves and saves it. Gradient checkpointing follows transformers' switch
    (``model.gradient_checkpointing_enable()``), layer by layer in both streams.

    Args:
        base_llava: a Llama or Mistral model for causal language modelling (``.model.layers``, ``.model.norm``,
            ``.model.rotary_emb``).
        expert_config: sizes and mode of the expert; None is the default one.
        prefix_attention: mask among prefix tokens when only padding is given.
        attention_implementation: ``auto``, ``eager`` or ``sdpa`` (`attention.attend`).
    """

    # Set by transformers, together with `gradient_checkpointing`.
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(
        self,
        base_llava: Any,
        expert_config: ActionExpertConfig | None = None,
        prefix_attention: str = 'bidirectional',
        attention_implementation: str = 'auto',
    ) -> None:
        super().__init__()
        expert_config = expert_config or ActionExpertConfig()
        self._borrowed = (base_llava,)
        text = base_llava.config
        self.prefix_attention = prefix_attention
        self.attention_implementation = attention_implementation
        self.gradient_checkpointing = False
        self.knowledge_insulation = expert_config.knowledge_insulation
        self.shared = expert_config.mode == 'shared'
        self.num_layers = int(text.num_hidden_layers)
        self.num_heads = int(text.num_attention_heads)
        self.num_kv_heads = int(text.num_key_value_heads)
        self.head_dim = head_width(text)
        self.hidden_size = int(text.hidden_size)
        self.expert_hidden_size = int(expert_config.hidden_size)
        self.expert_num_layers = self.num_layers if self.shared else expert_config.num_layers or self.num_layers
        if self.num_layers % self.expert_num_layers:
            raise ValueError(f'{self.num_layers} language layers cannot be paired with {self.expert_num_layers} expert layers')
        stride = self.num_layers // self.expert_num_layers
        late = expert_config.fusion_depth == 'late'
        self.layers_read = tuple(self.num_layers - 1 if late else index * stride for index in range(self.expert_num_layers))
        self.last_read_layer = self.layers_read[-1]
        layer_class = type(self.base.layers[0])
        self.expert_model = None if self.shared else ExpertLayers(text, layer_class, expert_config, self.expert_num_layers)
        self.expert_norm = type(self.base.norm)(self.expert_hidden_size, eps=text.rms_norm_eps)
        adaptive = expert_config.time_conditioning == 'adarms'
        self.expert_modulation = ExpertModulation(self.expert_hidden_size, self.expert_num_layers) if adaptive else None

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
        expert_cond: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[tuple[Any, Any], PrefixCache | None]:
        """Run the streams that are given.

        Args:
            attention_mask: prefix only: validity ``[B, Lp]`` or a mask ``[B, 1, Lp, Lp]``. With a suffix: the joint mask
                ``[B, 1, Lp + Ls, Lp + Ls]``, or, for the cached pass, its last Ls rows. Boolean, or additive with 0 = may look.
            position_ids: ``[B, L]`` of all streams or, for the cached pass, of the suffix; None derives them from a validity mask.
            past_key_values: the prefix cache, for the suffix-only pass.
            inputs_embeds: prefix ``[B, Lp, D]`` and suffix ``[B, Ls, E]`` embeddings; either may be None.
            use_cache: return the prefix cache of a prefix-only pass.
            expert_cond: time condition ``[B, E]`` or ``[B, Ls, E]``; needed exactly for adaptive norms.
            output_hidden_states: return, in place of the prefix output, the tuple of its layer inputs and the output.

        Returns:
            ``((prefix_out or None, suffix_out or None), cache or None)``.

        Raises:
            ValueError: neither stream is given, a suffix comes without prefix or cache, or the mask has a wrong shape.
        """
        prefix, suffix = inputs_embeds
        if prefix is None and suffix is None:
            raise ValueError('give prefix embeddings, suffix embeddings or both')
        prefix_out: Any = None
        cache = past_key_values
        if prefix is not None:
            done = self.prefix_pass(prefix, attention_mask, position_ids)
            prefix_out, cache = done.hidden_states if output_hidden_states else done.output, done.cache
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
            self.modulation(expert_cond),
        )
        return (prefix_out, suffix_out), None

    def modulation(self, condition: Tensor | None) -> Modulation | None:
        """Adaptive norms for a time condition ``[..., E]``. Raises ValueError where one is given without use, or missing."""
        if (condition is None) != (self.expert_modulation is None):
            raise ValueError("expert_cond is for time_conditioning 'adarms', and only for it")
        return None if condition is None or self.expert_modulation is None else self.expert_modulation(condition)

    def new_cache(self, batch: int, length: int, room: int, like: Tensor) -> PrefixCache:
        """A preallocated cache of the layers that the suffix reads, for ``batch`` prefixes of ``length`` tokens, on the device and
        in the dtype of ``like``; for prefix passes with ``cache_only``."""
        shape = (batch, self.num_kv_heads, length + room, self.head_dim)
        layers = tuple(LayerCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(self.last_read_layer + 1))
        return PrefixCache(layers, length, room)

    def prefix_pass(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        *,
        cache_only: bool = False,
        into: PrefixCache | None = None,
    ) -> PrefixPass:
        """Run the language model over the prefix.

        Args:
            embeds: ``[B, Lp, D]``.
            attention_mask: validity ``[B, Lp]``, or a mask of at least ``[B, 1, Lp, Lp]`` whose top left block is used.
            position_ids: ``[B, >= Lp]``; None derives them from the validity.
            cache_only: stop at the keys and values of the last layer that a suffix reads.
            into: with ``cache_only``, a preallocated cache of this size from `new_cache`, filled in place; None makes an immutable
                one.

        Raises:
            ValueError: mask, positions or the preallocated cache do not belong to these embeddings.
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
        if into is not None and not cache_only:
            raise ValueError('a preallocated cache holds the layers that a suffix reads; use it with cache_only')
        if into is not None and (into.batch, into.length) != (len(embeds), length):
            raise ValueError(f'the cache is for {into.batch} prefixes of {into.length} tokens, not {len(embeds)} of {length}')
        rotary = self.rotary(embeds, position_ids[:, :length])
        # A padded query that may look nowhere looks everywhere instead: finite in every kernel, and read by nobody.
        visible = simplified_mask(allowed | ~allowed.any(dim=-1, keepdim=True))
        hidden, states, layers = embeds, [embeds], []
        last = self.last_read_layer if cache_only else self.num_layers - 1
        for index, layer in enumerate(self.base.layers[: last + 1]):
            hidden, *kept = self._run_layer(self._prefix_layer, layer, hidden, visible, rotary, cache_only and index == last)
            layers.append(LayerCache(*kept) if into is None else _write(into.layers[index], LayerCache(*kept), 0))
            if index != last:
                states.append(hidden)
        cache = PrefixCache(tuple(layers), length) if into is None else into
        if cache_only:
            return PrefixPass(cache, tuple(states), None)
        output = torch.where(allowed.any(dim=-1)[:, 0, :, None], self.base.norm(hidden), 0.0)
        return PrefixPass(cache, (*states, output), output)

    def suffix_pass(
        self,
        embeds: Tensor,
        cache: PrefixCache,
        allowed: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        modulation: Modulation | None = None,
    ) -> Tensor:
        """Run the expert over the suffix against the prefix cache.

        Args:
            embeds: ``[B * R, Ls, E]``; rows ``b * R .. b * R + R - 1`` belong to prefix b.
            cache: prefix keys and values of batch B. The prefix part is never changed, copied or extended.
            allowed: boolean ``[B, 1, Ls, Lp + Ls]``, or None where nothing is masked.
            rotary: tables ``[B or B * R, Ls, dh]`` of the suffix positions, from `rotary`.
            modulation: adaptive norms whose tables are ``[1 or B * R, (Ls,) 6 E]``, from `modulation`.

        Returns:
            normalised suffix output ``[B * R, Ls, E]``.

        Raises:
            ValueError: the mask or the cache does not fit this suffix.
        """
        length = embeds.shape[1]
        if allowed is not None and allowed.shape[-2:] != (length, cache.length + length):
            raise ValueError(f'suffix mask is {tuple(allowed.shape)}; {length} suffix tokens see {cache.length + length} keys')
        repeats = len(embeds) // cache.batch
        if cache.room and (cache.room != length or repeats != 1 or torch.is_grad_enabled()):
            raise ValueError(
                f'a preallocated cache takes one suffix of {cache.room} tokens per prefix and no gradients; '
                f'here are {repeats} of {length}, gradients {"on" if torch.is_grad_enabled() else "off"}: use an immutable cache'
            )
        if len(rotary[0]) != len(embeds):
            rotary = (rotary[0].repeat_interleave(repeats, dim=0), rotary[1].repeat_interleave(repeats, dim=0))
        hidden = embeds
        layers = self.base.layers if self.expert_model is None else self.expert_model.layers
        for index, layer in enumerate(layers):
            past = cache.layers[self.layers_read[index]]
            table = None if modulation is None else modulation.layers[index]
            hidden = self._run_layer(self._suffix_layer, layer, hidden, *past, cache.room, allowed, rotary, table)
        normed = self.expert_norm(hidden)
        if modulation is None:
            return normed
        scale, shift = _rows(modulation.final, hidden).chunk(2, dim=-1)
        return normed * (1 + scale) + shift

    def stream_layers(self) -> list[nn.Module]:
        """The layers of both streams, each once: what a sharded model gathers one after the other."""
        return [*self.base.layers, *([] if self.expert_model is None else self.expert_model.layers)]

    def _run_layer(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """One layer (the first argument), recomputed in the backward pass where gradient checkpointing is on.

        Tensors that need gradients are arguments and results of their own: re-entrant checkpointing sees nothing inside a tuple.
        A sharded layer gathers its weights around a method of its own, which calls back.
        """
        gathered = getattr(arguments[0], CALL_BACK, None)
        if gathered is not None:
            function, arguments = gathered, (function, *arguments[1:])
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *arguments)
        return function(*arguments)

    def _prefix_layer(
        self, layer: Any, hidden: Tensor, visible: Tensor | None, rotary: tuple[Tensor, Tensor], cache_only: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        # Contiguous once, so that no matrix product of a later step has to copy them.
        key = apply_rotary(self._heads(attention.k_proj(normed)), rotary).contiguous()
        value = self._heads(attention.v_proj(normed)).contiguous()
        if cache_only:
            return hidden, key, value
        query = apply_rotary(self._heads(attention.q_proj(normed)), rotary)
        hidden = hidden + attention.o_proj(attend(query, [(key, value)], visible, self.attention_implementation))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), key, value

    def _suffix_layer(
        self,
        layer: Any,
        hidden: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        room: int,
        allowed: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        table: Tensor | None,
    ) -> Tensor:
        past = LayerCache(past_key, past_value)
        if self.knowledge_insulation:
            past = LayerCache(past_key.detach(), past_value.detach())
        attention = layer.self_attn
        first, second = (None, None) if table is None else _rows(table, hidden).chunk(2, dim=-1)
        normed, gate = _modulated(layer.input_layernorm(hidden), first)
        query = apply_rotary(self._heads(attention.q_proj(normed)), rotary)
        key = apply_rotary(self._heads(attention.k_proj(normed)), rotary)
        own = LayerCache(key, self._heads(attention.v_proj(normed)))
        segments = [_write(past, own, past.key.shape[2] - room)] if room else [past, own]
        mixed = attention.o_proj(attend(query, segments, allowed, self.attention_implementation))
        hidden = hidden + (mixed if gate is None else gate * mixed)
        normed, gate = _modulated(layer.post_attention_layernorm(hidden), second)
        mixed = layer.mlp(normed)
        return hidden + (mixed if gate is None else gate * mixed)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _write(buffer: LayerCache, new: LayerCache, start: int) -> LayerCache:
    """Copy keys and values into a preallocated layer from slot ``start`` on, and return that layer."""
    for whole, part in zip(buffer, new, strict=True):
        whole[:, :, start : start + part.shape[2]].copy_(part)
    return buffer


def _rows(table: Tensor, hidden: Tensor) -> Tensor:
    """A modulation table ``[n, 6 E]`` or ``[n, Ls, 6 E]`` that broadcasts over ``hidden`` ``[n or more, Ls, E]``."""
    return (table[:, None] if table.dim() == 2 else table).to(hidden.dtype)


def _modulated(normed: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scaled and shifted norm with its gate; the plain norm and None without a table."""
    if table is None:
        return normed, None
    scale, shift, gate = table.chunk(3, dim=-1)
    return normed * (1 + scale) + shift, gate
