"""Joint limits as arrays, in the order of the action vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.robot import Robot

Array = NDArray[np.float64]


@dataclass(frozen=True)
class JointLimits:
    """Planning limits of ``J`` joints.

    Attributes:
        names: ``J`` joint names.
        lower, upper: float64 ``[J]``, rad (or the joint's own unit).
        velocity: float64 ``[J]``, largest ``|velocity|`` per second.
        acceleration: float64 ``[J]``, largest ``|acceleration|`` per second squared.
        jerk: float64 ``[J]``, largest ``|jerk|`` per second cubed, infinite where it is not limited; None limits none.

    Raises:
        ValueError: shapes differ, a name repeats, a bound is not finite, not positive or not ordered.
    """

    names: tuple[str, ...]
    lower: Array
    upper: Array
    velocity: Array
    acceleration: Array
    jerk: Array | None = None

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f'joint limits need distinct joint names, got {list(self.names)}')
        for field in ('lower', 'upper', 'velocity', 'acceleration'):
            values = np.array(getattr(self, field), dtype=np.float64)
            if values.shape != (len(self.names),):
                raise ValueError(f'{field} limits have shape {values.shape} for {len(self.names)} joints')
            if not np.all(np.isfinite(values)):
                raise ValueError(f'{field} limit of joint {self.names[int(np.argmin(np.isfinite(values)))]!r} is not finite')
            values.setflags(write=False)
            object.__setattr__(self, field, values)
        if self.jerk is not None:
            jerk = np.array(self.jerk, dtype=np.float64)
            if jerk.shape != (len(self.names),) or not np.all(jerk > 0.0):
                raise ValueError(f'jerk limits are {jerk.tolist()} for {len(self.names)} joints; they must be positive')
            jerk.setflags(write=False)
            object.__setattr__(self, 'jerk', jerk if np.any(np.isfinite(jerk)) else None)
        for name, low, high, speed, acceleration in zip(
            self.names, self.lower, self.upper, self.velocity, self.acceleration, strict=True
        ):
            if not (low < high and speed > 0.0 and acceleration > 0.0):
                raise ValueError(
                    f'joint {name!r}: need lower < upper and positive velocity and acceleration limits, '
                    f'got [{low:g}, {high:g}], {speed:g}, {acceleration:g}'
                )

    @classmethod
    def from_robot(cls, robot: Robot) -> JointLimits:
        """The limits of a robot file, in the order of ``robot.action.joints``."""
        limits = [robot.limits[joint] for joint in robot.action.joints]
        return cls(
            tuple(robot.action.joints),
            np.array([limit.position[0] for limit in limits]),
            np.array([limit.position[1] for limit in limits]),
            np.array([limit.velocity for limit in limits]),
            np.array([limit.acceleration for limit in limits]),
            np.array([np.inf if limit.jerk is None else limit.jerk for limit in limits]),
        )
