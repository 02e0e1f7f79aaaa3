"""The acceptance rules of the joint_trajectory_controller (Jazzy), and what it accepts but executes badly.

`validate` answers as the controller does when a message arrives: None, or the first rule that drops it. `lint` names what
passes validation and still hurts: the controller checks neither finiteness nor limits nor duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal, get_args

import numpy as np

from vla_policy_ros.control.jtc_trajectory import InterpolationMethod, TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.types import NS_PER_S

FLT_EPSILON = float(np.finfo(np.float32).eps)
Distro = Literal['humble', 'jazzy', 'kilted', 'rolling']
DISTROS: tuple[Distro, ...] = get_args(Distro)

# What the releases set by default where they differ, and the parameters that only some of them have.
_DISTRO_DEFAULTS: dict[str, dict[str, Any]] = {
    'humble': {'allow_nonzero_velocity_at_trajectory_end': True},
    'jazzy': {},
    'kilted': {},
    'rolling': {'allow_trajectory_replacement': True},
}
_ONLY_IN: dict[str, tuple[Distro, ...]] = {
    'open_loop_control': ('humble', 'jazzy'),
    'interpolate_from_desired_state': ('jazzy', 'kilted', 'rolling'),
    'allow_trajectory_replacement': ('rolling',),
    'max_deceleration_on_cancel': ('jazzy', 'kilted', 'rolling'),
}


@dataclass(frozen=True)
class ControllerParameters:
    """Parameters of the controller, named as in its own parameter file.

    Attributes:
        joints: all joints, in the order of the command.
        distro: the release of ros2_controllers whose behaviour it has.
        update_rate: Hz, of the controller manager.
        interpolate_from_desired_state: start a new trajectory from the last command instead of the measured state.
        open_loop_control: the older name of the same behaviour (Humble, Jazzy).
        allow_trajectory_replacement: blend a new trajectory with the running one instead of forgetting that (Rolling).
        allow_partial_joints_goal: accept a subset of the joints; the others hold.
        allow_nonzero_velocity_at_trajectory_end: accept a last point that still moves.
        allow_integration_in_goal_trajectories: accept points without positions.
        interpolation_method: ``splines`` or ``none``.
        cmd_timeout: s after the last point until the controller holds; 0 is never.
        goal_time: ``constraints.goal_time``, s a goal may be late; 0 is unlimited.
        trajectory_tolerance: ``constraints.<joint>.trajectory`` per joint; absent or 0 is not checked.
        goal_tolerance: ``constraints.<joint>.goal`` per joint; absent or 0 is not checked.
        max_deceleration_on_cancel: per joint; when all joints have one, a cancel decelerates instead of stopping at once.
        angle_wraparound: joints that turn without end.
        effort_command_interface: whether the controller commands effort.
    """

    joints: tuple[str, ...]
    update_rate: float = 100.0
    interpolate_from_desired_state: bool = False
    open_loop_control: bool = False
    allow_trajectory_replacement: bool = False
    allow_partial_joints_goal: bool = False
    allow_nonzero_velocity_at_trajectory_end: bool = False
    allow_integration_in_goal_trajectories: bool = False
    interpolation_method: InterpolationMethod = 'splines'
    cmd_timeout: float = 0.0
    goal_time: float = 0.0
    trajectory_tolerance: Mapping[str, float] = field(default_factory=dict)
    goal_tolerance: Mapping[str, float] = field(default_factory=dict)
    max_deceleration_on_cancel: Mapping[str, float] = field(default_factory=dict)
    angle_wraparound: tuple[str, ...] = ()
    effort_command_interface: bool = False
    distro: Distro = 'jazzy'

    @classmethod
    def for_distro(cls, distro: str, joints: tuple[str, ...], **changes: Any) -> ControllerParameters:
        """The defaults of a release, with ``changes``.

        Raises:
            ValueError: an unknown release, or a parameter that the release does not have and that asks for something.
        """
        if distro not in DISTROS:
            raise ValueError(f'distro {distro!r} is unknown; use one of {", ".join(DISTROS)}')
        known = {item.name for item in fields(cls)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f'joint_trajectory_controller has no parameter {name!r} that matters here')
            if value and distro not in _ONLY_IN.get(name, DISTROS):
                raise ValueError(f'{distro} has no parameter {name}; it exists in {", ".join(_ONLY_IN[name])}')
        return cls(joints=tuple(joints), distro=distro, **{**_DISTRO_DEFAULTS[distro], **changes})

    @property
    def starts_from_command(self) -> bool:
        """Whether a new trajectory starts from the last command rather than from the measured state."""
        return self.interpolate_from_desired_state or self.open_loop_control

    @property
    def update_period_ns(self) -> int:
        """Nominal time between two updates."""
        return int(NS_PER_S / self.update_rate)

    @property
    def effective_cmd_timeout(self) -> float:
        """``cmd_timeout``, or 0 (never) where it does not exceed ``goal_time``, which silently disables it."""
        return self.cmd_timeout if self.cmd_timeout > self.goal_time else 0.0


class Rule(Enum):
    """What is wrong with a message. The value says what the controller does about it."""

    JOINT_COUNT = 'rejected: not all controller joints are named and partial goals are not allowed'
    NO_JOINT_NAMES = 'rejected: joint_names is empty'
    NO_POINTS = 'rejected: points is empty; an empty trajectory does not stop the arm'
    UNKNOWN_JOINT = 'rejected: a joint is not one of the controller'
    MOVING_END = 'rejected: the last point still moves'
    ENDS_IN_PAST = 'rejected: the stamped trajectory is already over on the clock of the controller'
    TIME_NOT_INCREASING = 'rejected: time_from_start does not strictly increase'
    FIELD_SIZE = 'rejected: a field does not have one value per joint name'
    NO_DATA = 'rejected: a point has no positions, velocities or accelerations'
    EFFORT = 'rejected: effort needs an effort command interface'

    NOT_FINITE = 'accepted, but NaN or infinity is commanded as it is'
    DUPLICATE_JOINT = 'accepted, but the joint left out is commanded a stale value'
    ACCELERATION_WITHOUT_VELOCITY = 'accepted, but 0.0 is commanded on every joint between points'
    STEP_TO_FIRST_POINT = 'accepted, but the command steps to the first point in one cycle'
    SINGLE_POINT = 'accepted, but nothing follows the first point, and releases with replacement never blend it'
    MOVES_ON = 'accepted, but after its end the last velocity is commanded for ever'
    PAST_STAMP = 'accepted, but it starts in the past: the command steps into it, or it is replayed late'
    POSITIONS_ONLY = 'accepted, but interpolated linearly: the velocity jumps at every point'


@dataclass(frozen=True)
class Finding:
    """A broken rule and a sentence with the values that broke it."""

    rule: Rule
    sentence: str


def _lint_for(message: TrajectoryMessage, parameters: ControllerParameters, now_ns: int | None) -> list[Finding]:
    findings = []
    points = message.points
    if points and parameters.allow_nonzero_velocity_at_trajectory_end and np.any(np.abs(points[-1].velocities) > FLT_EPSILON):
        findings.append(
            Finding(
                Rule.MOVES_ON,
                f'the last point moves at {np.abs(points[-1].velocities).max():.4g} and '
                'allow_nonzero_velocity_at_trajectory_end lets it: end at rest',
            )
        )
    if points and now_ns is not None and message.stamp_ns > 0:
        late = (now_ns - message.stamp_ns - points[0].time_from_start_ns) * 1e-9
        if late > 0 and parameters.allow_trajectory_replacement:
            findings.append(Finding(Rule.PAST_STAMP, f'its first point was due {late:.3f} s ago: it is replayed from there, late'))
    return findings


def validate(message: TrajectoryMessage, parameters: ControllerParameters, now_ns: int) -> Finding | None:
    """The first rule that makes the controller drop ``message`` when it arrives at ``now_ns``, or None if it is accepted."""
    names, points = message.joint_names, message.points
    if not parameters.allow_partial_joints_goal and len(names) != len(parameters.joints):
        return Finding(
            Rule.JOINT_COUNT,
            f'{len(names)} joints named, the controller has {len(parameters.joints)}: name all of them '
            'or set allow_partial_joints_goal',
        )
    if not names:
        return Finding(Rule.NO_JOINT_NAMES, 'joint_names is empty: name the joints of the controller')
    if not points:
        return Finding(Rule.NO_POINTS, 'points is empty: to stop, send a decelerating trajectory')
    for name in names:
        if name not in parameters.joints:
            return Finding(Rule.UNKNOWN_JOINT, f'joint {name!r} is not one of {", ".join(parameters.joints)}')
    if not parameters.allow_nonzero_velocity_at_trajectory_end:
        for name, velocity in zip(names, points[-1].velocities, strict=False):
            if abs(velocity) > FLT_EPSILON:
                return Finding(
                    Rule.MOVING_END,
                    f'the last point moves joint {name!r} at {velocity:.6g}: end at rest '
                    'or set allow_nonzero_velocity_at_trajectory_end',
                )
    end_ns = message.stamp_ns + points[-1].time_from_start_ns
    if message.stamp_ns != 0 and end_ns < now_ns:
        return Finding(
            Rule.ENDS_IN_PAST,
            f'it ended {(now_ns - end_ns) * 1e-9:.3f} s ago on the clock of the controller: '
            'use stamp 0, or one clock (use_sim_time) on both sides',
        )
    for index, point in enumerate(points):
        finding = _validate_point(index, message, parameters) or _validate_effort(index, point, parameters)
        if finding is not None:
            return finding
    return None


def _validate_point(index: int, message: TrajectoryMessage, parameters: ControllerParameters) -> Finding | None:
    point, count = message.points[index], len(message.joint_names)
    if index > 0:
        previous_ns = message.points[index - 1].time_from_start_ns
        if point.time_from_start_ns <= previous_ns:
            return Finding(
                Rule.TIME_NOT_INCREASING,
                f'points {index - 1} and {index} are at {previous_ns * 1e-9:.6f} s and {point.time_from_start_ns * 1e-9:.6f} s',
            )
    integrated = parameters.allow_integration_in_goal_trajectories
    if integrated and not (point.positions.size or point.velocities.size or point.accelerations.size):
        return Finding(Rule.NO_DATA, f'point {index} has no positions, velocities or accelerations')
    fields = {'positions': point.positions, 'velocities': point.velocities, 'accelerations': point.accelerations}
    for name, values in fields.items():
        may_be_absent = integrated or name != 'positions'
        if values.size != count and not (may_be_absent and values.size == 0):
            return Finding(Rule.FIELD_SIZE, f'point {index} has {values.size} {name} for {count} joint names')
    return None


def _validate_effort(index: int, point: TrajectoryPoint, parameters: ControllerParameters) -> Finding | None:
    if point.effort.size and (parameters.distro == 'humble' or not parameters.effort_command_interface):
        return Finding(Rule.EFFORT, f'point {index} has effort values: leave effort empty')
    return None


def lint(
    message: TrajectoryMessage, parameters: ControllerParameters | None = None, now_ns: int | None = None
) -> list[Finding]:
    """What the controller accepts and executes badly in ``message``, one finding per kind.

    ``parameters`` and the time of arrival add what depends on them.
    """
    findings = [] if parameters is None else _lint_for(message, parameters, now_ns)
    points, names = message.points, message.joint_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        findings.append(Finding(Rule.DUPLICATE_JOINT, f'joint {twice[0]!r} is named {names.count(twice[0])} times'))
    for index, point in enumerate(points):
        values = np.concatenate([point.positions, point.velocities, point.accelerations])
        if not np.all(np.isfinite(values)):
            findings.append(Finding(Rule.NOT_FINITE, f'point {index} has a value that is not finite'))
            break
    if any(point.accelerations.size and point.positions.size and not point.velocities.size for point in points):
        findings.append(Finding(Rule.ACCELERATION_WITHOUT_VELOCITY, 'accelerations are given without velocities'))
    if points and message.stamp_ns == 0 and points[0].time_from_start_ns <= 0:
        findings.append(Finding(Rule.STEP_TO_FIRST_POINT, 'stamp 0 with time_from_start 0 leaves no time to reach point 0'))
    if len(points) == 1:
        findings.append(Finding(Rule.SINGLE_POINT, 'one point only'))
    if points and all(point.velocities.size == 0 and point.accelerations.size == 0 for point in points):
        findings.append(Finding(Rule.POSITIONS_ONLY, 'no point has velocities'))
    return findings
