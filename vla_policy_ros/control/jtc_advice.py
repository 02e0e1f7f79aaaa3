"""Whether a controller's parameters are safe to stream to: what to refuse, what to warn about, and what to set instead.

What is refused makes the command step further than the velocity limit allows, with trajectories that are fine in themselves; what
is not refused does not. The tests measure both on the emulator, and `docs/controllers.md` has the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vla_policy_ros.control.jtc_rules import ControllerParameters

Severity = Literal['refuse', 'warn']
Stamp = Literal['zero', 'start']


@dataclass(frozen=True)
class Advice:
    """One thing about a controller: ``refuse`` must be mended before anything is sent, ``warn`` should be known.

    ``sentence`` names the parameter, its value, what to set it to and why.
    """

    severity: Severity
    sentence: str


def advise(parameters: ControllerParameters, stamp: Stamp) -> list[Advice]:
    """What speaks against streaming to a controller, refusals first.

    Args:
        parameters: of the controller.
        stamp: whether ``header.stamp`` is the trajectory's start (``start``) or 0 (``zero``), see `Emission`.

    Raises:
        ValueError: another ``stamp``.
    """
    if stamp not in ('zero', 'start'):
        raise ValueError(f"stamp must be 'zero' or 'start', got {stamp!r}")
    refused = [Advice('refuse', sentence) for sentence in _refusals(parameters, stamp)]
    warned = [*_stamp_warnings(parameters, stamp), *_timeout_warnings(parameters), *_other_warnings(parameters)]
    return refused + [Advice('warn', sentence) for sentence in warned]


def _refusals(parameters: ControllerParameters, stamp: Stamp) -> Iterator[str]:
    if parameters.interpolation_method == 'none':
        yield "interpolation_method is 'none', so that the command jumps from point to point: set it to 'splines'"
    if parameters.speed_scaling != 1.0:
        yield (
            f'speed_scaling.initial_scaling_factor is {parameters.speed_scaling:g}, so that the arm falls behind each trajectory '
            'and steps to the next: set it to 1.0'
        )
    if stamp == 'start' and parameters.allow_trajectory_replacement:
        yield (
            'allow_trajectory_replacement is true, so that a trajectory whose stamp has passed is replayed late instead of joined: '
            "set allow_trajectory_replacement to false, or this node's trajectory_stamp to zero"
        )
    if stamp == 'zero' and not parameters.starts_from_command and not parameters.allow_trajectory_replacement:
        name = _start_parameter(parameters)
        yield (
            f'{name} is false, so that every trajectory starts from the measured state, a step back by all that the arm lags: '
            f"set {name} to true, or this node's trajectory_stamp to start"
        )


def _stamp_warnings(parameters: ControllerParameters, stamp: Stamp) -> Iterator[str]:
    if parameters.open_loop_control and parameters.distro == 'jazzy':
        yield 'open_loop_control is deprecated and unknown after Jazzy: set interpolate_from_desired_state to true instead'
    if stamp == 'start':
        return
    if parameters.allow_trajectory_replacement and not parameters.starts_from_command:
        yield (
            'interpolate_from_desired_state is false, so that a trajectory that is not blended (the first, and those after a hold) '
            'starts from the measured state, a step of all that the arm sags: set interpolate_from_desired_state to true'
        )
    repeats = parameters.allow_trajectory_replacement or parameters.distro == 'humble'
    seam = 'repeats one command' if repeats else 'makes one step of nearly twice the size'
    yield f"with stamps of zero the controller {seam} at every replacement: set this node's trajectory_stamp to start"


def _timeout_warnings(parameters: ControllerParameters) -> Iterator[str]:
    if parameters.cmd_timeout <= 0.0:
        yield (
            f'cmd_timeout is {parameters.cmd_timeout:g}, so that an arm that is blocked pushes on for ever when nothing is sent '
            f'any more: set cmd_timeout to {max(1.0, 2.0 * parameters.goal_time):g} s, and it holds where it is'
        )
    elif parameters.effective_cmd_timeout == 0.0:
        yield (
            f'cmd_timeout ({parameters.cmd_timeout:g} s) does not exceed constraints.goal_time ({parameters.goal_time:g} s), which '
            f'silently disables it: raise cmd_timeout above {parameters.goal_time:g} s'
        )


def _other_warnings(parameters: ControllerParameters) -> Iterator[str]:
    if parameters.allow_partial_joints_goal:
        yield 'allow_partial_joints_goal is true; this node always names all joints: set it to false, so that mistakes show'
    if parameters.allow_nonzero_velocity_at_trajectory_end:
        yield (
            'allow_nonzero_velocity_at_trajectory_end is true, so that the last velocity of another sender would be commanded for '
            'ever: set it to false'
        )
    tolerances = [(f'constraints.{joint}.trajectory', value) for joint, value in parameters.trajectory_tolerance.items()]
    if parameters.goal_time > 0.0:  # without it a controller waits for ever
        tolerances += [(f'constraints.{joint}.goal', value) for joint, value in parameters.goal_tolerance.items()]
    tight = min(((value, name) for name, value in tolerances if value > 0.0), default=None)
    if tight is not None:
        yield (
            f'{tight[1]} is {tight[0]:g}: an arm that is further from its command is stopped in one cycle, a step back to where it '
            f'is; set it to 0, or well above speed times lag ({tight[0]:g} is 50 ms at {tight[0] / 0.05:.3g} per second)'
        )


def _start_parameter(parameters: ControllerParameters) -> str:
    return 'open_loop_control' if parameters.distro == 'humble' else 'interpolate_from_desired_state'
