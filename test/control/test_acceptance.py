"""A controller that follows is never accused; one that refused, lost or left a trajectory is found out within a few cycles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.acceptance import AcceptanceWatch
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.jtc import ControllerParameters, JointTrajectoryController, TrajectoryMessage
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner

MS = 1_000_000
MODES = ('start', 'zero')
Message = TrajectoryMessage


class Line:
    """A planner, a transport, an emulated controller and the watch. ``spoil(index, message)`` changes or loses (None) a message."""

    def __init__(self, tools: Any, mode: str, rate: float = 100.0, seed: int = 0, from_desired: bool = True) -> None:
        self.tools, self.rng = tools, np.random.default_rng(seed)
        self.limits = tools.limits()
        self.emission = Emission.for_controller(rate, mode, 60.0)  # type: ignore[arg-type]
        self.planner = TrajectoryPlanner(self.limits, self.emission)
        self.watch = AcceptanceWatch('arm', self.limits.names, self.limits, self.emission)
        self.from_desired, self.distro, self.blends = from_desired, 'jazzy', False
        self.replan_ms = 200
        self.state_every = max(1, round(rate / 50.0))
        self.transport_ms: tuple[float, float] = (0.0, 60.0)
        self.spoil: Callable[[int, Message], Message | None] = lambda _, message: message
        self.alarms: list[tuple[int, str]] = []
        self.seams: list[int] = []
        walk = np.cumsum(self.rng.normal(0, 0.12, (400, 3)), axis=0).clip(-2.7, 2.7)
        self.wants: Callable[[int, Any], Any] = lambda _, steps: walk[np.clip(steps, 0, 399)]
        self.speak_until = float('inf')

    def run(self, seconds: float) -> None:
        start, t0 = self.wants(0, np.array([0]))[0], self.tools.t0
        self.commanded = CommandedMotion.from_rest(self.limits.names, start, t0)
        rate = 1e9 / self.emission.controller_period_ns
        start_from = 'open_loop_control' if self.distro == 'humble' else 'interpolate_from_desired_state'
        changes = {'update_rate': rate, start_from: self.from_desired, 'allow_trajectory_replacement': self.blends}
        parameters = ControllerParameters.for_distro(self.distro, self.limits.names, **changes)
        controller = JointTrajectoryController(parameters, start)
        self.inflight: list[tuple[int, Message]] = []
        reports: list[tuple[int, int, Any]] = []
        measured, now, cycle, next_plan = start, t0, 0, t0 + int(self.rng.integers(0, 30 * MS))
        while now < t0 + seconds * 1e9:
            while next_plan <= now and next_plan < t0 + self.speak_until * 1e9:
                self.replan(next_plan)
                next_plan += self.replan_ms * MS
            for item in [item for item in self.inflight if item[0] <= now]:
                controller.receive(item[1], now)
                self.inflight.remove(item)
            command = controller.update(now, measured)
            measured = command.positions - 0.002  # the arm sags
            if cycle % self.state_every == 0:
                reports.append((now + int(self.rng.uniform(0, 10) * MS), now, command.reference_positions.copy()))
            for report in [report for report in reports if report[0] <= now]:
                sentence = self.watch.observe(report[2], report[1], report[0])
                if sentence:
                    self.alarms.append((now, sentence))
                reports.remove(report)
            now, cycle = now + self.emission.controller_period_ns, cycle + 1

    def replan(self, now: int) -> None:
        begin = now - 100 * MS
        steps = (begin - self.tools.t0) // (100 * MS) + np.arange(1, 17)
        actions = self.wants(len(self.seams), steps)
        plan = self.planner.plan(self.tools.chunk(self.limits.names, begin, actions), now, self.commanded)
        if plan.trajectory is None:
            return  # the last one comes to rest
        if self.commanded.until_ns < now:
            self.commanded = CommandedMotion.from_rest(self.limits.names, self.commanded.sample(now)[0], now)
        self.commanded.accept(plan.trajectory)
        self.watch.published(plan.trajectory, plan.seam_ns)
        message = Message.from_trajectory(plan.trajectory, self.emission.header_stamp_ns(plan.trajectory))
        spoilt = self.spoil(len(self.seams), message)
        self.seams.append(plan.seam_ns)
        if spoilt is not None:
            self.inflight.append((now + int(self.rng.uniform(*self.transport_ms) * MS), spoilt))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(MODES),
    st.sampled_from([50.0, 100.0, 250.0]),
    st.sampled_from([60, 200, 330, 2500]),
    st.booleans(),
    st.sampled_from(['humble', 'jazzy', 'kilted', 'rolling']),
)
def test_a_controller_that_follows_is_never_accused(
    tools: Any, seed: int, mode: str, rate: float, replan_ms: int, from_desired: bool, distro: str
) -> None:
    # With mode `zero` a controller that starts from the measured state is refused, as it falls behind with every message.
    line = Line(tools, mode, rate, seed, from_desired or mode == 'zero')
    line.distro, line.blends = distro, distro == 'rolling' and mode == 'zero'
    line.replan_ms = replan_ms
    line.run(4.0)
    assert line.seams and line.alarms == [] and line.watch.not_accepted == line.watch.in_a_row == 0


def wrong_joint(_: int, message: Message) -> Message:
    return Message((*message.joint_names[:-1], 'elbow'), message.points, message.stamp_ns)


def another_clock(_: int, message: Message) -> Message:
    """Ended an hour ago on the controller's clock."""
    return Message(message.joint_names, message.points, message.stamp_ns - 3600 * 1000 * MS)


