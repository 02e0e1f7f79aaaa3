"""What Rolling's controller does with a message while a trajectory runs: blend instead of forget.

The contract is that of ``allow_trajectory_replacement`` in ros2_controllers (its trajectory page and release notes): the running
trajectory goes on until the new one starts; at that moment the old motion's position and velocity become a point of the new
trajectory, so that it continues from there, if the new trajectory leaves time before its first point. A stamp in the future starts
then; a stamp of zero or in the past starts now, and a past one is replayed from its first point: nothing of it is skipped. Joints
that a message leaves out go on along the old path.
"""

from __future__ import annotations

import numpy as np

from vla_policy_ros.control.jtc_trajectory import InterpolationMethod, Trajectory, TrajectoryMessage, TrajectoryPoint


def can_blend(running: Trajectory, holding: bool) -> bool:
    """Blending needs a running trajectory of more than one point, and a controller that does not hold."""
    return not holding and running.is_sampled_already and len(running.points) > 1


def blended(
    running: Trajectory, message: TrajectoryMessage, joints: tuple[str, ...], now_ns: int, method: InterpolationMethod
) -> TrajectoryMessage:
    """``message`` as a trajectory that continues the running one, with all joints in the controller's order.

    Args:
        running: the trajectory so far; only read.
        message: accepted, and not sorted yet.
        joints: the controller's.
        now_ns: this update, on the clock of the running trajectory.
        method: its interpolation.
    """
    start_ns = max(message.stamp_ns, now_ns) if message.stamp_ns else now_ns
    points = [_state(running, now_ns, 0, method)]
    for point in running.points:
        time_ns = running.start_ns + point.time_from_start_ns
        if now_ns < time_ns < start_ns:
            points.append(_state(running, time_ns, time_ns - now_ns, method))
    offset_ns = start_ns - now_ns
    if message.points[0].time_from_start_ns > 0 and offset_ns > 0:
        points.append(_state(running, start_ns, offset_ns, method))
    for point in message.points:
        time_ns = offset_ns + point.time_from_start_ns
        if time_ns <= 0:
            points = []  # the new trajectory begins at once: nothing leads to its first point
        points.append(_all_joints(running, point, message.joint_names, joints, now_ns + time_ns, time_ns, method))
    return TrajectoryMessage(joints, points, now_ns)


def _state(running: Trajectory, time_ns: int, offset_ns: int, method: InterpolationMethod) -> TrajectoryPoint:
    """The running motion as a point; its acceleration is left out, so that what follows is a cubic."""
    state = running.copy().sample(time_ns, method).state
    assert state is not None
    return TrajectoryPoint(offset_ns, state.positions, state.velocities)


def _all_joints(
    running: Trajectory,
    point: TrajectoryPoint,
    names: tuple[str, ...],
    joints: tuple[str, ...],
    time_ns: int,
    offset_ns: int,
    method: InterpolationMethod,
) -> TrajectoryPoint:
    """A point of the message in the controller's order; joints that it leaves out are where the old path has them then."""
    named = [names.index(joint) if joint in names else -1 for joint in joints]
    old = running.copy().sample(time_ns, method).state if -1 in named else None

    def column(field: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        values = getattr(point, field)
        if values.size == 0:
            return values
        fill = np.zeros(len(joints)) if old is None else getattr(old, field)
        return np.array([values[index] if index >= 0 else fill[place] for place, index in enumerate(named)])

    return TrajectoryPoint(offset_ns, column('positions'), column('velocities'), column('accelerations'), column('effort'))
