"""What was recorded of one command topic: trajectories with the times at which they arrived, and where the joints were.

Messages are read by attribute, so those of rclpy and of rosbags both do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.types import NS_PER_S


@dataclass(frozen=True)
class JointPositions:
    """Where joints were at one moment.

    Attributes:
        source: the topic that said so.
        positions: joint name -> position, rad or m.
    """

    source: str
    positions: Mapping[str, float]


@dataclass(frozen=True)
class Received:
    """A trajectory and the time ``now_ns`` at which it arrived, on the clock of the controller."""

    now_ns: int
    message: TrajectoryMessage


@dataclass(frozen=True)
class Recording:
    """One command topic.

    Attributes:
        topic: its name.
        messages: in the order in which they arrived.
        states: where the joints were when the first message arrived, the controller's own word first.
        controller_joints: the joints that the controller's state topic names; empty where that is not known.
        begin_ns: the time that reports count from.
        notes: what the operator should know about how this was read.
    """

    topic: str
    messages: tuple[Received, ...]
    states: tuple[JointPositions, ...]
    controller_joints: tuple[str, ...]
    begin_ns: int
    notes: tuple[str, ...] = ()


def recording_from_messages(topic: str, trajectories: Sequence[tuple[int, Any]], states: Mapping[str, Any]) -> Recording:
    """What was heard live: (time on the controller's clock in ns, message) of ``topic``, and a state message per state topic.

    Raises:
        ValueError: ``trajectories`` is empty.
    """
    if not trajectories:
        raise ValueError(f'no message on {topic}: there is nothing to judge')
    found = [state for name, message in states.items() if (state := positions_from_message(name, message)) is not None]
    received = tuple(Received(now_ns, trajectory_from_message(message)) for now_ns, message in trajectories)
    return Recording(topic, received, *controller_first(topic, found), received[0].now_ns)


def controller_first(topic: str, states: Iterable[JointPositions]) -> tuple[tuple[JointPositions, ...], tuple[str, ...]]:
    """``states`` with that of the topic's own controller first, and the joints that it names (empty where it is not there)."""
    own = state_topic_of(topic)
    ordered = tuple(sorted(states, key=lambda state: (state.source != own, state.source)))
    return ordered, tuple(ordered[0].positions) if ordered and ordered[0].source == own else ()


def trajectory_from_message(message: Any) -> TrajectoryMessage:
    """The content of a trajectory_msgs/JointTrajectory."""
    points = [
        TrajectoryPoint(
            _nanoseconds(point.time_from_start),
            np.asarray(point.positions),
            np.asarray(point.velocities),
            np.asarray(point.accelerations),
            np.asarray(point.effort),
        )
        for point in message.points
    ]
    return TrajectoryMessage(tuple(message.joint_names), points, _nanoseconds(message.header.stamp))


def positions_from_message(source: str, message: Any) -> JointPositions | None:
    """Positions of a sensor_msgs/JointState, or the reference of a control_msgs/JointTrajectoryControllerState.

    None where there are none: a state without positions, with repeated names, or with values that are not finite.
    """
    if hasattr(message, 'joint_names'):
        # Humble calls it desired; later releases fill both, or have only the reference.
        candidates = [getattr(message, name).positions for name in ('reference', 'desired') if hasattr(message, name)]
        names = tuple(message.joint_names)
        values = next((positions for positions in candidates if len(positions)), ())
    else:
        names, values = tuple(message.name), message.position
    fits = 0 < len(names) == len(values) and len(set(names)) == len(names)
    if not fits or not np.isfinite(np.asarray(values, dtype=np.float64)).all():
        return None
    return JointPositions(source, {name: float(value) for name, value in zip(names, values, strict=True)})


def stamp_ns(message: Any) -> int:
    """``header.stamp`` in ns."""
    return _nanoseconds(message.header.stamp)


def clock_ns(message: Any) -> int:
    """The time of a rosgraph_msgs/Clock in ns."""
    return _nanoseconds(message.clock)


def state_topic_of(command_topic: str) -> str:
    """The state topic that a joint_trajectory_controller publishes beside its command topic."""
    return f'{command_topic.rpartition("/")[0]}/controller_state'


def _nanoseconds(time: Any) -> int:
    return int(time.sec) * NS_PER_S + int(time.nanosec)
