"""What the loop does about a controller that does not accept what it is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_runtime
from test_runtime import MS, Bench

from vla_policy_ros.robot import Robot
from vla_policy_ros.runtime import State


class Watched(Bench):
    """A bench whose controller reports its reference: what is commanded, unless ``reference`` says otherwise."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.warnings: list[str] = []
        self.recorder.on_warning = self.warnings.append  # type: ignore[method-assign]
        self.reference: Any = lambda t: self.runtime.timeline.commanded.sample(t)[0]

    def feed(self) -> None:
        super().feed()
        if self.runtime.timeline.commanded is not None:
            self.runtime.watch_acceptance('arm', self.reference(self.now), self.now, self.now)


@pytest.fixture(autouse=True)
def _state_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    data = test_runtime.ROBOT.model_dump()
    data['controllers']['arm']['state_topic'] = '/arm/controller_state'
    for limit in data['limits'].values():
        limit['following_error'] = None
    monkeypatch.setattr(test_runtime, 'ROBOT', Robot.model_validate(data))
    monkeypatch.setattr(Bench, 'stamp', 'start')


def wander(bench: Bench) -> Any:
    """Chunks that keep the arm moving for ever."""
    steps = np.arange(1, 11)[:, None] * 0.1
    return lambda o: bench.chunk(o, 0.6 * np.sin((o.stamp_ns * 1e-9 + steps) * np.array([1.1, 1.3])))


def test_a_controller_that_follows_runs_on():
    bench = Watched()
    bench.answer = wander(bench)
    bench.running()
    bench.run(5.0)
    assert bench.runtime.state is State.RUNNING
    assert bench.warnings == [] and bench.runtime.counters.trajectories_not_accepted == 0


def test_a_controller_that_takes_nothing_is_warned_about_then_stops_the_robot_without_a_command():
    bench = Watched()
    bench.answer = wander(bench)
    bench.reference = lambda _: np.zeros(2)
    bench.feed()
    bench.runtime.instruct('go', bench.now)
    bench.runtime.activate(bench.now)
    while bench.runtime.state is not State.STOPPED:
        sent = len(bench.recorder.trajectories)
        bench.step()
        assert bench.now < 10**10
    assert bench.runtime.reason.startswith("3 trajectories in a row were not accepted: controller 'arm' does not follow")
    assert '~/reset' in bench.runtime.reason
    assert len(bench.warnings) == 2 and bench.runtime.counters.trajectories_not_accepted == 3
    bench.run(1.0)
    assert len(bench.recorder.trajectories) == sent
    bench.reference = lambda t: bench.runtime.timeline.commanded.sample(t)[0]
    bench.runtime.reset(bench.now)
    bench.run(2.0)
    assert bench.runtime.state is State.RUNNING and bench.runtime.counters.trajectories_not_accepted == 3


def test_with_zero_it_only_warns():
    bench = Watched()
    bench.runtime.settings = replace(bench.runtime.settings, max_not_accepted=0)
    bench.answer = wander(bench)
    bench.reference = lambda _: np.zeros(2)
    bench.running()
    bench.run(3.0)
    assert bench.runtime.state is State.RUNNING and len(bench.warnings) > 5


def test_a_controller_that_others_command_after_deactivation_stops_nothing():
    bench = Watched()
    bench.answer = wander(bench)
    bench.running()
    bench.runtime.deactivate(bench.now)
    bench.reference = lambda _: np.full(2, 0.9)
    bench.run(2.0)
    assert bench.runtime.state is State.READY


def test_a_clock_jump_forgets_what_was_published():
    bench = Watched()
    bench.answer = wander(bench)
    bench.running()
    bench.now = bench.started = bench.now + 20 * 10**9
    bench.runtime.watch(bench.now)
    for index in range(9):
        bench.runtime.watch_acceptance('arm', np.ones(2), bench.now + index * MS, bench.now)
    assert bench.warnings == [] and bench.runtime.counters.trajectories_not_accepted == 0
