"""Normalisation of state and actions, saved with the checkpoint that was trained with it.

Every mode is one affine map per element, ``(x - offset) / scale``; the mode's name is kept so that a reader knows where the numbers
came from. Computed in float64.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODES = ('zscore', 'quantile', 'minmax', 'identity', 'limits')
SMALLEST_SCALE = 1e-6

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Normalizer:
    """One affine map.

    Attributes:
        mode: ``zscore`` (mean, standard deviation), ``quantile`` (1st and 99th percentile to -1 and 1), ``minmax`` (extremes to -1
            and 1), ``identity``, or ``limits`` (from the robot's limits, before there are data).
        offset, scale: float64 of the shape of one value, for instance ``[S]`` or ``[T, A]``.
    """

    mode: str
    offset: Array
    scale: Array

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> Normalizer:
        """The map that changes nothing."""
        return cls('identity', np.zeros(shape), np.ones(shape))

    @classmethod
    def fit(cls, mode: str, samples: Array) -> Normalizer:
        """Statistics over the first axis of ``samples``. An element that never changes is only shifted.

        Raises:
            ValueError: the mode is unknown, there are no samples, or one is not finite.
        """
        samples = np.asarray(samples, dtype=np.float64)
        fitted = [name for name in MODES if name != 'limits']
        if mode not in fitted:
            raise ValueError(f'normalisation {mode!r} cannot be fitted to samples; use one of {", ".join(fitted)}')
        if len(samples) == 0 or not np.isfinite(samples).all():
            raise ValueError('statistics need at least one sample and finite values')
        if mode == 'identity':
            return cls.identity(samples.shape[1:])
        if mode == 'zscore':
            offset, scale = samples.mean(axis=0), samples.std(axis=0)
        else:
            low, high = np.quantile(samples, (0.01, 0.99) if mode == 'quantile' else (0.0, 1.0), axis=0)
            offset, scale = (low + high) / 2, (high - low) / 2
        return cls(mode, offset, np.where(scale < SMALLEST_SCALE, 1.0, scale))

    def normalize(self, value: Array) -> Array:
        """``(value - offset) / scale``, broadcast over leading axes."""
        return (np.asarray(value, dtype=np.float64) - self.offset) / self.scale

    def unnormalize(self, value: Array) -> Array:
        """The inverse of `normalize`."""
        return np.asarray(value, dtype=np.float64) * self.scale + self.offset

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {'mode': self.mode, 'offset': self.offset.tolist(), 'scale': self.scale.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], place: str) -> Normalizer:
        """Inverse of `to_dict`. Raises ValueError naming ``place`` where a field is missing or a value cannot be used."""
        try:
            mode = str(data['mode'])
            offset, scale = (np.asarray(data[key], dtype=np.float64) for key in ('offset', 'scale'))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{place}: needs mode, offset and scale ({error})') from error
        if mode not in MODES or offset.shape != scale.shape:
            raise ValueError(f'{place}: mode {mode!r}, offset {offset.shape} and scale {scale.shape} do not fit')
        if not (np.isfinite(offset).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f'{place}: offsets must be finite and scales finite and positive')
        return cls(mode, offset, scale)


@dataclass(frozen=True)
class Statistics:
    """Normalisers of state ``[S]`` and of actions ``[T, A]`` or ``[A]``."""

    state: Normalizer
    action: Normalizer

    def to_json(self) -> str:
        """Canonical text: the same statistics always give the same bytes."""
        return json.dumps({'state': self.state.to_dict(), 'action': self.action.to_dict()}, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """Inverse of `to_json`. Raises ValueError where the text is not a statistics file."""
        try:
            data = json.loads(text)
            return cls(Normalizer.from_dict(data['state'], 'state'), Normalizer.from_dict(data['action'], 'action'))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'not a statistics file: {error}') from error

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical text, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
