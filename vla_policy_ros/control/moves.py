"""One-shot moves: from whatever is commanded now to a pose, at rest, within half of the limits.

The way is the straight line in joint space, all joints together, with the fifth-order time law that minimises jerk; it goes through
the planner like any chunk, so that it joins the commanded motion (also a moving one), is checked on the interpolated curve, and is
timed like everything else that is sent.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.planner import Plan, TrajectoryPlanner
from vla_policy_ros.types import NS_PER_S, ActionChunk

Array = NDArray[np.float64]

# Largest first, second and third derivative of 10 s^3 - 15 s^4 + 6 s^5 on [0, 1].
_PEAK_SPEED = 1.875
_PEAK_ACCELERATION = 10.0 / np.sqrt(3.0)
_PEAK_JERK = 60.0

_STEP_S = 0.05
# What a motion that was under way leaves of the difference to the line fades out meanwhile.
_HOLD_S = 1.0


class Moves:
    """Plans moves. Keeps no state between calls.

    Args:
        planner: with the limits.
        fraction: part of the limits on speed (its usable part), acceleration and jerk that a move from rest uses.
    """

    def __init__(self, planner: TrajectoryPlanner, fraction: float = 0.5) -> None:
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f'fraction of the limits is {fraction}, must be in (0, 1]')
        self._planner = planner
        limits = planner.limits
        self._speed = fraction * planner.emission.velocity_fraction * limits.velocity
        self._acceleration = fraction * limits.acceleration
        self._jerk = np.full_like(self._speed, np.inf) if limits.jerk is None else fraction * limits.jerk

    def move_to(self, positions: Mapping[str, float], now_ns: int, commanded: CommandedMotion) -> Plan:
        """The trajectory to ``positions``, joint to position, to be published at ``now_ns``; other joints stay where they are.

        Raises:
            ValueError: a joint is unknown or its position is outside its limits, or ``commanded`` has other joints.
        """
        limits = self._planner.limits
        begin_ns = now_ns + self._planner.emission.lead_ns
        start, velocity = commanded.sample(begin_ns)
        # A moving arm cannot turn to the pose before it could have stopped; the line begins there.
        start = start + 0.5 * velocity * np.abs(velocity) / limits.acceleration
        goal = start.copy()
        for joint, position in positions.items():
            if joint not in limits.names:
                raise ValueError(f'move to joint {joint!r}: not one of {", ".join(limits.names)}')
            column = limits.names.index(joint)
            if not limits.lower[column] <= position <= limits.upper[column]:
                bounds = f'[{limits.lower[column]:g}, {limits.upper[column]:g}]'
                raise ValueError(f'move of joint {joint!r} to {position:g}: outside its limits {bounds}')
            goal[column] = position
        actions = start + self._progress(np.abs(goal - start))[:, None] * (goal - start)
        dt_ns = round(_STEP_S * NS_PER_S)
        chunk = ActionChunk(begin_ns, dt_ns, limits.names, actions, now_ns, '')
        return self._planner.plan(chunk, now_ns, commanded)

    def _progress(self, distance: Array) -> Array:
        """Part of the way ``[T]`` at every step, for ``distance [J]``, and the hold at its end."""
        seconds = max(
            float(np.max(_PEAK_SPEED * distance / self._speed)),
            float(np.sqrt(np.max(_PEAK_ACCELERATION * distance / self._acceleration))),
            float(np.cbrt(np.max(_PEAK_JERK * distance / self._jerk))),
            _STEP_S,
        )
        times = np.arange(int(np.ceil((seconds + _HOLD_S) / _STEP_S)) + 1) * _STEP_S
        s = np.minimum(times / seconds, 1.0)
        progress: Array = s**3 * (10.0 + s * (6.0 * s - 15.0))
        return progress
