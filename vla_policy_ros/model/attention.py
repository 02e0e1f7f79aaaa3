"""Masks, positions and attention shared by every stream. All masks are boolean: True means that the query may look.

The rule is one line: a query sees the keys whose block id is not larger than its own, if neither is padding. Block ids are the
running sum of a 0/1 vector, so that a run of zeros forms one block whose tokens see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def block_attention_mask(pad: Tensor, starts_block: Tensor) -> Tensor:
    """Boolean mask ``[B, 1, L, L]`` from validity ``pad`` ``[B, L]`` and block starts ``[L]`` or ``[B, L]`` (1 opens a block)."""
    block = torch.cumsum(starts_block.to(torch.long), dim=-1)
    block = block.expand(pad.shape)
    allowed = block[:, None, :] <= block[:, :, None]
    return (allowed & pad[:, None, :] & pad[:, :, None])[:, None]


def prefix_block_starts(prefix_attention: str, pad: Tensor, image_token_mask: Tensor | None) -> Tensor:
    """Block starts ``[B, Lp]`` of the prefix for one of the `prefix_attention` choices of the configuration.

    Raises ValueError where ``image_bidirectional_text_causal`` is asked for without an image mask.
    """
    if prefix_attention == 'bidirectional':
        return torch.zeros_like(pad, dtype=torch.long)
    starts = torch.ones_like(pad, dtype=torch.long)
    if prefix_attention == 'causal':
        return starts
    if image_token_mask is None:
        raise ValueError('prefix_attention image_bidirectional_text_causal needs the image_token_mask of the prefix')
    inside_run = torch.zeros_like(image_token_mask)
    inside_run[:, 1:] = image_token_mask[:, 1:] & image_token_mask[:, :-1]
    return starts.masked_fill(inside_run, 0)


def position_ids_from_pad(pad: Tensor) -> Tensor:
    """Long ``[B, L]``: the running count of valid tokens minus one, so that padding never shifts a position."""
    return (torch.cumsum(pad.to(torch.long), dim=-1) - 1).clamp_min(0)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as 0 / most negative number of ``dtype``, for interfaces that want an additive mask."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def boolean_mask(mask: Tensor) -> Tensor:
    """A boolean mask from a boolean or additive (0 = may look) one."""
    return mask if mask.dtype == torch.bool else mask == 0


def rotate_half(x: Tensor) -> Tensor:
    """Second half negated in front of the first half, along the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of ``x`` ``[B, heads, L, dh]`` with cosine and sine tables ``[B, L, dh]``."""
    cosine, sine = (table.unsqueeze(1) for table in rotary)
    return x * cosine + rotate_half(x) * sine


def simplified_mask(allowed: Tensor) -> Tensor | None:
    """None where nothing is masked, so that no kernel reads a mask and SDPA may choose FlashAttention. Asks the device once."""
    return None if allowed.device.type != 'meta' and bool(allowed.all()) else allowed


def attend(
    query: Tensor, segments: Sequence[tuple[Tensor, Tensor]], allowed: Tensor | None, implementation: str = 'auto'
) -> Tensor:
    """Softmax attention of one set of queries over key/value segments; arguments and result as in `grouped_attention`.

    ``eager`` is `grouped_attention`. ``sdpa`` is torch's scaled_dot_product_attention, which takes FlashAttention where ``allowed``
    is None and the device has it. ``auto`` is ``sdpa`` on CUDA and for fewer queries than keys, and ``eager`` elsewhere: on a CPU
    each is the faster one there. Several segments, or several query rows per key row, always go to `grouped_attention`: a fused
    kernel would need them joined and repeated, which copies the prefix.
    """
    rows, heads, length, width = query.shape
    key, value = segments[0]
    if implementation == 'auto':
        implementation = 'sdpa' if query.device.type == 'cuda' or length < key.shape[2] else 'eager'
    if implementation == 'eager' or len(segments) > 1 or len(key) != rows:
        return grouped_attention(query, segments, allowed)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=key.shape[1] != heads)
    return mixed.transpose(1, 2).reshape(rows, length, heads * width)


def grouped_attention(query: Tensor, segments: Sequence[tuple[Tensor, Tensor]], allowed: Tensor | None) -> Tensor:
    """Softmax attention of one set of queries over several key/value segments, without joining or repeating the segments.

    A segment may have a smaller batch than the queries: query row ``b * R + r`` then reads segment row ``b``. Key/value heads may
    be fewer than query heads by an integer factor. Scores are normalised over all segments together, in float32.

    Args:
        query: ``[B * R, heads, Lq, dh]``.
        segments: pairs of keys and values ``[B or B * R, kv_heads, Lk, dh]``; the first one has batch B.
        allowed: boolean ``[B or 1, 1, Lq, sum of Lk]`` or None for no restriction. A row that may look nowhere yields finite
            values that carry no information.

    Returns:
        ``[B * R, Lq, heads * dh]``.
    """
    rows, heads, length, width = query.shape
    batch, kv_heads = segments[0][0].shape[:2]
    repeats, group = rows // batch, heads // kv_heads
    query = (query * width**-0.5).reshape(batch, repeats, kv_heads, group, length, width)
    by_sample = query.transpose(1, 2).reshape(batch, kv_heads, repeats * group * length, width)
    by_row = query.reshape(rows, kv_heads, group * length, width)

    scores = []
    for key, _ in segments:
        if key.shape[0] == batch:
            part = (by_sample @ key.transpose(-1, -2)).view(batch, kv_heads, repeats, group, length, -1)
        else:
            part = (by_row @ key.transpose(-1, -2)).view(batch, repeats, kv_heads, group, length, -1).transpose(1, 2)
        scores.append(part)
    joint = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
    if allowed is not None:
        joint = joint.masked_fill(~allowed[:, :, None, None], torch.finfo(joint.dtype).min)
    weights = torch.softmax(joint, dim=-1, dtype=torch.float32).to(segments[0][1].dtype)

    output: Tensor | None = None
    parts = weights.split([key.shape[2] for key, _ in segments], dim=-1) if len(segments) > 1 else (weights,)
    for part, (key, value) in zip(parts, segments, strict=True):
        if key.shape[0] == batch:
            mixed = part.reshape(batch, kv_heads, repeats * group * length, -1) @ value
            mixed = mixed.view(batch, kv_heads, repeats, group, length, width).transpose(1, 2)
        else:
            mixed = part.transpose(1, 2).reshape(rows, kv_heads, group * length, -1) @ value
            mixed = mixed.view(batch, repeats, kv_heads, group, length, width)
        output = mixed if output is None else output + mixed
    assert output is not None
    return output.reshape(rows, heads, length, width).transpose(1, 2).reshape(rows, length, heads * width)
