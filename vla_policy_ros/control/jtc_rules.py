"""The acceptance rules of the joint_trajectory_controller, per release, and what it accepts but executes badly.

`ControllerParameters` says which controller it is. `validate` answers as that controller does when a message arrives: None, or the
first rule that drops it. `lint` names what passes validation and still hurts: the controller checks neither finiteness nor limits
nor duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla_policy_ros.control.jtc_trajectory import InterpolationMethod, Trajectory, TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.types import NS_PER_S

FLT_EPSILON = float(np.finfo(np.float32).eps)
_ROUNDING = 1e-9
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
    'speed_scaling': ('jazzy', 'kilted', 'rolling'),
    'decelerate_on_cancel': ('jazzy', 'kilted', 'rolling'),
    'max_deceleration_on_cancel': ('jazzy', 'kilted', 'rolling'),
}

# What a release does that does not have one of them, where it is not False.
_WITHOUT: dict[str, Any] = {'speed_scaling': 1.0, 'max_deceleration_on_cancel': {}}


def _known_distro(name: str) -> Distro:
    for distro in DISTROS:
        if distro == name:
            return distro
    raise ValueError(f'distro {name!r} is unknown; use one of {", ".join(DISTROS)}')


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
        decelerate_on_cancel: ``constraints.decelerate_on_cancel``: where all joints have a deceleration and velocities are
            measured, decelerate at a cancel, a time-out or a violation, instead of stopping at once (Jazzy and later).
        max_deceleration_on_cancel: ``constraints.<joint>.max_deceleration_on_cancel`` per joint.
        speed_scaling: ``speed_scaling.initial_scaling_factor``: trajectory time per time (Jazzy and later).
        angle_wraparound: joints that turn without end.
        effort_command_interface: whether the controller commands effort.

    Raises:
        ValueError: an unknown release, or a parameter that the release does not have and that differs from what it does without.
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
    decelerate_on_cancel: bool = False
    max_deceleration_on_cancel: Mapping[str, float] = field(default_factory=dict)
    speed_scaling: float = 1.0
    angle_wraparound: tuple[str, ...] = ()
    effort_command_interface: bool = False
    distro: Distro = 'jazzy'

    def __post_init__(self) -> None:
        _known_distro(self.distro)
        for name, distros in _ONLY_IN.items():
            if self.distro not in distros and getattr(self, name) != _WITHOUT.get(name, False):
                raise ValueError(
                    f'{self.distro} has no parameter {name} (set to {getattr(self, name)!r}); it exists in {", ".join(distros)}: '
                    'leave it out, or name the right distro'
                )

    @classmethod
    def for_distro(cls, distro: str, joints: tuple[str, ...], **changes: Any) -> ControllerParameters:
        """The defaults of a release, with ``changes``.

        Raises:
            ValueError: an unknown release, an unknown parameter, or one that the release does not have.
        """
        release = _known_distro(distro)
        known = [item.name for item in fields(cls)]
        unknown = next((name for name in changes if name not in known), None)
        if unknown is not None:
            raise ValueError(f'the emulated controller has no parameter {unknown!r}; use some of {", ".join(known)}')
        return cls(joints=tuple(joints), distro=release, **{**_DISTRO_DEFAULTS[release], **changes})

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
    EFFORT = 'rejected: effort needs an effort command interface, and Humble takes none'

    NOT_FINITE = 'accepted, but NaN or infinity is commanded as it is'
    DUPLICATE_JOINT = 'accepted, but the joint left out is commanded a stale value'
    ACCELERATION_WITHOUT_VELOCITY = 'accepted, but 0.0 is commanded on every joint between points'
    STEP_TO_FIRST_POINT = 'accepted, but the command steps to the first point in one cycle'
    SINGLE_POINT = 'accepted, but nothing follows the first point, and the next trajectory is never blended with it'
    MOVES_ON = 'accepted, but after its end the last velocity is commanded for ever'
    PAST_STAMP = 'accepted, but where it replaces a trajectory it is replayed from its first point, late'
    STEP_INTO_PAST = 'accepted, but it runs already when it arrives: the command steps to where it is'
    EFFORT_UNCHECKED = 'accepted, but the effort is commanded as it is, against no limit'
    POSITIONS_ONLY = 'accepted, but interpolated linearly: the velocity jumps at every point'


@dataclass(frozen=True)
class Finding:
    """A broken rule and a sentence with the values that broke it."""

    rule: Rule
    sentence: str


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
    message: TrajectoryMessage,
    parameters: ControllerParameters | None = None,
    now_ns: int | None = None,
    command: ArrayLike | None = None,
) -> list[Finding]:
    """What the controller accepts and executes badly in ``message``, one finding per kind.

    Args:
        message: as sent; judged whether or not `validate` accepts it.
        parameters: of the controller; without them only what hurts on every controller is found.
        now_ns: the time of arrival; without it stamps are not judged.
        command: what is commanded at ``now_ns``, ``[J]`` in the order of ``parameters.joints``; without it nobody can tell whether
            a trajectory that runs already continues the motion.
    """
    found = [_lint_moving_end(message, parameters), _lint_stamp(message, parameters, now_ns, command)]
    found += [_lint_names(message), _lint_finite(message), _lint_accelerations(message), _lint_effort(message)]
    found += [_lint_first_point(message), _lint_single(message), _lint_velocities(message)]
    return [finding for finding in found if finding is not None]


def _lint_moving_end(message: TrajectoryMessage, parameters: ControllerParameters | None) -> Finding | None:
    if parameters is None or not parameters.allow_nonzero_velocity_at_trajectory_end or not message.points:
        return None
    speed = max(np.abs(message.points[-1].velocities), default=0.0)
    if not speed > FLT_EPSILON:
        return None
    return Finding(
        Rule.MOVES_ON,
        f'the last point moves at {speed:.4g} and allow_nonzero_velocity_at_trajectory_end lets it: end at rest',
    )


def _lint_stamp(
    message: TrajectoryMessage, parameters: ControllerParameters | None, now_ns: int | None, command: ArrayLike | None
) -> Finding | None:
    if parameters is None or now_ns is None or message.stamp_ns == 0 or not message.points:
        return None
    late_s = (now_ns - message.stamp_ns) / NS_PER_S
    if parameters.allow_trajectory_replacement:
        if late_s <= 1.0 / parameters.update_rate:
            return None
        return Finding(
            Rule.PAST_STAMP,
            f'its stamp passed {late_s:.3f} s ago: use stamp 0, or set allow_trajectory_replacement to false',
        )
    due = late_s > message.points[0].time_from_start_ns / NS_PER_S
    if not due or command is None or sorted(message.joint_names) != sorted(parameters.joints):
        return None
    return _lint_entry(message, parameters, now_ns, np.asarray(command, dtype=np.float64))


def _lint_entry(
    message: TrajectoryMessage, parameters: ControllerParameters, now_ns: int, command: NDArray[np.float64]
) -> Finding | None:
    """Whether the trajectory is where the command is, up to what it moves itself in a period at its fastest."""
    order = [message.joint_names.index(joint) for joint in parameters.joints]
    trajectory = Trajectory()
    trajectory.update(message)
    state = trajectory.sample(now_ns, parameters.interpolation_method).state
    if state is None or not all(point.positions.size == len(order) for point in message.points):
        return None
    positions = np.array([point.positions for point in message.points])
    times_s = np.array([point.time_from_start_ns for point in message.points]) / NS_PER_S
    fastest = np.max(np.abs(np.diff(positions, axis=0)) / np.diff(times_s)[:, None], axis=0, initial=0.0)
    excess = np.abs(state.positions[order] - command) - fastest[order] / parameters.update_rate
    joint = int(np.argmax(excess))
    if not excess[joint] > _ROUNDING:
        return None
    late_s, there = (now_ns - message.stamp_ns) / NS_PER_S, state.positions[order][joint]
    return Finding(
        Rule.STEP_INTO_PAST,
        f'joint {parameters.joints[joint]!r} is commanded to {command[joint]:.4g}; {late_s:.3f} s after its start the trajectory '
        f'is at {there:.4g}: begin with the motion commanded already, or leave time before the first point',
    )


def _lint_names(message: TrajectoryMessage) -> Finding | None:
    names = message.joint_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if not twice:
        return None
    return Finding(Rule.DUPLICATE_JOINT, f'joint {twice[0]!r} is named {names.count(twice[0])} times: name each joint once')


def _lint_finite(message: TrajectoryMessage) -> Finding | None:
    for index, point in enumerate(message.points):
        values = np.concatenate([point.positions, point.velocities, point.accelerations, point.effort])
        if not np.all(np.isfinite(values)):
            return Finding(Rule.NOT_FINITE, f'point {index} has a value that is not finite: do not send it')
    return None


def _lint_accelerations(message: TrajectoryMessage) -> Finding | None:
    for index, point in enumerate(message.points):
        if point.accelerations.size and point.positions.size and not point.velocities.size:
            return Finding(
                Rule.ACCELERATION_WITHOUT_VELOCITY,
                f'point {index} has accelerations without velocities: send velocities too, or leave accelerations empty',
            )
    return None


def _lint_effort(message: TrajectoryMessage) -> Finding | None:
    for index, point in enumerate(message.points):
        if point.effort.size:
            return Finding(
                Rule.EFFORT_UNCHECKED, f'point {index} has effort up to {np.abs(point.effort).max():.4g}: leave effort empty'
            )
    return None


def _lint_first_point(message: TrajectoryMessage) -> Finding | None:
    points = message.points
    if not points or message.stamp_ns != 0 or points[0].time_from_start_ns > 0:
        return None
    return Finding(
        Rule.STEP_TO_FIRST_POINT,
        f'stamp 0 with time_from_start {points[0].time_from_start_ns / NS_PER_S:g} leaves no time to reach point 0: '
        'give it a time_from_start of several update periods',
    )


def _lint_single(message: TrajectoryMessage) -> Finding | None:
    if len(message.points) != 1:
        return None
    return Finding(Rule.SINGLE_POINT, 'one point only: send at least two, the last of them at rest')


def _lint_velocities(message: TrajectoryMessage) -> Finding | None:
    if not message.points or any(point.velocities.size or point.accelerations.size for point in message.points):
        return None
    return Finding(Rule.POSITIONS_ONLY, 'no point has velocities: send them with the positions')
