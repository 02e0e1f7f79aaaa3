"""What a trace shows: steps, peaks, seams, tracking, rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from fault_cases import ON_NS, Fault
from harness import CONTROL_NS, Array, ReferencePath, Trace
from numpy.typing import NDArray

from vla_policy_ros.control.limits import JointLimits

Mask = NDArray[np.bool_]
Times = NDArray[np.int64]
_DT = CONTROL_NS * 1e-9
SETTLED_NS = 2_000_000_000  # the start is over
RECOVERED_NS = 6_500_000_000  # a fault that passes should be forgotten
ROUNDING = 1e-5  # third differences of positions have no more digits
_STILL = 30  # updates without a change that count as rest


@dataclass(frozen=True)
class Measures:
    """One run. Ratios are to the limits of the robot; None where nothing can be measured.

    Attributes:
        sent: messages.
        rejected: messages that the controller dropped.
        non_finite: controller updates that commanded NaN or infinity.
        step: largest commanded step relative to what the velocity limit allows in one controller period.
        velocity, acceleration, jerk: largest of the command by differences between updates (velocity: or of the interpolated
            curve), relative to the limits.
        seam_jump: rad/s, largest change of the commanded velocity from one update to the next, next to an update at which a new
            message or motion took over, beyond the reference path's own change; after the start.
        jerk_rms: rad/s^3 over the healthy part, all joints.
        tracking_rms: rad, command against the reference path over the healthy part, all joints.
        time_to_rest: s after the onset of the fault until the command stands still for 0.3 s; None: never.
        at_rest: whether it stands still at the end.
        status: what the sender reports at the end.
    """

    sent: int
    rejected: int
    non_finite: int
    step: float
    velocity: float
    acceleration: float
    jerk: float
    seam_jump: float
    jerk_rms: float | None
    tracking_rms: float | None
    time_to_rest: float | None
    at_rest: bool
    status: str


def measure(trace: Trace, limits: JointLimits, path: ReferencePath, fault: Fault) -> Measures:
    """Measures of a whole run, start included."""
    assert limits.jerk is not None
    times, raw = np.array(trace.times), np.array(trace.commands)
    finite: Mask = np.all(np.isfinite(raw), axis=1)
    commands = _held(raw, finite)
    velocity, acceleration, jerk = (np.diff(commands, count, axis=0) / _DT**count for count in (1, 2, 3))
    curve = np.where(finite[:, None], np.array(trace.velocities), 0.0)
    healthy = _healthy(times, fault)
    step = float((np.abs(velocity) / limits.velocity).max())
    resting = _resting_from(commands)
    rests = np.flatnonzero(resting & (times >= ON_NS))
    return Measures(
        sent=trace.sent,
        rejected=len(trace.rejections),
        non_finite=int((~finite).sum()),
        step=step,
        velocity=max(step, float((np.abs(curve) / limits.velocity).max())),
        acceleration=float((np.abs(acceleration) / limits.acceleration).max()),
        jerk=float((np.abs(jerk) / limits.jerk).max()),
        seam_jump=_seam_jump(trace, times, commands, path),
        jerk_rms=_rms(jerk[healthy[3:]]),
        tracking_rms=_rms((commands - path(times))[healthy]),
        time_to_rest=float(times[rests[0]] - ON_NS) * 1e-9 if len(rests) else None,
        at_rest=bool(resting[-_STILL - 1]),
        status=trace.status,
    )


def _held(commands: Array, finite: Mask) -> Array:
    """Commands ``[N, J]`` as a drive executes them: one that is not finite changes nothing."""
    last = np.maximum.accumulate(np.where(finite, np.arange(len(commands)), 0))
    return commands[last]


def _healthy(times: Times, fault: Fault) -> Mask:
    """Updates between the start's end and the fault, and from a while after a fault that passes; all of them without fault."""
    started: Mask = times >= SETTLED_NS
    if type(fault) is Fault:
        return started
    recovered = np.zeros_like(started) if fault.lasts else times >= RECOVERED_NS
    return started & ((times < ON_NS) | recovered)


def _seam_jump(trace: Trace, times: Times, commands: Array, path: ReferencePath) -> float:
    taken = np.zeros(len(times), dtype=np.bool_)
    taken[trace.replaced] = True
    taken[np.clip(np.searchsorted(times, trace.takeovers), 0, len(times) - 1)] = True
    near = taken.copy()
    near[1:] |= taken[:-1]
    near[:-1] |= taken[1:]
    own = np.abs(np.diff(path(times), 2, axis=0)) / _DT
    beyond = np.abs(np.diff(commands, 2, axis=0)) / _DT - own
    chosen = beyond[near[1:-1] & (times[1:-1] >= SETTLED_NS)]
    return float(np.maximum(chosen, 0.0).max()) if len(chosen) else 0.0


def _resting_from(commands: Array) -> Mask:
    """bool ``[N]``: whether the command does not change during the `_STILL` updates from each one on."""
    still = np.append((np.diff(commands, axis=0) == 0.0).all(axis=1), False)
    windows = np.lib.stride_tricks.sliding_window_view(still, _STILL).min(axis=1)
    return np.concatenate([windows, np.zeros(len(commands) - len(windows), dtype=np.bool_)])


def _rms(values: Array) -> float | None:
    return float(np.sqrt(np.mean(values**2))) if values.size else None


def worst(runs: Sequence[Measures]) -> Measures:
    """One row for several seeds: counts are summed, root mean squares averaged as such, of the rest the worst counts."""
    rests = [run.time_to_rest for run in runs]
    return Measures(
        sent=sum(run.sent for run in runs),
        rejected=sum(run.rejected for run in runs),
        non_finite=sum(run.non_finite for run in runs),
        step=max(run.step for run in runs),
        velocity=max(run.velocity for run in runs),
        acceleration=max(run.acceleration for run in runs),
        jerk=max(run.jerk for run in runs),
        seam_jump=max(run.seam_jump for run in runs),
        jerk_rms=_mean_square([run.jerk_rms for run in runs]),
        tracking_rms=_mean_square([run.tracking_rms for run in runs]),
        time_to_rest=None if None in rests else max(rest for rest in rests if rest is not None),
        at_rest=all(run.at_rest for run in runs),
        status=runs[-1].status,
    )


def broken_promises(row: Measures, deadly: bool) -> list[str]:
    """What our sender promises and ``row`` breaks, as sentences; ``deadly``: nobody is left to plan."""
    found = []
    if row.rejected:
        found.append(f'the controller rejected {row.rejected} of {row.sent} messages (allowed: 0)')
    if row.non_finite:
        found.append(f'{row.non_finite} controller updates commanded NaN or infinity (allowed: 0)')
    if not row.sent:
        found.append('nothing was sent')
    for name in ('step', 'velocity', 'acceleration', 'jerk'):
        value = getattr(row, name)
        if value > 1.0 + ROUNDING:
            found.append(f'{name} reaches {value:.4g} times its limit')
    if deadly and not row.at_rest:
        found.append('the arm still moves at the end, although nobody plans any more')
    return found


def plain(row: Measures) -> dict[str, Any]:
    """As JSON takes it, to five significant digits."""
    return {key: float(f'{value:.5g}') if isinstance(value, float) else value for key, value in asdict(row).items()}


def _mean_square(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if known else None
