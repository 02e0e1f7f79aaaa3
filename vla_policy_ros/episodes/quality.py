"""How good a recording is: rates, gaps, repeated and stale images, skew between inputs, and what was left out.

Enters: an `Episode`, and its images as they pass. Leaves: plain numbers. Times in s unless a name ends in ``_ms``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.episodes.episode import Episode, InputTimes
from vla_policy_ros.types import NS_PER_S, Observation

# An interval longer than this many usual ones is a gap, in which messages are missing.
GAP_FACTOR = 1.5
# Consecutive images whose grey levels differ by less, on average and small, are the same picture: sensor noise is several times
# that.
STALE_LEVELS = 0.1
_STALE_SIZE = (64, 48)


@dataclass(frozen=True)
class InputQuality:
    """One input.

    Attributes:
        name: as in `InputTimes`.
        messages: how many; ``rate``: per second, from the usual interval.
        gaps: intervals longer than `GAP_FACTOR` usual ones; ``missing``: messages that would have filled them.
        longest_gap: the longest interval, s.
        repeated: messages with the stamp of the one before; ``backwards``: with an earlier one.
        latency_ms: median and largest time from stamp to receipt; None where it was not recorded.
    """

    name: str
    messages: int
    rate: float
    gaps: int
    missing: int
    longest_gap: float
    repeated: int
    backwards: int
    latency_ms: tuple[float, float] | None


@dataclass(frozen=True)
class EpisodeQuality:
    """One episode.

    Attributes:
        name, format: of the recording.
        steps: moments at which an observation can be made; ``duration``: from the first to the last, s; ``rate``: per second.
        instructions: that were in force.
        action_source: where the actions come from.
        inputs: per input.
        camera_skew_ms: largest distance of two cameras in one step; 0 with one camera.
        state_skew_ms: median and largest distance of the joint state from the newest image of its step.
        stale: camera to images that show nothing new; empty where the images were not looked at.
        uncalibrated: cameras without intrinsics.
        skipped: reason to count of what was left out.
        notes: what else to know.
    """

    name: str
    format: str
    steps: int
    duration: float
    rate: float
    instructions: tuple[str, ...]
    action_source: str
    inputs: tuple[InputQuality, ...]
    camera_skew_ms: float
    state_skew_ms: tuple[float, float]
    stale: dict[str, int] = field(default_factory=dict)
    uncalibrated: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


class StaleCounter:
    """Counts images that show nothing new, as they pass one by one."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._last: dict[str, NDArray[np.float32]] = {}

    def add(self, observation: Observation) -> None:
        """Look at the images of the next step."""
        for camera, view in observation.cameras.items():
            grey = cv2.cvtColor(view.rgb, cv2.COLOR_RGB2GRAY)
            small = cv2.resize(grey, _STALE_SIZE, interpolation=cv2.INTER_AREA).astype(np.float32)
            before = self._last.get(camera)
            same = before is not None and bool(np.abs(small - before).mean() < STALE_LEVELS)
            self.counts[camera] = self.counts.get(camera, 0) + int(same)
            self._last[camera] = small


def judge_episode(episode: Episode, stale: dict[str, int] | None = None) -> EpisodeQuality:
    """The quality of an episode; ``stale`` is what a `StaleCounter` counted, if it saw the images."""
    stamps = np.array([step.stamp_ns for step in episode.steps])
    camera = [max(s.image_stamps_ns.values()) - min(s.image_stamps_ns.values()) for s in episode.steps]
    state = np.abs(np.array([step.state_stamp_ns - step.stamp_ns for step in episode.steps]))
    interval = float(np.median(np.diff(stamps))) if len(stamps) > 1 else 0.0
    return EpisodeQuality(
        name=episode.name,
        format=episode.provenance.format,
        steps=len(episode.steps),
        duration=episode.duration_s,
        rate=NS_PER_S / interval if interval > 0 else 0.0,
        instructions=episode.instructions,
        action_source=episode.commands.source,
        inputs=tuple(_judge_input(times) for times in episode.inputs),
        camera_skew_ms=float(max(camera)) / 1e6,
        state_skew_ms=(float(np.median(state)) / 1e6, float(state.max()) / 1e6),
        stale=dict(stale or {}),
        uncalibrated=episode.uncalibrated,
        skipped=dict(episode.skipped),
        notes=tuple(episode.notes),
    )


def look_at(episode: Episode) -> EpisodeQuality:
    """The quality of an episode, with every image decoded. Raises EpisodeError where one cannot be."""
    counter = StaleCounter()
    for observation in episode.observations():
        counter.add(observation)
    return judge_episode(episode, counter.counts)


def _judge_input(times: InputTimes) -> InputQuality:
    stamps = times.stamps_ns
    steps = np.diff(stamps)
    forward = steps[steps > 0]
    usual = float(np.median(forward)) if forward.size else 0.0
    gaps = forward[forward > GAP_FACTOR * usual]
    latency = None
    if times.receive_ns is not None and len(stamps):
        delay = (times.receive_ns - stamps) / 1e6
        latency = (float(np.median(delay)), float(delay.max()))
    return InputQuality(
        name=times.name,
        messages=len(stamps),
        rate=NS_PER_S / usual if usual > 0 else 0.0,
        gaps=len(gaps),
        missing=int(np.sum(np.round(gaps / usual) - 1)) if gaps.size else 0,
        longest_gap=float(forward.max()) / NS_PER_S if forward.size else 0.0,
        repeated=int((steps == 0).sum()),
        backwards=int((steps < 0).sum()),
        latency_ms=latency,
    )
