"""What was commanded, as targets over time: position ``positions[i]`` is the target at time ``stamps_ns[i]``.

That is the meaning of the rows of an `ActionChunk`, so that a chunk is trained on what `Commands.sample` says at its times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.jtc import JointTrajectoryController, TrajectoryMessage
from vla_policy_ros.control.jtc_rules import ControllerParameters
from vla_policy_ros.robot import Controller
from vla_policy_ros.types import NS_PER_S

# Between two targets further apart than this many usual distances nothing was commanded: the controller held the former.
GAP_FACTOR = 3.0
# The last target of a stream counts for this share of the distance of targets, so that rounding of times makes no padding.
_SLACK = 0.5
_LONGEST_TAIL_NS = 60 * NS_PER_S
_MOST_UPDATES = 2_000_000


class CommandError(ValueError):
    """Commands that cannot be used; the message says why."""


@dataclass(frozen=True)
class Targets:
    """Targets of the joints of one controller.

    Attributes:
        joints: ``J`` names, the columns of ``positions``.
        stamps_ns: int64 ``[N]``, strictly increasing.
        positions: float64 ``[N, J]``, robot units.
        source: where they come from, for reports.
    """

    joints: tuple[str, ...]
    stamps_ns: NDArray[np.int64]
    positions: NDArray[np.float64]
    source: str

    def __post_init__(self) -> None:
        if len(self.stamps_ns) == 0:
            raise CommandError(f'{self.source}: there is no target')
        if self.positions.shape != (len(self.stamps_ns), len(self.joints)):
            raise CommandError(f'{self.source}: positions {self.positions.shape} for {len(self.stamps_ns)} times')
        if len(self.stamps_ns) > 1 and not (np.diff(self.stamps_ns) > 0).all():
            raise CommandError(f'{self.source}: times of targets go back')

    @cached_property
    def spacing_ns(self) -> int:
        """The usual distance of targets; 0 where there is only one."""
        return int(np.median(np.diff(self.stamps_ns))) if len(self.stamps_ns) > 1 else 0

    @cached_property
    def _knots(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Targets, and where nothing was commanded for long, the held one again until the next is approached."""
        steps = np.diff(self.stamps_ns)
        before = np.flatnonzero(steps > GAP_FACTOR * self.spacing_ns)
        times = np.insert(self.stamps_ns, before + 1, self.stamps_ns[before + 1] - self.spacing_ns)
        return times, np.insert(self.positions, before + 1, self.positions[before], axis=0)

    def sample(self, times_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Targets ``[K, J]`` at ``times_ns [K]``: linear between two, the first before, the last after."""
        times, values = self._knots
        if len(times) == 1:
            return np.repeat(values, len(times_ns), axis=0)
        index = np.clip(np.searchsorted(times, times_ns, side='right') - 1, 0, len(times) - 2)
        # Differences of int64 first: a stamp in ns has more digits than a float64.
        share = (times_ns - times[index]) / (times[index + 1] - times[index])
        share = np.clip(share, 0.0, 1.0)[:, None]
        between = values[index] + share * (values[index + 1] - values[index])
        return np.where(share == 1.0, values[index + 1], between)


@dataclass(frozen=True)
class SampledActions:
    """Actions at some times.

    Attributes:
        positions: float64 ``[K, A]``.
        early: bool ``[K]``: before the first target of some joint; nothing is known of what was commanded then.
        is_pad: bool ``[K]``: after the last target of some joint; its last target stands there.
    """

    positions: NDArray[np.float64]
    early: NDArray[np.bool_]
    is_pad: NDArray[np.bool_]


@dataclass(frozen=True)
class Commands:
    """What was commanded to the action joints ``joints``, by one or several controllers.

    Raises:
        CommandError: a joint has no targets, or has them from two streams.
    """

    joints: tuple[str, ...]
    streams: tuple[Targets, ...]

    def __post_init__(self) -> None:
        owned = [joint for stream in self.streams for joint in stream.joints]
        missing = [joint for joint in self.joints if owned.count(joint) != 1]
        if missing:
            raise CommandError(f'joint {missing[0]!r} has {owned.count(missing[0])} streams of commands, not one')

    @property
    def source(self) -> str:
        """Where the actions come from, for reports."""
        return '; '.join(dict.fromkeys(stream.source for stream in self.streams))

    @property
    def spacing_ns(self) -> int:
        """The usual distance of targets of the slowest stream."""
        return max(stream.spacing_ns for stream in self.streams)

    def sample(self, times_ns: NDArray[np.int64]) -> SampledActions:
        """Actions at ``times_ns``, int64 ``[K]``."""
        positions = np.empty((len(times_ns), len(self.joints)))
        early, is_pad = np.zeros(len(times_ns), dtype=bool), np.zeros(len(times_ns), dtype=bool)
        for stream in self.streams:
            slack = round(_SLACK * stream.spacing_ns)
            kept = [joint for joint in stream.joints if joint in self.joints]
            columns = [stream.joints.index(joint) for joint in kept]
            positions[:, [self.joints.index(joint) for joint in kept]] = stream.sample(times_ns)[:, columns]
            early |= times_ns < stream.stamps_ns[0] - slack
            is_pad |= times_ns > stream.stamps_ns[-1] + slack
        return SampledActions(positions, early, is_pad)


def targets_of_trajectories(
    controller: Controller, received: Sequence[tuple[int, TrajectoryMessage]], start: NDArray[np.float64], source: str
) -> Targets:
    """Targets of trajectories that a joint_trajectory_controller received.

    Streamed commands, one point for all joints in each message, are the targets themselves: each at its start plus its
    ``time_from_start``; a message takes back what former ones said of later times. Other messages are executed by the emulated
    controller, whose reference at its update rate is the target.

    Args:
        controller: of the robot file.
        received: (time of receipt on the controller's clock, message), in order.
        start: positions ``[J]`` at the first message.
        source: for reports.

    Raises:
        CommandError: no message can be used.
    """
    finite = [(now_ns, message) for now_ns, message in received if _is_finite(message)]
    joints = set(controller.joints)
    streamed = all(len(message.points) == 1 and set(message.joint_names) == joints for _, message in finite)
    if not finite:
        raise CommandError(f'{source}: no message with points and finite positions')
    if not streamed:
        return _executed(controller, finite, start, source)
    rows = []
    for now_ns, message in finite:
        order = [message.joint_names.index(joint) for joint in controller.joints]
        point = message.points[0]
        rows.append(((message.stamp_ns or now_ns) + point.time_from_start_ns, np.asarray(point.positions)[order]))
    return targets_of_rows(controller.joints, rows, source)


def targets_of_rows(joints: tuple[str, ...], rows: Sequence[tuple[int, NDArray[np.float64]]], source: str) -> Targets:
    """Targets of (time, positions ``[J]``) in order of receipt: a row takes back what was said of its time and later."""
    kept: list[tuple[int, NDArray[np.float64]]] = []
    for row in rows:
        while kept and kept[-1][0] >= row[0]:
            kept.pop()
        kept.append(row)
    if not kept:
        raise CommandError(f'{source}: there is no target')
    return Targets(joints, np.array([time for time, _ in kept], dtype=np.int64), np.stack([p for _, p in kept]), source)


def _is_finite(message: TrajectoryMessage) -> bool:
    return len(message.points) > 0 and all(
        len(point.positions) == len(message.joint_names) and np.isfinite(np.asarray(point.positions)).all()
        for point in message.points
    )


def _executed(
    controller: Controller, received: Sequence[tuple[int, TrajectoryMessage]], start: NDArray[np.float64], source: str
) -> Targets:
    """The reference of the emulated controller at its update rate; the robot follows it perfectly."""
    partial = any(len(message.joint_names) < len(controller.joints) for _, message in received)
    parameters = ControllerParameters(
        joints=controller.joints,
        update_rate=controller.update_rate,
        distro=controller.distro or 'jazzy',
        allow_partial_joints_goal=partial,
    )
    emulated = JointTrajectoryController(parameters, start)
    period_ns = parameters.update_period_ns
    now_ns, end_ns = received[0][0], received[0][0]
    waiting = list(reversed(received))
    accepted, times, positions = 0, list[int](), list[NDArray[np.float64]]()
    position = start
    while waiting or now_ns <= end_ns:
        while waiting and waiting[-1][0] <= now_ns:
            arrived_ns, message = waiting.pop()
            if emulated.receive(message, arrived_ns).accepted:
                accepted += 1
                ends_ns = max(arrived_ns, message.stamp_ns) + message.points[-1].time_from_start_ns
                end_ns = min(max(end_ns, ends_ns), arrived_ns + _LONGEST_TAIL_NS)
        if len(times) >= _MOST_UPDATES:
            raise CommandError(f'{source}: longer than {_MOST_UPDATES} updates of its controller; split the recording')
        command = emulated.update(now_ns, position)
        position = command.reference_positions
        times.append(command.stamp_ns)
        positions.append(position)
        now_ns += period_ns
    if not accepted:
        raise CommandError(f'{source}: its controller would have accepted none of {len(received)} messages')
    return Targets(controller.joints, np.array(times, dtype=np.int64), np.stack(positions), f'{source} as executed')
