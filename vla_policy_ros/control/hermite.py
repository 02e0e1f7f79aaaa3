"""The cubic between two knots with positions and velocities, as joint_trajectory_controller interpolates them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def coefficients(q0: Array, v0: Array, q1: Array, v1: Array, duration: Array | float) -> tuple[Array, Array]:
    """``c2, c3`` of ``q0 + v0 t + c2 t^2 + c3 t^3``, which is at ``q1`` with velocity ``v1`` after ``duration`` seconds."""
    mean = (q1 - q0) / duration
    return (3.0 * mean - 2.0 * v0 - v1) / duration, (v0 + v1 - 2.0 * mean) / duration**2


def evaluate(q0: Array, v0: Array, c2: Array, c3: Array, t: Array | float) -> tuple[Array, Array]:
    """Position and velocity ``t`` seconds after the first knot."""
    return q0 + t * (v0 + t * (c2 + t * c3)), v0 + t * (2.0 * c2 + 3.0 * t * c3)


def acceleration(c2: Array, c3: Array, t: Array | float) -> Array:
    """Acceleration ``t`` seconds after the first knot."""
    return 2.0 * c2 + 6.0 * t * c3
