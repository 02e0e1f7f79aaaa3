"""What Rolling's controller does with a message while a trajectory runs: blend instead of forget.

The new trajectory is spliced into the running one (``allow_trajectory_replacement``, ros2_controllers 6.9):

- it starts where the running one was at the update before: a stamp of zero and a stamp in the past start now, a stamp in the future
  starts then. A past one is replayed from its first point; nothing of it is skipped;
- until then the knots of the old trajectory are kept; the way to the first of them comes from the state that any new trajectory
  starts from, measured or commanded;
- at the start, position and velocity of the old motion become a knot (the bridge), if there is time before the first point;
- joints that it leaves out go on along the old path, sampled at the new points, then over what is left of the old knots.

The running trajectory is dated by the update before, so a bridge that begins now repeats one command.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.jtc_trajectory import InterpolationMethod, Trajectory, TrajectoryMessage, TrajectoryPoint

_FIELDS = ('positions', 'velocities', 'accelerations')


def blend(
    running: Trajectory,
    message: TrajectoryMessage,
    joints: tuple[str, ...],
    delay_ns: int,
    cursor_ns: int,
    method: InterpolationMethod,
    sort: Callable[[TrajectoryMessage], None],
) -> TrajectoryMessage | None:
    """``message`` spliced into the running trajectory, to be started at once; None where that cannot be done.

    Args:
        running: has been sampled; its segment search moves on.
        message: accepted; it is used up.
        joints: the controller's.
        delay_ns: how long after the cursor the message starts, of trajectory time; 0 is now.
        cursor_ns: where the running trajectory was sampled last.
        method: the interpolation.
        sort: puts a message that names all joints into the controller's order.
    """
    named = np.array([joint in message.joint_names for joint in joints])
    if not named.all() and message.points[-1].positions.size == 0:
        return None  # the joints that are named could not be held after the end
    start_ns = cursor_ns + delay_ns
    bridge = running.sample(start_ns, method, search_monotonically_increasing=False).state
    if len(message.joint_names) < len(joints):
        old = [running.sample(start_ns + point.time_from_start_ns, method).state for point in message.points]
        if not _follow_the_old_path(message, old, joints):
            return None
    sort(message)

    points = [(point, running.start_ns + point.time_from_start_ns) for point in running.points]
    prefix = [_at(point, time_ns - cursor_ns) for point, time_ns in points if cursor_ns < time_ns < start_ns]
    if bridge is not None and message.points[0].time_from_start_ns > 0:
        prefix.append(_at(bridge, delay_ns))
    new = [_at(point, delay_ns + point.time_from_start_ns) for point in message.points]
    suffix = []
    if not named.all():
        end_ns = cursor_ns + new[-1].time_from_start_ns
        suffix = [_held(_at(point, time_ns - cursor_ns), new[-1], named) for point, time_ns in points if time_ns > end_ns]
    return TrajectoryMessage(joints, [*prefix, *new, *suffix])


def _at(point: TrajectoryPoint, time_from_start_ns: int) -> TrajectoryPoint:
    moved = point.copy()
    moved.time_from_start_ns = time_from_start_ns
    return moved


def _follow_the_old_path(message: TrajectoryMessage, old: list[TrajectoryPoint | None], joints: tuple[str, ...]) -> bool:
    """Add the joints that ``message`` leaves out, from the old trajectory's states at its points; False if one is missing."""
    omitted = [index for index, joint in enumerate(joints) if joint not in message.joint_names]
    states = [state for state in old if state is not None]
    if len(states) < len(old):
        return False
    message.joint_names = (*message.joint_names, *(joints[index] for index in omitted))
    for point, state in zip(message.points, states, strict=True):
        for name in _FIELDS:
            if getattr(point, name).size:
                setattr(point, name, np.concatenate([getattr(point, name), getattr(state, name)[omitted]]))
        if point.effort.size:
            point.effort = np.concatenate([point.effort, np.zeros(len(omitted))])
    return True


def _held(old: TrajectoryPoint, last: TrajectoryPoint, named: NDArray[np.bool_]) -> TrajectoryPoint:
    """A knot of the old trajectory in which the named joints rest at the last new point."""
    if old.positions.size:
        old.positions = np.where(named, last.positions, old.positions)
    if old.velocities.size:
        old.velocities = np.where(named, 0.0, old.velocities)
    if old.accelerations.size:
        old.accelerations = np.where(named, 0.0, old.accelerations)
    return old
