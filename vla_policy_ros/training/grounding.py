"""Auxiliary loss that teaches the prefix where the named object is.

A small head looks at the image tokens as the last language layer receives them, and answers, per camera, in which patch the
object lies and where in the patch. With few samples the flow loss alone does not find out that words and patches belong together.
The head belongs to the trainer; the checkpoint does not contain it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GroundingLoss:
    """Mean cross entropy over patches (nat), mean squared offset (patch sides), share of patches found; over visible targets."""

    patch: Tensor
    offset: Tensor
    accuracy: Tensor

    @property
    def total(self) -> Tensor:
        """What is added to the flow loss, before weighting."""
        return self.patch + self.offset


class GroundingHead(nn.Module):
    """One logit and one offset ``(du, dv)`` per image token.

    Args:
        width: D.
        patch_size: side of a patch, pixels.
        grid: patches along one side of an image.
    """

    def __init__(self, width: int, patch_size: int, grid: int) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.norm = nn.LayerNorm(width)
        self.logit = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, target_pixels: Tensor) -> GroundingLoss:
        """``tokens`` ``[B, V, N, D]`` and targets ``[B, V, 2]`` in pixels of the model's images, NaN where not seen."""
        tokens = self.norm(tokens.float()).flatten(0, 1)
        pixels = target_pixels.flatten(0, 1)
        # The centre of pixel 0 is coordinate 0, so that the left edge of the first patch lies at -0.5.
        position = (pixels + 0.5) / self.patch_size
        seen = torch.isfinite(pixels).all(dim=-1) & (position >= 0).all(dim=-1) & (position < self.grid).all(dim=-1)
        tokens, position = tokens[seen], position[seen]
        if len(tokens) == 0:
            nothing = self.logit.weight.sum() * 0.0
            return GroundingLoss(nothing, nothing, nothing.detach())
        column, row = position.floor().long().unbind(-1)
        cell = row * self.grid + column
        logits = self.logit(tokens)[..., 0]
        chosen = tokens[torch.arange(len(tokens)), cell]
        offset = self.offset(chosen) - (position - position.floor() - 0.5)
        accuracy = (logits.argmax(dim=-1) == cell).float().mean()
        return GroundingLoss(F.cross_entropy(logits, cell), offset.square().mean(), accuracy.detach())
