"""Which controller a command topic is judged for: its joints, update rate, parameters and the speed that its joints may have.

What the operator says counts first, then the robot file, then what the recording shows.
"""

from __future__ import annotations

import difflib
import types
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vla_policy_ros.bags.recording import Recording
from vla_policy_ros.control.jtc_rules import ControllerParameters
from vla_policy_ros.robot import Controller, Robot

DEFAULT_UPDATE_RATE = 100.0  # that of controller_manager
# These have an option of their own.
_OPTIONS = {'distro': '--profile', 'update_rate': '--update-rate'}


class ProfileError(ValueError):
    """The controller cannot be described as asked; the message names the parameter and the remedy."""


@dataclass(frozen=True)
class ControllerChoice:
    """What the operator says of the controller.

    Attributes:
        distro: release of ros2_controllers: humble, jazzy, kilted or rolling.
        changes: controller parameters that differ from the release's defaults, as `parse_changes` returns them.
        update_rate: Hz; None is the robot file's, or 100.
        velocity: largest speed of every joint, per second; None is the robot file's limit of each joint.
        robot: the robot file; None is unknown.
    """

    distro: str = 'jazzy'
    changes: Mapping[str, Any] = field(default_factory=dict)
    update_rate: float | None = None
    velocity: float | None = None
    robot: Robot | None = None

    def __post_init__(self) -> None:
        for name, value in (('--update-rate', self.update_rate), ('--velocity', self.velocity)):
            if value is not None and not 0.0 < value < float('inf'):
                raise ProfileError(f'{name} must be above 0 and finite, got {value:g}')

    @property
    def command_topics(self) -> tuple[str, ...]:
        """Topics of the robot's trajectory controllers; empty without a robot file."""
        return tuple(controller.topic for controller in self._controllers())

    def parameters_for(self, recording: Recording) -> ControllerParameters:
        """The controller behind the recorded topic.

        Raises:
            ProfileError: its joints are not known, or the release does not have a parameter.
        """
        known = next((controller for controller in self._controllers() if controller.topic == recording.topic), None)
        changes = dict(self.changes)
        joints = changes.pop('joints', ()) or (known.joints if known else _joints_of(recording))
        changes['update_rate'] = self.update_rate or (known.update_rate if known else DEFAULT_UPDATE_RATE)
        try:
            return ControllerParameters.for_distro(self.distro, tuple(joints), **changes)
        except ValueError as error:
            raise ProfileError(str(error)) from error

    def velocity_limits(self, joints: Collection[str]) -> dict[str, float]:
        """Largest speed of each joint that has one."""
        if self.velocity is not None:
            return dict.fromkeys(joints, self.velocity)
        limits = {} if self.robot is None else self.robot.limits
        return {joint: limits[joint].velocity for joint in joints if joint in limits}

    def _controllers(self) -> list[Controller]:
        if self.robot is None:
            return []
        return [controller for controller in self.robot.controllers.values() if controller.type == 'joint_trajectory']


def _joints_of(recording: Recording) -> Sequence[str]:
    """The joints of the controller's state, else those that most messages name."""
    if recording.controller_joints:
        return recording.controller_joints
    named = Counter(frozenset(item.message.joint_names) for item in recording.messages if item.message.joint_names)
    if not named:
        raise ProfileError(
            f'no message on {recording.topic} names a joint, so the joints of its controller are not known: '
            'give them with --param joints=first,second'
        )
    usual = named.most_common(1)[0][0]
    first = next(item.message.joint_names for item in recording.messages if frozenset(item.message.joint_names) == usual)
    return tuple(dict.fromkeys(first))


def parse_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """``name=value`` texts as values of the fields of `ControllerParameters`.

    Lists are ``a,b``; values per joint are ``joint:value,joint:value``. ``constraints.goal_time`` is ``goal_time``.

    Raises:
        ProfileError: not of that form, an unknown name, or a value that is not of the parameter's type.
    """
    hints = get_type_hints(ControllerParameters)
    known = [item.name for item in fields(ControllerParameters)]
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition('=')
        name = name.strip().removeprefix('constraints.')
        if not equals:
            raise ProfileError(f'--param {assignment!r}: write name=value, such as interpolate_from_desired_state=true')
        if name in _OPTIONS:
            raise ProfileError(f'--param {assignment!r}: use {_OPTIONS[name]}')
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean {near[0]}?' if near else f'known: {", ".join(known)}'
            raise ProfileError(f'--param {assignment!r}: the controller has no parameter {name!r}; {hint}')
        try:
            changes[name] = _value(text.strip(), hints[name])
        except ValueError as error:
            raise ProfileError(f'--param {assignment!r}: {error}') from error
    return changes


def _value(text: str, kind: Any) -> Any:
    """``text`` as a value of the annotated type ``kind``. Raises ValueError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return _value(text, next(option for option in arguments if option is not type(None)))
    if kind is bool:
        if text.lower() not in ('true', 'false'):
            raise ValueError(f'must be true or false, got {text!r}')
        return text.lower() == 'true'
    if kind is float:
        return _number(text)
    if origin is Literal:
        if text not in arguments:
            raise ValueError(f'must be one of {", ".join(arguments)}, got {text!r}')
        return text
    items = [item.strip() for item in text.split(',') if item.strip()]
    if origin is tuple:
        return tuple(items)
    pairs = [item.rpartition(':') for item in items]
    if not all(joint for joint, _, _ in pairs):
        raise ValueError(f'must be joint:value,joint:value, got {text!r}')
    return {joint: _number(value) for joint, _, value in pairs}


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) < float('inf'):
        raise ValueError(f'must be finite, got {text!r}')
    return value
