"""The smooth path that action chunks ask for: a cubic through their targets in absolute time, and how it joins a motion.

A new chunk seldom begins exactly where the arm is commanded to be: it was computed from an older, measured state. `JoinedPath`
lets the difference fade out instead of jumping it: a quintic that has the difference of position and velocity at the seam, bends
nowhere there, and is gone with both its derivatives after the fade, is added to the path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.hermite import coefficients, evaluate

Array = NDArray[np.float64]


class Path(Protocol):
    """What the planner follows."""

    start_ns: int
    end_ns: int

    def sample(self, times_ns: NDArray[np.int64]) -> tuple[Array, Array]:
        """Positions and velocities ``[N, J]`` at ``times_ns`` ``[N]``; outside the path its ends, standing still."""


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

    def extend_to(self, t_ns: int) -> None:
        """Begin at ``t_ns``, before waypoint 0, on the straight line that leads into the path."""
        self.begin_at(t_ns, self._waypoints[0] - self._slopes[0] * ((self.start_ns - t_ns) * 1e-9), self._slopes[0])

    def sample(self, times_ns: NDArray[np.int64]) -> tuple[Array, Array]:
        """Positions and velocities ``[N, J]`` at ``times_ns`` ``[N]``; outside the path its ends, standing still."""
        if len(self._waypoints) == 1:
            return np.repeat(self._waypoints, len(times_ns), axis=0), np.zeros((len(times_ns), self._waypoints.shape[1]))
        t = (times_ns - self._origin_ns) * 1e-9
        outside = (times_ns < self.start_ns) | (times_ns > self.end_ns)
        t = np.clip(t, self._seconds[0], self._seconds[-1])
        index = np.clip(np.searchsorted(self._seconds, t, side='right') - 1, 0, len(self._seconds) - 2)
        duration = (self._seconds[index + 1] - self._seconds[index])[:, None]
        s = t[:, None] - self._seconds[index][:, None]
        q0, v0 = self._waypoints[index], self._slopes[index]
        c2, c3 = coefficients(q0, v0, self._waypoints[index + 1], self._slopes[index + 1], duration)
        position, velocity = evaluate(q0, v0, c2, c3, s)
        velocity[outside] = 0.0
        return position, velocity


class EnsemblePath:
    """Weighted mean of the paths of several chunks that speak about the same time (temporal ensembling, Zhao et al., ACT).

    The newest chunk has weight 1, one that is k chunks older ``decay ** k``. An older chunk's weight falls to zero over its last
    ``taper_ns``, so that the mean does not jump where it ends.

    Args:
        paths: newest first, at least one.
        decay: in (0, 1].
        taper_ns: positive.
    """

    def __init__(self, paths: Sequence[Path], decay: float, taper_ns: int) -> None:
        if not paths or not 0.0 < decay <= 1.0 or taper_ns <= 0:
            raise ValueError(f'an ensemble needs paths, a decay in (0, 1] and a taper; got {len(paths)}, {decay}, {taper_ns} ns')
        self.start_ns, self.end_ns = paths[0].start_ns, paths[0].end_ns
        self._paths, self._decay, self._taper_s = paths, decay, taper_ns * 1e-9

    def sample(self, times_ns: NDArray[np.int64]) -> tuple[Array, Array]:
        """As `Path.sample`; velocities include the change of the weights."""
        position, velocity = self._paths[0].sample(times_ns)
        total, slope = np.ones((len(times_ns), 1)), np.zeros((len(times_ns), 1))
        summed, moved = position.copy(), velocity.copy()
        for age, path in enumerate(self._paths[1:], start=1):
            left = (path.end_ns - times_ns)[:, None] * 1e-9 / self._taper_s
            weight = self._decay**age * np.clip(left, 0.0, 1.0)
            falling = np.where((left > 0.0) & (left < 1.0), -(self._decay**age) / self._taper_s, 0.0)
            q, v = path.sample(times_ns)
            summed += weight * q
            moved += weight * v + falling * q
            total += weight
            slope += falling
        mean = summed / total
        return mean, (moved - mean * slope) / total


class EarlierPath:
    """A path run through ``by_ns`` earlier."""

    def __init__(self, path: Path, by_ns: int) -> None:
        self.start_ns, self.end_ns = path.start_ns - by_ns, path.end_ns - by_ns
        self._path, self._by_ns = path, by_ns

    def sample(self, times_ns: NDArray[np.int64]) -> tuple[Array, Array]:
        """As `Path.sample`."""
        return self._path.sample(times_ns + self._by_ns)


class JoinedPath:
    """A path to which a motion's state at the seam is joined: the difference fades out within a given time.

    Args:
        path: what to follow after the fade.
        seam_ns: where the motion is left.
        position, velocity: float64 ``[J]``, the motion at the seam.
        fade_ns: positive.
    """

    def __init__(self, path: Path, seam_ns: int, position: Array, velocity: Array, fade_ns: int) -> None:
        self.start_ns, self.end_ns = seam_ns, path.end_ns
        self._path = path
        self._fade_s = fade_ns * 1e-9
        q, v = path.sample(np.array([seam_ns], dtype=np.int64))
        self._quintic = _fading_quintic(position - q[0], velocity - v[0], self._fade_s)

    def sample(self, times_ns: NDArray[np.int64]) -> tuple[Array, Array]:
        """As `Path.sample`, from the seam on."""
        q, v = self._path.sample(times_ns)
        t = np.clip((times_ns - self.start_ns) * 1e-9, 0.0, self._fade_s)[:, None]
        offset, change = np.zeros_like(q), np.zeros_like(v)
        for coefficient in self._quintic[::-1]:
            change = change * t + offset
            offset = offset * t + coefficient
        return q + offset, v + np.where(t < self._fade_s, change, 0.0)


def _fading_quintic(q: Array, v: Array, duration: float) -> list[Array]:
    """Coefficients of the quintic that is at ``q``, moving with ``v``, at 0, and at zero with zero derivatives after ``duration``
    seconds; its acceleration is zero at both ends.

    The acceleration of a noisy path is not matched: it may be far beyond any limit, and would lead far astray.
    """
    T = duration
    return [
        q,
        v,
        np.zeros_like(q),
        (-10.0 * q - 6.0 * v * T) / T**3,
        (15.0 * q + 8.0 * v * T) / T**4,
        (-6.0 * q - 3.0 * v * T) / T**5,
    ]


def _slopes(waypoints: Array, dt: float) -> Array:
    """Velocities ``[T, J]``: central differences, three-point one-sided ones at the ends."""
    if len(waypoints) == 1:
        return np.zeros_like(waypoints)
    chords = np.diff(waypoints, axis=0) / dt
    if len(waypoints) == 2:
        return np.vstack([chords, chords])
    between = 0.5 * (chords[:-1] + chords[1:])
    return np.vstack([2.0 * chords[0] - between[0], between, 2.0 * chords[-1] - between[-1]])
