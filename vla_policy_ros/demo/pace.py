"""How fast simulated time may run: as fast as the policy keeps its rate on this machine, and never faster than asked.

A robot does not wait, so a policy that misses its ticks there is too slow. Here a loaded machine is no reason to show a worse
policy: simulated time slows down until every tick finds the policy free, and the summary says by how much.
"""

from __future__ import annotations

SLOWER = 0.75
SLOWEST = 0.1
LOOK_EVERY_S = 1.0
# One missed tick is made up at once, and a new instruction alone may cause it.
TOLERATED = 1


class Pace:
    """Lowers the real-time factor while the policy misses replan ticks.

    Args:
        factor: simulated seconds per wall second to begin with.
        now: simulated time in s.
    """

    def __init__(self, factor: float, now: float) -> None:
        self.factor = factor
        self._looked_at = now
        self._skipped = 0

    def slower(self, now: float, requests_skipped: int) -> float | None:
        """The new factor where it must fall, else None; ``requests_skipped`` is PolicyStatus' running count."""
        if now - self._looked_at < LOOK_EVERY_S:
            return None
        missed, self._skipped, self._looked_at = requests_skipped - self._skipped, requests_skipped, now
        if missed <= TOLERATED or self.factor <= SLOWEST:
            return None
        self.factor = max(SLOWEST, SLOWER * self.factor)
        return self.factor
