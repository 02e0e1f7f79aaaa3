"""Which settings of a controller are refused, which are warned of, and that this is right: measured on the emulated controller.

A sine that comes near the velocity limit is streamed five times a second, over a transport of 10 to 40 ms, to an arm that trails
its command by 50 ms. `docs/controllers.md` shows the numbers; a test compares them with what is measured here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_advice import Stamp, advise
from vla_policy_ros.control.jtc_rules import DISTROS, ControllerParameters
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner

MS = 1_000_000
T0 = 1_000_000 * MS
RATE = 100.0
PERIOD = 10 * MS
JOINT = 'joint0'
TRANSPORT_CYCLES = (1, 4, 2, 3, 1, 3, 4)
LAG_S = 0.05

Setting = tuple[str, Stamp, str]
DESIRED, OPEN_LOOP = 'interpolate_from_desired_state: true', 'open_loop_control: true'
REPLACING, FORGETTING = 'allow_trajectory_replacement: true', 'allow_trajectory_replacement: false'
FORGETTING_DESIRED = f'{FORGETTING}, {DESIRED}'
ACCEPTED: list[Setting] = [
    ('humble', 'start', ''),
    ('jazzy', 'start', ''),
    ('kilted', 'start', ''),
    ('rolling', 'start', FORGETTING),
    ('humble', 'zero', OPEN_LOOP),
    ('jazzy', 'zero', DESIRED),
    ('kilted', 'zero', DESIRED),
    ('rolling', 'zero', FORGETTING_DESIRED),
    ('rolling', 'zero', REPLACING),
    ('jazzy', 'start', 'constraints.joint0.trajectory: 0.2'),
]
REFUSED: list[tuple[str, Stamp, str, str]] = [
    ('humble', 'zero', '', 'set open_loop_control to true'),
    ('jazzy', 'zero', '', 'set interpolate_from_desired_state to true'),
    ('kilted', 'zero', '', 'set interpolate_from_desired_state to true'),
    ('rolling', 'zero', FORGETTING, 'set interpolate_from_desired_state to true'),
    ('rolling', 'start', REPLACING, 'set allow_trajectory_replacement to false'),
    ('jazzy', 'start', 'interpolation_method: none', "set it to 'splines'"),
    ('jazzy', 'start', 'speed_scaling.initial_scaling_factor: 0.9', 'set it to 1.0'),
    ('jazzy', 'zero', f'{DESIRED}, speed_scaling.initial_scaling_factor: 0.5', 'set it to 1.0'),
]
# Not refused, because only the arm knows its lag.
TOO_TIGHT: Setting = ('jazzy', 'start', 'constraints.joint0.trajectory: 0.03')


def parameters(distro: str, settings: str) -> ControllerParameters:
    """The release with settings written as in a parameter file, ``name: value, name: value``."""
    changes: dict[str, Any] = {}
    for name, text in (setting.split(': ') for setting in settings.split(', ') if setting):
        if name == f'constraints.{JOINT}.trajectory':
            changes['trajectory_tolerance'] = {JOINT: float(text)}
        elif name == 'speed_scaling.initial_scaling_factor':
            changes['speed_scaling'] = float(text)
        else:
            changes[name] = {'true': True, 'false': False}.get(text, text)
    return ControllerParameters.for_distro(distro, (JOINT,), update_rate=RATE, **changes)


@cache
def streamed(tools: Any, distro: str, stamp: Stamp, settings: str, lag_s: float = LAG_S) -> tuple[float, float]:
    """Largest velocity and acceleration that is commanded, as parts of the limits."""
    limits, emission = tools.limits(1), Emission.for_controller(RATE, stamp)
    planner = TrajectoryPlanner(limits, emission)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(1), T0)
    controller = JointTrajectoryController(parameters(distro, settings), [0.0])
    commands, measured, arriving = [0.0], 0.0, {}
    for tick in range(600):
        now = T0 + tick * PERIOD
        if tick % 20 == 0:
            stamps = now + 50 * MS * np.arange(24)
            actions = 0.85 * (1.0 - np.cos(1.5 * (stamps - T0) * 1e-9))
            plan = planner.plan(tools.chunk(limits.names, now, actions[:, None], 50), now, commanded)
            assert plan.trajectory is not None
            commanded.accept(plan.trajectory, plan.raw)
            arrival = tick + TRANSPORT_CYCLES[tick // 20 % len(TRANSPORT_CYCLES)]
            arriving[arrival] = TrajectoryMessage.from_trajectory(plan.trajectory, emission.header_stamp_ns(plan.trajectory))
        if tick in arriving:
            assert controller.receive(arriving[tick], now).accepted
        commands.append(float(controller.update(now, [measured]).positions[0]))
        measured += (commands[-1] - measured) * (1.0 - np.exp(-1.0 / (RATE * lag_s)))
    velocity = np.diff(commands) * RATE
    acceleration = np.diff(velocity) * RATE
    return float(np.abs(velocity).max() / limits.velocity[0]), float(np.abs(acceleration).max() / limits.acceleration[0])


def sentences(distro: str, stamp: Stamp, settings: str, severity: str = 'refuse') -> list[str]:
    return [item.sentence for item in advise(parameters(distro, settings), stamp) if item.severity == severity]


@pytest.mark.parametrize(('distro', 'stamp', 'settings'), ACCEPTED)
def test_what_is_not_refused_makes_no_step_beyond_the_velocity_limit(tools: Any, distro: str, stamp: Stamp, settings: str) -> None:
    assert sentences(distro, stamp, settings) == []
    velocity, acceleration = streamed(tools, distro, stamp, settings)
    assert velocity <= 1.0
    if stamp == 'start':
        assert acceleration <= 1.0, 'with a stamp the seams keep the acceleration limit as well'


@pytest.mark.parametrize(('distro', 'stamp', 'settings', 'remedy'), REFUSED)
def test_what_is_refused_really_steps_beyond_the_velocity_limit_and_the_sentence_says_what_to_set(
    tools: Any, distro: str, stamp: Stamp, settings: str, remedy: str
) -> None:
    (sentence,) = sentences(distro, stamp, settings)
    assert remedy in sentence
    assert streamed(tools, distro, stamp, settings)[0] > 1.3


def test_the_step_from_the_measured_state_grows_with_the_lag_of_the_arm(tools: Any) -> None:
    steps = [streamed(tools, 'jazzy', 'zero', '', lag_s)[0] for lag_s in (0.02, 0.05, 0.1)]
    assert steps[0] < 1.0 < steps[1] < steps[2]


def test_a_tolerance_that_the_lag_exceeds_stops_the_arm_with_a_step_and_a_wide_one_does_not(tools: Any) -> None:
    assert streamed(tools, *TOO_TIGHT)[0] > 1.3
    (warning,) = [text for text in sentences(*TOO_TIGHT, 'warn') if 'constraints' in text]
    assert warning.startswith('constraints.joint0.trajectory is 0.03') and 'set it to 0, or well above' in warning


def warned(distro: str, stamp: Stamp, **changes: Any) -> list[str]:
    found = advise(ControllerParameters.for_distro(distro, ('a', 'b'), **{'cmd_timeout': 1.0, **changes}), stamp)
    return [item.sentence for item in found if item.severity == 'warn']


@pytest.mark.parametrize(
    ('distro', 'stamp', 'changes', 'words'),
    [
        ('jazzy', 'start', {'cmd_timeout': 0.0}, ('cmd_timeout is 0', 'set cmd_timeout to 1 s')),
        ('jazzy', 'start', {'cmd_timeout': 0.0, 'goal_time': 2.0}, ('set cmd_timeout to 4 s',)),
        ('jazzy', 'start', {'cmd_timeout': 0.5, 'goal_time': 0.5}, ('silently disables', 'raise cmd_timeout above 0.5 s')),
        ('jazzy', 'start', {'allow_partial_joints_goal': True}, ('allow_partial_joints_goal', 'set it to false')),
        ('humble', 'start', {}, ('allow_nonzero_velocity_at_trajectory_end', 'set it to false')),
        ('jazzy', 'start', {'trajectory_tolerance': {'a': 0.2, 'b': 0.1}}, ('constraints.b.trajectory is 0.1',)),
        ('jazzy', 'start', {'goal_tolerance': {'a': 0.1}, 'goal_time': 0.5}, ('constraints.a.goal is 0.1',)),
        ('jazzy', 'start', {'open_loop_control': True}, ('open_loop_control is deprecated', 'interpolate_from_desired_state')),
        ('jazzy', 'zero', {'interpolate_from_desired_state': True}, ('nearly twice the size', 'trajectory_stamp to start')),
        ('rolling', 'zero', {'interpolate_from_desired_state': True}, ('repeats one command',)),
    ],
)
def test_what_should_be_known_is_one_warning_with_the_remedy(
    distro: str, stamp: Stamp, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    (sentence,) = warned(distro, stamp, **changes)
    assert all(word in sentence for word in words), sentence


def test_rolling_that_blends_still_starts_from_the_measured_state_where_there_is_nothing_to_blend_with() -> None:
    found = warned('rolling', 'zero')
    assert len(found) == 2 and 'not blended' in found[0] and 'set interpolate_from_desired_state to true' in found[0]


@pytest.mark.parametrize('distro', DISTROS)
def test_a_controller_set_as_advised_has_nothing_against_it(distro: str) -> None:
    changes = {'allow_trajectory_replacement': False} if distro == 'rolling' else {}
    advised = {'allow_nonzero_velocity_at_trajectory_end': False, 'cmd_timeout': 1.0, 'goal_time': 0.5, **changes}
    assert advise(ControllerParameters.for_distro(distro, ('a',), **advised), 'start') == []


def test_a_goal_tolerance_without_a_goal_time_is_never_judged_and_not_warned_of() -> None:
    assert warned('jazzy', 'start', goal_tolerance={'a': 0.001}) == []


def test_another_stamp_is_an_error() -> None:
    with pytest.raises(ValueError, match="'zero' or 'start', got 'now'"):
        advise(ControllerParameters(('a',)), 'now')  # type: ignore[arg-type]


ROW = re.compile(
    r'^\| (?P<distro>\w+) \| `(?P<stamp>\w+)` \| (?P<settings>.*?) \| (?P<velocity>[\d.]+) \| (?P<acceleration>[\d.]+) \|'
)


def test_the_numbers_of_the_docs_are_those_of_the_emulator(tools: Any, root: Path) -> None:
    rows = [found for line in (root / 'docs' / 'controllers.md').read_text().splitlines() if (found := ROW.match(line))]
    shown = {(row['distro'].lower(), row['stamp'], row['settings'].strip('`—')): row for row in rows}
    assert set(shown) == {*ACCEPTED, *(setting[:3] for setting in REFUSED), TOO_TIGHT}
    for setting, row in shown.items():
        velocity, acceleration = streamed(tools, *setting)
        assert (row['velocity'], row['acceleration']) == (f'{velocity:.2f}', f'{acceleration:.1f}'), setting
