"""A jerk limit by averaging: the moving average of a motion over a fixed time.

If a motion keeps position, velocity and acceleration limits, so does its average over the last ``width`` seconds, because each of
these is then an average of values inside the limits; and its acceleration changes by at most 2 a per width, so that its jerk is at
most 2 a / width. It rests one width after the motion rests. On the grid of the knots, where the motion's acceleration is constant
between two knots, the average is exactly the cubic that a controller interpolates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.limits import JointLimits

Array = NDArray[np.float64]
LONGEST_S = 0.5


@dataclass(frozen=True)
class Smoother:
    """Average over ``steps`` grid steps of ``step`` seconds; 0 steps change nothing."""

    steps: int
    step: float

    @classmethod
    def for_limits(cls, limits: JointLimits, step: float) -> Smoother:
        """The shortest one that keeps every jerk limit.

        Raises:
            ValueError: a jerk limit is so small that motions would be delayed by more than `LONGEST_S`.
        """
        if limits.jerk is None:
            return cls(0, step)
        needed = 2.0 * limits.acceleration / limits.jerk
        joint = int(np.argmax(needed))
        if needed[joint] > LONGEST_S:
            raise ValueError(
                f'joint {limits.names[joint]!r}: a jerk limit of {limits.jerk[joint]:g} with an acceleration limit of '
                f'{limits.acceleration[joint]:g} needs {needed[joint]:.2f} s of smoothing, at most {LONGEST_S:g} s are allowed; '
                f'raise jerk to {2.0 * limits.acceleration[joint] / LONGEST_S:g} or lower acceleration'
            )
        return cls(int(np.ceil(needed[joint] / step - 1e-9)), step)

    @property
    def width_ns(self) -> int:
        """The time that is averaged over; the average lags by half of it."""
        return round(self.steps * self.step * 1e9)

    def __call__(self, positions: Array, velocities: Array) -> tuple[Array, Array]:
        """The average at grid rows ``steps .. N-1`` of a motion given at rows ``0 .. N-1`` ``[N, J]``."""
        if self.steps == 0:
            return positions, velocities
        mean = 0.5 * (positions[:-1] + positions[1:]) + self.step / 12.0 * (velocities[:-1] - velocities[1:])
        integral = np.vstack([np.zeros_like(positions[:1]), np.cumsum(mean, axis=0)])
        width = self.steps
        averaged = (integral[width:] - integral[:-width]) / width
        return averaged, (positions[width:] - positions[:-width]) / (width * self.step)
