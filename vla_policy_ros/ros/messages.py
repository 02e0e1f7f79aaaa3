"""Our nouns as ROS messages."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np
from builtin_interfaces.msg import Duration, Time
from std_msgs.msg import Header
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg
from trajectory_msgs.msg import JointTrajectoryPoint

from vla_policy_msgs.msg import ActionChunk as ActionChunkMsg
from vla_policy_msgs.msg import InputStatus
from vla_policy_ros.observation import InputHealth
from vla_policy_ros.runtime import ChunkReport
from vla_policy_ros.types import NS_PER_S, JointTrajectory


def to_time(ns: int) -> Time:
    """Nanoseconds as builtin_interfaces/Time."""
    return Time(sec=ns // NS_PER_S, nanosec=ns % NS_PER_S)


def to_trajectory(trajectory: JointTrajectory, stamp_ns: int) -> JointTrajectoryMsg:
    """A trajectory as the controller takes it, with ``header.stamp`` ``stamp_ns``: positions with velocities, no accelerations.

    Accelerations are left out on purpose: with them the controller makes quintic segments, which leave the checked limits.
    """
    message = JointTrajectoryMsg(header=Header(stamp=to_time(stamp_ns)))
    message.joint_names = list(trajectory.joint_names)
    for time_ns, position, velocity in zip(trajectory.times_ns.tolist(), trajectory.positions, trajectory.velocities, strict=True):
        message.points.append(
            JointTrajectoryPoint(
                positions=array('d', position.tobytes()),
                velocities=array('d', velocity.tobytes()),
                time_from_start=Duration(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S),
            )
        )
    return message


def to_chunk(report: ChunkReport) -> ActionChunkMsg:
    """A chunk with its provenance and its fate."""
    chunk, plan = report.chunk, report.plan
    rejected = plan.trajectory is None
    outcome = ActionChunkMsg.OUTCOME_PUBLISHED if report.actuated else ActionChunkMsg.OUTCOME_DRY_RUN
    return ActionChunkMsg(
        header=Header(stamp=to_time(chunk.observation_stamp_ns)),
        sequence=chunk.sequence,
        instruction=chunk.instruction,
        joint_names=list(chunk.joint_names),
        action_stamp=to_time(chunk.stamp_ns),
        dt=chunk.dt_ns / NS_PER_S,
        horizon=chunk.actions.shape[0],
        actions=array('d', np.ascontiguousarray(chunk.actions, dtype=np.float64).tobytes()),
        **_stamps(report.input_stamps),
        stage_names=list(report.stages_ms),
        stage_ms=array('f', report.stages_ms.values()),
        latency_ms=report.latency_ms,
        outcome=ActionChunkMsg.OUTCOME_REJECTED if rejected else outcome,
        rejection='' if plan.rejection is None else plan.rejection.name,
        reason=plan.reason,
        trajectory_start=to_time(0 if plan.trajectory is None else plan.trajectory.start_ns),
        points_expired=plan.points_expired,
        clamped_joints=list(plan.clamped_joints),
        seam_jump=float(plan.seam_jump),
        checkpoint_hash=chunk.checkpoint_hash,
        stats_hash=chunk.stats_hash,
    )


def to_input_status(health: InputHealth) -> InputStatus:
    """The health of one input."""
    return InputStatus(
        name=health.name,
        topic=health.topic,
        rate=health.rate,
        age=health.age,
        max_age=health.max_age,
        ok=not health.problem,
        reason=health.problem,
    )


def _stamps(stamps: Mapping[str, int]) -> dict[str, list[object]]:
    return {'input_names': list(stamps), 'input_stamps': [to_time(stamp) for stamp in stamps.values()]}
