"""What a replay says of a policy: errors against what was commanded, how its chunks fit together, and what they ask of the robot.

Everything here follows from stamps and values, not from how fast this machine is: the same bag, seed and checkpoint give the same
numbers, unless latencies are measured ones. Units rad, m, s; NaN never leaves: what cannot be said is None.

Enters: a `Run`, the episode's commands. Leaves: plain dictionaries. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.episodes.commands import Commands
from vla_policy_ros.episodes.errors import POLICY, OpenLoopError, baselines
from vla_policy_ros.replay.offline import ReplayedChunk, Run
from vla_policy_ros.robot import Robot
from vla_policy_ros.runtime import State
from vla_policy_ros.types import NS_PER_S, ActionChunk

Array = NDArray[np.float64]

# A joint that is commanded to move less than this share of its range has no motion to compare with.
_STILL = 1e-3
_HISTOGRAM_MS = (0.0, 5.0, 10.0, 20.0, 33.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0)


@dataclass(frozen=True)
class Windows:
    """Chunks of which something is known to compare with.

    Attributes:
        chunks: ``N`` of the run.
        actions, truth: float64 ``[N, T, A]``.
        counted: bool ``[N, T]``: not before the first command, and not after the last.
        start: float64 ``[N, A]``, measured positions.
    """

    chunks: tuple[ReplayedChunk, ...]
    actions: Array
    truth: Array
    counted: NDArray[np.bool_]
    start: Array

    @property
    def error(self) -> Array:
        """``[N, T, A]``."""
        return self.actions - self.truth


def windows_of(run: Run, commands: Commands, robot: Robot) -> Windows:
    """The chunks of a run beside what was commanded at their times. Chunks with values that are not finite are left out."""
    kept, actions, truth, counted, start = [], [], [], [], []
    for replayed in run.chunks:
        chunk = replayed.chunk
        sampled = commands.sample(chunk.times_ns)
        known = ~(sampled.early | sampled.is_pad)
        if not known.any() or not np.isfinite(chunk.actions).all():
            continue
        kept.append(replayed)
        actions.append(chunk.actions)
        truth.append(sampled.positions)
        counted.append(known)
        start.append(robot.action_positions(replayed.state))
    horizon, width = robot.action.horizon, len(robot.action.joints)
    return Windows(
        tuple(kept),
        np.array(actions).reshape(-1, horizon, width),
        np.array(truth).reshape(-1, horizon, width),
        np.array(counted, dtype=np.bool_).reshape(-1, horizon),
        np.array(start).reshape(-1, width),
    )


def accuracy(windows: Windows, commands: Commands, robot: Robot) -> dict[str, Any] | None:
    """Errors of the policy and of the baselines, and how alike the motions are. None where there is nothing to compare."""
    if not windows.chunks:
        return None
    joints = robot.action.joints
    stamps = np.array([replayed.chunk.observation_stamp_ns for replayed in windows.chunks], dtype=np.int64)
    states = np.stack([replayed.state for replayed in windows.chunks])
    made = {POLICY: windows.actions, **baselines(robot, states, stamps, commands, windows.actions.shape[1])}
    spread = windows.truth[windows.counted].std(axis=0)
    found = {}
    for name, actions in made.items():
        error = OpenLoopError.of(actions - windows.truth, windows.counted)
        found[name] = error.to_dict(joints)
        ranges = np.array([robot.limits[joint].position for joint in joints])
        moving = spread > _STILL * (ranges[:, 1] - ranges[:, 0])
        normalised = np.divide(error.joint_rmse, spread, out=np.full(len(joints), np.nan), where=moving)
        found[name]['normalised_rmse'] = _known(float(np.nanmean(normalised)) if moving.any() else np.nan)
        found[name]['joint_normalised_rmse'] = dict(zip(joints, map(_known, normalised.tolist()), strict=True))
    return {'windows': len(windows.chunks), 'errors': found, 'motion_cosine': _cosine(windows, robot)}


def _cosine(windows: Windows, robot: Robot) -> float | None:
    """Mean cosine between the motion from the measured positions that a chunk asks for and that which was commanded."""
    ranges = np.array([robot.limits[joint].position for joint in robot.action.joints])
    mask = windows.counted[..., None]
    asked = ((windows.actions - windows.start[:, None]) * mask).reshape(len(windows.chunks), -1)
    given = ((windows.truth - windows.start[:, None]) * mask).reshape(len(windows.chunks), -1)
    moves = np.abs(given).max(axis=1) > _STILL * float((ranges[:, 1] - ranges[:, 0]).min())
    lengths = np.linalg.norm(asked, axis=1) * np.linalg.norm(given, axis=1)
    moves &= lengths > 0.0
    return float(np.mean((asked * given).sum(axis=1)[moves] / lengths[moves])) if moves.any() else None


@dataclass(frozen=True)
class Executed:
    """What would have been asked of the robot, on a grid of one action period: always the newest chunk that has arrived.

    Attributes:
        times_ns: int64 ``[K]``, from when the policy could first be asked to the end of the replay.
        positions: float64 ``[K, A]``; NaN where starved.
        starved: bool ``[K]``: no chunk that has arrived speaks of this time.
    """

    times_ns: NDArray[np.int64]
    positions: Array
    starved: NDArray[np.bool_]


def executed(run: Run, robot: Robot) -> Executed:
    """The chunks one after the other, each from its takeover until that of the next one."""
    period = robot.action.period_ns
    begin = next((change.time_ns for change in run.states if change.state is State.RUNNING), run.end_ns)
    times = np.arange(begin, run.end_ns, period, dtype=np.int64)
    positions = np.full((len(times), len(robot.action.joints)), np.nan)
    usable = _usable(run)
    newest = np.searchsorted(np.array([takeover_ns(each) for each in usable], dtype=np.int64), times, side='right') - 1
    for index, replayed in enumerate(usable):
        rows = np.flatnonzero(newest == index)
        if len(rows):
            positions[rows] = path_at(replayed.chunk, times[rows])
    return Executed(times, positions, np.isnan(positions).any(axis=1))


def takeover_ns(replayed: ReplayedChunk) -> int:
    """When a chunk begins to be followed: once it is there, and its first action is due."""
    return max(replayed.ready_ns, replayed.chunk.stamp_ns)


def path_at(chunk: ActionChunk, times_ns: NDArray[np.int64]) -> Array:
    """The path through the actions of a chunk ``[K, A]``: linear between two, NaN before the first and after the last."""
    knots = chunk.times_ns
    offsets, grid = (times_ns - knots[0]).astype(np.float64), (knots - knots[0]).astype(np.float64)
    found = np.stack([np.interp(offsets, grid, column) for column in chunk.actions.T], axis=1)
    found[(times_ns < knots[0]) | (times_ns > knots[-1])] = np.nan
    return found


def _usable(run: Run) -> list[ReplayedChunk]:
    return [replayed for replayed in run.chunks if np.isfinite(replayed.chunk.actions).all()]


def seam_jumps(run: Run) -> list[float]:
    """Largest distance, over the joints, between a chunk and the one before at its takeover, where both speak of that moment."""
    jumps = []
    for before, after in pairwise(_usable(run)):
        at = np.array([takeover_ns(after)], dtype=np.int64)
        jump = float(np.abs(path_at(after.chunk, at) - path_at(before.chunk, at)).max())
        if np.isfinite(jump):
            jumps.append(jump)
    return jumps


def continuity(run: Run, path: Executed, commands: Commands, robot: Robot) -> dict[str, Any]:
    """How the chunks fit together: seams, jerk, starvation, and the error of what would have been executed."""
    jumps, dt = seam_jumps(run), robot.action.period_ns / NS_PER_S
    jerk = [np.diff(each.chunk.actions, n=3, axis=0) / dt**3 for each in _usable(run) if len(each.chunk.actions) > 3]
    return {
        'seams': len(jumps),
        'seam_jump_mean': _known(float(np.mean(jumps)) if jumps else np.nan),
        'seam_jump_p95': _known(float(np.percentile(jumps, 95)) if jumps else np.nan),
        'seam_jump_max': _known(max(jumps, default=np.nan)),
        'jerk_rms': _known(float(np.sqrt(np.mean([np.mean(each**2) for each in jerk]))) if jerk else np.nan),
        'starved_s': float(path.starved.sum() * dt),
        'aligned_error': _aligned_error(path, commands),
    }


def _aligned_error(path: Executed, commands: Commands) -> dict[str, Any] | None:
    """Error of what would have been executed, at the time at which it would have been."""
    if not len(path.times_ns):
        return None
    sampled = commands.sample(path.times_ns)
    known = ~(sampled.early | sampled.is_pad | path.starved)
    if not known.any():
        return None
    error = path.positions[known] - sampled.positions[known]
    return {'mae': float(np.abs(error).mean()), 'rmse': float(np.sqrt((error**2).mean())), 'times': int(known.sum())}


def demands(run: Run, robot: Robot) -> dict[str, Any]:
    """What the chunks ask of the robot, and what became of them."""
    usable = [replayed.chunk.actions for replayed in _usable(run)]
    outcomes = [replayed.outcome for replayed in run.chunks]
    rejected = {name: outcomes.count(name) for name in sorted(set(outcomes) - {'planned'})}
    joints = robot.action.joints
    margins: dict[str, float] = {}
    speeds: dict[str, float] = {}
    for column, joint in enumerate(joints if usable else ()):
        limit, low_high = robot.limits[joint], np.array(robot.limits[joint].position)
        values = [actions[:, column] for actions in usable]
        margins[joint] = float(min(min(v.min() - low_high[0], low_high[1] - v.max()) for v in values))
        steps = max(float(np.abs(np.diff(v)).max(initial=0.0)) for v in values)
        speeds[joint] = steps / (robot.action.period_ns / NS_PER_S) / limit.velocity
    chunks = len(run.chunks)
    return {
        'chunks': chunks,
        'questions': run.counters.observations,
        'skipped_ticks': run.counters.requests_skipped,
        'dropped_answers': run.dropped,
        'rejected': rejected,
        'clip_rate': _known(sum(bool(replayed.clamped) for replayed in run.chunks) / chunks if chunks else np.nan),
        'cut_rate': _known(sum(bool(replayed.cut) for replayed in run.chunks) / chunks if chunks else np.nan),
        'limit_margin': margins,
        'speed_ratio': speeds,
    }


def freshness(run: Run, replan_rate: float) -> dict[str, Any]:
    """How old the inputs were when the policy was asked, how far apart, and which answers came later than the next question."""
    ages: dict[str, list[float]] = {}
    camera_skew, state_skew = [], []
    for replayed in run.chunks:
        for name, stamp in replayed.input_stamps.items():
            ages.setdefault(name, []).append((replayed.asked_ns - stamp) / 1e6)
        cameras = [stamp for name, stamp in replayed.input_stamps.items() if name.startswith('camera:')]
        camera_skew.append((max(cameras) - min(cameras)) / 1e6)
        state_skew.append(abs(max(cameras) - replayed.input_stamps['state']) / 1e6)
    latency = [(replayed.ready_ns - replayed.chunk.observation_stamp_ns) / 1e6 for replayed in run.chunks]
    late = sum(replayed.ready_ns - replayed.asked_ns > NS_PER_S / replan_rate for replayed in run.chunks)
    return {
        'age_ms': {name: _spread(values) for name, values in sorted(ages.items())},
        'camera_skew_ms': _spread(camera_skew),
        'state_skew_ms': _spread(state_skew),
        'image_to_trajectory_ms': _spread(latency),
        'deadline_misses': int(late),
    }


def health(run: Run) -> dict[str, Any]:
    """Seconds in each state, and the changes."""
    seconds: dict[str, float] = {}
    ends = [change.time_ns for change in run.states[1:]] + [run.end_ns]
    for change, end_ns in zip(run.states, ends, strict=True):
        seconds[change.state.name] = seconds.get(change.state.name, 0.0) + (end_ns - change.time_ns) / NS_PER_S
    return {
        'duration_s': (run.end_ns - run.begin_ns) / NS_PER_S,
        'seconds': {name: round(value, 6) for name, value in sorted(seconds.items())},
        'changes': [
            {'time_s': (change.time_ns - run.begin_ns) / NS_PER_S, 'state': change.state.name, 'reason': change.reason}
            for change in run.states
        ],
        'warnings': dict(sorted(run.warnings.items())),
    }


def window_errors(windows: Windows) -> dict[int, float]:
    """Observation stamp to mean absolute error of its chunk."""
    absolute = np.abs(windows.error).mean(axis=2)
    return {
        replayed.chunk.observation_stamp_ns: float(row[known].mean())
        for replayed, row, known in zip(windows.chunks, absolute, windows.counted, strict=True)
    }


def paired_difference(first: Windows, second: Windows, seed: int = 0, resamples: int = 2000) -> dict[str, Any] | None:
    """Mean absolute error of the second minus the first on the observations that both were asked about, with a 95 % bootstrap
    interval over them. None where they share fewer than two.

    Neighbouring observations are alike, so blocks of a second of the replay are drawn, not single ones.
    """
    ours, theirs = window_errors(first), window_errors(second)
    stamps = sorted(set(ours) & set(theirs))
    if len(stamps) < 2:
        return None
    differences = np.array([theirs[stamp] - ours[stamp] for stamp in stamps])
    block = np.array([(stamp - stamps[0]) // NS_PER_S for stamp in stamps])
    groups = [differences[block == one] for one in np.unique(block)]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(groups), size=(resamples, len(groups)))
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        'observations': len(stamps),
        'blocks': len(groups),
        'mae_difference': float(differences.mean()),
        'interval95': [float(low), float(high)],
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    counts, _ = np.histogram(values, bins=[*_HISTOGRAM_MS, float('inf')])
    p50, p95 = np.percentile(values, [50, 95])
    return {
        'p50': float(p50),
        'p95': float(p95),
        'max': float(max(values)),
        'histogram': {'edges_ms': list(_HISTOGRAM_MS), 'counts': counts.tolist()},
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
