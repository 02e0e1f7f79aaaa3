"""The loop without ROS: states, gates, one request in flight, braking, and a clock that jumps.

The real assembler and planner run; only inference is replaced by a function that answers when the test lets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_messages import camera_info, image, joint_state

from vla_policy_ros.control.check import violation
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.observation import ObservationError
from vla_policy_ros.robot import parse_robot
from vla_policy_ros.runtime import PolicyRuntime, Settings, State
from vla_policy_ros.types import ActionChunk, JointTrajectory, Observation

ROBOT = parse_robot("""
name: toy
cameras:
  left: {topic: /left, camera_info: /left/info}
state: {topic: /joint_states, joints: [a, b]}
action: {joints: [a, b], period: 0.1, horizon: 10}
limits:
  a: {position: [-1, 1], velocity: 1, acceleration: 4, following_error: 0.3}
  b: {position: [-1, 1], velocity: 1, acceleration: 4, following_error: 0.3}
controllers:
  arm: {topic: /arm/joint_trajectory, joints: [a, b]}
timing: {max_image_age: 0.4, max_state_age: 0.2, max_camera_skew: 0.1, max_state_skew: 0.2}
""")
MS = 10**6
PIXELS = np.zeros((48, 64, 3), np.uint8)
GOAL = np.array([0.5, -0.5])


@dataclass
class Recorder:
    trajectories: list[tuple[JointTrajectory, bool]] = field(default_factory=list)
    chunks: list[Any] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def on_trajectory(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        self.trajectories.append((trajectory, actuate))

    def on_chunk(self, report: Any) -> None:
        self.chunks.append(report)

    def on_state(self, state: State, reason: str) -> None:
        self.states.append(state)

    def on_warning(self, sentence: str) -> None:
        raise AssertionError(sentence)


class ManualExecutor:
    """Runs the submitted call when the test says so."""

    def __init__(self) -> None:
        self.job: tuple[Callable[[], Any], Callable[[Any], None]] | None = None

    def submit(self, call: Callable[[], Any], on_done: Callable[[Any], None]) -> bool:
        if self.job is not None:
            return False
        self.job = (call, on_done)
        return True

    def run(self) -> None:
        assert self.job is not None
        (call, on_done), self.job = self.job, None
        try:
            on_done(SimpleNamespace(value=call(), error=None))
        except Exception as error:
            on_done(SimpleNamespace(value=None, error=error))


class Bench:
    """A runtime on a hand-driven clock: 20 ms steps, sensors at every step, replan every 200 ms, inference of `latency_ms`."""

    stamp: str = 'start'

    def __init__(self, latency_ms: int = 60, dry_run: bool = False) -> None:
        self.now = 10**9
        self.latency_ms = latency_ms
        self.executor, self.recorder = ManualExecutor(), Recorder()
        self.answer: Callable[[Observation], ActionChunk] = self.towards_goal
        planner = TrajectoryPlanner(JointLimits.from_robot(ROBOT), Emission.for_controller(100.0, self.stamp))
        settings = Settings(replan_rate=5.0, dry_run=dry_run, max_inference_time=0.5)
        self.runtime = PolicyRuntime(
            ROBOT, lambda o, _: self.answer(o), planner, self.executor, self.recorder, lambda: None, settings
        )
        self.started = 0
        self.camera_on = True
        self.measured: Callable[[int], np.ndarray] | None = None

    def towards_goal(self, observation: Observation) -> ActionChunk:
        ramp = np.linspace(0.1, 1.0, ROBOT.action.horizon)[:, None]
        actions = observation.state + ramp * np.clip(GOAL - observation.state, -0.4, 0.4)
        return self.chunk(observation, actions)

    def chunk(self, observation: Observation, actions: np.ndarray) -> ActionChunk:
        period = ROBOT.action.period_ns
        return ActionChunk(
            observation.stamp_ns + period, period, ROBOT.action.joints, actions, observation.stamp_ns, observation.instruction
        )

    def commanded(self, t: int) -> np.ndarray:
        """Where the newest trajectory has the robot, sampled as the controller would between its knots."""
        sent = [trajectory for trajectory, actuate in self.recorder.trajectories if actuate and trajectory.start_ns <= t]
        if not sent:
            return np.zeros(2)
        last = sent[-1]
        return np.array([np.interp(t - last.start_ns, last.times_ns, last.positions[:, j]) for j in range(2)])

    def feed(self) -> None:
        inputs = self.runtime.inputs
        if self.camera_on:
            inputs.put_image('left', image(PIXELS, stamp_ns=self.now), self.now)
            inputs.put_camera_info('left', camera_info(), self.now)
        measured = self.measured(self.now) if self.measured else self.commanded(self.now)
        inputs.put_joint_state(joint_state(['a', 'b'], measured.tolist(), self.now), self.now)

    def step(self, feed: bool = True) -> None:
        self.now += 20 * MS
        if feed:
            self.feed()
        if self.executor.job is not None and self.now - self.started >= self.latency_ms * MS:
            self.executor.run()
            self.runtime.collect(self.now)
        idle = self.executor.job is None
        if self.now % (200 * MS) == 0:
            self.runtime.tick(self.now)
        else:
            self.runtime.watch(self.now)
        if idle and self.executor.job is not None:
            self.started = self.now

    def run(self, seconds: float, feed: bool = True) -> None:
        for _ in range(round(seconds * 50)):
            self.step(feed)

    def running_until_asked(self) -> Bench:
        """Active, with the first request on its way."""
        self.feed()
        self.runtime.instruct('go', self.now)
        self.runtime.activate(self.now)
        while self.executor.job is None:
            self.step()
        return self

    def running(self) -> Bench:
        self.feed()
        self.runtime.instruct('go', self.now)
        self.runtime.activate(self.now)
        self.run(1.0)
        assert self.runtime.state is State.RUNNING
        return self


@pytest.fixture(autouse=True, params=['start', 'zero'])
def _both_stamps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds for both ways of timing the message."""
    monkeypatch.setattr(Bench, 'stamp', request.param)


