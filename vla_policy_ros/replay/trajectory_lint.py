"""What a joint_trajectory_controller would make of recorded trajectories: which it rejects, and which become a step.

Every message is judged twice. By the rules: as it arrives, would this controller drop it, or accept what it executes badly? And by
execution: the messages go, in the order and at the times of their arrival, into the emulated controller, whose robot follows every
command perfectly; each update's step of the command belongs to the message that was accepted last. The first message is taken half
a period after it arrived: the real phase of the updates is not recorded.

Times are nanoseconds of the controller's clock, which is the recording's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.bags.recording import Received, Recording
from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_rules import ControllerParameters, lint
from vla_policy_ros.replay.lint_report import JointPeak, MessageFinding, TopicReport
from vla_policy_ros.types import NS_PER_S

Array = NDArray[np.float64]

MAX_CYCLES = 1_000_000
MAX_TAIL_NS = 60 * NS_PER_S
# A clock that goes back further than this starts anew; less is a message that overtook another.
CLOCK_JUMP_NS = NS_PER_S // 5
_ROUNDING = 1e-6
# A step belongs to the seam in the first cycles, if so much of it is new; else the motion was that fast already.
_SEAM_CYCLES = 2
_JUMP = 0.4


class Execution(Enum):
    """What can only be seen by executing a message. The value says what the controller does."""

    STEP = 'executed, but the command moves further in one period than the velocity limit allows'
    OVERWRITTEN = 'accepted, but never executed: the next message arrived before an update of the controller'
    NOT_FINITE_COMMAND = 'executed, and NaN or infinity is commanded'
    UNDEFINED = 'accepted, but the controller has no defined answer to it'


@dataclass
class _Executed:
    """What the execution of one message came to."""

    cycles: int = 0
    worst_ratio: float = 0.0
    worst_joint: int = 0
    worst_step: float = 0.0
    worst_at_seam: bool = False
    worst_ns: int = 0
    finite: bool = True
    undefined: str = ''
    overwritten: bool = False


def lint_recording(recording: Recording, parameters: ControllerParameters, velocity_limits: Mapping[str, float]) -> TopicReport:
    """Judge one command topic.

    Args:
        recording: the messages and where the joints were.
        parameters: of the controller behind the topic.
        velocity_limits: largest speed of a joint, per second. A joint without one is measured, not judged.
    """
    # What NaN and huge values become is the subject here, not a mistake of this code.
    with np.errstate(all='ignore'):
        return _judge(recording, parameters, velocity_limits)


def _judge(recording: Recording, parameters: ControllerParameters, velocity_limits: Mapping[str, float]) -> TopicReport:
    findings: list[MessageFinding] = []
    execution = _Execution(recording, parameters, velocity_limits)
    for index, item in enumerate(recording.messages):
        execution.run_until(item.now_ns)
        findings += _rule_findings(recording, parameters, index, execution.receive(index, item))
    execution.run_to_rest()
    findings += execution.findings()
    findings.sort(key=lambda finding: finding.message)
    return TopicReport(
        topic=recording.topic,
        messages=len(recording.messages),
        accepted=execution.accepted,
        rejected=len(recording.messages) - execution.accepted,
        joints=parameters.joints,
        update_rate=parameters.update_rate,
        start=execution.start,
        findings=tuple(findings),
        peaks=execution.peaks(),
        notes=(*recording.notes, *execution.notes),
    )


def _rule_findings(
    recording: Recording, parameters: ControllerParameters, index: int, rejection: tuple[str, str, str] | None
) -> list[MessageFinding]:
    """The rule that drops the message; where it is accepted, what is known to be executed badly."""
    item = recording.messages[index]
    time_s = (item.now_ns - recording.begin_ns) / NS_PER_S
    if rejection is not None:
        return [MessageFinding(index, time_s, *rejection)]
    found = lint(item.message, parameters, item.now_ns)
    return [MessageFinding(index, time_s, finding.rule.name, finding.rule.value, finding.sentence) for finding in found]


@dataclass
class _Execution:
    """The emulated controller, its updates and what they commanded."""

    recording: Recording
    parameters: ControllerParameters
    velocity_limits: Mapping[str, float]
    notes: list[str] = field(default_factory=list)
    accepted: int = 0

    def __post_init__(self) -> None:
        joints = self.parameters.joints
        self._limits = np.array([self.velocity_limits.get(joint, np.inf) for joint in joints])
        positions, self.start = self._start()
        self._controller = JointTrajectoryController(self.parameters, positions)
        self._command = positions
        self._velocity = np.zeros(len(joints))
        self._steps, self._accelerations = np.zeros(len(joints)), np.zeros(len(joints))
        self._period_ns = self.parameters.update_period_ns
        self._next_ns = self.recording.messages[0].now_ns - self._period_ns // 2
        self._busy_until_ns = self._next_ns
        self._cycles = 0
        self._executed: dict[int, _Executed] = {}
        self._current: int | None = None
        self._waiting: int | None = None
        unlimited = [joint for joint in joints if joint not in self.velocity_limits]
        if unlimited:
            which = 'any joint' if len(unlimited) == len(joints) else ', '.join(unlimited)
            self.notes.append(f'steps of {which} are measured, but not judged: give a velocity limit with --velocity or --robot')

    def _start(self) -> tuple[Array, str]:
        joints = self.parameters.joints
        for state in self.recording.states:
            if all(joint in state.positions for joint in joints):
                return np.array([state.positions[joint] for joint in joints]), state.source
        for index, item in enumerate(self.recording.messages):
            for point in item.message.points[:1]:
                named = dict(zip(item.message.joint_names, point.positions.tolist(), strict=False))
                if all(np.isfinite(named.get(joint, np.nan)) for joint in joints):
                    self.notes.append('no joint or controller state names all joints: a step of the first motion cannot be seen')
                    return np.array([named[joint] for joint in joints]), f'the first point of message {index}'
        self.notes.append('neither a state nor a message gives the positions of all joints: the first motion starts from zero')
        return np.zeros(len(joints)), 'zero'

    # ---- time ------------------------------------------------------------------------------------------------------------------

    def run_until(self, now_ns: int) -> None:
        """All updates up to ``now_ns``. Where the controller only holds, they are left out but for the last."""
        if now_ns < self._next_ns - self._period_ns - CLOCK_JUMP_NS:
            self.notes.append(
                f'the clock goes back by {(self._next_ns - self._period_ns - now_ns) / NS_PER_S:.3f} s: '
                'the controller is started anew there, where it was'
            )
            self._restart(now_ns)
        while self._next_ns <= now_ns and self._cycles < MAX_CYCLES:
            if self._next_ns > self._busy_until_ns:
                self._next_ns += (now_ns - self._next_ns) // self._period_ns * self._period_ns
            self._update()

    def run_to_rest(self) -> None:
        """The updates after the last message, until its trajectory has ended."""
        end_ns = self._busy_until_ns
        longest_ns = self._next_ns + MAX_TAIL_NS
        if end_ns > longest_ns:
            self.notes.append(
                f'the last trajectory goes on for {(end_ns - self._next_ns) / NS_PER_S:.0f} s; '
                f'the first {MAX_TAIL_NS // NS_PER_S} s were executed'
            )
        while self._next_ns <= min(end_ns, longest_ns) and self._cycles < MAX_CYCLES:
            self._update()
        if self._cycles >= MAX_CYCLES:
            self.notes.append(
                f'only the first {MAX_CYCLES} updates in motion were executed; judge a shorter bag, or use a lower --update-rate'
            )

    def receive(self, index: int, item: Received) -> tuple[str, str, str] | None:
        """The message arrives. Returns (rule, consequence, sentence) of its rejection, or None."""
        acceptance = self._controller.receive(item.message, item.now_ns)
        if acceptance.finding is not None:
            rule = acceptance.finding.rule
            return rule.name, rule.value, acceptance.finding.sentence
        self.accepted += 1
        if self._waiting is not None:
            self._executed[self._waiting].overwritten = True
        self._executed[index] = _Executed()
        self._waiting = index
        starts_ns = max(item.now_ns, item.message.stamp_ns)
        patience_ns = round((self.parameters.effective_cmd_timeout + self.parameters.goal_time) * NS_PER_S)
        ends_ns = starts_ns + item.message.points[-1].time_from_start_ns + patience_ns
        if len(item.message.joint_names) < len(self.parameters.joints):
            ends_ns = max(ends_ns, self._busy_until_ns)  # where messages are blended, joints left out go on as before
        self._busy_until_ns = ends_ns + 3 * self._period_ns
        return None

    # ---- one update ------------------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        now_ns, self._next_ns = self._next_ns, self._next_ns + self._period_ns
        self._cycles += 1
        if self._waiting is not None:
            self._current, self._waiting = self._waiting, None
        try:
            command = self._controller.update(now_ns, self._command).positions
            if command.shape != self._command.shape:
                raise ValueError(f'{command.size} positions are commanded to {self._command.size} joints')
        except (ValueError, IndexError) as error:
            self._undefined(str(error), now_ns)
            return
        executed = self._executed.get(-1 if self._current is None else self._current)
        if executed is not None:
            executed.cycles += 1
            self._measure(executed, command, now_ns)

    def _measure(self, executed: _Executed, command: Array, now_ns: int) -> None:
        if not np.isfinite(command).all():
            executed.finite = False
            return  # the robot stays; what such a command does to it nobody knows
        period = self._period_ns / NS_PER_S
        step = np.abs(command - self._command)
        velocity = (command - self._command) / period
        ratio = np.where(np.isfinite(self._limits), step / (self._limits * period), 0.0)
        judged = ratio if ratio.any() else step
        worst = int(np.argmax(judged))
        if (float(ratio[worst]), float(step[worst])) > (executed.worst_ratio, executed.worst_step):
            executed.worst_ratio, executed.worst_joint = float(ratio[worst]), worst
            executed.worst_step, executed.worst_ns = float(step[worst]), now_ns
            change = abs(velocity[worst] - self._velocity[worst])
            executed.worst_at_seam = executed.cycles <= _SEAM_CYCLES and bool(change > _JUMP * abs(velocity[worst]))
        np.maximum(self._steps, step, out=self._steps)
        np.maximum(self._accelerations, np.abs(velocity - self._velocity) / period, out=self._accelerations)
        self._command, self._velocity = command, velocity

    def _undefined(self, reason: str, now_ns: int) -> None:
        if self._current is not None:
            self._executed[self._current].undefined = reason
        self._restart(now_ns + self._period_ns)

    def _restart(self, next_ns: int) -> None:
        self._controller.activate(self._command)
        self._velocity = np.zeros_like(self._command)
        self._next_ns = self._busy_until_ns = next_ns
        self._current = self._waiting = None

    # ---- results ---------------------------------------------------------------------------------------------------------------

    def peaks(self) -> tuple[JointPeak, ...]:
        """What was commanded at most, per joint."""
        period = self._period_ns / NS_PER_S
        if not any(executed.cycles for executed in self._executed.values()):
            return ()
        return tuple(
            JointPeak(joint, float(step), float(step / period), float(acceleration), self.velocity_limits.get(joint))
            for joint, step, acceleration in zip(self.parameters.joints, self._steps, self._accelerations, strict=True)
        )

    def findings(self) -> list[MessageFinding]:
        """What the execution shows of each message."""
        found = []
        for index, executed in self._executed.items():
            arrived_ns = self.recording.messages[index].now_ns
            time_s = (arrived_ns - self.recording.begin_ns) / NS_PER_S
            for kind, sentence in self._told(executed, arrived_ns):
                found.append(MessageFinding(index, time_s, kind.name, kind.value, sentence))
        return found

    def _told(self, executed: _Executed, arrived_ns: int) -> list[tuple[Execution, str]]:
        told = []
        period = self._period_ns / NS_PER_S
        if executed.overwritten:
            told.append((Execution.OVERWRITTEN, f'send at most one message per period of {period * 1e3:g} ms'))
        if executed.undefined:
            told.append((Execution.UNDEFINED, f'{executed.undefined}; send full points for all joints, each named once'))
        if not executed.finite:
            told.append((Execution.NOT_FINITE_COMMAND, 'send finite values only; the robot is taken to stay where it was'))
        if executed.worst_ratio > 1.0 + _ROUNDING:
            limit = float(self._limits[executed.worst_joint])
            where = (
                'where it takes over, so it does not continue the commanded motion'
                if executed.worst_at_seam
                else 'between its own points, which are too fast or too close in time'
            )
            told.append(
                (
                    Execution.STEP,
                    f'{self.parameters.joints[executed.worst_joint]} moves {executed.worst_step:.4f} in {period * 1e3:g} ms '
                    f'(limit {limit:g} per second allows {limit * period:.4f}), '
                    f'{(executed.worst_ns - arrived_ns) / NS_PER_S:.3f} s after it arrived, {where}',
                )
            )
        return told
