"""Follow a desired path on a grid of knots, within velocity, acceleration and position limits by construction.

Between two knots the acceleration is constant, so the position is an exact parabola: the velocity of a step lies between those
of its ends, its acceleration is one number, and the controller's cubic through positions and velocities reproduces it exactly.
What holds at the knots therefore holds on the curve.

Each step chooses the next velocity: the desired one plus a correction of the error, then cut to the speed limit, to the speed
from which the arm can still stop before a position limit, and to what the acceleration limit can reach. The acceleration has
the last word; that never costs a position limit, because full braking keeps it from any state that these cuts led to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.limits import JointLimits

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Knots:
    """A grid motion: ``positions``, ``velocities`` float64 ``[N, J]``, one row per knot."""

    positions: Array
    velocities: Array


def stopping_distance(velocity: Array, acceleration: Array, step: float) -> Array:
    """Distance ``[J]`` that full braking on the grid takes, with the sign of ``velocity``.

    The continuous ``v^2 / 2a`` where the speed is a whole number of steps, the chord between such speeds elsewhere.
    """
    unit = acceleration * step
    ratio = np.abs(velocity) / unit
    whole = np.floor(ratio)
    rest = ratio - whole
    distance: Array = np.sign(velocity) * unit * step * (0.5 * whole * whole + rest * (whole + 0.5))
    return distance


class Follower:
    """Steps a motion from one state on a grid of ``step`` seconds.

    Args:
        limits: the joints' limits.
        speed: float64 ``[J]``, largest speed to choose, at most the limit.
        step: seconds between two knots.
        rate: 1/s at which a small error is corrected.
        position, velocity: float64 ``[J]``, the state to start from. A state from which a position limit can no longer be kept
            is not refused: that limit moves out to where full braking ends, and no further.
    """

    def __init__(
        self, limits: JointLimits, speed: Array, step: float, rate: float, position: Array, velocity: Array
    ) -> None:
        self._half_step = 0.5 * step
        self._rate = rate
        self._speed = speed
        self._gain = limits.acceleration * step
        # Half of the acceleration closes an error; the rest is left for the desired motion itself.
        self._approach = limits.acceleration
        self._twice = 2.0 * limits.acceleration
        self._half_gain = 0.5 * self._gain
        stop = position + stopping_distance(velocity, limits.acceleration, step)
        self.upper = np.maximum(limits.upper, np.maximum(stop, position))
        self.lower = np.minimum(limits.lower, np.minimum(stop, position))
        self._bounds = np.stack([self.upper, -self.lower])
        self._signs = np.array([[1.0], [-1.0]])
        self._positions = [position]
        self._velocities = [velocity]

    @property
    def knots(self) -> Knots:
        """All knots so far, the start included."""
        return Knots(np.array(self._positions), np.array(self._velocities))

    def adopt(self, positions: Array, velocities: Array) -> None:
        """Take ``positions``, ``velocities`` ``[N+1, J]`` as they are; row 0 is the current knot. The caller checks the limits."""
        self._positions += list(positions[1:])
        self._velocities += list(velocities[1:])

    def follow(self, positions: Array, velocities: Array) -> None:
        """Track the desired ``positions``, ``velocities`` ``[N+1, J]``; row 0 belongs to the current knot."""
        rate, approach = self._rate, self._approach
        for desired_position, next_velocity in zip(positions[:-1], velocities[1:], strict=True):
            error = desired_position - self._positions[-1]
            size = np.abs(error)
            closing = np.minimum(rate * size, np.sqrt(approach * size))
            self._advance(next_velocity + np.copysign(closing, error))

    def rest_together(self) -> None:
        """Come to rest with all joints at once, as soon as the slowest to stop allows."""
        steps = int(np.ceil(float(np.max(np.abs(self._velocities[-1]) / self._gain))))
        for left in range(steps, 0, -1):
            self._advance(self._velocities[-1] * ((left - 1) / left))
        self._velocities[-1] = np.zeros_like(self._velocities[-1])
        self._stand()

    def brake(self) -> None:
        """Come to rest as soon as possible, each joint on its own."""
        while np.any(self._velocities[-1] != 0.0):
            velocity = self._velocities[-1]
            self._advance(velocity - np.clip(velocity, -self._gain, self._gain))
        self._stand()

    def _stand(self) -> None:
        """A second knot at the same place: releases that cut the last segment short lose nothing."""
        self._positions.append(self._positions[-1])
        self._velocities.append(np.zeros_like(self._velocities[-1]))

    def _advance(self, wanted: Array) -> None:
        position, velocity = self._positions[-1], self._velocities[-1]
        # Speed towards each position limit after this step from which full braking on the grid surely stops before it:
        # v'^2 / 2a plus at most one chord's sagitta, solved for v'; and never more than the speed that may be chosen.
        room = self._bounds - self._signs * (position + self._half_step * velocity)
        allowed = np.sqrt(self._twice * np.maximum(room, 0.0)) - self._half_gain
        allowed = np.minimum(np.maximum(allowed, 0.0), self._speed)
        chosen = np.minimum(np.maximum(wanted, -allowed[1]), allowed[0])
        chosen = np.minimum(np.maximum(chosen, velocity - self._gain), velocity + self._gain)
        self._positions.append(position + self._half_step * (velocity + chosen))
        self._velocities.append(chosen)
