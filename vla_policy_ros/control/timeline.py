"""All time of the policy loop, in one place and on one clock.

Where each action of each chunk lies, what has been commanded and until when, which chunks still speak about the future, how long
answers take from observation to takeover, and which actions are decided already when the next chunk is asked for. Nothing else
counts steps: delays are measured as what really elapsed between an observation's stamp and the seam at which its chunk took over,
never estimated from inference times.

Enters: the clock, chunks with what the planner made of them. Leaves: plans, known actions, ages. One thread, the planner's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.planner import Plan, TrajectoryPlanner
from vla_policy_ros.types import NS_PER_S, ActionChunk, KnownActions

Array = NDArray[np.float64]
Chunking = Literal['replace', 'ensemble', 'rtc_guided', 'rtc_trained']
CHUNKING: tuple[Chunking, ...] = ('replace', 'ensemble', 'rtc_guided', 'rtc_trained')

_RATE_WINDOW = 20
_DELAY_WINDOW = 8
_ENSEMBLE_CHUNKS = 8
_RECENT_MOTIONS = 6
# A reference this close to a motion (rad, or the joint's unit) lies on it; senders and controllers interpolate alike.
_SAME_MOTION = 1e-5
_JUMP_BACK_NS = NS_PER_S // 5
_LEAP_AHEAD_NS = NS_PER_S


class Timeline:
    """See the module.

    Args:
        planner: chunk to trajectory.
        chunking: ``replace`` (each chunk replaces the last), ``ensemble`` (chunks that overlap are averaged), ``rtc_guided`` and
            ``rtc_trained`` (the next chunk is asked for with what is decided already, see `known_actions`).
    """

    def __init__(self, planner: TrajectoryPlanner, chunking: Chunking = 'replace') -> None:
        if chunking not in CHUNKING:
            raise ValueError(f'chunking {chunking!r} is unknown; use one of {", ".join(CHUNKING)}')
        self.chunking = chunking
        self.commanded: CommandedMotion | None = None
        self.now_ns = 0
        self._planner = planner
        self._settled_ns = 0
        self._chunk_times: deque[int] = deque(maxlen=_RATE_WINDOW)
        self._chunks: deque[ActionChunk] = deque(maxlen=_ENSEMBLE_CHUNKS)
        self._delays_ns: deque[int] = deque(maxlen=_DELAY_WINDOW)
        self._warm = False
        self._motions: deque[CommandedMotion] = deque(maxlen=_RECENT_MOTIONS)

    # ---- the clock -----------------------------------------------------------------------------------------------------------

    def advance(self, now_ns: int) -> bool:
        """Move to ``now_ns``. A small step back stands still; after a jump back or a leap ahead everything is forgotten, and True
        is returned."""
        jumped = now_ns < self.now_ns - _JUMP_BACK_NS or (self.now_ns > 0 and now_ns > self.now_ns + _LEAP_AHEAD_NS)
        if jumped:
            # A controller that still executes the last trajectory goes on with it, whatever its clock says: nothing new may begin
            # until that one has come to rest.
            settling_ns = round(self.moving_for(self.now_ns) * NS_PER_S)
            self.commanded = None
            self._motions.clear()
            self._chunk_times.clear()
            self.forget_chunks()
            self.now_ns, self._settled_ns = now_ns, now_ns + settling_ns
        self.now_ns = max(now_ns, self.now_ns)
        return jumped

    @property
    def settled(self) -> bool:
        """False while a trajectory from before a clock jump may still be executed."""
        return self.now_ns >= self._settled_ns

    # ---- the motion ----------------------------------------------------------------------------------------------------------

    def begin(self, positions: Array) -> CommandedMotion:
        """The commanded motion begins anew, at rest at ``positions`` ``[J]``."""
        self.commanded = CommandedMotion.from_rest(self._planner.limits.names, positions, self.now_ns)
        self._motions.clear()
        self.forget_chunks()
        return self.commanded

    def accept(self, plan: Plan) -> None:
        """``plan`` has been sent: from its seam on its trajectory is what is commanded."""
        assert self.commanded is not None and plan.trajectory is not None
        self._motions.append(self.commanded.copy())
        self.commanded.accept(plan.trajectory, plan.raw)

    def reconcile(self, positions: Array, stamp_ns: int) -> None:
        """The controllers' reference was at ``positions`` ``[J]`` at ``stamp_ns``: go on from the motion that it lies on.

        That is the newest one, unless a message was lost or is late; then an earlier motion is still being executed, and a
        trajectory that continued the newest would begin where the arm is not commanded to be.
        """
        if self.commanded is None or not self._motions or stamp_ns < self.commanded.since_ns:
            return
        if _distance(self.commanded, positions, stamp_ns) <= _SAME_MOTION:
            return
        nearest = min(self._motions, key=lambda motion: _distance(motion, positions, stamp_ns))
        if _distance(nearest, positions, stamp_ns) <= _SAME_MOTION:
            self._motions.remove(nearest)
            self._motions.append(self.commanded)
            self.commanded = nearest

    def forget_motion_at_rest(self) -> None:
        """A robot at rest may have been moved by others since; one still moving continues from its commanded motion."""
        if self.commanded is not None and self.commanded.at_rest(self.now_ns):
            self.commanded = None
            self._motions.clear()

    def forget_chunks(self) -> None:
        """What earlier chunks wanted no longer counts: the instruction has changed, the motion was braked or begins anew. The next
        answer is not taken as a measure of the delay."""
        self._chunks.clear()
        self._warm = False

    def moving_for(self, now_ns: int) -> float:
        """Seconds until the last trajectory has come to rest, 0 if it has."""
        return 0.0 if self.commanded is None else max(0.0, (self.commanded.until_ns - now_ns) / NS_PER_S)

    def starved(self) -> bool:
        """Whether the last trajectory has come to rest before anything new arrived."""
        return self.commanded is None or self.commanded.until_ns < self.now_ns

    # ---- chunks --------------------------------------------------------------------------------------------------------------

    def plan(self, chunk: ActionChunk, commanded: CommandedMotion) -> Plan:
        """What becomes of ``chunk``. Raises ValueError where it does not fit the robot at all."""
        older = list(reversed(self._chunks)) if self.chunking == 'ensemble' else ()
        return self._planner.plan(chunk, self.now_ns, commanded, older)

    def brake(self) -> Plan | None:
        """The shortest stop, or None where nothing moves; what chunks wanted is forgotten. Raises `LimitExceeded`."""
        self.forget_chunks()
        return None if self.commanded is None else self._planner.brake(self.now_ns, self.commanded)

    def taken(self, chunk: ActionChunk, plan: Plan) -> None:
        """``plan`` for ``chunk`` has been sent. Its delay is measured, unless it is the first since the motion began or was braked:
        that one has waited for caches and compilers, or for nothing in particular."""
        self._chunk_times.append(self.now_ns)
        self._chunks.append(chunk)
        if self._warm:
            self._delays_ns.append(plan.seam_ns - chunk.observation_stamp_ns)
        self._warm = True

    def refused(self) -> None:
        """A chunk came back and was not executed."""
        self._chunk_times.append(self.now_ns)

    @property
    def delay_ns(self) -> int | None:
        """From an observation's stamp to the takeover of its chunk: the second longest of the last few measured delays, so that
        one slow outlier does not count; None before two were measured."""
        return sorted(self._delays_ns)[-2] if len(self._delays_ns) >= 2 else None

    def known_actions(self, observation_stamp_ns: int, dt_ns: int, horizon: int) -> KnownActions | None:
        """What is decided already about a chunk that is asked for now, for the modes that use it.

        None in other modes, before the delay is known, and where nothing moves: then the new chunk is free.
        """
        if self.chunking not in ('rtc_guided', 'rtc_trained') or self.delay_ns is None or self.starved() or not self._chunks:
            return None
        assert self.commanded is not None
        times = observation_stamp_ns + dt_ns * np.arange(1, horizon + 1, dtype=np.int64)
        last = self._chunks[-1]
        overlap = int(np.count_nonzero(times <= last.stamp_ns + (len(last.actions) - 1) * last.dt_ns))
        # What the motion has not decided, the last action of the overlap repeats: finite, and of no weight.
        overlap = min(overlap, horizon - 1)
        committed = min(int(np.count_nonzero(times <= observation_stamp_ns + self.delay_ns)), overlap)
        if overlap == 0:
            return None
        rows = np.array([self.commanded.sample(int(time))[0] for time in times[:overlap]])
        actions = np.vstack([rows, np.repeat(rows[-1:], horizon - overlap, axis=0)])
        return KnownActions(actions, committed, overlap)

    # ---- numbers for the status ----------------------------------------------------------------------------------------------

    def chunk_rate(self, now_ns: int, expected_hz: float) -> float:
        """Chunks per second achieved of late; 0 after a pause of three expected periods."""
        times = self._chunk_times
        stale = not times or now_ns - times[-1] > 3 * NS_PER_S / expected_hz
        return 0.0 if stale else rate(times)


def rate(times_ns: Sequence[int]) -> float:
    """Mean rate of events, Hz; 0 for fewer than two, and where no time passed, as on a simulated clock that stands still."""
    if len(times_ns) < 2 or times_ns[-1] <= times_ns[0]:
        return 0.0
    return (len(times_ns) - 1) * NS_PER_S / (times_ns[-1] - times_ns[0])


def _distance(motion: CommandedMotion, positions: Array, stamp_ns: int) -> float:
    return float(np.abs(motion.sample(stamp_ns)[0] - positions).max())
