"""How Rolling splices a new trajectory into the running one, where every other release forgets the old one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_rules import ControllerParameters
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint

MS = 1_000_000
T0 = 1_000_000 * MS
PERIOD = 10 * MS
NOMINAL = 0.01  # rad per update at 1 rad/s and 100 Hz


def point(ms: int, *positions: float, v: float | None = None, a: float | None = None) -> TrajectoryPoint:
    fill = [[] if value is None else [value] * len(positions) for value in (v, a)]
    return TrajectoryPoint(ms * MS, list(positions), *fill)


def ramp(start: float = 0.0, first_ms: int = 100, stamp_ns: int = 0) -> TrajectoryMessage:
    """1 rad/s, a knot every 100 ms, and a resting end."""
    rows = [point(first_ms + 100 * i, start + 0.1 * (i + 1), v=1.0) for i in range(8)]
    return TrajectoryMessage(('a',), [*rows, point(first_ms + 900, start + 0.8, v=0.0)], stamp_ns)


class Arm:
    """Rolling's controller and an arm that stands ``lag`` behind its command."""

    def __init__(self, joints: tuple[str, ...] = ('a',), lag: float = 0.0, **changes: Any) -> None:
        changes = {'allow_partial_joints_goal': True, **changes}
        self.controller = JointTrajectoryController(
            ControllerParameters.for_distro('rolling', joints, **changes), np.zeros(len(joints))
        )
        self.tick, self.lag = 0, lag
        self.commands, self.references = [np.zeros(len(joints))], [np.zeros(len(joints))]

    @property
    def now(self) -> int:
        return T0 + self.tick * PERIOD

    def send(self, message: TrajectoryMessage) -> None:
        assert self.controller.receive(message, self.now).accepted

    def run(self, ticks: int) -> np.ndarray:
        """All commands so far ``[N]`` of the first joint, the start first."""
        for _ in range(ticks):
            command = self.controller.update(self.now, self.commands[-1] - self.lag)
            self.commands.append(command.positions)
            self.references.append(command.reference_positions)
            self.tick += 1
        return np.array(self.commands)[:, 0]


def test_stamp_zero_starts_at_the_running_motion_with_its_velocity_whatever_the_arm_lags() -> None:
    arm = Arm(lag=0.05)
    arm.send(ramp())
    arm.run(30)
    last = arm.commands[-1][0]
    arm.send(ramp(start=arm.references[-1][0]))
    commands = arm.run(30)
    # The running trajectory is dated by the update before, so one command is repeated; then it goes on as if nothing had been.
    assert commands[31] == pytest.approx(last, abs=1e-9)
    assert np.diff(commands)[31:] == pytest.approx(NOMINAL, abs=1e-9)


def test_the_bridge_is_continuous_in_position_and_velocity_where_the_new_motion_differs() -> None:
    arm = Arm(lag=0.05)
    arm.send(ramp())
    arm.run(30)
    before = arm.references[-1][0]
    arm.send(ramp(start=before + 0.05))
    steps = np.diff(arm.run(40))[31:]
    # The cubic from (before, 1 rad/s) to (before + 0.15, 1 rad/s) in 0.1 s.
    t = np.arange(1, 11) * 0.01
    c2, c3 = 3 * 0.05 / 0.1**2, -2 * 0.05 / 0.1**3
    cubic = before + t + c2 * t**2 + c3 * t**3
    assert arm.commands[31][0] == pytest.approx(cubic[0], abs=1e-9)
    assert np.array(arm.commands)[31:41, 0] == pytest.approx(cubic, abs=1e-9)
    assert steps.min() > 0.0


def test_the_bridge_is_a_quintic_where_the_new_points_have_accelerations() -> None:
    arm = Arm()
    arm.send(ramp())
    arm.run(30)
    before = arm.references[-1][0]
    arm.send(TrajectoryMessage(('a',), [point(100, before + 0.1, v=0.0, a=0.0), point(200, before + 0.1, v=0.0, a=0.0)]))
    arm.run(9)
    # From 1 rad/s and no acceleration to rest at 0.1 further, in 0.1 s; s is the part of it.
    s = np.arange(1, 10) / 10
    quintic = s * 0.1 + 0.1 * (4 * s**3 - 7 * s**4 + 3 * s**5)
    assert np.array(arm.commands)[31:, 0] - before == pytest.approx(quintic, abs=1e-9)


def test_without_time_before_the_first_point_there_is_no_bridge_but_a_step() -> None:
    arm = Arm()
    arm.send(ramp())
    arm.run(30)
    arm.send(TrajectoryMessage(('a',), [point(0, 1.0, v=0.0), point(100, 1.0, v=0.0)]))
    assert arm.run(1)[-1] == 1.0


def test_a_past_stamp_is_replayed_from_its_first_point_as_if_it_had_none() -> None:
    commands = {}
    for stamp_ns in (0, T0 + 100 * MS):
        arm = Arm()
        arm.send(ramp())
        arm.run(30)
        arm.send(ramp(start=0.3, stamp_ns=stamp_ns))
        commands[stamp_ns] = arm.run(40)
    np.testing.assert_array_equal(*commands.values())
    assert commands[0][41] == pytest.approx(arm.references[30][0] + 0.11, abs=0.02), 'nothing is skipped'


