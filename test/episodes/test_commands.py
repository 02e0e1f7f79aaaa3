"""Targets over time: exact at their times, linear between, held over gaps, padded after the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_policy_ros.episodes.commands import CommandError, Commands, Targets, targets_of_rows

EPOCH = 1_776_000_000 * 10**9  # stamps of today have more digits than a float64
MS = 10**6


def stream(times_ms: list[int], values: list[float], joints: tuple[str, ...] = ('a',)) -> Targets:
    rows = [(EPOCH + t * MS, np.full(len(joints), v)) for t, v in zip(times_ms, values, strict=True)]
    return targets_of_rows(joints, rows, 'test')


def at(commands: Commands | Targets, *times_ms: float) -> np.ndarray:
    times = np.array([EPOCH + round(t * MS) for t in times_ms])
    return commands.sample(times).positions if isinstance(commands, Commands) else commands.sample(times)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(-3, 3)), min_size=1, max_size=20))
def test_targets_are_exact_at_their_times(steps: list[tuple[int, float]]) -> None:
    times = np.cumsum([step for step, _ in steps]).tolist()
    values = [value for _, value in steps]
    np.testing.assert_array_equal(at(stream(times, values), *times)[:, 0], values)


def test_between_two_targets_the_way_is_straight_and_outside_it_stands() -> None:
    targets = stream([0, 100, 200], [0.0, 1.0, 3.0])
    np.testing.assert_allclose(at(targets, -50, 25, 150, 900)[:, 0], [0.0, 0.25, 2.0, 3.0], rtol=1e-6)


def test_over_a_gap_the_last_target_is_held_until_the_next_is_approached() -> None:
    targets = stream([0, 100, 200, 1200, 1300], [0.0, 1.0, 2.0, 6.0, 7.0])
    np.testing.assert_allclose(at(targets, 300, 1000, 1100, 1150, 1200)[:, 0], [2.0, 2.0, 2.0, 4.0, 6.0], rtol=1e-6)


def test_a_later_message_takes_back_what_was_said_of_later_times() -> None:
    targets = stream([100, 200, 300, 150, 250], [1.0, 2.0, 3.0, -1.0, -2.0])
    assert ((targets.stamps_ns - EPOCH) // MS).tolist() == [100, 150, 250]
    assert targets.positions[:, 0].tolist() == [1.0, -1.0, -2.0]


def test_actions_after_the_end_are_padding_and_before_the_beginning_unknown() -> None:
    commands = Commands(('a', 'b'), (stream([0, 100, 200], [0, 1, 2], ('b',)), stream([50, 150], [5, 6], ('a',))))
    sampled = commands.sample(np.array([EPOCH + t * MS for t in (-60, 0, 50, 200, 201, 300)]))
    assert sampled.early.tolist() == [True, False, False, False, False, False]
    # `a` ends at 150 ms; half a spacing later (200 ms) counts still.
    assert sampled.is_pad.tolist() == [False, False, False, False, True, True]
    np.testing.assert_array_equal(sampled.positions[-1], [6, 2])


def test_every_joint_needs_one_stream() -> None:
    with pytest.raises(CommandError, match="'b' has 0 streams"):
        Commands(('a', 'b'), (stream([0], [0]),))
    with pytest.raises(CommandError, match="'a' has 2 streams"):
        Commands(('a',), (stream([0], [0]), stream([0], [0])))
    with pytest.raises(CommandError, match='no target'):
        targets_of_rows(('a',), [], 'test')
    with pytest.raises(CommandError, match='go back'):
        Targets(('a',), np.array([1, 1]), np.zeros((2, 1)), 'test')
