"""Auxiliary losses on the image tokens before any word is read: what lies where, and how far away.

A small network that is trained from nothing has to learn to see before a sentence can mean anything. Where a simulator knows
the objects of a scene, small heads ask each image token whether an object's centre lies in its patch, and there for colour,
shape, offset inside the patch, and place in the base frame; every token is asked for the depth behind it. Place and depth need
the intrinsics, which makes the geometry trunk use them. The heads belong to the trainer; the checkpoint does not contain them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_policy_ros.training.patches import locate

CENTRE_WEIGHT = 8.0
POINT_ORIGIN = (0.5, 0.0, 0.03)
POINT_UNIT = 0.1
DEPTH_RANGE = (0.05, 4.0)

LOSS_WEIGHTS = {'centre': 1.0, 'colour': 0.5, 'shape': 1.0, 'offset': 1.0, 'point': 1.0, 'depth': 0.3}


class PerceptionHead(nn.Module):
    """Linear heads over normalised image tokens.

    Args:
        width: D.
        patch_size: side of a patch, pixels.
        grid: patches along one side of an image.
        colours, shapes: largest number of words of each.
    """

    def __init__(self, width: int, patch_size: int, grid: int, colours: int = 8, shapes: int = 8) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.norm = nn.LayerNorm(width)
        self.centre = nn.Linear(width, 1)
        self.colour = nn.Linear(width, colours)
        self.shape = nn.Linear(width, shapes)
        self.offset = nn.Linear(width, 2)
        self.point = nn.Linear(width, 3)
        self.depth = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, kinds: Tensor, pixels: Tensor, points: Tensor, depth: Tensor) -> dict[str, Tensor]:
        """Losses and, detached, ``colour_accuracy`` and ``shape_accuracy``; a loss without labels is zero.

        Args:
            tokens: ``[B, V, N, D]``.
            kinds: long ``[B, O, 2]``, colour and shape; -1 where there is no word.
            pixels: ``[B, V, O, 2]`` in pixels of the model's images, NaN where not seen.
            points: ``[B, V, O, 3]`` in the base frame, m, NaN where not asked for.
            depth: ``[B, V, side, side]``, m, NaN where unknown.
        """
        tokens = self.norm(tokens.float())
        seen, cell, offset = locate(pixels, self.patch_size, self.grid)
        at = torch.gather(tokens, 2, cell[..., None].expand(*cell.shape, tokens.shape[-1]))[seen]
        colour, shape = kinds[:, None].expand(*cell.shape, 2)[seen].unbind(-1)
        placed = torch.isfinite(points[seen]).all(dim=-1)
        origin = points.new_tensor(POINT_ORIGIN)
        answers = {
            name: (head(at[label >= 0]), label[label >= 0])
            for name, head, label in (('colour', self.colour, colour), ('shape', self.shape, shape))
        }
        losses = {name: _mean(F.cross_entropy(logits, label, reduction='none')) for name, (logits, label) in answers.items()}
        losses |= {
            'centre': self._centre_loss(tokens, cell, seen),
            'offset': _mean((self.offset(at) - offset[seen]).square()),
            'point': _mean(
                F.smooth_l1_loss(self.point(at[placed]), (points[seen][placed] - origin) / POINT_UNIT, beta=0.1, reduction='none')
            ),
            'depth': self._depth_loss(tokens, depth),
        }
        with torch.no_grad():
            right = {name: (logits.argmax(-1) == label).float() for name, (logits, label) in answers.items()}
            accuracy = {f'{name}_accuracy': _mean(values) for name, values in right.items()}
        return {**losses, **accuracy}

    def _centre_loss(self, tokens: Tensor, cell: Tensor, seen: Tensor) -> Tensor:
        if not cell.numel():
            return _mean(tokens.new_zeros(0)) + self.centre.weight.sum() * 0.0
        wanted = torch.zeros(tokens.shape[:3], device=tokens.device)
        wanted.scatter_reduce_(2, cell, seen.float(), reduce='amax')
        weight = wanted.new_tensor(CENTRE_WEIGHT)
        return F.binary_cross_entropy_with_logits(self.centre(tokens)[..., 0], wanted, pos_weight=weight)

    def _depth_loss(self, tokens: Tensor, depth: Tensor) -> Tensor:
        """Mean absolute error of the logarithm; a tile that is partly unknown does not count."""
        depth, size = depth.clamp(*DEPTH_RANGE), (self.grid, self.grid)
        wanted = F.interpolate(depth, size=size, mode='bilinear', align_corners=False).flatten(2)
        known = torch.isfinite(wanted)
        error = self.depth(tokens)[..., 0][known] - wanted[known].log()
        return _mean(error.abs())


def _mean(values: Tensor) -> Tensor:
    """Mean that is zero, with a gradient, where there is nothing."""
    return values.sum() / max(1, values.numel())
