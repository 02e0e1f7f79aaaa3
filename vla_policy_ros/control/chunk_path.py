"""The smooth path that an action chunk asks for: a cubic through its targets, in absolute time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.hermite import coefficients, evaluate

Array = NDArray[np.float64]


class ChunkPath:
    """Cubic Hermite path through waypoints with central-difference velocities.

    Args:
        start_ns: time of waypoint 0.
        dt_ns: time between two waypoints.
        waypoints: float64 ``[T, J]``.
    """

    def __init__(self, start_ns: int, dt_ns: int, waypoints: Array) -> None:
        self.start_ns = start_ns
        self.end_ns = start_ns + (len(waypoints) - 1) * dt_ns
        self._origin_ns = start_ns
        self._seconds = np.arange(len(waypoints)) * (dt_ns * 1e-9)
        self._waypoints = waypoints
        self._slopes = _slopes(waypoints, dt_ns * 1e-9)

    def begin_at(self, t_ns: int, position: Array, velocity: Array) -> None:
        """Prepend the state ``[J]`` at ``t_ns``, which lies before waypoint 0, so that the path leads from it to the chunk."""
        if t_ns >= self.start_ns:
            raise ValueError(f'the path starts at {self.start_ns} ns already, cannot begin at {t_ns} ns')
        self._seconds = np.concatenate([[(t_ns - self._origin_ns) * 1e-9], self._seconds])
        self._waypoints = np.vstack([position, self._waypoints])
        self._slopes = np.vstack([velocity, self._slopes])
        self.start_ns = t_ns

    def sample(self, times_ns: NDArray[np.int64]) -> tuple[Array, Array]:
        """Positions and velocities ``[N, J]`` at ``times_ns`` ``[N]``; outside the path its ends, standing still."""
        if len(self._waypoints) == 1:
            return np.repeat(self._waypoints, len(times_ns), axis=0), np.zeros((len(times_ns), self._waypoints.shape[1]))
        t = (times_ns - self._origin_ns) * 1e-9
        outside = (t < self._seconds[0]) | (t > self._seconds[-1])
        t = np.clip(t, self._seconds[0], self._seconds[-1])
        index = np.clip(np.searchsorted(self._seconds, t, side='right') - 1, 0, len(self._seconds) - 2)
        duration = (self._seconds[index + 1] - self._seconds[index])[:, None]
        s = t[:, None] - self._seconds[index][:, None]
        q0, v0 = self._waypoints[index], self._slopes[index]
        c2, c3 = coefficients(q0, v0, self._waypoints[index + 1], self._slopes[index + 1], duration)
        position, velocity = evaluate(q0, v0, c2, c3, s)
        velocity[outside] = 0.0
        return position, velocity


def _slopes(waypoints: Array, dt: float) -> Array:
    """Velocities ``[T, J]``: central differences, three-point one-sided ones at the ends."""
    if len(waypoints) == 1:
        return np.zeros_like(waypoints)
    chords = np.diff(waypoints, axis=0) / dt
    if len(waypoints) == 2:
        return np.vstack([chords, chords])
    between = 0.5 * (chords[:-1] + chords[1:])
    return np.vstack([2.0 * chords[0] - between[0], between, 2.0 * chords[-1] - between[-1]])
