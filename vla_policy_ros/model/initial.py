"""Marks a projection whose initial weights are not the family's default.

The mark sits on the layer itself, because transformers initialises a model leaf by leaf.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

Start = float | Literal['identity']


def start_as(layer: nn.Linear, start: Start) -> nn.Linear:
    """Mark ``layer``: ``identity`` copies its first inputs, a number is the standard deviation. Its bias starts at zero."""
    layer._starts_as = start  # type: ignore[assignment]
    return layer


def starts_as(layer: nn.Linear) -> Start | None:
    """The mark of a layer, or None for the default."""
    return getattr(layer, '_starts_as', None)
