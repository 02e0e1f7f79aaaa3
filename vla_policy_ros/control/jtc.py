"""Emulator of the joint_trajectory_controller: what a message becomes, cycle by cycle.

It is Jazzy's (4.42), with what Humble (2.54), Kilted (5.17) and Rolling (6.9) do differently where ``parameters.distro`` says so:
Humble commands the trajectory now and not one period ahead, takes its time from the clock, and repeats the state before a new
trajectory for one update; Rolling blends a new trajectory with the running one. Kilted differs in its parameters only.

`JointTrajectoryController` receives messages as the ``~/joint_trajectory`` topic (or goals as the action) would bring them and
is updated at the controller manager's rate. It reproduces what matters to a sender: validation, the single real-time slot in
which the newest message wins, replacement that forgets the old trajectory, the start from the measured or the last commanded
state, the command that looks one period ahead of the reference, tolerances, time-out and hold.

Enters: messages, the clock, measured positions. Leaves: one `Command` per update. Single thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike

from vla_policy_ros.control.jtc_blending import blend
from vla_policy_ros.control.jtc_rules import ControllerParameters, Finding, Rule, validate
from vla_policy_ros.control.jtc_stopping import decelerate, hold
from vla_policy_ros.control.jtc_trajectory import Array, Sample, Trajectory, TrajectoryMessage, TrajectoryPoint

__all__ = [
    'Acceptance',
    'Command',
    'ControllerParameters',
    'Goal',
    'GoalStatus',
    'JointTrajectoryController',
    'TrajectoryMessage',
    'TrajectoryPoint',
]


@dataclass(frozen=True)
class Acceptance:
    """The controller's answer to a message: ``finding`` says why it was dropped, None when it was accepted."""

    finding: Finding | None = None

    @property
    def accepted(self) -> bool:
        """Whether the message will be executed."""
        return self.finding is None

    @property
    def reason(self) -> str:
        """A sentence for the operator; empty when accepted."""
        return '' if self.finding is None else f'{self.finding.rule.value}: {self.finding.sentence}'


@dataclass(frozen=True)
class Command:
    """What one update commands.

    Attributes:
        stamp_ns: time of the update.
        positions, velocities, accelerations: float64 ``[J]`` written to the hardware: the trajectory one period ahead.
        reference_positions, reference_velocities: float64 ``[J]``: the trajectory now, as ``~/controller_state`` reports it.
    """

    stamp_ns: int
    positions: Array
    velocities: Array
    accelerations: Array
    reference_positions: Array
    reference_velocities: Array


class GoalStatus(Enum):
    """Life of an action goal."""

    ACTIVE = 'active'
    SUCCEEDED = 'succeeded'
    CANCELED = 'canceled'
    INVALID_GOAL = 'aborted: preempted by a new goal'
    PATH_TOLERANCE_VIOLATED = 'aborted: path tolerance violated'
    GOAL_TOLERANCE_VIOLATED = 'aborted: goal tolerance still violated after goal_time'


@dataclass
class Goal:
    """A FollowJointTrajectory goal that was accepted."""

    status: GoalStatus = GoalStatus.ACTIVE


@dataclass
class Counters:
    """How many messages were accepted, rejected (by rule), and overwritten before an update saw them."""

    accepted: int = 0
    overwritten: int = 0
    rejected: Counter[Rule] = field(default_factory=Counter)


