"""Masks, positions and attention against independent, slower definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vla_policy_ros.model.attention import (
    additive_mask,
    block_attention_mask,
    boolean_mask,
    grouped_attention,
    position_ids_from_pad,
    prefix_block_starts,
)


@pytest.mark.parametrize('seed', range(8))
def test_mask_equals_the_rule_written_out_pair_by_pair(seed: int) -> None:
    """O14."""
    torch.manual_seed(seed)
    length = int(torch.randint(2, 13, ()))
    pad = torch.rand(3, length) > 0.3
    starts = (torch.rand(3, length) > 0.6).long()
    got = block_attention_mask(pad, starts)
    assert got.shape == (3, 1, length, length)
    for b in range(3):
        for q in range(length):
            for k in range(length):
                block_q, block_k = int(starts[b, : q + 1].sum()), int(starts[b, : k + 1].sum())
                assert bool(got[b, 0, q, k]) == (block_k <= block_q and bool(pad[b, q]) and bool(pad[b, k]))


def test_prefix_modes() -> None:
    pad = torch.tensor([[True, True, True, True, True, False]])
    image = torch.tensor([[False, True, True, False, False, False]])
    sees = {
        mode: block_attention_mask(pad, prefix_block_starts(mode, pad, image))[0, 0]
        for mode in ('bidirectional', 'causal', 'image_bidirectional_text_causal')
    }
    assert sees['bidirectional'][0, 4] and not sees['causal'][0, 4]
    assert not sees['causal'][1, 2] and sees['image_bidirectional_text_causal'][1, 2]
    assert not sees['image_bidirectional_text_causal'][2, 3] and sees['image_bidirectional_text_causal'][3, 2]
    assert not any(mask[:, 5].any() or mask[5].any() for mask in sees.values())
    with pytest.raises(ValueError, match='image_token_mask'):
        prefix_block_starts('image_bidirectional_text_causal', pad, None)


@pytest.mark.parametrize('pads', [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
def test_positions_count_valid_tokens_and_the_suffix_starts_at_their_number(pads: list[int]) -> None:
    """O15."""
    pad = torch.tensor([[*pads, 1, 1, 1]], dtype=torch.bool)
    positions = position_ids_from_pad(pad)
    assert positions[0, 5:].tolist() == [3, 4, 5]
    assert positions[pad].tolist() == list(range(int(pad.sum())))
    assert int(positions.min()) >= 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_additive_and_boolean_masks_are_the_same_mask(dtype: torch.dtype) -> None:
    allowed = torch.rand(2, 1, 5, 5) > 0.5
    additive = additive_mask(allowed, dtype)
    assert torch.isfinite(additive).all()
    assert torch.equal(boolean_mask(additive), allowed)


@pytest.mark.parametrize(('heads', 'kv_heads', 'repeats'), [(4, 4, 1), (4, 2, 1), (6, 2, 3), (4, 1, 2)])
def test_attention_over_segments_equals_attention_over_their_concatenation(heads: int, kv_heads: int, repeats: int) -> None:
    torch.manual_seed(0)
    batch, length, width = 2, 5, 8
    query = torch.randn(batch * repeats, heads, length, width)
    past = torch.randn(2, batch, kv_heads, 7, width)
    own = torch.randn(2, batch * repeats, kv_heads, length, width)
    allowed = torch.rand(batch, 1, length, 7 + length) > 0.4
    allowed[..., 0] = True
    got = grouped_attention(query, [(past[0], past[1]), (own[0], own[1])], allowed)

    joined = [torch.cat((past[i].repeat_interleave(repeats, 0), own[i]), dim=2) for i in range(2)]
    key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in joined)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed.repeat_interleave(repeats, 0))
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(2), atol=1e-5, rtol=0)


def test_a_query_that_may_look_nowhere_stays_finite() -> None:
    query = torch.randn(1, 2, 3, 4)
    allowed = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    assert torch.isfinite(grouped_attention(query, [(query, query)], allowed)).all()
