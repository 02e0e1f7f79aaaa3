"""One action chunk becomes one trajectory that continues the commanded motion, keeps every limit and ends at rest.

The knots lie on a grid that is fixed to the clock, so the grids of two plans coincide and a new trajectory starts exactly on a
knot of the motion it continues (the seam). From there the difference between motion and chunk fades out, and the chunk's path is
taken as it is where it keeps the limits, and followed within the limits where it does not; after the chunk's last action all joints
come to rest together. Losing the sender therefore always ends in a smooth stop.

How the message is timed is the `Emission`:

- ``stamp='zero'``: ``header.stamp`` is 0 and the controller starts counting at its first update after the message arrives. It
  needs no common clock. The controller bridges from its own state to knot 0, dates that state one update too early, and does
  not know how late the message is: the first step after a replacement is up to twice the nominal one, more with jitter. A
  ``velocity_fraction`` below one half keeps that step within the velocity limit. The bridge is the controller's own: the
  acceleration limit does not hold on it.
- ``stamp='start'``: ``header.stamp`` is the start time and the first knots repeat the motion commanded already. The controller
  enters the trajectory where the clock says, on the very curve it is executing: no bridge, no step, whatever the delay up to
  ``lead_ns``, and whether it interpolates from the desired or the measured state. Sender and controller must share a clock,
  and the controller must not blend replacements (Humble to Kilted do not).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.check import violation
from vla_policy_ros.control.chunk_path import ChunkPath, EarlierPath, EnsemblePath, JoinedPath, Path
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.follower import Follower, Knots, stopping_distance
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.smoothing import Smoother
from vla_policy_ros.control.workspace import Band, Workspace, fit_inside
from vla_policy_ros.types import NS_PER_S, ActionChunk, JointTrajectory

Array = NDArray[np.float64]
NS_PER_MS = 1_000_000
# How long an older chunk of an ensemble takes to lose its weight before it ends: shorter is rough where chunks end early.
ENSEMBLE_TAPER_S = 0.4


class Rejection(Enum):
    """Why a chunk is not executed. The running trajectory goes on and ends at rest."""

    NON_FINITE = 'the chunk holds a value that is not finite'
    EXPIRED = 'every action of the chunk is in the past'
    OUT_OF_LIMITS = 'an action lies too far outside the position limits'
    TOO_FAR = 'the chunk starts too far from the commanded position'
    CLOCK_JUMPED = 'the clock is behind the commanded motion'
    OUTSIDE_WORKSPACE = 'the tip of the arm would be outside the workspace'
    LIMIT_EXCEEDED = 'the planned trajectory exceeds a limit'

    @property
    def text(self) -> str:
        """What it means, for the operator."""
        return self.value


class LimitExceeded(RuntimeError):
    """A planned brake exceeds a limit, so it was not returned; the message names joint, value and limit."""


@dataclass(frozen=True)
class Emission:
    """How trajectories are timed and shaped. Use `for_controller` for defaults that fit an update rate.

    Attributes:
        stamp: ``'zero'`` or ``'start'``, see the module.
        lead_ns: at least this long after ``now`` the new motion takes over; time for transport, and the bridge of ``'zero'``.
        transport_ns: the longest delay until the controller's first update with the message.
        controller_period_ns: time between two updates of the controller.
        knot_spacing_ns: grid of the knots.
        velocity_fraction: part of the velocity limit that is used; the rest is for the first step after a replacement.
        tracking_rate: 1/s, how fast a small difference between path and motion closes.
        position_margin: part of a joint's range by which an action may lie outside its limits and still be clamped; beyond it
            the chunk is rejected.
        reach_s: a chunk that starts further away than this many seconds of full speed is rejected.
        fade_s: how long the difference between the commanded motion and a new chunk takes to fade out.
        ensemble_decay: weight of a chunk relative to the next newer one, where several are averaged.

    Raises:
        ValueError: a value is out of its range.
    """

    stamp: Literal['zero', 'start'] = 'zero'
    lead_ns: int = 100 * NS_PER_MS
    transport_ns: int = 40 * NS_PER_MS
    controller_period_ns: int = 10 * NS_PER_MS
    knot_spacing_ns: int = 20 * NS_PER_MS
    velocity_fraction: float = 0.42
    tracking_rate: float = 8.0
    position_margin: float = 0.05
    reach_s: float = 1.0
    fade_s: float = 0.3
    ensemble_decay: float = 0.6

    def __post_init__(self) -> None:
        if self.stamp not in ('zero', 'start'):
            raise ValueError(f"stamp must be 'zero' or 'start', got {self.stamp!r}")
        if self.knot_spacing_ns <= 0 or self.controller_period_ns <= 0 or self.transport_ns < 0:
            raise ValueError('knot_spacing_ns and controller_period_ns must be positive, transport_ns not negative')
        floor_ns = max(2 * self.controller_period_ns, self.transport_ns)
        if self.lead_ns < floor_ns:
            raise ValueError(
                f'lead_ns is {self.lead_ns}, needs at least {floor_ns}: two controller periods, and the transport delay'
            )
        if not 0.0 < self.velocity_fraction <= 1.0:
            raise ValueError(f'velocity_fraction must be in (0, 1], got {self.velocity_fraction}')
        # Beyond 0.34 per knot the correction overshoots from one knot to the next.
        if not 0.0 < self.tracking_rate * self.knot_spacing_ns / NS_PER_S <= 0.34:
            raise ValueError(f'tracking_rate must be in (0, {0.34 * NS_PER_S / self.knot_spacing_ns:.3g}] at this knot spacing')
        if not (self.position_margin >= 0.0 and self.reach_s > 0.0 and self.fade_s > 0.0):
            raise ValueError('position_margin must not be negative, reach_s and fade_s must be positive')
        if not 0.0 < self.ensemble_decay <= 1.0:
            raise ValueError(f'ensemble_decay must be in (0, 1], got {self.ensemble_decay}')

    @classmethod
    def for_controller(
        cls, update_rate: float, stamp: Literal['zero', 'start'] = 'zero', transport_ms: float = 30.0
    ) -> Emission:
        """Defaults for a controller updated at ``update_rate`` Hz that sees a message after at most ``transport_ms``."""
        period_ns = round(NS_PER_S / update_rate)
        transport_ns = round(transport_ms * NS_PER_MS) + period_ns
        if stamp == 'start':
            lead_ns = max(2 * period_ns, transport_ns)
            return cls('start', lead_ns, transport_ns, period_ns, velocity_fraction=1.0)
        lead_ns = max(10 * period_ns, round(2.5 * transport_ns))
        return cls(stamp, lead_ns, transport_ns, period_ns)

    def header_stamp_ns(self, trajectory: JointTrajectory) -> int:
        """What to put into ``header.stamp`` of the message that carries ``trajectory``."""
        return 0 if self.stamp == 'zero' else trajectory.start_ns


@dataclass(frozen=True)
class Plan:
    """What became of a chunk, or of the wish to stop.

    Attributes:
        trajectory: what to publish, or None when rejected.
        rejection: None when there is a trajectory.
        reason: a sentence for the operator that names joint, value and limit; empty without rejection.
        points_expired: actions that lie before the new motion takes over.
        clamped_joints: joints of which an action was cut to the position limits, or asks for more than the usable speed.
        seam_jump: largest distance, over the joints, between the chunk's own path and the commanded motion where the chunk
            takes over (rad, or the joint's unit).
        seam_ns: when the new motion takes over; 0 without a trajectory.
        bent: whether the chunk's path is followed step by step, as limits on speed, acceleration or jerk demand; False where it is
            executed as it is.
        raw: the trajectory before the smoothing of a jerk limit; None where none is smoothed. `CommandedMotion.accept` wants it.
        cut: why the motion ends at rest before the chunk does, to stay in the workspace; empty where it does not.
    """

    trajectory: JointTrajectory | None
    rejection: Rejection | None = None
    reason: str = ''
    points_expired: int = 0
    clamped_joints: tuple[str, ...] = ()
    seam_jump: float = 0.0
    seam_ns: int = 0
    bent: bool = False
    raw: JointTrajectory | None = None
    cut: str = ''


class TrajectoryPlanner:
    """Turns chunks, and the wish to stop, into trajectories. Keeps no state between calls."""

    def __init__(self, limits: JointLimits, emission: Emission, workspace: Workspace | None = None) -> None:
        self.limits = limits
        self.workspace = workspace
        self.emission = emission
        self._speed = limits.velocity * emission.velocity_fraction
        self._margin = (limits.upper - limits.lower) * emission.position_margin
        self._smoother = Smoother.for_limits(limits, emission.knot_spacing_ns * 1e-9)

    def plan(
        self, chunk: ActionChunk, now_ns: int, commanded: CommandedMotion, older: Sequence[ActionChunk] = ()
    ) -> Plan:
        """The trajectory that follows ``chunk`` from the commanded motion on, to be published at ``now_ns``.

        ``older`` chunks, newest first, are averaged with it where they speak about the same time (temporal ensembling).

        Raises:
            ValueError: the chunk's shape, period or joint names do not fit the limits, or ``commanded`` has other joints; these
                are mistakes of configuration, not of one chunk.
        """
        actions = self._actions(chunk)
        self._check_commanded(commanded)
        finite = np.isfinite(actions)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            return _reject(
                Rejection.NON_FINITE, f'action {row} of joint {self.limits.names[column]!r} is {actions[row, column]}'
            )
        if now_ns < commanded.since_ns:
            behind = (commanded.since_ns - now_ns) * 1e-9
            return _reject(Rejection.CLOCK_JUMPED, f'now is {behind:.3f} s before anything commanded: start again from rest')

        seam_ns = self._seam_ns(now_ns)
        times = chunk.stamp_ns + np.arange(len(actions), dtype=np.int64) * chunk.dt_ns
        expired = int(np.count_nonzero(times <= seam_ns))
        if expired == len(actions):
            late = (seam_ns - int(times[-1])) * 1e-9
            return _reject(
                Rejection.EXPIRED,
                f'the last action is {late:.3f} s too old to be reached; shorten the inference or lengthen the horizon',
                expired,
            )
        problem = self._outside(actions, expired)
        if problem:
            return _reject(Rejection.OUT_OF_LIMITS, problem, expired)

        waypoints = np.clip(actions, self.limits.lower, self.limits.upper)
        path = ChunkPath(chunk.stamp_ns, chunk.dt_ns, waypoints)
        seam_jump, problem = self._seam(path, seam_ns, commanded.raw)
        if problem:
            return _reject(Rejection.TOO_FAR, problem, expired, seam_jump)

        wanted = self._with_older(path, older, seam_ns)
        # Smoothing is exact only for what the follower makes, whose acceleration is constant between two knots.
        for bent in (True,) if self._smoother.steps else (False, True):
            follower = self._along(wanted, seam_ns, commanded.raw, bent)
            trajectory, raw = self._assemble(follower.knots, seam_ns, now_ns, commanded)
            exceeded = self._exceeds(trajectory, follower, seam_ns, strictly=not bent)
            if not exceeded:
                break
        if exceeded:
            return _reject(Rejection.LIMIT_EXCEEDED, exceeded, expired, seam_jump)
        cut = ''
        if self.workspace is not None:
            kept, cut = self._inside_workspace(trajectory, raw, follower.knots, seam_ns, now_ns, commanded)
            if kept is None:
                return _reject(Rejection.OUTSIDE_WORKSPACE, cut, expired, seam_jump)
            trajectory, raw = kept
        clamped = self._clamped(actions, waypoints, expired, chunk.dt_ns)
        return Plan(trajectory, None, '', expired, clamped, seam_jump, seam_ns, bent, raw, cut)

    def brake(self, now_ns: int, commanded: CommandedMotion) -> Plan | None:
        """The shortest stop from the commanded motion that keeps the limits, or None if it comes to rest by itself at once.

        Raises:
            ValueError: ``commanded`` has other joints.
            LimitExceeded: the stop would exceed a limit; the running trajectory comes to rest by itself.
        """
        self._check_commanded(commanded)
        if commanded.raw.at_rest(now_ns):
            return None
        seam_ns = self._seam_ns(now_ns)
        problem: str | None = None
        # Each joint on its own stops soonest, and leaves the path; all together they stay near it.
        for together in (False,) if self.workspace is None else (False, True):
            follower = self._follower(seam_ns, commanded.raw)
            if together:
                follower.rest_together()
            else:
                follower.brake()
            trajectory, raw = self._assemble(follower.knots, seam_ns, now_ns, commanded)
            problem = self._exceeds(trajectory, follower, seam_ns)
            if problem is None and self.workspace is not None:
                problem = self.workspace.judge(trajectory, seam_ns).reason or None
            if problem is None:
                return Plan(trajectory, seam_ns=seam_ns, raw=raw)
        raise LimitExceeded(f'brake not sent: {problem}')

    # Steps of plan, in order.

    def _actions(self, chunk: ActionChunk) -> Array:
        """The actions ``[T, J]`` in the order of the limits."""
        names = tuple(chunk.joint_names)
        if sorted(names) != sorted(self.limits.names):
            raise ValueError(f'chunk has joints {list(names)}, the limits are for {list(self.limits.names)}')
        actions = np.asarray(chunk.actions, dtype=np.float64)
        if actions.ndim != 2 or actions.shape[0] < 1 or actions.shape[1] != len(names):
            raise ValueError(f'chunk actions have shape {actions.shape}, expected [T >= 1, {len(names)}]')
        if chunk.dt_ns <= 0:
            raise ValueError(f'chunk period is {chunk.dt_ns} ns, must be positive')
        return actions if names == self.limits.names else actions[:, [names.index(name) for name in self.limits.names]]

    def _check_commanded(self, commanded: CommandedMotion) -> None:
        if commanded.names != self.limits.names:
            raise ValueError(f'commanded motion has joints {list(commanded.names)}, not {list(self.limits.names)}')

    def _seam_ns(self, now_ns: int) -> int:
        """The first grid instant at or after now + lead."""
        spacing = self.emission.knot_spacing_ns
        return -(-(now_ns + self.emission.lead_ns) // spacing) * spacing

    def _outside(self, actions: Array, expired: int) -> str:
        """A sentence about the worst usable action that lies outside the limits by more than the margin, or ''."""
        usable = actions[expired:]
        excess = np.maximum(self.limits.lower - usable, usable - self.limits.upper) - self._margin
        row, column = np.unravel_index(int(np.argmax(excess)), excess.shape)
        if excess[row, column] <= 0.0:
            return ''
        return (
            f'action {expired + row} of joint {self.limits.names[column]!r} is {usable[row, column]:.4g}, limits '
            f'[{self.limits.lower[column]:.4g}, {self.limits.upper[column]:.4g}] with a margin of {self._margin[column]:.3g}'
        )

    def _seam(self, path: ChunkPath, seam_ns: int, commanded: CommandedMotion) -> tuple[float, str]:
        """Distance between chunk and commanded motion where the chunk takes over, and a sentence if it is too far.

        A chunk that begins later than a fade takes over at its first action; until then the path leads there from the seam.
        """
        over_ns = max(seam_ns, path.start_ns)
        wanted = path.sample(np.array([over_ns]))[0][0]
        present = commanded.sample(over_ns)[0]
        if path.start_ns - seam_ns > round(self.emission.fade_s * NS_PER_S):
            path.begin_at(seam_ns, *commanded.sample(seam_ns))
        elif path.start_ns > seam_ns:
            path.extend_to(seam_ns)  # too soon to be there on time: the difference fades out
        distance = np.abs(wanted - present)
        reach = self.limits.velocity * (self.emission.reach_s + (over_ns - seam_ns) * 1e-9)
        joint = int(np.argmax(distance / reach))
        problem = ''
        if distance[joint] > reach[joint]:
            problem = (
                f'joint {self.limits.names[joint]!r} is commanded to {present[joint]:.4g} and the chunk begins at '
                f'{wanted[joint]:.4g}; at most {reach[joint]:.3g} away is accepted'
            )
        return float(distance.max()), problem

    def _follower(self, seam_ns: int, motion: CommandedMotion) -> Follower:
        return self._follower_from(*motion.sample(seam_ns))

    def _follower_from(self, position: Array, velocity: Array) -> Follower:
        step = self.emission.knot_spacing_ns * 1e-9
        return Follower(self.limits, self._speed, step, self.emission.tracking_rate, position, velocity)

    def _with_older(self, path: ChunkPath, older: Sequence[ActionChunk], seam_ns: int) -> Path:
        """The mean of the chunk's path and those of older chunks that still speak about the time after the seam."""
        live = [chunk for chunk in older if chunk.stamp_ns + (len(chunk.actions) - 1) * chunk.dt_ns > seam_ns]
        if not live or path.start_ns > seam_ns:
            return path
        clipped = [np.clip(self._actions(chunk), self.limits.lower, self.limits.upper) for chunk in live]
        paths = [ChunkPath(chunk.stamp_ns, chunk.dt_ns, rows) for chunk, rows in zip(live, clipped, strict=True)]
        return EnsemblePath([path, *paths], self.emission.ensemble_decay, round(ENSEMBLE_TAPER_S * NS_PER_S))

    def _along(self, path: Path, seam_ns: int, motion: CommandedMotion, bent: bool) -> Follower:
        """From the motion's state at the seam along the path to rest: on it exactly, or ``bent`` by the limits."""
        spacing, ahead_ns = self.emission.knot_spacing_ns, self._smoother.width_ns // 2
        if ahead_ns:
            path = EarlierPath(path, ahead_ns)  # what is sent lags by half of the smoothing
        left_ns = max(path.end_ns - seam_ns, 0)
        if left_ns > 0:
            fade_ns = min(round(self.emission.fade_s * NS_PER_S), left_ns)
            path = JoinedPath(path, seam_ns, *motion.sample(seam_ns), fade_ns)
        positions, velocities = path.sample(seam_ns + spacing * np.arange(left_ns // spacing + 1, dtype=np.int64))
        follower = self._follower(seam_ns, motion)
        if bent:
            follower.follow(positions, velocities)
        else:
            follower.adopt(positions, velocities)
        follower.rest_together()
        return follower

    def _assemble(
        self, knots: Knots, seam_ns: int, now_ns: int, commanded: CommandedMotion
    ) -> tuple[JointTrajectory, JointTrajectory | None]:
        """The message's knots, smoothed where there is a jerk limit (then with what they were smoothed from), and for
        ``stamp='start'`` after the commanded motion before the seam."""
        names, spacing = self.limits.names, self.emission.knot_spacing_ns
        positions, velocities, raw = knots.positions, knots.velocities, None
        if self._smoother.steps:
            positions, velocities, raw = self._smoothed(knots, seam_ns, commanded.raw)
        times = seam_ns + spacing * np.arange(len(positions), dtype=np.int64)
        if self.emission.stamp == 'zero' or commanded.at_rest(now_ns):
            # From rest without knots before the seam: the controller bridges from its own state, which may sag from the commanded.
            return JointTrajectory(now_ns, names, times - now_ns, positions, velocities), raw
        start_ns = now_ns // spacing * spacing
        before = [start_ns, *(int(time) for time in commanded.knots_between(start_ns, seam_ns))]
        states = [commanded.sample(time) for time in before]
        trajectory = JointTrajectory(
            start_ns,
            names,
            np.concatenate([np.array(before, dtype=np.int64), times]) - start_ns,
            np.vstack([*(position for position, _ in states), positions]),
            np.vstack([*(velocity for _, velocity in states), velocities]),
        )
        return trajectory, raw

    def _smoothed(self, knots: Knots, seam_ns: int, motion: CommandedMotion) -> tuple[Array, Array, JointTrajectory]:
        """Positions and velocities from the seam on, averaged with the motion before it, until the average rests too."""
        steps, spacing = self._smoother.steps, self.emission.knot_spacing_ns
        before = [motion.sample(seam_ns - index * spacing) for index in range(steps, 0, -1)]
        rest = np.repeat(knots.positions[-1:], steps, axis=0)
        positions, velocities = self._smoother(
            np.vstack([*(position for position, _ in before), knots.positions, rest]),
            np.vstack([*(velocity for _, velocity in before), knots.velocities, np.zeros_like(rest)]),
        )
        positions[-2:], velocities[-2:] = knots.positions[-1], 0.0
        times = spacing * np.arange(len(knots.positions), dtype=np.int64)
        return positions, velocities, JointTrajectory(seam_ns, self.limits.names, times, knots.positions, knots.velocities)

    def _exceeds(self, trajectory: JointTrajectory, follower: Follower, seam_ns: int, strictly: bool = False) -> str | None:
        """The limit that the part after the seam exceeds, or None. What was commanded before is given, and its speed is.

        ``strictly`` is for a path that nothing has bent: it allows no rounding and only the usable part of the velocity limit, and
        wants room for a stop at every knot. Braking on the grid takes a little longer than the curve that a path may follow to the
        very limit, and a next plan may have to brake from there.
        """
        first = int(np.searchsorted(trajectory.times_ns, seam_ns - trajectory.start_ns))
        usable = np.maximum(self._speed if strictly else self.limits.velocity, np.abs(trajectory.velocities[first]))
        reachable = replace(self.limits, lower=follower.lower, upper=follower.upper, velocity=usable)
        new = JointTrajectory(
            trajectory.start_ns,
            trajectory.joint_names,
            trajectory.times_ns[first:],
            trajectory.positions[first:],
            trajectory.velocities[first:],
        )
        if not strictly:
            return violation(new, reachable)
        stops = new.positions + stopping_distance(new.velocities, self.limits.acceleration, self.emission.knot_spacing_ns * 1e-9)
        without_room = np.any((stops < follower.lower - 1e-10) | (stops > follower.upper + 1e-10), axis=0)
        if without_room.any():
            return f'joint {self.limits.names[int(np.argmax(without_room))]!r} could not stop inside its position limits'
        return violation(new, reachable, 1e-10)

    def _inside_workspace(
        self,
        trajectory: JointTrajectory,
        raw: JointTrajectory | None,
        knots: Knots,
        seam_ns: int,
        now_ns: int,
        commanded: CommandedMotion,
    ) -> tuple[tuple[JointTrajectory, JointTrajectory | None] | None, str]:
        """The trajectory, or the longest part of it that rests inside the workspace, and why it was cut; None for no part."""
        assert self.workspace is not None
        first = int(np.searchsorted(trajectory.times_ns, seam_ns - trajectory.start_ns))
        stops: dict[int, tuple[JointTrajectory, JointTrajectory | None]] = {}

        def stop(knot: int) -> JointTrajectory:
            row = min(knot - first, len(knots.positions) - 1)
            follower = self._follower_from(knots.positions[row], knots.velocities[row])
            follower.rest_together()
            rest = follower.knots
            shorter = Knots(
                np.vstack([knots.positions[:row], rest.positions]), np.vstack([knots.velocities[:row], rest.velocities])
            )
            stops[knot] = self._assemble(shorter, seam_ns, now_ns, commanded)
            return stops[knot][0]

        fit = fit_inside(trajectory, self.workspace, stop, seam_ns)
        if fit.verdict.band is Band.PASS:
            return (trajectory, raw), ''
        if fit.last_knot is None:
            return None, fit.verdict.reason
        kept = stops[fit.last_knot]
        exceeded = self._exceeds(kept[0], self._follower(seam_ns, commanded.raw), seam_ns)
        return (None, exceeded) if exceeded else (kept, fit.verdict.reason)

    def _clamped(self, actions: Array, waypoints: Array, expired: int, dt_ns: int) -> tuple[str, ...]:
        clipped = np.any(actions[expired:] != waypoints[expired:], axis=0)
        speeds = np.abs(np.diff(waypoints[max(expired - 1, 0) :], axis=0)) / (dt_ns * 1e-9)
        too_fast = np.any(speeds > self._speed * (1.0 + 1e-9), axis=0)
        return tuple(name for name, cut in zip(self.limits.names, clipped | too_fast, strict=True) if cut)


def _reject(rejection: Rejection, reason: str, expired: int = 0, seam_jump: float = 0.0) -> Plan:
    return Plan(None, rejection, f'{rejection.text}: {reason}', expired, (), seam_jump)
