"""A box that the tip of the arm stays in, judged on the curve that a controller interpolates.

Between two samples of the curve the tip is no further from the straight line between them than ``h^2 / 8`` times a bound on its
acceleration (Chain.curvature, from link lengths and the extreme joint velocities and accelerations of the cubic between two
knots). Every stretch between two knots is divided until that is at most `TOLERANCE_M`; then the samples decide. The division
depends on the motion alone, not on the box, so a larger box never judges a motion more harshly.

A tip that is already closer to a face than the margin, or beyond it, must not get any further out; beyond the face itself it must
come in again. An arm that was moved out of its workspace by hand can therefore return, and nothing else.

Enters: trajectories. Leaves: a `Verdict`, or a `Fit` that ends at rest inside. Nothing here keeps state; any thread. Positions are
in m, in the frame of the base link (REP-103: x forward, y left, z up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.hermite import acceleration, coefficients, evaluate
from vla_policy_ros.control.kinematics import Chain, UrdfError
from vla_policy_ros.robot import Robot, RobotFileError
from vla_policy_ros.types import JointTrajectory

Array = NDArray[np.float64]

# By how much the tip may pass a face between two samples, unseen.
TOLERANCE_M = 0.5e-3
# No division is finer: a motion that would need it is faster than any arm, and counts as leaving the box.
_FINEST = 1000
_ROUNDING_M = 1e-9
# A tip outside the box comes in again if it gets closer by at least this.
_INWARDS_M = 1e-6


class Band(Enum):
    """How a trajectory lies in the workspace."""

    PASS = 'pass'
    CLAMP = 'clamp'
    REJECT = 'reject'


@dataclass(frozen=True)
class Verdict:
    """What `Workspace.judge` found.

    Attributes:
        band: ``PASS``: the path stays inside to its end. ``CLAMP``: it leaves later, or does not end inside. ``REJECT``: the tip is
            outside at the seam and the path does not lead inwards.
        until_ns: up to here the path stays inside, on the caller's clock; the last knot under ``PASS``, the seam under ``REJECT``.
        last_knot: index of the last knot at or before ``until_ns``.
        clearance: smallest distance of the sampled tip from a face of the box, m; negative outside.
        reason: a sentence for the operator that names axis, value and limit; empty under ``PASS``.
    """

    band: Band
    until_ns: int
    last_knot: int
    clearance: float
    reason: str = ''


@dataclass(frozen=True)
class Fit:
    """What `fit_inside` made of a trajectory.

    Attributes:
        trajectory: what stays inside the workspace and ends at rest; None where there is nothing.
        verdict: the judgement of the trajectory as it was wanted.
        last_knot: the knot from which it is brought to rest; None where the trajectory is as it was, or None.
    """

    trajectory: JointTrajectory | None
    verdict: Verdict
    last_knot: int | None = None


@dataclass(frozen=True)
class Workspace:
    """The box, and the chain that leads to the tip.

    Attributes:
        names: ``J`` joint names, the columns of the positions that the chain takes.
        lower, upper: float64 ``[3]``, corners of the box, m.
        margin: distance from the faces that a path keeps, m.

    Raises:
        ValueError: the box is empty, within the margin, or not finite.
    """

    names: tuple[str, ...]
    chain: Chain
    lower: Array
    upper: Array
    margin: float = 0.0

    def __post_init__(self) -> None:
        for field in ('lower', 'upper'):
            values = np.array(getattr(self, field), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, field, values)
        # Written so that NaN counts as empty.
        if not (self.margin >= 0.0 and np.all(self.lower + self.margin < self.upper - self.margin)):
            raise ValueError(
                f'workspace from {self.lower.tolist()} to {self.upper.tolist()} m is empty with a margin of {self.margin:g} m on '
                'each side: make it larger or the margin smaller'
            )

    @classmethod
    def from_robot(cls, robot: Robot) -> Workspace | None:
        """The workspace of a robot file, for positions in the order of ``robot.action.joints``; None where it has no such section.

        Raises:
            RobotFileError: the section does not fit the URDF; the message names the link or joint and what there is instead.
        """
        limit, names = robot.workspace, robot.action.joints
        if limit is None:
            return None
        try:
            chain = Chain.from_urdf(limit.urdf, names, limit.tip, limit.base, limit.held, limit.unrelated)
        except UrdfError as error:
            raise RobotFileError(f'workspace: {error}') from error
        return cls(tuple(names), chain, np.array(limit.box.lower), np.array(limit.box.upper), limit.margin)

    def positions(self, q: Array) -> Array:
        """Positions ``[N, 3]`` of the tip, m, for joint positions ``q [N, J]``."""
        return self.chain.positions(q)

    def judge(self, trajectory: JointTrajectory, seam_ns: int | None = None) -> Verdict:
        """Whether the interpolant of ``trajectory`` stays inside, from its first knot at or after ``seam_ns`` on.

        What lies before the seam is commanded already and is not judged.

        Raises:
            ValueError: it has other joints, ends before the seam, or holds a value that is not finite.
        """
        first, q, v = self._rows(trajectory, seam_ns)
        path = self._path(trajectory.times_ns[first:], q, v)
        outside = self._outside(path)
        # The seam itself never counts: the faces give way to it.
        inside = int(np.argmax(outside)) - 1 if outside.any() else len(outside) - 1
        nearer = self._nearer(path)
        left = inside < len(outside) - 1
        if not np.any(nearer[: inside + 1]):
            band, inside = Band.REJECT, 0
        else:
            band = Band.CLAMP if left or not nearer[-1] else Band.PASS
        until_ns = trajectory.start_ns + int(path.times_ns[inside])
        clearance = float(np.min([path.tip - self.lower, self.upper - path.tip]))
        reason = self._reason(band, path, inside, left)
        return Verdict(band, until_ns, first + int(path.knots[inside]), clearance, reason)

    def _rests_inside(self, trajectory: JointTrajectory, seam_ns: int | None = None) -> bool:
        """Whether its last knot is inside. What does not rest inside cannot pass, and this is a fifth of the work of `judge`.

        Raises:
            ValueError: as `judge`.
        """
        _, q, _ = self._rows(trajectory, seam_ns)
        tip = self.positions(q[[0, -1]])
        return bool(self._admits(tip[-1:], tip[0])[0])

    def _rows(self, trajectory: JointTrajectory, seam_ns: int | None) -> tuple[int, Array, Array]:
        """The knot at the seam; positions and velocities ``[N, J]`` from there on, in the order of ``names``."""
        if tuple(trajectory.joint_names) != self.names:
            if sorted(trajectory.joint_names) != sorted(self.names):
                raise ValueError(f'trajectory has joints {list(trajectory.joint_names)}, the workspace has {list(self.names)}')
            trajectory = trajectory.select(self.names)
        first = 0 if seam_ns is None else int(np.searchsorted(trajectory.times_ns, seam_ns - trajectory.start_ns))
        if first == len(trajectory.times_ns):
            raise ValueError(f'trajectory ends before the seam, {seam_ns} ns: there is nothing to judge')
        q, v = trajectory.positions[first:], trajectory.velocities[first:]
        if not (np.isfinite(q).all() and np.isfinite(v).all()):
            raise ValueError('trajectory holds a position or velocity that is not finite; refuse it before judging where it leads')
        return first, q, v

    def _path(self, times_ns: NDArray[np.int64], q: Array, v: Array) -> _Path:
        """The tip along the cubics through the knots, divided finely enough."""
        seconds = np.diff(times_ns)[:, None] * 1e-9
        c2, c3 = coefficients(q[:-1], v[:-1], q[1:], v[1:], seconds)
        # A cubic and its derivatives lie within their Bernstein coefficients.
        middle = 3.0 * (q[1:] - q[:-1]) / seconds - v[:-1] - v[1:]
        speed = np.maximum(np.maximum(np.abs(v[:-1]), np.abs(v[1:])), np.abs(middle))
        bend = np.maximum(np.abs(acceleration(c2, c3, 0.0)), np.abs(acceleration(c2, c3, seconds)))
        handles = np.abs(v) * (seconds.max(initial=0.0) / 3.0)
        curvature = self.chain.curvature((np.abs(q) + handles).max(axis=0), speed, bend)

        sagitta = curvature * seconds[:, 0] ** 2 / 8.0
        # fmin, because a bound that overflows to NaN wants the finest division too.
        parts = np.fmax(np.fmin(np.ceil(np.sqrt(sagitta / TOLERANCE_M)), _FINEST), 1).astype(np.int64)
        knots = np.repeat(np.arange(len(parts)), parts)
        fraction = (np.arange(len(knots)) - np.repeat(np.cumsum(parts) - parts, parts)) / np.repeat(parts, parts)
        t = fraction[:, None] * seconds[knots]
        rows = evaluate(q[knots], v[knots], c2[knots], c3[knots], t)[0]
        moments = times_ns[knots] + np.floor(t[:, 0] * 1e9).astype(np.int64)
        return _Path(
            self.positions(np.vstack([rows, q[-1:]])),
            np.append(moments, times_ns[-1]),
            np.append(knots, len(parts)),
            (sagitta / parts**2)[knots],
        )

    def _outside(self, path: _Path) -> NDArray[np.bool_]:
        """bool ``[P]``: the samples that the path cannot be led to without leaving the box, the first never."""
        outside = ~self._admits(path.tip, path.tip[0])
        outside[1:] |= path.wild
        return outside

    def _admits(self, tip: Array, start: Array) -> NDArray[np.bool_]:
        """bool ``[P]``: the points ``tip [P, 3]`` between the faces, where those give way to the tip at the seam, ``start [3]``."""
        lower, upper = np.minimum(self.lower + self.margin, start), np.maximum(self.upper - self.margin, start)
        admitted: NDArray[np.bool_] = np.all((tip >= lower - _ROUNDING_M) & (tip <= upper + _ROUNDING_M), axis=1)
        return admitted

    def _nearer(self, path: _Path) -> NDArray[np.bool_]:
        """bool ``[P]``: the samples closer than the start to each face that the start lies beyond; all, if it lies beyond none."""
        start = path.tip[0]
        below = (start >= self.lower) | (path.tip > start + _INWARDS_M)
        above = (start <= self.upper) | (path.tip < start - _INWARDS_M)
        nearer: NDArray[np.bool_] = np.all(below & above, axis=1)
        return nearer

    def _reason(self, band: Band, path: _Path, inside: int, left: bool) -> str:
        if band is Band.PASS:
            return ''
        if left and path.wild[inside]:
            knot = int(path.knots[inside])
            return f'after knot {knot} from the seam the joints move too fast to bound the tip: check the velocities of the knots'
        shown = 0 if band is Band.REJECT else inside + 1 if left else inside
        tip, seconds = path.tip[shown], (path.times_ns[shown] - path.times_ns[0]) * 1e-9
        axis = int(np.argmax(np.maximum(self.lower - tip, tip - self.upper)))
        where = (
            f'{"xyz"[axis]} = {tip[axis]:.4g} m; the workspace is [{self.lower[axis]:.4g}, {self.upper[axis]:.4g}] m with a margin '
            f'of {self.margin:g} m'
        )
        if band is Band.REJECT:
            return f'the tip is at {where}, and it does not move inwards: bring it back by other means or enlarge workspace.box'
        return f'{seconds:.3f} s after the seam the tip is at {where}'


@dataclass(frozen=True)
class _Path:
    """Samples of the tip: ``tip [P, 3]``, ``times_ns [P]`` from the trajectory's start, ``knots [P]`` the last knot before each,
    ``sagitta [P-1]`` how far the tip may leave the line to the next sample, m."""

    tip: Array
    times_ns: NDArray[np.int64]
    knots: NDArray[np.int64]
    sagitta: Array

    @property
    def wild(self) -> NDArray[np.bool_]:
        """bool ``[P-1]``: the steps that not even the finest division bounds."""
        return ~(self.sagitta <= TOLERANCE_M * (1.0 + 1e-9))


def fit_inside(
    trajectory: JointTrajectory,
    workspace: Workspace,
    stop: Callable[[int], JointTrajectory],
    seam_ns: int | None = None,
) -> Fit:
    """``trajectory`` if it passes, else the longest part of it that can be brought to rest inside the workspace.

    Args:
        stop: ``stop(knot)`` is a trajectory that equals ``trajectory`` up to that knot and comes to rest from there. Called with
            falling indices into ``trajectory.times_ns`` from the last knot inside down to the seam, until an answer passes; so a
            larger workspace never ends a motion earlier.
        seam_ns: see `Workspace.judge`.

    Returns:
        A `Fit` without trajectory where not even stopping at the seam passes: the running motion, which ends inside, goes on.

    Raises:
        ValueError: as `Workspace.judge`.
    """
    verdict = workspace.judge(trajectory, seam_ns)
    if verdict.band is Band.PASS:
        return Fit(trajectory, verdict)
    if verdict.band is Band.CLAMP:
        seam = 0 if seam_ns is None else int(np.searchsorted(trajectory.times_ns, seam_ns - trajectory.start_ns))
        for knot in range(verdict.last_knot, seam - 1, -1):
            stopped = stop(knot)
            if workspace._rests_inside(stopped, seam_ns) and workspace.judge(stopped, seam_ns).band is Band.PASS:
                return Fit(stopped, verdict, knot)
    return Fit(None, verdict)