def test_a_future_stamp_lets_the_old_trajectory_run_until_then_and_bridges_from_there() -> None:
    arm = Arm(interpolate_from_desired_state=True)
    arm.send(ramp())
    arm.run(30)
    reference = arm.references[-1][0]
    arm.send(ramp(start=0.6, stamp_ns=arm.now + 200 * MS))
    commands = arm.run(60)
    assert np.array(arm.references)[50, 0] == pytest.approx(reference + 0.19, abs=0.001), 'still the old motion'
    seam = commands[50]
    assert np.diff(commands)[40:50] == pytest.approx(NOMINAL, rel=0.06)
    assert commands[61] == pytest.approx(0.71, abs=0.001), 'the new motion, 0.1 s after its start'
    assert np.all(np.diff(commands)[49:60] > 0.0) and commands[51] - seam < 2 * NOMINAL


@pytest.mark.parametrize(('from_desired', 'step'), [(False, -0.03), (True, 0.015)])
def test_until_a_future_stamp_the_way_to_the_next_old_point_begins_like_any_new_trajectory(from_desired: bool, step: float) -> None:
    arm = Arm(lag=0.05, interpolate_from_desired_state=from_desired)
    arm.send(ramp())
    arm.run(33)
    arm.send(ramp(start=0.6, stamp_ns=arm.now + 300 * MS))
    first = np.diff(arm.run(1))[-1]
    assert bool(first < step) if step < 0 else bool(step < first < 2 * NOMINAL)


def test_under_speed_scaling_a_future_stamp_is_kept_as_a_moment_of_the_clock() -> None:
    arm = Arm(interpolate_from_desired_state=True, speed_scaling=0.5)
    arm.send(ramp())
    arm.run(30)
    target = TrajectoryMessage(('a',), [point(10, 2.0, v=0.0), point(110, 2.0, v=0.0)], stamp_ns=arm.now + 200 * MS)
    arm.send(target)
    arm.run(18)
    assert arm.commands[-1][0] < 0.5, '200 ms are not over'
    arm.run(4)
    assert arm.commands[-1][0] == pytest.approx(2.0)


def legacy(events: dict[int, TrajectoryMessage], ticks: int, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The commands with and without blending."""
    commands = []
    for blends in (True, False):
        arm = Arm(lag=0.02, allow_trajectory_replacement=blends, **changes)
        for tick in range(ticks):
            if tick in events:
                arm.send(events[tick])
            arm.run(1)
        commands.append(arm.run(0))
    return commands[0], commands[1]


def test_what_follows_a_hold_or_a_single_point_is_not_blended() -> None:
    np.testing.assert_array_equal(*legacy({0: ramp()}, 20))
    single = TrajectoryMessage(('a',), [point(200, 0.2, v=0.0)])
    np.testing.assert_array_equal(*legacy({0: single, 10: ramp(start=0.1)}, 30))
    # The hold after a time-out.
    np.testing.assert_array_equal(*legacy({0: ramp()}, 160, cmd_timeout=0.2))
    blended, forgotten = legacy({0: ramp(), 10: single}, 30)
    assert np.abs(blended - forgotten).max() > 0.005, 'a single point itself is blended'


def test_a_violation_stops_at_once_and_is_not_blended() -> None:
    arm = Arm(lag=0.02, trajectory_tolerance={'a': 0.1})
    arm.send(ramp())
    arm.run(30)
    arm.lag = 0.2
    arm.run(2)
    measured = arm.commands[-2][0] - 0.2
    assert arm.controller.is_holding and arm.commands[-1][0] == pytest.approx(measured)


def moving(ms: int, *positions: float) -> TrajectoryPoint:
    return point(ms, *positions, v=1.0)


WHOLE = TrajectoryMessage(
    ('a', 'b'), [moving(0, 0.0, 0.0), moving(400, 0.4, 0.4), moving(800, 0.8, 0.8), point(1000, 0.9, 0.9, v=0.0)]
)


@pytest.mark.parametrize('blends', [True, False])
def test_joints_that_are_left_out_go_on_along_the_old_path_where_the_others_hold(blends: bool) -> None:
    arm = Arm(('a', 'b'), allow_trajectory_replacement=blends)
    arm.send(WHOLE)
    arm.run(20)
    left = arm.commands[-1][1]
    arm.send(TrajectoryMessage(('a',), [point(100, 0.3, v=0.0), point(300, 0.3, v=0.0)]))
    arm.run(100)
    commands = np.array(arm.commands)
    assert commands[-1, 0] == pytest.approx(0.3), 'the named joint goes where it was sent'
    assert commands[60:, 0] == pytest.approx(0.3), 'and stays there when the old points come'
    if blends:
        assert np.diff(commands[21:60, 1])[1:] == pytest.approx(NOMINAL, rel=0.05)
        assert commands[-1, 1] == pytest.approx(0.9), 'to the end of the old path'
    else:
        assert commands[21:, 1] == pytest.approx(left)


def test_a_partial_goal_whose_end_has_no_positions_is_not_blended() -> None:
    for blends in (True, False):
        arm = Arm(('a', 'b'), allow_trajectory_replacement=blends, allow_integration_in_goal_trajectories=True)
        arm.send(WHOLE)
        arm.run(20)
        arm.send(TrajectoryMessage(('a',), [point(100, 0.3, v=0.0), TrajectoryPoint(300 * MS, [], [0.0])]))
        before = arm.commands[-1][1]
        arm.run(30)
        assert arm.commands[-1][1] == pytest.approx(before), 'the joint left out holds, as on every other release'


def test_a_blend_before_the_old_trajectory_has_begun_starts_from_the_ramp_to_it() -> None:
    arm = Arm()
    arm.send(ramp(stamp_ns=T0 + 500 * MS))
    arm.run(20)
    reference = arm.references[-1][0]
    arm.send(ramp(start=reference))
    arm.run(1)
    assert arm.references[-1][0] == pytest.approx(reference, abs=1e-9)
