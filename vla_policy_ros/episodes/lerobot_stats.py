"""Statistics of the features of a LeRobot dataset, as its ``meta/stats.json`` and its tables of episodes hold them.

Vectors: exact, over all rows. Images: of evenly chosen frames and pixels, in 0 to 1, with the shape ``[3, 1, 1]`` that LeRobot
uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {'q01': 0.01, 'q10': 0.10, 'q50': 0.50, 'q90': 0.90, 'q99': 0.99}
IMAGES_PER_EPISODE = 100
_PIXEL_STRIDE = 4
_LEVELS = np.arange(256) / 255.0

Stats = dict[str, Any]


def vector_stats(rows: NDArray[Any]) -> Stats:
    """Statistics of ``[N, D]`` rows, lists of ``D`` numbers."""
    values = np.asarray(rows, dtype=np.float64)
    stats: Stats = {
        'min': rows.min(axis=0).tolist(),  # integers stay integers, as in LeRobot's tables
        'max': rows.max(axis=0).tolist(),
        'mean': values.mean(axis=0).tolist(),
        'std': values.std(axis=0).tolist(),
        'count': [len(values)],
    }
    return stats | {name: np.quantile(values, q, axis=0).tolist() for name, q in QUANTILES.items()}


class ImageHistogram:
    """How often each level of each channel was seen.

    Attributes:
        images: how many images.
        levels: int64 ``[3, 256]``.
    """

    def __init__(self) -> None:
        self.images = 0
        self.levels = np.zeros((3, 256), dtype=np.int64)

    def add(self, rgb: NDArray[np.uint8]) -> None:
        """Count every fourth row and column of an image."""
        pixels = rgb[::_PIXEL_STRIDE, ::_PIXEL_STRIDE].reshape(-1, 3)
        self.images += 1
        for channel in range(3):
            self.levels[channel] += np.bincount(pixels[:, channel], minlength=256)

    def merge(self, other: ImageHistogram) -> None:
        """Add what another one counted."""
        self.images += other.images
        self.levels += other.levels

    def stats(self) -> Stats:
        """Statistics in 0 to 1, lists of shape ``[3, 1, 1]``. At least one image must have been added."""
        share = self.levels / self.levels.sum(axis=1, keepdims=True)
        mean = share @ _LEVELS
        seen, below = self.levels > 0, np.cumsum(share, axis=1)
        values: dict[str, NDArray[np.float64]] = {
            'min': _LEVELS[seen.argmax(axis=1)],
            'max': _LEVELS[255 - seen[:, ::-1].argmax(axis=1)],
            'mean': mean,
            'std': np.sqrt(np.maximum(0.0, share @ _LEVELS**2 - mean**2)),
        }
        values |= {name: _LEVELS[(below >= q).argmax(axis=1)] for name, q in QUANTILES.items()}
        return {name: value.reshape(3, 1, 1).tolist() for name, value in values.items()} | {'count': [self.images]}
