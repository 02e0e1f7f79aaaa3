"""Numbers from finished episodes: rates with intervals, distances, failure classes; as JSON and as a table.

Enters: `EpisodeResult`s. Leaves: plain values. Pure functions, any thread. Lengths in m.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCHEMA, VERSION = 'vla_policy_ros/evaluation', 1
FAILURES = ('wrong_object', 'missed', 'timed_out', 'limit')
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode ended.

    Attributes:
        seed: of the scene.
        instruction: what the policy was told.
        success: whether the task was done at the end of the episode.
        error: remaining distance, m.
        failure: '' on success, else a class: those of the task, or ``limit`` where the policy ended outside what the robot may do.
        followed: with a false instruction, whether what it said was done; else None.
    """

    seed: int
    instruction: str
    success: bool
    error: float
    failure: str
    followed: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        row = {
            'seed': self.seed, 'instruction': self.instruction, 'success': self.success, 'error_m': round(self.error, 6),
            'failure': self.failure,
        }  # fmt: skip
        return row if self.followed is None else row | {'followed': self.followed}


def wilson95(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate. Raises ValueError without trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f'{successes} of {trials} is no rate')
    share, spread = successes / trials, _Z95**2 / trials
    centre = share + spread / 2.0
    reach = _Z95 * np.sqrt(share * (1.0 - share) / trials + spread / (4.0 * trials))
    low, high = ((centre + sign * reach) / (1.0 + spread) for sign in (-1.0, 1.0))
    return max(0.0, float(low)), min(1.0, float(high))


def summarise(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """The numbers of one task under one variation. Raises ValueError without episodes."""
    if not results:
        raise ValueError('no episode was finished')
    count = len(results)
    successes = sum(result.success for result in results)
    errors = np.array([result.error for result in results])
    classes = Counter(result.failure for result in results if not result.success)
    numbers: dict[str, Any] = {
        'success_rate': successes / count,
        'episodes': count,
        'wilson95': [round(bound, 6) for bound in wilson95(successes, count)],
        'median_error_m': round(float(np.median(errors)), 6),
        'p90_error_m': round(float(np.quantile(errors, 0.9)), 6),
        'wrong_object_rate': classes['wrong_object'] / count,
        'failures': {name: classes[name] for name in dict.fromkeys((*FAILURES, *sorted(classes)))},
        'failed_seeds': [result.seed for result in results if not result.success],
    }
    followed = [result.followed for result in results if result.followed is not None]
    if followed:
        numbers['followed_rate'] = sum(followed) / len(followed)
    return numbers


def table_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Task, variation, and the numbers in words for people, one row each; see `TABLE_HEAD`."""
    rows = []
    for task, numbers in tasks.items():
        for variation, found in {numbers['variation']: numbers, **numbers['variations']}.items():
            failures = ', '.join(f'{count} {name.replace("_", " ")}' for name, count in found['failures'].items() if count)
            rows.append(
                [
                    task,
                    variation,
                    str(found['episodes']),
                    rate_text(found),
                    f'{100 * found["median_error_m"]:.1f}',
                    f'{100 * found["p90_error_m"]:.1f}',
                    f'{100 * found["wrong_object_rate"]:.1f}',
                    failures or '-',
                ]
            )
    return rows


TABLE_HEAD = ('task', 'variation', 'episodes', 'success, %', 'median, cm', '90 %, cm', 'wrong object, %', 'failures')


def rate_text(numbers: Mapping[str, Any]) -> str:
    """``97.5 (94.3–98.9)``: success rate and its interval, per cent."""
    low, high = numbers['wilson95']
    return f'{100 * numbers["success_rate"]:.1f} ({100 * low:.1f}–{100 * high:.1f})'


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table; the first ``words`` columns are text, the others numbers."""
    lines = [f'| {" | ".join(head)} |', '|' + '---|' * words + '---:|' * (len(head) - words)]
    return '\n'.join([*lines, *(f'| {" | ".join(row)} |' for row in rows)])
