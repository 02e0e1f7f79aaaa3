"""Which patch of a picture a pixel lies in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Located(NamedTuple):
    """Where pixels ``[..., 2]`` lie: ``seen`` bool ``[...]``, inside the picture; ``cell`` long ``[...]``, row-major index of the
    patch; ``offset`` ``[..., 2]`` from its centre, patch sides. The latter two mean nothing where not seen."""

    seen: Tensor
    cell: Tensor
    offset: Tensor


def locate(pixels: Tensor, patch_size: int, grid: int) -> Located:
    """For pixels ``(u, v)`` of a picture of ``grid`` times ``grid`` patches; NaN is nowhere."""
    # The centre of pixel 0 is coordinate 0, so that the left edge of the first patch lies at -0.5.
    position = (pixels + 0.5) / patch_size
    seen = torch.isfinite(pixels).all(dim=-1) & (position >= 0).all(dim=-1) & (position < grid).all(dim=-1)
    column, row = torch.where(seen[..., None], position, 0.0).floor().long().unbind(-1)
    return Located(seen, row * grid + column, position - position.floor() - 0.5)
