"""How long answers take in a replay: a constant, a recorded distribution, or what this machine needs.

Enters: what the operator wrote. Leaves: nanoseconds from question to answer. Pure but for its own generator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MEASURED = 'measured'
LONGEST_MS = 60_000.0
_NS_PER_MS = 1_000_000


@dataclass(frozen=True)
class Latency:
    """Time from the question to the answer.

    Attributes:
        samples_ms: what an answer may take, each as likely; one is a constant. Empty: as long as it takes here.
        source: as the operator wrote it, for the report.
    """

    samples_ms: tuple[float, ...]
    source: str

    @classmethod
    def parse(cls, text: str) -> Latency:
        """From milliseconds, ``measured``, or a JSON file with a list of milliseconds (or an object with ``samples_ms``).

        Raises:
            ValueError: it is none of these, or a time is negative, not finite or longer than a minute.
            OSError: the file cannot be read.
        """
        if text == MEASURED:
            return cls((), text)
        try:
            return cls(_checked([float(text)], text), f'{float(text):g} ms')
        except ValueError:
            if not text.endswith('.json'):
                raise ValueError(
                    f'latency {text!r} is neither milliseconds from 0 to {LONGEST_MS:g}, nor {MEASURED!r}, nor a .json file'
                ) from None
        try:
            data = json.loads(Path(text).read_text(encoding='utf-8'))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f'{text} is not JSON ({error}); it must hold a list of milliseconds') from error
        samples = data.get('samples_ms') if isinstance(data, dict) else data
        if not isinstance(samples, list) or not samples:
            raise ValueError(f'{text} must hold a list of milliseconds, or an object with the list samples_ms')
        return cls(_checked(samples, text), Path(text).name)

    @property
    def is_measured(self) -> bool:
        """Whether the replay depends on the machine it runs on."""
        return not self.samples_ms

    def draw_ns(self, rng: np.random.Generator, took_ms: float) -> int:
        """How long the next answer takes, where inference took ``took_ms`` here."""
        if self.is_measured:
            return round(took_ms * _NS_PER_MS)
        return round(self.samples_ms[int(rng.integers(len(self.samples_ms)))] * _NS_PER_MS)


def _checked(values: list[object], text: str) -> tuple[float, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= LONGEST_MS:
            raise ValueError(f'latency {value!r} of {text} must lie in 0..{LONGEST_MS:g} ms')
    return tuple(float(value) for value in values if isinstance(value, (int, float)))
