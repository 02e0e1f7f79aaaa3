"""What must hold of a report: ``--fail-if "mae > 0.05"``.

Enters: a condition as text, a report. Leaves: a sentence where the condition to fail is met. Pure functions.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vla_policy_ros.episodes.errors import HOLD, POLICY, REPEAT_LAST

_CONDITION = re.compile(r'\s*([a-z_0-9]+)\s*(<=|>=|<|>)\s*(\S+)\s*')
_COMPARE: dict[str, Callable[[float, float], bool]] = {'<': operator.lt, '<=': operator.le, '>': operator.gt, '>=': operator.ge}


def _error(name: str, key: str) -> tuple[str, ...]:
    return ('accuracy', 'errors', name, key)


NUMBERS: dict[str, tuple[str, ...]] = {
    'mae': _error(POLICY, 'mae'),
    'rmse': _error(POLICY, 'rmse'),
    'normalised_rmse': _error(POLICY, 'normalised_rmse'),
    'hold_mae': _error(HOLD, 'mae'),
    'repeat_last_mae': _error(REPEAT_LAST, 'mae'),
    'motion_cosine': ('accuracy', 'motion_cosine'),
    'aligned_mae': ('continuity', 'aligned_error', 'mae'),
    'aligned_rmse': ('continuity', 'aligned_error', 'rmse'),
    'seam_jump_mean': ('continuity', 'seam_jump_mean'),
    'seam_jump_max': ('continuity', 'seam_jump_max'),
    'jerk_rms': ('continuity', 'jerk_rms'),
    'starved_s': ('continuity', 'starved_s'),
    'clip_rate': ('demands', 'clip_rate'),
    'chunks': ('demands', 'chunks'),
    'deadline_misses': ('freshness', 'deadline_misses'),
    'reproduced_difference': ('reproduction', 'largest_difference'),
}
"""What a condition can name, and where it stands under ``metrics``; ``rejected`` is the number of refused chunks."""


@dataclass(frozen=True)
class Gate:
    """A condition to fail: ``name`` compared with ``bound``."""

    name: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """From ``NAME < NUMBER`` (or >, <=, >=). Raises ValueError with the closest name."""
        match = _CONDITION.fullmatch(text)
        names = [*NUMBERS, 'rejected']
        if match is None:
            raise ValueError(f'condition {text!r} is not of the form "NAME > NUMBER"; names are {", ".join(names)}')
        name, comparison, bound = match.groups()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f'; did you mean {near[0]!r}?' if near else ''
            raise ValueError(f'condition {text!r}: there is no {name!r}{hint} ({", ".join(names)})')
        try:
            return cls(name, comparison, float(bound))
        except ValueError:
            raise ValueError(f'condition {text!r}: {bound!r} is not a number') from None

    def failure(self, report: Mapping[str, Any]) -> str | None:
        """Why the report fails: the condition is met, or its number cannot be told. None where it passes."""
        value = self._value(report['metrics'])
        if value is None:
            return f'fails: {self.name} is not known of this bag'
        met = _COMPARE[self.comparison](value, self.bound)
        return f'fails: {self.name} is {value:.6g}, {self.comparison} {self.bound:g}' if met else None

    def _value(self, metrics: Mapping[str, Any]) -> float | None:
        if self.name == 'rejected':
            return float(sum(metrics['demands']['rejected'].values()))
        found: Any = metrics
        for key in NUMBERS[self.name]:
            found = None if found is None else found[key]
        return None if found is None else float(found)
