"""The trajectories that the joint_trajectory_controller makes for itself when it stops: hold, or decelerate and hold."""

from __future__ import annotations

import numpy as np

from vla_policy_ros.control.jtc_rules import FLT_EPSILON
from vla_policy_ros.control.jtc_trajectory import Array, TrajectoryMessage, TrajectoryPoint


def hold(joints: tuple[str, ...], positions: Array) -> TrajectoryMessage:
    """Be at ``positions`` ``[J]`` within one cycle."""
    return TrajectoryMessage(joints, [TrajectoryPoint(0, positions)])


def decelerate(joints: tuple[str, ...], measured: TrajectoryPoint, decelerations: Array, period_ns: int) -> TrajectoryMessage:
    """Slow down from the measured state, each joint with its deceleration ``[J]`` (> 0), one point per update period."""
    velocity = measured.velocities
    stop_s = np.abs(velocity) / decelerations
    brake = -np.sign(velocity) * decelerations
    points = []
    for cycle in range(int(np.ceil(stop_s.max() / (period_ns * 1e-9))) + 1):
        t = np.minimum(cycle * period_ns * 1e-9, stop_s)
        moving = (t < stop_s) & (np.abs(velocity) > FLT_EPSILON)
        points.append(
            TrajectoryPoint(
                cycle * period_ns,
                measured.positions + t * (velocity + 0.5 * t * brake),
                np.where(moving, velocity + brake * t, 0.0),
                np.where(moving, brake, 0.0),
            )
        )
    return TrajectoryMessage(joints, points)
