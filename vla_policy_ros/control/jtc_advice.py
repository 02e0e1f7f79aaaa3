"""Whether a controller's parameters are safe to stream to: what to refuse, what to warn about, and what to set instead.

Every refusal is a setting under which the emulator commands a step or leaves the limits with trajectories that are fine in
themselves; `docs/controllers.md` has the numbers, and the tests measure them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vla_policy_ros.control.jtc_rules import ControllerParameters

Severity = Literal['refuse', 'warn']


@dataclass(frozen=True)
class Advice:
    """One thing about a controller: ``refuse`` must be mended before anything is sent, ``warn`` should be known."""

    severity: Severity
    sentence: str


def advise(parameters: ControllerParameters, stamp: Literal['zero', 'start']) -> list[Advice]:
    """What is wrong with a controller for trajectories that carry a start stamp (``start``) or none (``zero``)."""
    return [*_refusals(parameters, stamp), *_warnings(parameters)]


def _refusals(parameters: ControllerParameters, stamp: Literal['zero', 'start']) -> list[Advice]:
    found = []
    if parameters.interpolation_method == 'none':
        found.append(
            "interpolation_method is 'none', so that the command jumps from point to point: set it to 'splines'"
        )
    if parameters.allow_trajectory_replacement and stamp == 'start':
        found.append(
            'allow_trajectory_replacement is true, so that a trajectory whose stamp has passed is replayed late instead of joined: '
            "set allow_trajectory_replacement to false, or this node's trajectory_stamp to zero"
        )
    if stamp == 'zero' and not parameters.starts_from_command and not parameters.allow_trajectory_replacement:
        name = 'open_loop_control' if parameters.distro == 'humble' else 'interpolate_from_desired_state'
        found.append(
            f'{name} is false, so that every trajectory starts from the lagging measured state, a step back each time: '
            f"set {name} to true, or this node's trajectory_stamp to start"
        )
    return [Advice('refuse', sentence) for sentence in found]


def _warnings(parameters: ControllerParameters) -> list[Advice]:
    found = []
    if parameters.cmd_timeout > 0.0 and parameters.effective_cmd_timeout == 0.0:
        found.append(
            f'cmd_timeout ({parameters.cmd_timeout:g} s) does not exceed constraints.goal_time ({parameters.goal_time:g} s), which '
            'silently disables it: raise cmd_timeout'
        )
    if parameters.allow_partial_joints_goal:
        found.append('allow_partial_joints_goal is true; this node always names all joints: set it to false, so that mistakes show')
    if parameters.allow_nonzero_velocity_at_trajectory_end:
        found.append(
            'allow_nonzero_velocity_at_trajectory_end is true, so that another sender could make the arm move on for ever: '
            'set it to false'
        )
    if any(tolerance > 0.0 for tolerance in (*parameters.trajectory_tolerance.values(), *parameters.goal_tolerance.values())):
        found.append(
            'constraints are set: a violation makes the controller hold the measured position within one cycle, a hard stop; keep '
            "them well above the arm's lag"
        )
    return [Advice('warn', sentence) for sentence in found]
