"""What has been commanded so far, as one continuous motion on the caller's clock."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.hermite import coefficients, evaluate
from vla_policy_ros.types import NS_PER_S, JointTrajectory

Array = NDArray[np.float64]
HISTORY_NS = 2 * NS_PER_S


class CommandedMotion:
    """The motion that the accepted trajectories add up to.

    Mirrors the controller: an accepted trajectory replaces the old one from its first knot on; until then the old motion
    continues (or, where it has ended, a cubic leads from where it rests to the first knot). Before the first knot and after the
    last one the motion stands still. Owned by one thread. When the clock jumps back, replace the object by `from_rest`.

    Where a jerk limit smooths what is sent, ``raw`` is the motion before smoothing, from which the next one continues; else it is
    this motion itself.
    """

    def __init__(self, names: tuple[str, ...], times_ns: NDArray[np.int64], positions: Array, velocities: Array) -> None:
        self.names = names
        self._times = times_ns
        self._positions = positions
        self._velocities = velocities
        self._raw: CommandedMotion | None = None

    @classmethod
    def from_rest(cls, names: tuple[str, ...], positions: Array, t_ns: int) -> CommandedMotion:
        """Standing at ``positions`` ``[J]`` from ``t_ns`` on.

        Raises:
            ValueError: ``positions`` does not fit ``names`` or is not finite.
        """
        names = tuple(names)
        q = np.array(positions, dtype=np.float64)
        if q.shape != (len(names),):
            raise ValueError(f'rest positions have shape {q.shape} for {len(names)} joints')
        if not np.all(np.isfinite(q)):
            raise ValueError(f'rest position of joint {names[int(np.argmin(np.isfinite(q)))]!r} is not finite')
        return cls(names, np.array([t_ns], dtype=np.int64), q[None], np.zeros_like(q)[None])

    def copy(self) -> CommandedMotion:
        """A motion that later trajectories do not change."""
        other = CommandedMotion(self.names, self._times, self._positions, self._velocities)
        other._raw = None if self._raw is None else self._raw.copy()
        return other

    @property
    def raw(self) -> CommandedMotion:
        """The motion before smoothing."""
        return self._raw or self

    @property
    def since_ns(self) -> int:
        """The oldest moment that is still remembered."""
        return int(self._times[0])

    @property
    def until_ns(self) -> int:
        """The last knot; the motion rests from there on."""
        return int(self._times[-1])

    def sample(self, t_ns: int) -> tuple[Array, Array]:
        """Position and velocity ``[J]`` commanded at ``t_ns``."""
        if t_ns < self._times[0] or t_ns >= self._times[-1]:
            position = self._positions[0 if t_ns < self._times[0] else -1].copy()
            return position, np.zeros_like(position)
        index = int(np.searchsorted(self._times, t_ns, side='right')) - 1
        q0, q1 = self._positions[index], self._positions[index + 1]
        v0, v1 = self._velocities[index], self._velocities[index + 1]
        duration = float(self._times[index + 1] - self._times[index]) * 1e-9
        t = float(t_ns - self._times[index]) * 1e-9
        return evaluate(q0, v0, *coefficients(q0, v0, q1, v1, duration), t)

    def knots_between(self, after_ns: int, before_ns: int) -> NDArray[np.int64]:
        """Times of the knots strictly between two moments."""
        return self._times[(self._times > after_ns) & (self._times < before_ns)]

    def accept(self, trajectory: JointTrajectory, raw: JointTrajectory | None = None) -> None:
        """``trajectory`` has been sent: it replaces the motion from its first knot on; ``raw`` is what it was smoothed from.

        Raises:
            ValueError: its joints are not the joints of this motion, in this order.
        """
        if tuple(trajectory.joint_names) != self.names:
            raise ValueError(f'trajectory has joints {list(trajectory.joint_names)}, commanded are {list(self.names)}')
        if raw is not None:
            if self._raw is None:
                self._raw = CommandedMotion(self.names, self._times, self._positions, self._velocities)
            self._raw.accept(raw)
        first_ns = trajectory.start_ns + int(trajectory.times_ns[0])
        kept = (self._times < first_ns) & (self._times >= self._last_needed_ns(trajectory.start_ns - HISTORY_NS))
        times, positions, velocities = self._times[kept], self._positions[kept], self._velocities[kept]
        if len(times) and self.until_ns < trajectory.start_ns < first_ns:
            # The old motion rests since a while: the way to the first knot begins now, not where it came to rest.
            q, v = self.sample(trajectory.start_ns)
            times = np.append(times, np.int64(trajectory.start_ns))
            positions, velocities = np.vstack([positions, q]), np.vstack([velocities, v])
        self._times = np.concatenate([times, trajectory.start_ns + trajectory.times_ns])
        self._positions = np.vstack([positions, trajectory.positions])
        self._velocities = np.vstack([velocities, trajectory.velocities])

    def at_rest(self, t_ns: int) -> bool:
        """Whether nothing moves at ``t_ns`` or after it."""
        index = max(int(np.searchsorted(self._times, t_ns, side='right')) - 1, 0)
        still = np.all(self._velocities[index:] == 0.0) and np.all(self._positions[index:] == self._positions[index])
        return bool(still)

    def _last_needed_ns(self, oldest_ns: int) -> int:
        """The knot at or before ``oldest_ns``, so that the motion is known from there on."""
        index = max(int(np.searchsorted(self._times, oldest_ns, side='right')) - 1, 0)
        return int(self._times[index])