def lost(_: int, message: Message) -> None:
    return None


@pytest.mark.parametrize(
    ('mode', 'spoil'), [('start', wrong_joint), ('start', another_clock), ('start', lost), ('zero', wrong_joint), ('zero', lost)]
)
@pytest.mark.parametrize('replan_ms', [50, 200])
def test_a_controller_that_takes_nothing_is_found_out_and_counted(tools: Any, mode: str, spoil: Any, replan_ms: int) -> None:
    line = Line(tools, mode, seed=3)
    line.spoil, line.replan_ms = spoil, replan_ms
    line.run(3.0)
    assert line.watch.not_accepted == len(line.alarms) >= line.watch.in_a_row >= 3
    sentence = line.alarms[-1][1]
    assert sentence.startswith("controller 'arm' does not follow") and "'joint" in sentence and 'transport_delay' in sentence


@pytest.mark.parametrize('after', [2, 3, 5])
def test_one_lost_trajectory_is_reported_once_within_ten_cycles_and_forgiven_when_the_next_is_followed(
    tools: Any, after: int
) -> None:
    line = Line(tools, 'start', seed=5)
    # The lost message would have turned the arm round, so that it leaves the old motion at once.
    line.wants = lambda index, steps: np.tile(0.1 * (steps if index < after else 6 * after - steps)[:, None], 3)
    line.replan_ms = 300
    line.spoil = lambda index, message: None if index == after else message
    line.run(3.0)
    assert len(line.alarms) == 1 and line.watch.not_accepted == 1 and line.watch.in_a_row == 0
    within = line.emission.transport_ns + 10 * line.emission.controller_period_ns
    assert 0 <= line.alarms[0][0] - line.seams[after] <= within


@pytest.mark.parametrize('mode', MODES)
def test_a_last_trajectory_that_was_lost_is_found_out_with_no_other_behind_it(tools: Any, mode: str) -> None:
    line = Line(tools, mode, seed=6)
    line.speak_until = 1.0
    line.spoil = lambda index, message: None if index >= 4 else message
    line.run(3.5)
    assert len(line.alarms) == 1 and len(line.seams) == 5


def test_a_controller_that_leaves_the_motion_midway_is_reported_too(tools: Any) -> None:
    line = Line(tools, 'start', seed=7)
    line.run(1.0)
    now, watch = line.tools.t0 + 1000 * MS, line.watch
    held = line.commanded.sample(now)[0]
    for _ in range(20):
        now += 20 * MS
        sentence = watch.observe(held, now, now)
        if sentence:
            break
    assert sentence and watch.in_a_row == 1


def test_a_hold_elsewhere_after_the_end_is_nobodys_fault(tools: Any) -> None:
    line = Line(tools, 'start', seed=8)
    line.speak_until = 0.5
    line.run(3.0)
    now = line.commanded.until_ns + 500 * MS
    for _ in range(20):
        now += 20 * MS
        assert line.watch.observe(line.commanded.sample(now)[0] + 0.05, now, now) is None


def test_what_is_not_finite_is_not_followed(tools: Any) -> None:
    line = Line(tools, 'start', seed=9)
    line.run(1.0)
    now = line.tools.t0 + 1000 * MS
    sentences = [line.watch.observe(np.array([np.nan, 0.0, 0.0]), now + i * 20 * MS, now) for i in range(1, 4)]
    assert sentences[:2] == [None, None] and sentences[2] is not None


def test_references_that_came_late_or_twice_are_not_counted_twice(tools: Any) -> None:
    line = Line(tools, 'start', seed=10)
    line.run(1.0)
    now = line.tools.t0 + 1000 * MS
    away = line.commanded.sample(now)[0] + 1.0
    assert [line.watch.observe(away, now, now + i * MS) for i in range(10)] == [None] * 10
    assert line.watch.not_accepted == 0


def test_after_clear_nothing_is_judged_until_something_is_published(tools: Any) -> None:
    line = Line(tools, 'start', seed=11)
    line.spoil = lost
    line.run(1.5)
    total = line.watch.not_accepted
    line.watch.clear()
    now = line.tools.t0 + 1500 * MS
    assert all(line.watch.observe(np.full(3, 9.0), now + i * 20 * MS, now) is None for i in range(1, 10))
    assert line.watch.in_a_row == 0 and line.watch.not_accepted == total > 0


def test_a_controller_of_some_joints_is_judged_by_those_alone(tools: Any) -> None:
    line = Line(tools, 'start', seed=12)
    names = line.limits.names
    part = AcceptanceWatch('hand', names[:0:-1], line.limits, line.emission)
    whole, line.watch = line.watch, part
    line.run(0.05)
    line.watch = whole
    now = line.seams[0] + 200 * MS
    expected = line.commanded.sample(now)[0]
    moved = expected[:0:-1]
    assert all(part.observe(moved + 1e-5, now + i * MS, now) is None for i in range(5))
    assert any(part.observe(moved[::-1] + 1.0, now + i * MS, now) for i in range(5, 10))
