"""The interpolation half of the joint_trajectory_controller emulator: messages and the `Trajectory` that samples them.

`Trajectory` answers like the class of the same name in ros2_controllers (Jazzy, 4.42): same start time rule, same segment
search with its forward-only cursor, same choice between linear, cubic and quintic, same deduction of missing positions. Times
are integer nanoseconds; a field that a message leaves out is an array of length 0, as on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.types import JointTrajectory

Array = NDArray[np.float64]
InterpolationMethod = Literal['splines', 'none']


def _absent() -> Array:
    return np.zeros(0)


@dataclass
class TrajectoryPoint:
    """One point, or one sampled state. Every field is float64 ``[J]``, or ``[0]`` where it is absent."""

    time_from_start_ns: int = 0
    positions: Array = field(default_factory=_absent)
    velocities: Array = field(default_factory=_absent)
    accelerations: Array = field(default_factory=_absent)
    effort: Array = field(default_factory=_absent)

    def __post_init__(self) -> None:
        self.positions = np.array(self.positions, dtype=np.float64)
        self.velocities = np.array(self.velocities, dtype=np.float64)
        self.accelerations = np.array(self.accelerations, dtype=np.float64)
        self.effort = np.array(self.effort, dtype=np.float64)

    def copy(self) -> TrajectoryPoint:
        """An independent copy."""
        return replace(self)


@dataclass
class TrajectoryMessage:
    """The content of a trajectory_msgs/JointTrajectory message.

    Attributes:
        joint_names: the columns of every point.
        points: in order of time.
        stamp_ns: ``header.stamp``; exactly 0 means "start at the first update".
    """

    joint_names: tuple[str, ...]
    points: list[TrajectoryPoint]
    stamp_ns: int = 0

    @classmethod
    def from_trajectory(cls, trajectory: JointTrajectory, stamp_ns: int = 0) -> TrajectoryMessage:
        """The message that carries a `JointTrajectory`: positions and velocities, never accelerations."""
        points = [
            TrajectoryPoint(int(time), position, velocity)
            for time, position, velocity in zip(trajectory.times_ns, trajectory.positions, trajectory.velocities, strict=True)
        ]
        return cls(tuple(trajectory.joint_names), points, stamp_ns)

    def copy(self) -> TrajectoryMessage:
        """An independent copy, points included."""
        return TrajectoryMessage(tuple(self.joint_names), [point.copy() for point in self.points], self.stamp_ns)


@dataclass(frozen=True)
class Sample:
    """The answer of `Trajectory.sample`.

    Attributes:
        state: the interpolated state, or None where the trajectory cannot be sampled.
        start_index: index of the point that starts the segment.
        end_index: index of the point that ends it; ``len(points)`` after the last point, 0 before the first.
    """

    state: TrajectoryPoint | None
    start_index: int
    end_index: int

    @property
    def valid(self) -> bool:
        """Whether there is a state."""
        return self.state is not None


class Trajectory:
    """A trajectory message on the clock, sampled forward. Missing positions that it deduces stay filled in.

    ``keeps_cursor_when_looking_ahead`` is Rolling's answer to a look past the end, see `sample`.
    """

    def __init__(self, keeps_cursor_when_looking_ahead: bool = False) -> None:
        self._keeps_cursor = keeps_cursor_when_looking_ahead
        self._points: list[TrajectoryPoint] = []
        self._start_ns = 0
        self._time_before_ns = 0
        self._state_before = TrajectoryPoint()
        self._sampled = False
        self._cursor = 0

    @property
    def points(self) -> list[TrajectoryPoint]:
        """The points of the message, with deduced fields filled in so far."""
        return self._points

    @property
    def start_ns(self) -> int:
        """The moment ``time_from_start`` counts from; meaningful after the first sample."""
        return self._start_ns

    @property
    def is_sampled_already(self) -> bool:
        """Whether this message has been sampled."""
        return self._sampled

    def update(self, message: TrajectoryMessage) -> None:
        """Replace the trajectory. Nothing of the old one is kept except the state before the message."""
        self._points = [point.copy() for point in message.points]
        self._start_ns = message.stamp_ns
        self._sampled = False
        self._cursor = 0

    def set_point_before_trajectory_msg(self, time_ns: int, state: TrajectoryPoint, wraparound: Sequence[bool] = ()) -> None:
        """Say where the motion comes from: ``state`` at ``time_ns``. Call after `update`.

        ``wraparound`` marks joints that turn without end; their position is shifted by whole turns to be nearest to point 0.
        """
        state = state.copy()
        first = self._points[0]
        if state.velocities.size == 0:
            state.velocities = np.zeros_like(first.velocities)
        if state.accelerations.size == 0:
            state.accelerations = np.zeros_like(first.accelerations)
        for joint, wraps in enumerate(wraparound):
            if wraps:
                state.positions[joint] = _nearest_turn(float(state.positions[joint]), float(first.positions[joint]))
        self._time_before_ns = time_ns
        self._state_before = state

    def sample(self, time_ns: int, method: InterpolationMethod = 'splines', search_monotonically_increasing: bool = True) -> Sample:
        """State at ``time_ns``.

        The search starts at a cursor that only moves forward; with ``search_monotonically_increasing=False`` the cursor stays,
        except that before Rolling a sample past the end moves it there all the same: from then on the last point is returned.
        """
        if not self._points:
            return Sample(None, 0, 0)
        if not self._sampled:
            self._start_ns = self._start_ns or time_ns
            self._sampled = True
        if time_ns < self._time_before_ns:
            return Sample(None, 0, 0)

        first_ns = self._start_ns + self._points[0].time_from_start_ns
        if time_ns < first_ns:
            if method == 'none':
                return Sample(self._state_before.copy(), 0, 0)
            state = self._interpolate(self._state_before, self._time_before_ns, self._points[0], first_ns, time_ns)
            return Sample(state, 0, 0)

        for index in range(self._cursor, len(self._points) - 1):
            a, b = self._points[index], self._points[index + 1]
            a_ns, b_ns = self._start_ns + a.time_from_start_ns, self._start_ns + b.time_from_start_ns
            if a_ns <= time_ns < b_ns:
                state = b.copy() if method == 'none' else self._interpolate(a, a_ns, b, b_ns, time_ns)
                state.time_from_start_ns = b.time_from_start_ns
                if search_monotonically_increasing:
                    self._cursor = index
                return Sample(state, index, index + 1)
        if search_monotonically_increasing or not self._keeps_cursor:
            self._cursor = len(self._points) - 1
        return self._ended()

    def _ended(self) -> Sample:
        """The last point, held; absent derivatives are zero."""
        count = len(self._points)
        last = self._points[-1]
        if last.positions.size == 0 and count > 1 and self._points[-2].positions.size:
            previous = self._points[-2]
            _deduce(previous, last, (last.time_from_start_ns - previous.time_from_start_ns) * 1e-9)
        if last.positions.size == 0:
            return Sample(None, count, count)
        state = last.copy()
        for name in ('velocities', 'accelerations', 'effort'):
            if getattr(state, name).size == 0:
                setattr(state, name, np.zeros_like(state.positions))
        return Sample(state, count - 1, count)

    def _interpolate(self, a: TrajectoryPoint, a_ns: int, b: TrajectoryPoint, b_ns: int, time_ns: int) -> TrajectoryPoint:
        duration = (b_ns - a_ns) * 1e-9
        _deduce(a, b, duration)
        velocity = a.velocities.size > 0 and b.velocities.size > 0
        acceleration = a.accelerations.size > 0 and b.accelerations.size > 0
        elapsed = (time_ns - a_ns) * 1e-9
        if velocity and acceleration:
            return _quintic(a, b, duration, elapsed)
        if velocity:
            return _cubic(a, b, duration, elapsed)
        if acceleration:
            # The controller has no branch for positions with accelerations only: it commands zero.
            zero = np.zeros_like(a.positions)
            return TrajectoryPoint(0, zero, zero, zero)
        slope = (b.positions - a.positions) / duration
        return TrajectoryPoint(0, a.positions + slope * elapsed, slope, np.zeros_like(slope))


def _deduce(a: TrajectoryPoint, b: TrajectoryPoint, duration: float) -> None:
    """Fill in positions (and velocities) of ``b`` that the message left out, by the trapezoid rule from ``a``."""
    if b.positions.size:
        return
    zero = np.zeros_like(a.positions)
    if a.velocities.size == 0:
        a.velocities = zero.copy()
    if b.velocities.size == 0:
        if a.accelerations.size == 0:
            a.accelerations = zero.copy()
        b.velocities = a.velocities + (a.accelerations + b.accelerations) * 0.5 * duration
    b.positions = a.positions + (a.velocities + b.velocities) * 0.5 * duration


def _cubic(a: TrajectoryPoint, b: TrajectoryPoint, duration: float, t: float) -> TrajectoryPoint:
    """The cubic through the positions and velocities of both ends."""
    mean = (b.positions - a.positions) / duration
    c2 = (3.0 * mean - 2.0 * a.velocities - b.velocities) / duration
    c3 = (a.velocities + b.velocities - 2.0 * mean) / duration**2
    return TrajectoryPoint(
        0,
        a.positions + t * (a.velocities + t * (c2 + t * c3)),
        a.velocities + t * (2.0 * c2 + t * 3.0 * c3),
        2.0 * c2 + 6.0 * c3 * t,
    )


def _quintic(a: TrajectoryPoint, b: TrajectoryPoint, duration: float, t: float) -> TrajectoryPoint:
    """The quintic through the positions, velocities and accelerations of both ends."""
    # What is left of b's state after the parabola that leaves a, per power of the duration.
    rest = (b.positions - a.positions - duration * (a.velocities + 0.5 * duration * a.accelerations)) / duration**3
    rest_velocity = (b.velocities - a.velocities - duration * a.accelerations) / duration**2
    rest_acceleration = (b.accelerations - a.accelerations) / duration
    c3 = 10.0 * rest - 4.0 * rest_velocity + 0.5 * rest_acceleration
    c4 = (-15.0 * rest + 7.0 * rest_velocity - rest_acceleration) / duration
    c5 = (6.0 * rest - 3.0 * rest_velocity + 0.5 * rest_acceleration) / duration**2
    return TrajectoryPoint(
        0,
        a.positions + t * (a.velocities + t * (0.5 * a.accelerations + t * (c3 + t * (c4 + t * c5)))),
        a.velocities + t * (a.accelerations + t * (3.0 * c3 + t * (4.0 * c4 + t * 5.0 * c5))),
        a.accelerations + t * (6.0 * c3 + t * (12.0 * c4 + t * 20.0 * c5)),
    )


def _nearest_turn(current: float, target: float) -> float:
    """``current`` shifted by whole turns so that the way to ``target`` is shortest; half a turn keeps its sign."""
    distance = float(np.mod(target - current + np.pi, 2.0 * np.pi) - np.pi)
    if abs(abs(distance) - np.pi) < 1e-9:
        distance = abs(distance) if target > current else -abs(distance)
    return target - distance
