"""Simulated time slows down exactly while the policy misses ticks."""

from __future__ import annotations

from vla_policy_ros.demo.pace import SLOWER, SLOWEST, Pace


def test_keeps_its_pace_while_nothing_is_missed():
    pace = Pace(1.0, 0.0)
    assert [pace.slower(float(t), 0) for t in range(1, 20)] == [None] * 19
    assert pace.factor == 1.0


def test_slows_down_per_second_in_which_ticks_were_missed():
    pace = Pace(1.0, 0.0)
    assert pace.slower(0.5, 3) is None, 'too early to judge'
    assert pace.slower(1.0, 3) == SLOWER
    assert pace.slower(2.0, 3) is None, 'the count did not grow'
    assert pace.slower(3.0, 4) is None, 'one missed tick is made up'
    assert pace.slower(4.0, 6) == SLOWER**2


def test_never_stops():
    pace = Pace(0.2, 0.0)
    for t in range(1, 50):
        pace.slower(float(t), 2 * t)
    assert pace.factor == SLOWEST