class JointTrajectoryController:
    """The active controller with position command interfaces.

    Args:
        parameters: see `ControllerParameters`.
        positions: measured positions ``[J]`` at activation; the controller starts by holding them.

    Raises:
        ValueError: ``positions`` does not fit the joints.
    """

    def __init__(self, parameters: ControllerParameters, positions: ArrayLike) -> None:
        self.parameters = parameters
        self._decelerations = _per_joint(parameters.max_deceleration_on_cancel, parameters.joints)
        self._wraparound = tuple(joint in parameters.angle_wraparound for joint in parameters.joints)
        self.speed_scaling = parameters.speed_scaling
        self.activate(positions)

    def activate(self, positions: ArrayLike) -> None:
        """(Re)start at ``positions`` ``[J]``: forget every trajectory, hold. Counters start again."""
        measured = self._joint_vector(positions, 'positions')
        self.counters = Counters()
        self.goal: Goal | None = None
        self.timed_out = False
        self._set_tolerances()
        self._trajectory = Trajectory(keeps_cursor_when_looking_ahead=self.parameters.distro == 'rolling')
        self._measured = TrajectoryPoint(0, measured)
        self._last_command = TrajectoryPoint(0, measured)
        self._last_command_ns: int | None = None
        self._written = TrajectoryPoint(0, measured, np.zeros_like(measured), np.zeros_like(measured))
        self._reference = self._written.copy()
        self._holding = True
        self._trajectory_ns = 0
        self._sort_buffer = np.zeros_like(measured)
        self._pending: TrajectoryMessage | None = self._hold_message()

    @property
    def is_holding(self) -> bool:
        """True after activation, time-out, cancel, violation or success, until the next message."""
        return self._holding

    def receive(self, message: TrajectoryMessage, now_ns: int) -> Acceptance:
        """A message arrives on the topic. An accepted one waits for the next update and replaces one that waits already."""
        finding = validate(message, self.parameters, now_ns)
        if finding is not None:
            self.counters.rejected[finding.rule] += 1
            return Acceptance(finding)
        self.counters.accepted += 1
        if self._pending is not None and not self._holding:
            self.counters.overwritten += 1
        self._pending = message.copy()
        self._holding = False
        return Acceptance()

    def send_goal(
        self,
        message: TrajectoryMessage,
        now_ns: int,
        trajectory_tolerance: Mapping[str, float] | None = None,
        goal_tolerance: Mapping[str, float] | None = None,
        goal_time: float | None = None,
    ) -> tuple[Acceptance, Goal | None]:
        """A message arrives as an action goal. Accepting it ends the active goal; a topic message never does.

        Tolerances that come with the goal replace those of the parameters, until the next goal: also for topic messages.
        """
        acceptance = self.receive(message, now_ns)
        if not acceptance.accepted:
            return acceptance, None
        self._finish_goal(GoalStatus.CANCELED if self.parameters.distro == 'humble' else GoalStatus.INVALID_GOAL)
        self._set_tolerances(trajectory_tolerance, goal_tolerance, goal_time)
        self.goal = Goal()
        return acceptance, self.goal

    def cancel_goal(self) -> None:
        """Cancel the active goal and stop; without an active goal nothing happens."""
        if self.goal is not None:
            self._finish_goal(GoalStatus.CANCELED)
            self._pending = self._stop_message()

    def update(
        self,
        now_ns: int,
        measured_positions: ArrayLike,
        measured_velocities: ArrayLike | None = None,
        period_ns: int | None = None,
    ) -> Command:
        """One control cycle at ``now_ns``.

        Args:
            now_ns: time of this update.
            measured_positions: ``[J]``.
            measured_velocities: ``[J]`` where the hardware has velocity state interfaces, else None.
            period_ns: time since the last update as the controller manager measures it; None is the nominal period.

        Raises:
            ValueError: a measured vector does not fit the joints.
        """
        self._take_pending(now_ns)
        self._read_state(measured_positions, measured_velocities)
        self._advance(now_ns, self.parameters.update_period_ns if period_ns is None else period_ns)
        method = self.parameters.interpolation_method
        first_sample = not self._trajectory.is_sampled_already
        desired = self._trajectory.sample(self._trajectory_ns, method)
        if self.parameters.distro == 'humble':
            ahead = desired
        else:
            ahead_ns = self._trajectory_ns + self.parameters.update_period_ns
            ahead = self._trajectory.sample(ahead_ns, method, search_monotonically_increasing=False)
        if desired.state is not None:
            self._reference = desired.state
        if ahead.state is not None:
            self._judge_and_write(now_ns, ahead, ahead.state, first_sample)
        return Command(
            now_ns,
            self._written.positions,
            _or_zero(self._written.velocities, self._written.positions),
            _or_zero(self._written.accelerations, self._written.positions),
            self._reference.positions,
            _or_zero(self._reference.velocities, self._reference.positions),
        )

    def query_state(self, time_ns: int) -> Sample:
        """The ``~/query_state`` service. A time ahead moves the segment search of the running trajectory for good."""
        return self._trajectory.sample(time_ns, self.parameters.interpolation_method)

    # One cycle, in order.

    def _take_pending(self, now_ns: int) -> None:
        if self._pending is None:
            return
        message, self._pending = self._pending, None
        blended = None
        # A single point is not blended, and neither is what the controller makes for itself to hold.
        if self.parameters.allow_trajectory_replacement and not self._holding and len(self._trajectory.points) > 1:
            delay_ns = round(max(message.stamp_ns - now_ns, 0) * self.speed_scaling)
            joints, method = self.parameters.joints, self.parameters.interpolation_method
            sort, cursor_ns = self._sort_to_local_joint_order, self._trajectory_ns
            blended = blend(self._trajectory, message, joints, delay_ns, cursor_ns, method, sort)
        if blended is None:
            self._fill_partial_goal(message)
            self._sort_to_local_joint_order(message)
        self._trajectory.update(message if blended is None else blended)

    def _read_state(self, positions: ArrayLike, velocities: ArrayLike | None) -> None:
        measured = TrajectoryPoint(0, self._joint_vector(positions, 'measured_positions'))
        if velocities is not None:
            measured.velocities = self._joint_vector(velocities, 'measured_velocities')
        self._measured = measured

    def _advance(self, now_ns: int, period_ns: int) -> None:
        """Move the trajectory's time by the cycle; the first cycle of a message sets where it starts from."""
        first, humble = not self._trajectory.is_sampled_already, self.parameters.distro == 'humble'
        if first:
            before, before_ns = self._measured, now_ns
            if self.parameters.starts_from_command:
                before = self._last_command
                # Dated by the update that computed it, although it was sampled one period ahead; Humble dates it now.
                if not humble and self._last_command_ns is not None:
                    before_ns = self._last_command_ns
            self._trajectory.set_point_before_trajectory_msg(before_ns, before, self._wraparound)
        if first or humble:
            self._trajectory_ns = now_ns
        else:
            # Later clock jumps do not move a running trajectory: only the period counts.
            self._trajectory_ns += round(period_ns * self.speed_scaling)

    def _judge_and_write(self, now_ns: int, ahead: Sample, command: TrajectoryPoint, first_sample: bool) -> None:
        ended = ahead.end_index == len(self._trajectory.points)
        point = self._trajectory.points[ahead.start_index]
        since_point_s = (self._trajectory_ns - self._trajectory.start_ns - point.time_from_start_ns) * 1e-9
        free = not self._holding

        error = np.abs(self._position_error())
        path_violated = free and (not ended or first_sample) and _violates(error, self._path_tolerance)
        outside_goal = free and ended and _violates(error, self._goal_tolerance)
        too_late = outside_goal and 0.0 < self._goal_time < since_point_s

        timeout = self.parameters.effective_cmd_timeout
        if ended and free and 0.0 < timeout < since_point_s:
            self.timed_out = True
            self._pending = self._stop_message()

        if not path_violated and not too_late:
            self._written = command
            self._last_command = command
            self._last_command_ns = now_ns

        if path_violated:
            self._finish_goal(GoalStatus.PATH_TOLERANCE_VIOLATED)
            self._pending = self._stop_message()
        elif too_late:
            self._finish_goal(GoalStatus.GOAL_TOLERANCE_VIOLATED)
            self._pending = self._stop_message()
        elif ended and not outside_goal and self.goal is not None:
            self._finish_goal(GoalStatus.SUCCEEDED)
            self._pending = self._success_message()

    def _position_error(self) -> Array:
        error = self._reference.positions - self._measured.positions
        turned = np.mod(error + np.pi, 2.0 * np.pi) - np.pi
        wrapped: Array = np.where(self._wraparound, turned, error)
        return wrapped

    def _set_tolerances(
        self,
        trajectory: Mapping[str, float] | None = None,
        goal: Mapping[str, float] | None = None,
        goal_time: float | None = None,
    ) -> None:
        defaults, joints = self.parameters, self.parameters.joints
        self._path_tolerance = _per_joint({**defaults.trajectory_tolerance, **(trajectory or {})}, joints)
        self._goal_tolerance = _per_joint({**defaults.goal_tolerance, **(goal or {})}, joints)
        self._goal_time = defaults.goal_time if goal_time is None else goal_time

    def _finish_goal(self, status: GoalStatus) -> None:
        if self.goal is not None:
            self.goal.status = status
            self.goal = None

    # Messages the controller makes for itself.

    def _hold_message(self) -> TrajectoryMessage:
        """The measured position, reached within one cycle."""
        self._holding = True
        return hold(self.parameters.joints, self._measured.positions)

    def _success_message(self) -> TrajectoryMessage:
        """The last point as it was sent, repeated: a velocity it carries is repeated as well."""
        self._holding = True
        last = self._trajectory.points[-1].copy()
        last.time_from_start_ns = 0
        return TrajectoryMessage(self.parameters.joints, [last])

    def _stop_message(self) -> TrajectoryMessage:
        """Hold at the measured position, or decelerate from the measured state where that is asked for and known."""
        self._holding = True
        can_brake = self.parameters.decelerate_on_cancel and bool(np.all(self._decelerations > 0.0))
        if not can_brake or self._measured.velocities.size == 0:
            return hold(self.parameters.joints, self._measured.positions)
        return decelerate(self.parameters.joints, self._measured, self._decelerations, self.parameters.update_period_ns)

    # Joints.

    def _fill_partial_goal(self, message: TrajectoryMessage) -> None:
        """Joints that a partial goal leaves out hold the last written command with zero velocity."""
        joints = self.parameters.joints
        if len(message.joint_names) == len(joints):
            return
        omitted = [index for index, joint in enumerate(joints) if joint not in message.joint_names]
        message.joint_names = (*message.joint_names, *(joints[index] for index in omitted))
        zeros = np.zeros(len(omitted))
        for point in message.points:
            if point.positions.size:
                point.positions = np.concatenate([point.positions, self._written.positions[omitted]])
            for name in ('velocities', 'accelerations', 'effort'):
                if getattr(point, name).size:
                    setattr(point, name, np.concatenate([getattr(point, name), zeros]))

    def _sort_to_local_joint_order(self, message: TrajectoryMessage) -> None:
        """Reorder the columns. One buffer serves all fields, so a joint that no name points at keeps a stale value."""
        mapping = [self.parameters.joints.index(name) for name in message.joint_names]
        for point in message.points:
            for name in ('positions', 'velocities', 'accelerations', 'effort'):
                values = getattr(point, name)
                if values.size and values.size == self._sort_buffer.size == len(mapping):
                    for index, value in zip(mapping, values, strict=True):
                        self._sort_buffer[index] = value
                    setattr(point, name, self._sort_buffer.copy())
        message.joint_names = self.parameters.joints

    def _joint_vector(self, values: ArrayLike, name: str) -> Array:
        vector = np.array(values, dtype=np.float64)
        if vector.shape != (len(self.parameters.joints),):
            raise ValueError(f'{name} has shape {vector.shape}, the controller has {len(self.parameters.joints)} joints')
        return vector


def _per_joint(values: Mapping[str, float], joints: tuple[str, ...]) -> Array:
    return np.array([values.get(joint, 0.0) for joint in joints])


def _or_zero(values: Array, like: Array) -> Array:
    return values if values.size else np.zeros_like(like)


def _violates(error: Array, tolerance: Array) -> bool:
    """A tolerance of 0 is not checked."""
    return bool(np.any((tolerance > 0.0) & (error > tolerance)))
