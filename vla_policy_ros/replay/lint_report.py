"""What was found in recorded trajectories, as numbers, as lines of text and as a dictionary for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Examples told per kind of finding; the JSON has all.
_EXAMPLES = 3
FORMAT_VERSION = 1


@dataclass(frozen=True)
class MessageFinding:
    """What is wrong with one message.

    Attributes:
        message: its index on the topic, from 0.
        time_s: when it arrived, s after the recording began.
        rule: name of the broken rule.
        consequence: what the controller does about it; begins with ``rejected``, ``accepted`` or ``executed``.
        sentence: the values that broke the rule, and the remedy.
    """

    message: int
    time_s: float
    rule: str
    consequence: str
    sentence: str


@dataclass(frozen=True)
class JointPeak:
    """The most that one joint was commanded, from update to update.

    Attributes:
        joint: its name.
        step: largest change of the commanded position in one period, rad or m.
        velocity: that step per second.
        acceleration: largest change of the velocity in one period, per second.
        velocity_limit: the largest speed allowed; None is unknown.
    """

    joint: str
    step: float
    velocity: float
    acceleration: float
    velocity_limit: float | None


@dataclass(frozen=True)
class TopicReport:
    """One command topic judged for one controller.

    Attributes:
        topic: its name.
        messages, accepted, rejected: how many there were, and how the controller answered.
        joints: of the controller.
        update_rate: Hz.
        start: where the emulated controller started from, in words.
        findings: in order of the messages.
        peaks: one per joint; empty where nothing was executed.
        notes: what limits these results.
    """

    topic: str
    messages: int
    accepted: int
    rejected: int
    joints: tuple[str, ...]
    update_rate: float
    start: str
    findings: tuple[MessageFinding, ...]
    peaks: tuple[JointPeak, ...]
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """The report as text: each kind of finding once, with its first messages."""
        yield (
            f'{self.topic}: {self.messages} messages, {self.accepted} accepted, {self.rejected} rejected '
            f'({len(self.joints)} joints, {self.update_rate:g} Hz, started from {self.start})'
        )
        yield from (f'  note: {note}' for note in self.notes)
        kinds: dict[str, list[MessageFinding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.rule, []).append(finding)
        for rule, found in kinds.items():
            count = len({finding.message for finding in found})
            yield f'  {rule}, {count} of {self.messages} messages: {found[0].consequence}'
            for finding in found[:_EXAMPLES]:
                yield f'    message {finding.message} at {finding.time_s:.3f} s: {finding.sentence}'
            if len(found) > _EXAMPLES:
                yield f'    and {len(found) - _EXAMPLES} more'
        if self.peaks:
            yield f'  {self._peak_sentence()}'

    def _peak_sentence(self) -> str:
        def parts_of_limit(peak: JointPeak) -> float:
            return peak.velocity / peak.velocity_limit if peak.velocity_limit else peak.velocity

        worst = max(self.peaks, key=parts_of_limit)
        hardest = max(self.peaks, key=lambda peak: peak.acceleration)
        allowed = 'no limit given'
        if worst.velocity_limit:
            allowed = f'{worst.velocity_limit / self.update_rate:.4f} allowed'
        return (
            f'executed: largest step {worst.step:.4f} of {worst.joint} ({allowed}), that is a velocity of {worst.velocity:.3f}; '
            f'largest acceleration {hardest.acceleration:.2f} of {hardest.joint}'
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; see the attributes."""
        return {
            'topic': self.topic,
            'messages': self.messages,
            'accepted': self.accepted,
            'rejected': self.rejected,
            'joints': list(self.joints),
            'update_rate': self.update_rate,
            'start': self.start,
            'notes': list(self.notes),
            'findings': [
                {
                    'message': finding.message,
                    'time_s': _finite(finding.time_s),
                    'rule': finding.rule,
                    'consequence': finding.consequence,
                    'sentence': finding.sentence,
                }
                for finding in self.findings
            ],
            'peaks': {
                peak.joint: {
                    'step': _finite(peak.step),
                    'velocity': _finite(peak.velocity),
                    'acceleration': _finite(peak.acceleration),
                    'velocity_limit': peak.velocity_limit,
                }
                for peak in self.peaks
            },
        }


@dataclass(frozen=True)
class LintReport:
    """Everything that was judged.

    Attributes:
        source: the bag, or the live topic.
        distro: release of ros2_controllers that the controllers are of.
        changes: parameters that differ from the release's defaults.
        topics: one report per command topic.
    """

    source: str
    distro: str
    changes: Mapping[str, Any]
    topics: tuple[TopicReport, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not any(topic.findings for topic in self.topics)

    def lines(self) -> Iterator[str]:
        """The report as text."""
        changes = ''.join(f', {name}={value}' for name, value in self.changes.items())
        yield f'{self.source} for a joint_trajectory_controller of {self.distro}{changes}'
        for topic in self.topics:
            yield from topic.lines()
        count = len({(topic.topic, finding.message) for topic in self.topics for finding in topic.findings})
        total = sum(topic.messages for topic in self.topics)
        yield f'nothing found in {total} messages' if self.clean else f'{count} of {total} messages have findings'

    def to_dict(self) -> dict[str, Any]:
        """For JSON. ``version`` grows when a key changes its meaning."""
        return {
            'version': FORMAT_VERSION,
            'source': self.source,
            'distro': self.distro,
            'changes': {name: _plain(value) for name, value in self.changes.items()},
            'clean': self.clean,
            'topics': [topic.to_dict() for topic in self.topics],
        }


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
