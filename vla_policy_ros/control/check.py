"""Exact extrema of the curve that a controller interpolates, compared with the limits.

Between two knots with positions and velocities the controller executes a cubic. Its position peaks where the velocity is zero,
its velocity where the acceleration is zero, its acceleration at an end, and its jerk is constant; all are closed forms, so nothing
is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.hermite import coefficients, evaluate
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.types import JointTrajectory

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Extrema:
    """Extreme values of each joint over a whole trajectory, all float64 ``[J]``.

    Attributes:
        lowest, highest: position.
        speed: largest ``|velocity|``.
        acceleration: largest ``|acceleration|``.
        jerk: largest ``|jerk|`` inside the segments; between two segments the acceleration may step.
    """

    lowest: Array
    highest: Array
    speed: Array
    acceleration: Array
    jerk: Array


def extrema(trajectory: JointTrajectory) -> Extrema:
    """Exact extrema of the cubic interpolant of ``trajectory``; one knot alone is a standing point."""
    q, v = trajectory.positions, trajectory.velocities
    if len(q) < 2:
        return Extrema(q[0], q[0], np.abs(v[0]), np.zeros_like(v[0]), np.zeros_like(v[0]))
    seconds = (trajectory.times_ns - trajectory.times_ns[0]) * 1e-9
    duration = np.diff(seconds)[:, None]
    c2, c3 = coefficients(q[:-1], v[:-1], q[1:], v[1:], duration)

    with np.errstate(divide='ignore', invalid='ignore'):
        root = np.sqrt(c2 * c2 - 3.0 * c3 * v[:-1])
        # The two roots of the velocity without cancellation, and the root of the acceleration.
        far = -(c2 + np.copysign(root, c2))
        turns = (far / (3.0 * c3), v[:-1] / far)
        vertex = -c2 / (3.0 * c3)
    lowest, highest = q.min(axis=0), q.max(axis=0)
    for turn in turns:
        t = np.where((turn > 0.0) & (turn < duration), turn, 0.0)
        peak = evaluate(q[:-1], v[:-1], c2, c3, t)[0]
        lowest, highest = np.minimum(lowest, peak.min(axis=0)), np.maximum(highest, peak.max(axis=0))
    t = np.where((vertex > 0.0) & (vertex < duration), vertex, 0.0)
    speed = np.maximum(np.abs(v).max(axis=0), np.abs(evaluate(q[:-1], v[:-1], c2, c3, t)[1]).max(axis=0))
    ends = np.maximum(np.abs(2.0 * c2), np.abs(2.0 * c2 + 6.0 * c3 * duration))
    return Extrema(lowest, highest, speed, ends.max(axis=0), np.abs(6.0 * c3).max(axis=0))


def violation(trajectory: JointTrajectory, limits: JointLimits, tolerance: float = 1e-6) -> str | None:
    """The first limit that the interpolant of ``trajectory`` exceeds, as a sentence, or None.

    ``tolerance`` is relative to ``max(1, limit)`` and covers rounding only.
    """
    found = extrema(trajectory)
    checks = [
        ('position', limits.lower - found.lowest, found.lowest, limits.lower),
        ('position', found.highest - limits.upper, found.highest, limits.upper),
        ('speed', found.speed - limits.velocity, found.speed, limits.velocity),
        ('acceleration', found.acceleration - limits.acceleration, found.acceleration, limits.acceleration),
    ]
    if limits.jerk is not None:
        checks.append(('jerk', found.jerk - limits.jerk, found.jerk, limits.jerk))
    for quantity, excess, value, limit in checks:
        # Written so that NaN counts as a violation.
        bad = ~(excess <= tolerance * np.maximum(1.0, np.abs(limit)))
        if bad.any():
            joint = int(np.argmax(bad))
            return f'{quantity} of joint {limits.names[joint]!r} reaches {value[joint]:.6g}, limit {limit[joint]:.6g}'
    return None
