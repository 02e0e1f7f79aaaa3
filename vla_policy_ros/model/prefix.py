"""The prefix before the language model: words and image tokens as one sequence, and which of its positions count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixEmbeddings:
    """Prefix tokens before the language model.

    Attributes:
        embeds: ``[B, Lp, D]``.
        pad: bool ``[B, Lp]``, False at padding and at the tokens of absent cameras.
        image_token_mask: bool ``[B, Lp]``.
        image_features: ``[B, S, D]`` or None.
    """

    embeds: Tensor
    pad: Tensor
    image_token_mask: Tensor
    image_features: Tensor | None


def inject_images(
    words: Tensor, pad: Tensor, is_image: Tensor, features: Tensor | None, image_masks: Tensor | None
) -> PrefixEmbeddings:
    """Put image tokens, in order, into the image positions of each sample; everything else keeps its value.

    Args:
        words: word embeddings ``[B, Lp, D]``.
        pad: bool ``[B, Lp]``, valid positions.
        is_image: bool ``[B, Lp]``, image positions.
        features: ``[B, S, D]``, view-major, or None.
        image_masks: bool ``[B, V]``, cameras that are present; None is all.

    Raises:
        ValueError: the number of image positions of a sample is not S, or batches differ.
    """
    slots = is_image.sum(dim=1)
    if features is None:
        if bool(slots.any()):
            raise ValueError(f'input_ids mark {int(slots.max())} image positions but no pixel_values are given')
        return PrefixEmbeddings(words, pad, is_image, None)
    if len(features) != len(is_image):
        raise ValueError(f'input_ids have batch {len(is_image)}, the images have batch {len(features)}')
    expected = features.shape[1]
    if not bool((slots == expected).all()):
        raise ValueError(f'input_ids mark {slots.tolist()} image positions per sample; the images make {expected} tokens')
    embeds = words.masked_scatter(is_image[..., None], features.to(words.dtype))
    if image_masks is not None:
        present = image_masks.bool().repeat_interleave(expected // image_masks.shape[1], dim=1)
        pad = pad & torch.ones_like(is_image).masked_scatter(is_image, present)
    return PrefixEmbeddings(embeds, pad, is_image, features)


def hide_at_random(pad: Tensor, may_hide: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """``pad`` without a random share of the positions ``may_hide``; nothing can look at a hidden position."""
    draw = torch.rand(pad.shape, device=pad.device, generator=generator)
    return pad & ~(may_hide & (draw < probability))


def left_padded(embeds: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
    """The same sequences with all invalid positions in front, as generation needs them; the order of valid ones stays."""
    order = torch.argsort(pad.to(torch.uint8), dim=1, stable=True)
    return embeds.gather(1, order[..., None].expand_as(embeds)), pad.gather(1, order)