def test_states_from_waiting_to_running():
    bench = Bench()
    bench.runtime.watch(bench.now)
    assert bench.runtime.state is State.WAITING
    bench.feed()
    bench.runtime.instruct('go', bench.now)
    assert bench.runtime.state is State.READY
    bench.run(1.0)
    assert bench.recorder.chunks == [] and bench.recorder.trajectories == [], 'an inactive runtime must be silent'
    bench.runtime.activate(bench.now)
    bench.run(1.0)
    assert bench.recorder.states == [State.WAITING, State.READY, State.RUNNING]


def test_reaches_the_goal_replanning_at_its_rate_within_limits():
    bench = Bench().running()
    bench.run(5.0)
    np.testing.assert_allclose(bench.commanded(bench.now), GOAL, atol=0.02)
    assert bench.runtime.chunk_rate(bench.now) == pytest.approx(5.0, rel=0.02)
    assert bench.runtime.counters.trajectories_rejected == 0
    limits = JointLimits.from_robot(ROBOT)
    for trajectory, actuate in bench.recorder.trajectories:
        assert actuate
        assert violation(trajectory, limits) is None
        assert not trajectory.velocities[-1].any()
    report = bench.recorder.chunks[-1]
    assert report.latency_ms == pytest.approx(60, abs=21)
    assert set(report.stages_ms) >= {'decode', 'plan'}


def test_one_request_in_flight_and_a_missed_tick_is_made_up_at_once():
    bench = Bench(latency_ms=260)
    bench.running()
    before = bench.runtime.counters.chunks
    bench.run(5.2)
    assert bench.runtime.counters.chunks - before >= 18, 'a 260 ms policy must be asked again as soon as it is free'
    assert bench.runtime.counters.requests_skipped > 0


def test_a_dead_camera_brakes_holds_and_recovers_by_itself():
    bench = Bench().running()
    bench.camera_on = False
    died = bench.now
    while bench.runtime.state is State.RUNNING:
        bench.step()
    assert bench.runtime.state is State.HOLDING
    assert bench.now - died <= 400 * MS + 20 * MS + 20 * MS
    assert "camera 'left'" in bench.runtime.reason
    sent = len(bench.recorder.trajectories)
    brake = bench.recorder.trajectories[-1][0]
    assert not brake.velocities[-1].any()
    bench.run(2.0)
    assert len(bench.recorder.trajectories) == sent, 'silence after braking'
    assert bench.runtime.commanded_until(bench.now) == 0.0
    bench.camera_on = True
    bench.run(0.6)
    assert bench.runtime.state is State.RUNNING
    assert len(bench.recorder.trajectories) > sent


