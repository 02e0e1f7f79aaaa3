"""One clock for everything: delays as they were consumed, what is known of the next chunk, and what a clock jump forgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.control.timeline import CHUNKING, Timeline

MS = 1_000_000
T0 = 1_000_000 * MS
DT = 50
HORIZON = 20


class Loop:
    """A timeline whose chunks come back after a given latency, one every 200 ms."""

    def __init__(self, tools: Any, chunking: str = 'rtc_guided') -> None:
        self.tools = tools
        self.limits = tools.limits()
        self.emission = Emission.for_controller(100.0, 'start')
        self.timeline = Timeline(TrajectoryPlanner(self.limits, self.emission), chunking)  # type: ignore[arg-type]
        self.timeline.advance(T0)
        self.timeline.begin(np.zeros(3))
        self.asked = T0

    def path(self, t_ns: np.ndarray) -> np.ndarray:
        return 0.3 * np.sin(0.8 * (t_ns - T0)[:, None] * 1e-9 + np.arange(3)) - 0.3 * np.sin(np.arange(3))

    def answer(self, latency_ms: int, offset: float = 0.0) -> Any:
        """One chunk, observed now and planned ``latency_ms`` later; then on to the next request."""
        stamp = self.asked
        times = stamp + DT * MS * np.arange(1, HORIZON + 1)
        chunk = self.tools.chunk(self.limits.names, stamp + DT * MS, self.path(times) + offset, DT)
        self.timeline.advance(stamp + latency_ms * MS)
        commanded = self.timeline.commanded
        if commanded is None or self.timeline.starved():
            commanded = self.timeline.begin(np.zeros(3) if commanded is None else commanded.sample(self.timeline.now_ns)[0])
        plan = self.timeline.plan(chunk, commanded)
        assert plan.trajectory is not None, plan.reason
        self.timeline.accept(plan)
        self.timeline.taken(chunk, plan)
        self.asked += max(200, latency_ms) * MS
        self.timeline.advance(self.asked)
        return plan

    def known(self) -> Any:
        return self.timeline.known_actions(self.asked, DT * MS, HORIZON)


def test_delay_is_what_was_consumed_from_the_observation_to_the_seam(tools: Any) -> None:
    loop = Loop(tools)
    plans = [loop.answer(100) for _ in range(4)]
    seams = [plan.seam_ns - (T0 + index * 200 * MS) for index, plan in enumerate(plans)]
    assert loop.timeline.delay_ns == seams[-1] == 140 * MS, '100 ms of latency and 40 ms of lead'


def test_the_first_chunk_waits_for_warm_up_and_does_not_count(tools: Any) -> None:
    loop = Loop(tools)
    loop.answer(900)
    assert loop.timeline.delay_ns is None and loop.known() is None
    loop.answer(100)
    loop.answer(100)
    assert loop.timeline.delay_ns == 140 * MS
    known = loop.known()
    assert known is not None and known.committed == 2, 'actions at 50 and 100 ms are executed by 140 ms'


def test_one_slow_outlier_does_not_change_the_delay_and_a_lasting_one_does(tools: Any) -> None:
    loop = Loop(tools)
    for _ in range(6):
        loop.answer(100)
    before = loop.timeline.delay_ns
    loop.answer(700)
    assert loop.timeline.delay_ns == before
    loop.answer(100)
    assert loop.timeline.delay_ns == before
    loop.answer(700)
    assert loop.timeline.delay_ns == 740 * MS


def test_a_starved_queue_leaves_the_next_chunk_free(tools: Any) -> None:
    loop = Loop(tools)
    for _ in range(4):
        loop.answer(100)
    assert loop.known() is not None
    loop.timeline.advance(loop.asked + 900 * MS)
    assert loop.timeline.advance(loop.asked + 1800 * MS) is False
    assert loop.timeline.starved() and loop.timeline.known_actions(loop.timeline.now_ns, DT * MS, HORIZON) is None


def test_known_actions_are_the_commanded_motion_and_end_with_the_last_chunk(tools: Any) -> None:
    loop = Loop(tools)
    for _ in range(4):
        loop.answer(100, offset=0.01)
    known = loop.known()
    times = loop.asked + DT * MS * np.arange(1, HORIZON + 1)
    assert known.actions.shape == (HORIZON, 3) and np.isfinite(known.actions).all()
    assert (known.committed, known.overlap) == (2, 16), 'the last chunk ends 800 ms after this observation'
    for index in range(known.overlap):
        np.testing.assert_array_equal(known.actions[index], loop.timeline.commanded.sample(int(times[index]))[0])
    assert (known.actions[known.overlap :] == known.actions[known.overlap - 1]).all()


def test_known_actions_of_a_delay_longer_than_the_chunk_stay_inside_it(tools: Any) -> None:
    loop = Loop(tools)
    for _ in range(4):
        loop.answer(500)
    known = loop.known()
    assert known is not None and known.committed == known.overlap < HORIZON


@pytest.mark.parametrize('chunking', ['replace', 'ensemble'])
def test_other_modes_know_nothing_of_the_next_chunk(tools: Any, chunking: str) -> None:
    loop = Loop(tools, chunking)
    for _ in range(4):
        loop.answer(100)
    assert loop.known() is None


def test_forgetting_chunks_frees_the_next_one_and_keeps_the_measured_delay(tools: Any) -> None:
    loop = Loop(tools)
    for _ in range(4):
        loop.answer(100)
    loop.timeline.forget_chunks()
    assert loop.known() is None and loop.timeline.delay_ns == 140 * MS
    loop.answer(900)
    assert loop.timeline.delay_ns == 140 * MS, 'the answer after a pre-emption is no measure'
    loop.answer(100)
    assert loop.known() is not None


def test_an_ensemble_lies_between_its_chunks_and_replace_follows_the_newest(tools: Any) -> None:
    ends = {}
    for chunking in ('replace', 'ensemble'):
        loop = Loop(tools, chunking)
        for index in range(6):
            plan = loop.answer(60, offset=0.03 * (-1) ** index)
        assert plan.trajectory is not None
        commanded, now = loop.timeline.commanded, loop.asked - 200 * MS + 60 * MS
        when = now + 600 * MS
        ends[chunking] = commanded.sample(when)[0] - loop.path(np.array([when]))[0]
    newest = -0.03
    np.testing.assert_allclose(ends['replace'], newest, atol=2e-3)
    assert (ends['ensemble'] > newest + 0.005).all() and (ends['ensemble'] < 0.0).all()


def test_a_clock_jump_forgets_everything_and_waits_for_the_last_trajectory_to_rest(tools: Any) -> None:
    for jump_ms, back in ((-5000, True), (4000, False)):
        loop = Loop(tools)
        for _ in range(3):
            loop.answer(100)
        moving = loop.timeline.moving_for(loop.timeline.now_ns)
        assert moving > 0.5
        new = loop.timeline.now_ns + jump_ms * MS
        assert loop.timeline.advance(new) is True
        assert loop.timeline.now_ns == new and loop.timeline.commanded is None and loop.known() is None
        assert loop.timeline.settled is False
        loop.timeline.advance(new + int(moving * 5e8))
        assert not loop.timeline.settled
        loop.timeline.advance(new + int(moving * 1e9) + MS)
        assert loop.timeline.settled, back


def test_chunks_while_the_clock_stands_still_have_no_rate(tools: Any) -> None:
    timeline = Loop(tools).timeline
    for _ in range(2):
        timeline.refused()
    assert timeline.chunk_rate(timeline.now_ns, 5.0) == 0.0


def test_a_small_step_back_stands_still(tools: Any) -> None:
    loop = Loop(tools)
    now = loop.timeline.now_ns
    assert loop.timeline.advance(now - 150 * MS) is False
    assert loop.timeline.now_ns == now and loop.timeline.commanded is not None


def test_an_unknown_mode_is_named() -> None:
    limits_free: Any = None
    with pytest.raises(ValueError, match=r"'async'.*rtc_trained"):
        Timeline(limits_free, 'async')  # type: ignore[arg-type]
    assert len(CHUNKING) == 4


@pytest.mark.parametrize('jerk', [None, 100.0])
def test_after_a_lost_message_the_motion_goes_on_from_what_the_controller_executes(tools: Any, jerk: float | None) -> None:
    """Two trajectories are lost; the reference shows it, and the next one begins on the curve that is really being executed."""
    loop = Loop(tools, 'replace')
    if jerk is not None:
        limits = replace(loop.limits, jerk=np.full(3, jerk))
        loop.timeline = Timeline(TrajectoryPlanner(limits, loop.emission), 'replace')
        loop.timeline.advance(T0)
        loop.timeline.begin(np.zeros(3))
    for index in range(3):
        loop.answer(100, offset=0.02 * index)
    executed = loop.timeline.commanded.copy()
    for offset in (0.08, -0.08):
        loop.answer(100, offset=offset)
    now = loop.timeline.now_ns
    heard, _ = executed.sample(now - 10 * MS)
    assert np.abs(loop.timeline.commanded.sample(now - 10 * MS)[0] - heard).max() > 0.01
    loop.timeline.reconcile(heard, now - 10 * MS)
    for time in range(now, now + 300 * MS, 20 * MS):
        np.testing.assert_allclose(loop.timeline.commanded.sample(time)[0], executed.sample(time)[0], atol=1e-12)
    plan = loop.answer(100)
    np.testing.assert_allclose(loop.timeline.commanded.sample(plan.seam_ns)[0], executed.sample(plan.seam_ns)[0], atol=1e-9)


def test_a_late_message_that_arrives_after_all_is_followed_again(tools: Any) -> None:
    loop = Loop(tools, 'replace')
    for offset in (0.0, 0.02, 0.04):
        loop.answer(100, offset=offset)
    newest, now = loop.timeline.commanded.copy(), loop.timeline.now_ns
    older = next(motion for motion in reversed(loop.timeline._motions))
    loop.timeline.reconcile(older.sample(now)[0], now)
    np.testing.assert_array_equal(loop.timeline.commanded.sample(now)[0], older.sample(now)[0])
    loop.timeline.reconcile(newest.sample(now + 10 * MS)[0], now + 10 * MS)
    np.testing.assert_array_equal(loop.timeline.commanded.sample(now + 20 * MS)[0], newest.sample(now + 20 * MS)[0])


def test_a_reference_that_lies_on_no_motion_changes_nothing(tools: Any) -> None:
    loop = Loop(tools, 'replace')
    for _ in range(3):
        loop.answer(100)
    before, now = loop.timeline.commanded, loop.timeline.now_ns
    loop.timeline.reconcile(before.sample(now)[0] + 0.01, now)
    loop.timeline.reconcile(before.sample(now)[0], T0 - 10**9)
    assert loop.timeline.commanded is before
