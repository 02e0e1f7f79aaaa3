"""The node parameters: how to run today. Declared once here; the reference page and the YAML defaults are checked against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node


@dataclass(frozen=True)
class Parameter:
    """One parameter: default (which fixes the type), what it means, its inclusive range, and when it may change."""

    name: str
    default: str | float | int | bool
    description: str
    range: tuple[float, float] | None = None
    when: str = 'before configure'  # 'at start only' | 'before configure' | 'while inactive' | 'any time'
    choices: tuple[str, ...] = ()

    def descriptor(self) -> ParameterDescriptor:
        """The rcl_interfaces descriptor."""
        descriptor = ParameterDescriptor(description=f'{self.description} Changes {self.when}.')
        descriptor.read_only = self.when == 'at start only'
        if self.range is not None and isinstance(self.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=self.range[0], to_value=self.range[1], step=0.0)]
        elif self.range is not None:
            descriptor.integer_range = [IntegerRange(from_value=int(self.range[0]), to_value=int(self.range[1]), step=0)]
        return descriptor


PARAMETERS: tuple[Parameter, ...] = (
    Parameter('robot_file', '', 'Path of the robot file (YAML), or the name of a shipped one.'),
    Parameter('checkpoint', '', 'Folder of the checkpoint, or the name of a shipped one.'),
    Parameter('device', 'cpu', 'torch device that the policy runs on, such as cpu or cuda:0.'),
    Parameter('dtype', 'float32', 'torch dtype of the weights: float32 or bfloat16.'),
    Parameter('num_inference_steps', 0, "Flow-matching integration steps; 0 takes the checkpoint's own number.", (0, 1000)),
    Parameter(
        'solver',
        '',
        'Integrator: euler, ab2 (second order at the same cost) or midpoint (second order, two evaluations a step); empty takes '
        "the checkpoint's own.",
    ),
    Parameter(
        'chunking',
        'replace',
        'How chunks follow each other. replace: each replaces the last at its seam. ensemble: chunks that overlap are averaged. '
        'rtc_guided: the next chunk is steered towards what is committed already (any checkpoint, costs a backward pass per step). '
        'rtc_trained: it is drawn to continue it (checkpoints trained for it).',
    ),
    Parameter('seed', -1, 'Seed of the sampling noise; -1 draws fresh noise.', (-1, 2**31 - 1)),
    Parameter('torch_threads', 1, 'CPU threads of torch.', (1, 256)),
    Parameter('replan_rate', 5.0, 'New action chunks wanted, Hz.', (0.1, 50.0), 'any time'),
    Parameter('dry_run', False, 'Plan and preview, but send nothing to the controllers.', None, 'while inactive'),
    Parameter(
        'shadow_window',
        30.0,
        'In dry run, chunks of the last so many seconds are compared with what the robot did: row shadow of /diagnostics. 0: off.',
        (0.0, 600.0),
    ),
    Parameter('max_inference_time', 2.0, 'An inference that takes longer is reported as a stall, s.', (0.05, 600.0), 'any time'),
    Parameter(
        'stop_policy',
        'brake',
        'What a soft stop and a deactivation do. brake: brake and hold. park: go to the park pose of the robot file. When the node '
        'ends, on a fault, and where the robot does not follow, it brakes in either case.',
        choices=('brake', 'park'),
    ),
    Parameter(
        'check_controllers',
        'refuse',
        'What the parameters of the joint trajectory controllers, read from their nodes, may do. refuse: unsafe ones keep the node '
        'from activating. warn: they are only told. skip: they are not read.',
        None,
        'while inactive',
        ('refuse', 'warn', 'skip'),
    ),
    Parameter(
        'max_not_accepted',
        3,
        'The node stops when a controller with a state topic does not accept this many trajectories in a row; 0 only warns.',
        (0, 1000),
        'any time',
    ),
    Parameter(
        'trajectory_stamp',
        'start',
        'header.stamp of trajectories. start: they join the commanded motion exactly where the clock says; needs a controller on '
        'the same clock that does not blend replacements (Humble to Kilted). zero: they start on arrival; needs no common clock, '
        'but the controller bridges to them with a velocity step each time, and less than half of the velocity limits is used.',
    ),
    Parameter(
        'transport_delay',
        0.06,
        'Longest delay of a trajectory message to the controller, s. The new motion takes over after it; a message later than that '
        'makes a velocity step.',
        (0.0, 1.0),
    ),
    Parameter('status_rate', 5.0, 'PolicyStatus messages, Hz of wall time.', (0.1, 50.0), 'at start only'),
    Parameter('autostart', False, 'Configure and activate without a lifecycle manager.', None, 'at start only'),
)


def declare(node: Node) -> None:
    """Declare all parameters on ``node``."""
    for parameter in PARAMETERS:
        node.declare_parameter(parameter.name, parameter.default, parameter.descriptor())


def values(node: Node) -> dict[str, Any]:
    """The current value of every parameter."""
    return {parameter.name: node.get_parameter(parameter.name).value for parameter in PARAMETERS}


def wrong_choice(given: dict[str, Any]) -> str | None:
    """Which of the values given is none that its parameter can have, as a sentence, or None."""
    for parameter in PARAMETERS:
        if parameter.choices and given.get(parameter.name, parameter.default) not in parameter.choices:
            return f'{parameter.name} is {given[parameter.name]!r}; use one of {", ".join(parameter.choices)}'
    return None


def refusal(changes: dict[str, Any], *, configured: bool, active: bool) -> str | None:
    """Why a set of changes may not happen now, as a sentence, or None."""
    known = {parameter.name: parameter for parameter in PARAMETERS}
    if problem := wrong_choice(changes):
        return problem
    for name in changes:
        parameter = known.get(name)
        if parameter is None or parameter.when == 'any time':
            continue
        if active:
            return f'{name} cannot change while the node is active; deactivate it first'
        if configured and parameter.when == 'before configure':
            return f'{name} cannot change while the node is configured; clean it up first'
    return None