def test_nothing_moves_on_bad_actions():
    bench = Bench().running()
    sent = len(bench.recorder.trajectories)
    bench.answer = lambda o: bench.chunk(o, np.full((10, 2), np.nan))
    bench.run(1.0)
    assert len(bench.recorder.trajectories) <= sent + 1  # one chunk may have been under way
    assert bench.runtime.state is State.HOLDING and 'refused' in bench.runtime.reason
    assert bench.recorder.chunks[-1].plan.trajectory is None
    bench.answer = bench.towards_goal
    bench.run(0.6)
    assert bench.runtime.state is State.RUNNING


def test_an_image_that_does_not_decode_holds_with_its_reason():
    bench = Bench().running()

    def fail(_: Observation) -> ActionChunk:
        raise ObservationError("camera 'left': broken")

    bench.answer = fail
    bench.run(0.6)
    assert bench.runtime.state is State.HOLDING and bench.runtime.reason == "camera 'left': broken"


def test_a_failing_policy_is_a_fault_that_brakes_and_stays():
    bench = Bench().running()

    def fail(_: Observation) -> ActionChunk:
        raise RuntimeError('out of memory')

    bench.answer = fail
    bench.run(1.0)
    assert bench.runtime.state is State.FAULT and 'out of memory' in bench.runtime.reason
    sent = len(bench.recorder.trajectories)
    bench.answer = bench.towards_goal
    bench.run(1.0)
    bench.runtime.reset(bench.now)
    assert bench.runtime.state is State.FAULT and len(bench.recorder.trajectories) == sent


def test_a_stalled_policy_is_reported_and_the_tail_rests():
    bench = Bench().running()
    bench.latency_ms = 10_000
    bench.run(3.0)
    assert bench.runtime.state is State.HOLDING and 'inference has taken' in bench.runtime.reason
    assert bench.runtime.commanded_until(bench.now) == 0.0
    bench.latency_ms = 60
    bench.run(1.0)
    assert bench.runtime.state is State.RUNNING


def test_soft_stop_brakes_latches_and_needs_a_reset():
    bench = Bench().running()
    sent = len(bench.recorder.trajectories)
    bench.runtime.stop(bench.now, 'operator')
    assert len(bench.recorder.trajectories) == sent + 1
    bench.run(2.0)
    assert bench.runtime.state is State.STOPPED and len(bench.recorder.trajectories) == sent + 1
    bench.runtime.reset(bench.now)
    bench.run(0.6)
    assert bench.runtime.state is State.RUNNING and len(bench.recorder.trajectories) > sent + 1


def test_deactivate_brakes_then_silence():
    bench = Bench().running()
    bench.runtime.deactivate(bench.now)
    sent = len(bench.recorder.trajectories)
    bench.run(1.0)
    assert bench.runtime.state is State.READY and len(bench.recorder.trajectories) == sent


def test_a_robot_that_does_not_follow_stops_without_a_command():
    bench = Bench().running()
    frozen = bench.commanded(bench.now) + np.array([0.5, 0.0])
    sent = len(bench.recorder.trajectories)
    bench.measured = lambda _: frozen
    bench.run(0.1)
    assert bench.runtime.state is State.STOPPED and "'a' is 0." in bench.runtime.reason
    assert len(bench.recorder.trajectories) <= sent + 1
    for trajectory, _ in bench.recorder.trajectories[sent:]:
        assert trajectory.start_ns <= bench.now - 80 * MS


def test_a_new_instruction_drops_the_chunk_in_flight():
    bench = Bench().running()
    while bench.executor.job is None:
        bench.step()
    chunks = len(bench.recorder.chunks)
    bench.runtime.instruct('go elsewhere', bench.now)
    bench.run(0.08)
    assert all(r.chunk.instruction == 'go elsewhere' for r in bench.recorder.chunks[chunks:])
    bench.run(0.4)
    assert bench.recorder.chunks[-1].chunk.instruction == 'go elsewhere'


def test_an_empty_instruction_means_rest():
    bench = Bench().running()
    bench.runtime.instruct('', bench.now)
    assert bench.runtime.state is State.HOLDING and 'instruction' in bench.runtime.reason
    bench.run(2.0)
    assert bench.runtime.commanded_until(bench.now) == 0.0


