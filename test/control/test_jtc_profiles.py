"""What the releases of the controller do differently with the same messages, and which settings are safe to stream to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_advice import advise
from vla_policy_ros.control.jtc_rules import DISTROS, ControllerParameters, Rule, lint, validate
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner

MS = 1_000_000
T0 = 1_000_000 * MS
PERIOD = 10 * MS
ONE = ('a',)


def point(ms: int, position: float, velocity: float | None = None) -> TrajectoryPoint:
    return TrajectoryPoint(ms * MS, [position], [] if velocity is None else [velocity])


def ramp(start: float = 0.0, speed: float = 1.0, first_ms: int = 100, stamp_ns: int = 0) -> TrajectoryMessage:
    """Knots every 100 ms at constant speed, with a resting end."""
    rows = [point(first_ms + 100 * i, start + speed * 0.1 * (i + 1), speed) for i in range(8)]
    end = rows[-1].positions[0]
    return TrajectoryMessage(ONE, [*rows, point(first_ms + 900, end, 0.0)], stamp_ns)


def run(parameters: ControllerParameters, events: dict[int, TrajectoryMessage], ticks: int, lag: float = 0.0) -> np.ndarray:
    """Commands at every update; the arm follows at once, or trails by ``lag``."""
    controller = JointTrajectoryController(parameters, [0.0])
    commands, measured = [0.0], 0.0
    for tick in range(ticks):
        now = T0 + tick * PERIOD
        if tick in events:
            assert controller.receive(events[tick], now).accepted
        commands.append(float(controller.update(now, [measured]).positions[0]))
        measured += (commands[-1] - measured) * (1.0 - lag)
    return np.array(commands)


def test_each_release_has_its_defaults_and_knows_its_parameters() -> None:
    made = {distro: ControllerParameters.for_distro(distro, ONE) for distro in DISTROS}
    assert [made[d].allow_nonzero_velocity_at_trajectory_end for d in DISTROS] == [True, False, False, False]
    assert [made[d].allow_trajectory_replacement for d in DISTROS] == [False, False, False, True]
    for distro, name in (
        ('kilted', 'open_loop_control'),
        ('humble', 'interpolate_from_desired_state'),
        ('jazzy', 'allow_trajectory_replacement'),
    ):
        with pytest.raises(ValueError, match=f'{distro} has no parameter {name}'):
            ControllerParameters.for_distro(distro, ONE, **{name: True})
        assert not getattr(ControllerParameters.for_distro(distro, ONE, **{name: False}), name)
    with pytest.raises(ValueError, match=r"'iron' is unknown.*humble"):
        ControllerParameters.for_distro('iron', ONE)
    with pytest.raises(ValueError, match="no parameter 'speed'"):
        ControllerParameters.for_distro('jazzy', ONE, speed=1)


def test_a_moving_end_is_accepted_by_humble_only_and_named() -> None:
    message = TrajectoryMessage(ONE, [point(100, 0.1, 1.0), point(200, 0.2, 1.0)])
    accepted = {distro: validate(message, ControllerParameters.for_distro(distro, ONE), T0) is None for distro in DISTROS}
    assert accepted == {'humble': True, 'jazzy': False, 'kilted': False, 'rolling': False}
    found = lint(message, ControllerParameters.for_distro('humble', ONE))
    assert Rule.MOVES_ON in {finding.rule for finding in found}
    assert Rule.MOVES_ON not in {finding.rule for finding in lint(ramp(), ControllerParameters.for_distro('humble', ONE))}


def test_effort_is_refused_by_humble_also_with_an_effort_interface() -> None:
    message = TrajectoryMessage(ONE, [TrajectoryPoint(100 * MS, [0.1], [0.0], [], [1.0])])
    for distro, refused in (('humble', True), ('jazzy', False)):
        parameters = ControllerParameters.for_distro(distro, ONE, effort_command_interface=True)
        finding = validate(message, parameters, T0)
        assert (finding is not None and finding.rule is Rule.EFFORT) == refused


def test_humble_repeats_the_last_command_for_one_update_where_jazzy_steps_nearly_twice() -> None:
    events = {0: ramp(), 20: ramp(start=0.2)}
    steps = {}
    for distro, name in (('humble', 'open_loop_control'), ('jazzy', 'interpolate_from_desired_state')):
        commands = run(ControllerParameters.for_distro(distro, ONE, **{name: True}), events, 40)
        steps[distro] = np.diff(commands)[20:24]
    assert steps['humble'].min() == pytest.approx(0.0, abs=1e-9)
    assert steps['jazzy'].max() > 1.5 * 0.01
    assert steps['humble'].max() < 1.3 * 0.01


def test_humble_commands_the_trajectory_now_and_the_others_one_update_ahead() -> None:
    message = ramp(first_ms=0)
    ends = {
        distro: run(ControllerParameters.for_distro(distro, ONE), {0: message}, 30)[-1] for distro in ('humble', 'jazzy', 'kilted')
    }
    assert ends['jazzy'] == ends['kilted'] == pytest.approx(ends['humble'] + 0.01, abs=1e-9)


def test_a_clock_jump_moves_a_running_trajectory_on_humble_only() -> None:
    for distro, jumps in (('humble', True), ('jazzy', False)):
        controller = JointTrajectoryController(ControllerParameters.for_distro(distro, ONE), [0.0])
        assert controller.receive(ramp(), T0).accepted
        before = [controller.update(T0 + tick * PERIOD, [0.0]).positions[0] for tick in range(30)][-1]
        after = controller.update(T0 + 30 * PERIOD + 200 * MS, [0.0]).positions[0]
        assert bool(after - before > 0.1) == jumps


def rolling(**changes: Any) -> ControllerParameters:
    return ControllerParameters.for_distro('rolling', ONE, **changes)


def test_rolling_blends_a_replacement_without_a_step_where_jazzy_starts_from_the_lagging_arm() -> None:
    events = {0: ramp(), 30: ramp(start=0.3)}
    worst = {}
    for name, parameters in (('rolling', rolling()), ('jazzy', ControllerParameters.for_distro('jazzy', ONE))):
        steps = np.diff(run(parameters, events, 60, lag=0.8))[2:]
        worst[name] = float(np.abs(steps - 0.01)[26:34].max())
    assert worst['rolling'] < 1e-6 < worst['jazzy']


def test_rolling_runs_the_old_trajectory_until_a_future_stamp_and_then_bridges_smoothly() -> None:
    late = ramp(start=0.5, stamp_ns=T0 + 500 * MS)
    commands = run(rolling(), {0: ramp(), 30: late}, 100)
    steps = np.diff(commands)
    until = slice(12, 48)
    np.testing.assert_allclose(steps[until], 0.01, atol=1e-6)
    assert np.abs(steps[12:]).max() < 0.0101 and np.abs(np.diff(steps[12:])).max() < 0.002, 'one motion'
    apart = np.diff(run(rolling(), {0: ramp(), 30: ramp(start=0.6, stamp_ns=T0 + 500 * MS)}, 100))
    np.testing.assert_allclose(apart[until], 0.01, atol=1e-6)
    assert np.abs(np.diff(apart[47:52])).max() < 0.006, 'a bridge that begins with the velocity of the old motion'


def test_rolling_replays_a_past_stamp_from_its_first_point() -> None:
    past = ramp(start=0.3, stamp_ns=T0 + 100 * MS)
    replayed = run(rolling(), {0: ramp(), 30: past}, 60)
    joined = run(rolling(allow_trajectory_replacement=False), {0: ramp(), 30: past}, 60)
    assert replayed[45] < joined[45] - 0.05, 'what was due already is executed late'
    found = lint(past, rolling(), T0 + 300 * MS)
    assert Rule.PAST_STAMP in {finding.rule for finding in found}
    assert Rule.PAST_STAMP not in {f.rule for f in lint(past, rolling(allow_trajectory_replacement=False), T0 + 300 * MS)}


def test_rolling_never_blends_from_hold_or_from_a_single_point() -> None:
    first = run(rolling(), {0: ramp()}, 20)
    np.testing.assert_allclose(first, run(rolling(allow_trajectory_replacement=False), {0: ramp()}, 20))
    single = TrajectoryMessage(ONE, [point(200, 0.2, 0.0)])
    events = {0: single, 10: ramp(start=0.1)}
    np.testing.assert_allclose(run(rolling(), events, 30), run(rolling(allow_trajectory_replacement=False), events, 30))


def test_rolling_lets_joints_that_are_left_out_go_on_along_the_old_path() -> None:
    both = ('a', 'b')
    whole = TrajectoryMessage(both, [TrajectoryPoint(0, [0, 0], [1, 1]), TrajectoryPoint(1000 * MS, [1, 1], [0, 0])])
    part = TrajectoryMessage(('a',), [point(200, 0.4, 0.0), point(600, 0.4, 0.0)])
    for blend in (True, False):
        parameters = ControllerParameters.for_distro(
            'rolling', both, allow_partial_joints_goal=True, allow_trajectory_replacement=blend
        )
        controller, ends = JointTrajectoryController(parameters, [0.0, 0.0]), []
        for tick in range(60):
            now = T0 + tick * PERIOD
            for due, message in ((0, whole), (20, part)):
                if tick == due:
                    assert controller.receive(message, now).accepted
            ends.append(controller.update(now, [0.0, 0.0]).positions[1])
        assert bool(ends[-1] > ends[19] + 0.2) == blend


def streamed(parameters: ControllerParameters, stamp: str, tools: Any) -> tuple[float, float]:
    """Largest step and acceleration, as parts of the limits, of a streamed sine on a controller whose arm lags."""
    limits = tools.limits(1)
    emission = Emission.for_controller(100.0, stamp)  # type: ignore[arg-type]
    planner = TrajectoryPlanner(limits, emission)
    commanded = CommandedMotion.from_rest(limits.names, np.zeros(1), T0)
    controller = JointTrajectoryController(parameters, [0.0])
    commands, measured, arriving = [0.0], 0.0, {}
    for tick in range(400):
        now = T0 + tick * PERIOD
        if tick % 20 == 0:
            stamps = now + 50 * MS * np.arange(1, 25)
            actions = 0.4 * np.sin(1.5 * (stamps - T0) * 1e-9)[:, None]
            plan = planner.plan(tools.chunk(limits.names, int(stamps[0]), actions, 50), now, commanded)
            assert plan.trajectory is not None
            commanded.accept(plan.trajectory, plan.raw)
            arriving[tick + 2] = TrajectoryMessage.from_trajectory(plan.trajectory, emission.header_stamp_ns(plan.trajectory))
        if tick in arriving:
            assert controller.receive(arriving[tick], now).accepted
        commands.append(float(controller.update(now, [measured]).positions[0]))
        measured += 0.2 * (commands[-1] - measured)
    velocity = np.diff(commands) / 0.01
    return float(np.abs(velocity).max() / limits.velocity[0]), float(
        (np.abs(np.diff(velocity)) / 0.01).max() / limits.acceleration[0]
    )


NAMES = ('joint0',)
SAFE = [
    ('humble', 'start', {}),
    ('jazzy', 'start', {}),
    ('kilted', 'start', {}),
    ('rolling', 'start', {'allow_trajectory_replacement': False}),
]
UNSAFE = [
    ('jazzy', 'zero', {}, 'interpolate_from_desired_state to true'),
    ('humble', 'zero', {}, 'open_loop_control to true'),
    ('rolling', 'start', {}, 'allow_trajectory_replacement to false'),
    ('jazzy', 'start', {'interpolation_method': 'none'}, "set it to 'splines'"),
]


@pytest.mark.parametrize(('distro', 'stamp', 'changes'), SAFE)
def test_what_is_not_refused_executes_within_the_limits(tools: Any, distro: str, stamp: Any, changes: dict[str, Any]) -> None:
    parameters = ControllerParameters.for_distro(distro, NAMES, **changes)
    assert not [item for item in advise(parameters, stamp) if item.severity == 'refuse']
    step, acceleration = streamed(parameters, stamp, tools)
    assert step <= 1.0 and acceleration <= 1.0 + 1e-6


@pytest.mark.parametrize(('distro', 'stamp', 'changes', 'remedy'), UNSAFE)
def test_what_is_refused_really_leaves_the_limits(
    tools: Any, distro: str, stamp: Any, changes: dict[str, Any], remedy: str
) -> None:
    parameters = ControllerParameters.for_distro(distro, NAMES, **changes)
    refused = [item.sentence for item in advise(parameters, stamp) if item.severity == 'refuse']
    assert len(refused) == 1 and remedy in refused[0]
    assert streamed(parameters, stamp, tools)[1] > 2.0


def test_what_should_be_known_is_warned_of() -> None:
    for changes, word in (
        ({'cmd_timeout': 0.2, 'goal_time': 0.5}, 'raise cmd_timeout'),
        ({'allow_partial_joints_goal': True}, 'allow_partial_joints_goal'),
        ({'allow_nonzero_velocity_at_trajectory_end': True}, 'set it to false'),
        ({'trajectory_tolerance': {'a': 0.1}}, 'constraints are set'),
    ):
        found = advise(ControllerParameters.for_distro('jazzy', ONE, **changes), 'start')
        assert [item.severity for item in found] == ['warn'] and word in found[0].sentence
    assert advise(ControllerParameters.for_distro('jazzy', ONE, cmd_timeout=1.0), 'start') == []
