"""Numbers of evaluations, against values that others have published or that can be counted."""

from __future__ import annotations

import json

import pytest

pytest.importorskip('mujoco')

from vla_policy_ros.evaluation.report import EpisodeResult, markdown, rate_text, summarise, table_rows, wilson95


@pytest.mark.parametrize(
    ('successes', 'trials', 'interval'),
    [
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (200, 200, (0.9812, 1.0)),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(successes: int, trials: int, interval: tuple[float, float]) -> None:
    assert wilson95(successes, trials) == pytest.approx(interval, abs=6e-5)


@pytest.mark.parametrize(('successes', 'trials'), [(0, 0), (3, 2), (-1, 2)])
def test_a_rate_of_nothing_has_no_interval(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match='no rate'):
        wilson95(successes, trials)


RESULTS = [
    EpisodeResult(1, 'reach the red cube', True, 0.01, ''),
    EpisodeResult(2, 'reach the red cube', True, 0.02, ''),
    EpisodeResult(3, 'reach the red cube', False, 0.2, 'wrong_object'),
    EpisodeResult(4, 'reach the red cube', False, 0.04, 'missed'),
    EpisodeResult(5, 'reach the red cube', False, 0.05, 'dropped'),
]


def test_every_failure_is_counted_under_its_class_also_one_that_only_a_task_knows() -> None:
    numbers = summarise(RESULTS)
    assert numbers['success_rate'] == 0.4 and numbers['wrong_object_rate'] == 0.2 and numbers['episodes'] == 5
    assert numbers['failures'] == {'wrong_object': 1, 'missed': 1, 'timed_out': 0, 'limit': 0, 'dropped': 1}
    assert sum(numbers['failures'].values()) == len(numbers['failed_seeds']) == 3
    assert numbers['median_error_m'] == 0.04 and 0.05 < numbers['p90_error_m'] < 0.2
    assert 'followed_rate' not in numbers
    json.dumps(numbers, allow_nan=False)


def test_a_false_sentence_is_judged_by_what_it_said_too() -> None:
    told = [EpisodeResult(1, 's', False, 0.2, 'wrong_object', True), EpisodeResult(2, 's', False, 0.1, 'timed_out', False)]
    assert summarise(told)['followed_rate'] == 0.5
    assert told[0].as_dict()['followed'] is True and 'followed' not in RESULTS[0].as_dict()


def test_no_episode_is_no_number() -> None:
    with pytest.raises(ValueError, match='no episode'):
        summarise([])


def test_tables_have_a_row_per_variation_in_order() -> None:
    numbers = {'variation': 'nominal', **summarise(RESULTS), 'variations': {'shape_only': summarise(RESULTS[:2])}}
    rows = table_rows({'reach': numbers})
    assert [row[:4] for row in rows] == [
        ['reach', 'nominal', '5', '40.0 (11.8–76.9)'],
        ['reach', 'shape_only', '2', rate_text(summarise(RESULTS[:2]))],
    ]
    assert rows[0][-1] == '1 wrong object, 1 missed, 1 dropped' and rows[1][-1] == '-'
    assert markdown(['a', 'b'], [['x', '1']]) == '| a | b |\n|---|---:|\n| x | 1 |'
