"""Whether a controller follows what it was sent: a topic gives no answer, its reported reference does.

A joint_trajectory_controller drops a message that breaks one of its rules, and says so in its own log only. What it executes shows
in the reference of its state topic: once a new trajectory has taken over, the reference must lie on the motion that the published
trajectories add up to. Three references in a row that do not are the proof that it was not accepted, or arrived too late.

How near "on" is depends on the timing of the messages (`Emission.stamp`). With ``start`` the controller enters each trajectory
where the clock says, so that the reference is known to a controller period. With ``zero`` it starts at an unknown moment within the
transport delay, bridges to the first knot, and need not share a clock; the reference can only be said to lie among the positions
of the motion around the time at which it arrives. A difference smaller than that, or than a thousandth of a joint's range, is
not seen.

Enters: published trajectories, references. Leaves: a sentence for each trajectory that was not accepted. One thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission
from vla_policy_ros.types import JointTrajectory

Array = NDArray[np.float64]

PROOF = 3
_MARGIN_CYCLES = 2
_TOLERANCE = 1e-3


@dataclass
class _Sent:
    """A published trajectory: when it was sent and takes over, until when it is judged, and whether it begins off the old one."""

    sent_ns: int
    takeover_ns: int
    until_ns: int
    bridged: bool
    judged: bool = False
    reported: bool = False


class AcceptanceWatch:
    """Watches one controller.

    Args:
        name: of the controller, for the sentence.
        joints: of the controller.
        limits: of all action joints.
        emission: how trajectories are timed.
        cycles: controller cycles after its end during which a trajectory is still judged. A controller may hold elsewhere later.
    """

    def __init__(self, name: str, joints: tuple[str, ...], limits: JointLimits, emission: Emission, cycles: int = 10) -> None:
        columns = [limits.names.index(joint) for joint in joints]
        self.name = name
        self.joints = tuple(joints)
        self.not_accepted = 0
        self.in_a_row = 0
        self._tolerance = _TOLERANCE * (limits.upper - limits.lower)[columns]
        period_ns = emission.controller_period_ns
        self._common_clock = emission.stamp == 'start'
        self._tail_ns = cycles * period_ns
        slack_ns = _MARGIN_CYCLES * period_ns
        if self._common_clock:
            self._late_ns = 0
            before_ns, after_ns, spacing_ns = slack_ns, slack_ns, period_ns
        else:
            # The reference may be that of a message that took the transport delay, and takes as long to come back itself.
            self._late_ns = 2 * emission.transport_ns
            before_ns, after_ns = self._late_ns + emission.lead_ns + slack_ns, emission.lead_ns
            spacing_ns = emission.knot_spacing_ns
        self._margin_ns = slack_ns + self._late_ns
        self._around_ns = (*range(-before_ns, after_ns, spacing_ns), 0, after_ns)
        self.clear()

    def clear(self) -> None:
        """What was published no longer counts: the controller may hold the robot anywhere. The total stays."""
        self.in_a_row = 0
        self._motion: CommandedMotion | None = None
        self._sent: deque[_Sent] = deque()
        self._run = 0
        self._last_ns: int | None = None

    def published(self, trajectory: JointTrajectory, seam_ns: int) -> None:
        """``trajectory`` was sent, of which the part from ``seam_ns`` on is new. Raises KeyError where it lacks a joint."""
        own = trajectory.select(self.joints)
        if self._motion is None:
            self._motion = CommandedMotion.from_rest(self.joints, own.positions[0], own.start_ns)
        self._motion.accept(own)
        first_ns, last_ns = (own.start_ns + int(own.times_ns[index]) for index in (0, -1))
        takeover_ns, until_ns = seam_ns + self._margin_ns, last_ns + self._margin_ns + self._tail_ns
        # With a common clock and knots before the seam the reference is on the motion throughout.
        bridged = self._common_clock and first_ns > own.start_ns
        self._sent.append(_Sent(own.start_ns, takeover_ns, until_ns, bridged))

    def observe(self, positions: Array, stamp_ns: int, arrived_ns: int) -> str | None:
        """The controller's reference was ``positions`` ``[J]`` at ``stamp_ns`` on its clock; it arrived at ``arrived_ns``.

        Returns a sentence, once for each trajectory that the controller turns out not to follow. `not_accepted` counts them,
        `in_a_row` those since it last followed one.
        """
        time_ns = stamp_ns if self._common_clock else arrived_ns
        if self._last_ns is not None and time_ns <= self._last_ns:
            return None
        self._last_ns = time_ns
        while len(self._sent) > 1 and self._sent[1].takeover_ns <= time_ns:
            self._end(self._sent.popleft())
        current = self._responsible(time_ns)
        if current is None or self._motion is None:
            self._run = 0
            return None
        current.judged = True
        excess = self._excess(self._motion, positions, time_ns)
        self._run = self._run + 1 if np.any(excess > self._tolerance) else 0
        if self._run < PROOF or current.reported:
            return None
        current.reported = True
        self.not_accepted += 1
        self.in_a_row += 1
        return self._sentence(excess)

    def _responsible(self, time_ns: int) -> _Sent | None:
        """The trajectory that a reference of ``time_ns`` must lie on, or None while that is not certain."""
        if not self._sent or not self._sent[0].takeover_ns <= time_ns <= self._sent[0].until_ns:
            return None
        if len(self._sent) > 1 and self._sent[1].bridged and time_ns >= self._sent[1].sent_ns:
            return None
        return self._sent[0]

    def _end(self, sent: _Sent) -> None:
        """The next trajectory has taken over from ``sent``."""
        if sent.judged and not sent.reported and self._run == 0:
            self.in_a_row = 0

    def _excess(self, motion: CommandedMotion, positions: Array, time_ns: int) -> Array:
        """How far ``positions`` lie outside of where the motion is around ``time_ns``, ``[J]``."""
        states = [motion.sample(time_ns + around) for around in self._around_ns]
        expected = np.array([position for position, _ in states])
        # A bridge leaves what it connects by as much as its ends are uncertain in time.
        stray = 0.5e-9 * self._late_ns * np.abs([velocity for _, velocity in states]).max(axis=0)
        excess: Array = np.maximum(expected.min(axis=0) - stray - positions, positions - expected.max(axis=0) - stray)
        return np.where(np.isfinite(excess), excess, np.inf)

    def _sentence(self, excess: Array) -> str:
        joint = int(np.argmax(excess / self._tolerance))
        clock = ' on the clock of the controller,' if self._common_clock else ''
        return (
            f'controller {self.name!r} does not follow the trajectory that was sent to it: its reference for joint '
            f'{self.joints[joint]!r} is {excess[joint]:.4f} away (limit {self._tolerance[joint]:.4f}). Is it active, are these all '
            f'of its joints, did the message arrive within transport_delay{clock} and is no other node commanding it? '
            'Its log says why it refused one'
        )