def test_dry_run_plans_everything_and_actuates_nothing():
    bench = Bench(dry_run=True).running()
    bench.run(1.0)
    bench.runtime.stop(bench.now, 'operator')
    assert len(bench.recorder.chunks) >= 8
    assert bench.recorder.trajectories and not any(actuate for _, actuate in bench.recorder.trajectories)
    assert bench.runtime.counters.trajectories_published == 0


def test_a_clock_that_jumps_back_starts_anew():
    bench = Bench().running()
    sent = len(bench.recorder.trajectories)
    bench.now = bench.started = 10**8 * 5
    bench.measured = lambda _: np.array([0.9, 0.9])  # the robot stands elsewhere on the new time line
    bench.runtime.watch(bench.now)
    assert bench.runtime.state is State.WAITING
    assert len(bench.recorder.trajectories) == sent
    bench.run(0.2)
    assert 'the clock jumped' in bench.runtime.reason, 'a controller may still execute the last trajectory'
    bench.run(3.0)
    assert bench.runtime.state is State.RUNNING, bench.runtime.reason
    first = bench.recorder.trajectories[sent][0]
    np.testing.assert_allclose(first.positions[0], [0.9, 0.9], atol=0.05)


def test_a_small_step_back_of_the_clock_changes_nothing():
    bench = Bench().running()
    states = list(bench.recorder.states)
    bench.now -= 100 * MS
    bench.runtime.watch(bench.now)
    bench.run(1.0)
    assert bench.recorder.states == states


def test_a_clock_that_leaps_ahead_starts_anew_once_the_last_trajectory_rests():
    bench = Bench().running()
    sent = len(bench.recorder.trajectories)
    bench.now = bench.started = bench.now + 20 * 10**9
    bench.measured = lambda _: np.array([0.2, 0.2])
    bench.runtime.watch(bench.now)
    bench.run(0.2)
    assert len(bench.recorder.trajectories) == sent and 'the clock jumped' in bench.runtime.reason
    bench.run(3.0)
    assert bench.runtime.state is State.RUNNING, bench.runtime.reason
    np.testing.assert_allclose(bench.recorder.trajectories[sent][0].positions[0], [0.2, 0.2], atol=0.05)


def test_an_input_that_fails_while_holding_brakes_too():
    bench = Bench().running()
    bench.answer = lambda o: bench.chunk(o, np.full((10, 2), np.nan))
    while bench.runtime.state is State.RUNNING:
        bench.step()
    assert bench.runtime.commanded_until(bench.now) > 0.5, 'the tail must still be moving'
    sent = len(bench.recorder.trajectories)
    bench.runtime.instruct('', bench.now)
    assert len(bench.recorder.trajectories) == sent + 1
    assert not bench.recorder.trajectories[-1][0].velocities[-1].any()


def test_an_answer_to_an_input_that_failed_meanwhile_is_dropped():
    bench = Bench(latency_ms=5000).running_until_asked()
    bench.camera_on = False
    bench.run(0.6)
    sent, chunks = len(bench.recorder.trajectories), len(bench.recorder.chunks)
    bench.latency_ms = 60
    bench.run(0.1)
    assert bench.executor.job is None, 'the answer has come'
    assert (len(bench.recorder.trajectories), len(bench.recorder.chunks)) == (sent, chunks)


def test_a_robot_that_was_moved_during_a_silence_is_taken_where_it_is():
    bench = Bench().running()
    bench.camera_on = False
    bench.run(2.5)
    assert bench.runtime.commanded_until(bench.now) == 0.0
    moved = bench.commanded(bench.now) + np.array([0.2, 0.0])
    bench.measured = lambda _: moved
    bench.camera_on = True
    sent = len(bench.recorder.trajectories)
    while len(bench.recorder.trajectories) == sent:
        bench.step()
    np.testing.assert_allclose(bench.recorder.trajectories[sent][0].positions[0], moved, atol=1e-9)


def test_a_motion_begins_where_the_controllers_hold_the_robot_if_that_is_known():
    bench = Bench()
    bench.feed()
    bench.runtime.instruct('go', bench.now)
    bench.runtime.activate(bench.now)
    held = np.array([0.05, -0.05])
    while not bench.recorder.trajectories:
        bench.runtime.put_controller_reference(held, bench.now)
        bench.step()
    np.testing.assert_allclose(bench.recorder.trajectories[0][0].positions[0], held, atol=1e-9)
