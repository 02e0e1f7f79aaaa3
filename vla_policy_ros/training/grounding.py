"""Auxiliary losses that teach the prefix what is where.

*Grounding*: a small head looks at the image tokens as the last language layer receives them, and answers, per camera, in which
patch the named object lies and where in the patch. With few samples the flow loss alone does not find out that words and patches
belong together.

*Naming*: another head looks at the image token of that patch before any language has been seen, and answers which words the
sentence used. It makes the towers tell apart what the sentences tell apart, also where that is a matter of a few pixels and
guessing would serve grounding almost as well.

The heads belong to the trainer; the checkpoint does not contain them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GroundingLoss:
    """Means over visible targets.

    Attributes:
        patch: cross entropy over patches, nat.
        offset: squared distance inside the patch, patch sides.
        naming: binary cross entropy, nat, summed over the words that vary between sentences.
        accuracy: share of targets whose patch is found.
    """

    patch: Tensor
    offset: Tensor
    naming: Tensor
    accuracy: Tensor

    @property
    def total(self) -> Tensor:
        """What is added to the flow loss, before weighting."""
        return self.patch + self.offset + self.naming


class GroundingHead(nn.Module):
    """One logit and one offset ``(du, dv)`` per image token, and words per image token.

    Args:
        width: D.
        patch_size: side of a patch, pixels.
        grid: patches along one side of an image.
        word_frequency: ``[W]``, share of sentences that use each word, strictly between 0 and 1.
    """

    def __init__(self, width: int, patch_size: int, grid: int, word_frequency: Tensor) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.norm = nn.LayerNorm(width)
        self.logit = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 2)
        self.image_norm = nn.LayerNorm(width)
        self.words = nn.Linear(width, len(word_frequency))
        with torch.no_grad():
            self.words.bias.copy_(torch.logit(word_frequency.float()))

    def forward(self, tokens: Tensor, image_tokens: Tensor, target_pixels: Tensor, words: Tensor) -> GroundingLoss:
        """Losses of a batch.

        Args:
            tokens: image tokens after language ``[B, V, N, D]``.
            image_tokens: the same before language.
            target_pixels: ``[B, V, 2]`` in pixels of the model's images, NaN where not seen.
            words: bool ``[B, W]``, words that each sentence uses.
        """
        views = target_pixels.shape[1]
        tokens, image_tokens = tokens.float().flatten(0, 1), image_tokens.float().flatten(0, 1)
        pixels, words = target_pixels.flatten(0, 1), words.repeat_interleave(views, dim=0)
        # The centre of pixel 0 is coordinate 0, so that the left edge of the first patch lies at -0.5.
        position = (pixels + 0.5) / self.patch_size
        seen = torch.isfinite(pixels).all(dim=-1) & (position >= 0).all(dim=-1) & (position < self.grid).all(dim=-1)
        if not bool(seen.any()):
            nothing = self.logit.weight.sum() * 0.0
            return GroundingLoss(nothing, nothing, nothing, nothing.detach())
        tokens, image_tokens, position, words = self.norm(tokens[seen]), image_tokens[seen], position[seen], words[seen]
        column, row = position.floor().long().unbind(-1)
        cell, each = row * self.grid + column, torch.arange(len(tokens))
        logits = self.logit(tokens)[..., 0]
        offset = self.offset(tokens[each, cell]) - (position - position.floor() - 0.5)
        said = self.words(self.image_norm(image_tokens[each, cell]))
        naming = F.binary_cross_entropy_with_logits(said, words.float(), reduction='none').sum(dim=-1).mean()
        accuracy = (logits.argmax(dim=-1) == cell).float().mean()
        return GroundingLoss(F.cross_entropy(logits, cell), offset.square().mean(), naming, accuracy.detach())
