"""Auxiliary loss that teaches the prefix where the named object is, and where it shall go.

A small head looks at the image tokens as the last language layer receives them, and answers, per camera and target, in which
patch the target lies and where in the patch. With few samples the flow loss alone does not find out that words and patches
belong together. The head belongs to the trainer; the checkpoint does not contain it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_policy_ros.training.patches import locate


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
    """One logit and one offset ``(du, dv)`` per image token and target.

    Args:
        width: D.
        patch_size: side of a patch, pixels.
        grid: patches along one side of an image.
        targets: G, what a sentence can name: an object, and a place for it.
    """

    def __init__(self, width: int, patch_size: int, grid: int, targets: int = 2) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.norm = nn.LayerNorm(width)
        self.logit = nn.Linear(width, targets)
        self.offset = nn.Linear(width, 2 * targets)

    def forward(self, tokens: Tensor, target_pixels: Tensor) -> GroundingLoss:
        """``tokens`` ``[B, V, N, D]`` and targets ``[B, V, G, 2]`` in pixels of the model's images, NaN where not seen."""
        tokens = self.norm(tokens.float())
        logits = self.logit(tokens).transpose(2, 3)
        offsets = self.offset(tokens).unflatten(3, (-1, 2)).transpose(2, 3)
        seen, cell, offset = locate(target_pixels, self.patch_size, self.grid)
        logits, offsets, cell, offset = logits[seen], offsets[seen], cell[seen], offset[seen]
        if len(logits) == 0:
            nothing = self.logit.weight.sum() * 0.0
            return GroundingLoss(nothing, nothing, nothing.detach())
        error = offsets[torch.arange(len(cell)), cell] - offset
        accuracy = (logits.argmax(dim=-1) == cell).float().mean()
        return GroundingLoss(F.cross_entropy(logits, cell), error.square().mean(), accuracy.detach())
