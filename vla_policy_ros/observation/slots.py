"""Latest-value slots: one per input, newest message wins, judged by header stamps.

A message that breaks the stamp rules never replaces a good one; the reason is kept for the operator and the good value's age runs
out by itself.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from vla_policy_ros.types import NS_PER_S

_RATE_WINDOW_NS = 2 * NS_PER_S


def seconds(ns: int) -> float:
    """Nanoseconds as seconds."""
    return ns / NS_PER_S


class Slot:
    """The newest acceptable message of one input.

    Args:
        name: how messages to the operator call it, such as ``camera 'wrist'``.
        topic: where it comes from.
        max_age_ns: age of the stamp from which the value is no longer used, or None.
        remedy: what to do while there is no value.
    """

    def __init__(self, name: str, topic: str, max_age_ns: int | None, remedy: str = 'is it published?') -> None:
        self.name = name
        self.topic = topic
        self.max_age_ns = max_age_ns
        self.remedy = self.remedy_without_publisher = remedy
        self.clear()

    def clear(self) -> None:
        """Forget everything, as after a jump of the clock."""
        self.value: Any = None
        self.stamp_ns = 0
        self.refusal = ''
        self._arrivals: deque[int] = deque(maxlen=64)

    def refuse(self, reason: str) -> str:
        """Note that the newest message cannot be used, and why."""
        self.refusal = reason
        return f'{self.name}: message on {self.topic} refused: {reason}'

    def offer(self, value: Any, stamp_ns: int, now_ns: int, max_future_ns: int) -> str | None:
        """Take ``value`` if its stamp is sound, else return the sentence that says why not."""
        self._arrivals.append(now_ns)
        if stamp_ns == 0:
            return self.refuse('its header.stamp is zero; the driver must stamp with the acquisition time')
        if stamp_ns > now_ns + max_future_ns:
            ahead = seconds(stamp_ns - now_ns)
            return self.refuse(f'its stamp lies {ahead:.3f} s in the future; synchronise the clocks (check use_sim_time)')
        if stamp_ns < self.stamp_ns:
            back = seconds(self.stamp_ns - stamp_ns)
            return self.refuse(f'its stamp is {back:.3f} s older than that of the message before; is there a second publisher?')
        self.value, self.stamp_ns, self.refusal = value, stamp_ns, ''
        return None

    def age_ns(self, now_ns: int) -> int | None:
        """Age of the value by its stamp, or None if there is no value."""
        return None if self.value is None else now_ns - self.stamp_ns

    def rate(self, now_ns: int) -> float:
        """Messages per second by arrival, over the last two seconds."""
        recent = [t for t in self._arrivals if 0 <= now_ns - t <= _RATE_WINDOW_NS]
        if len(recent) < 2 or recent[-1] == recent[0]:
            return 0.0
        return (len(recent) - 1) / seconds(recent[-1] - recent[0])

    def problem(self, now_ns: int) -> str | None:
        """Why the value cannot be used now, as a sentence for the operator, or None."""
        because = f' (last message refused: {self.refusal})' if self.refusal else ''
        age = self.age_ns(now_ns)
        if age is None:
            return f'{self.name}: none on {self.topic} yet{because or "; " + self.remedy}'
        if self.max_age_ns is not None and age > self.max_age_ns:
            limit = seconds(self.max_age_ns)
            return f'{self.name}: newest message is {seconds(age):.2f} s old (limit {limit:g} s): check topic {self.topic}{because}'
        return None
