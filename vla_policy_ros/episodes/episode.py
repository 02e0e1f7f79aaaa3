"""What a recorded episode is: moments at which the live node could have looked, and what was commanded meanwhile."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros import __version__
from vla_policy_ros.episodes.commands import Commands
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import Observation

PROVENANCE_FILE = 'provenance.json'
_NUMBERED = re.compile(r'episode_(\d{6,})')


class EpisodeError(ValueError):
    """A recording that cannot be used; the message says what, where, and what to do."""


@dataclass(frozen=True)
class Step:
    """One moment of an episode, without its pixels.

    Attributes:
        stamp_ns: acquisition time of the newest image.
        image_stamps_ns: camera name to acquisition time.
        state: float64 ``[S]``, in the order of ``robot.state.names``.
        state_stamp_ns: stamp of the joint state.
        instruction: in force then.
    """

    stamp_ns: int
    image_stamps_ns: Mapping[str, int]
    state: NDArray[np.float64]
    state_stamp_ns: int
    instruction: str


@dataclass(frozen=True)
class InputTimes:
    """When the messages of one input were made, and received.

    Attributes:
        name: ``camera:<name>``, ``state`` or ``command:<controller>``.
        stamps_ns: int64 ``[N]`` of all messages, in order of receipt.
        receive_ns: int64 ``[N]`` on the same clock; None where the recording does not know.
    """

    name: str
    stamps_ns: NDArray[np.int64]
    receive_ns: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Provenance:
    """Where an episode comes from.

    Attributes:
        source: name of the recording and of the episode in it.
        format: such as ``rosbag2`` or ``LeRobot v3.0``.
        robot: name in the robot file; ``robot_digest``: SHA-256 of what it says.
        software: this package and its version, at reading.
        recorded: what the recording says of itself, where it does.
    """

    source: str
    format: str
    robot: str
    robot_digest: str
    software: str
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: str, format: str, robot: Robot, recorded: Mapping[str, Any] | None = None) -> Provenance:
        """Of an episode that is read now, for ``robot``."""
        return cls(source, format, robot.name, robot_digest(robot), software(), dict(recorded or {}))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


class Episode(ABC):
    """A recorded episode, as one robot sees it.

    Attributes:
        robot: whose cameras, joints and units it is in.
        name: for messages and reports.
        steps: the moments, in order of time.
        commands: what was commanded.
        inputs: times of all messages, for reports.
        provenance: where it comes from.
        skipped: why moments or messages were left out -> how often.
        notes: what else the operator should know.
        uncalibrated: cameras without intrinsics.
    """

    robot: Robot
    name: str
    steps: tuple[Step, ...]
    commands: Commands
    inputs: tuple[InputTimes, ...]
    provenance: Provenance
    skipped: Counter[str]
    notes: list[str]
    uncalibrated: tuple[str, ...]

    @abstractmethod
    def observations(self, indices: Sequence[int] | None = None) -> Iterator[Observation]:
        """Observations of the steps ``indices`` (all of them), which must increase. Images are decoded one step at a time.

        Raises:
            EpisodeError: an image cannot be decoded.
            ValueError: an index is out of range or out of order.
        """

    @property
    def duration_s(self) -> float:
        """Seconds from the first step to the last."""
        return (self.steps[-1].stamp_ns - self.steps[0].stamp_ns) / 1e9

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions in force, in order of their first step."""
        return tuple(dict.fromkeys(step.instruction for step in self.steps))

    def checked(self, indices: Sequence[int] | None) -> Sequence[int]:
        """``indices``, or all. Raises ValueError where they are not increasing indices of steps."""
        if indices is None:
            return range(len(self.steps))
        if any(later <= earlier for earlier, later in itertools.pairwise(indices)):
            raise ValueError(f'{self.name}: indices of steps must increase')
        if len(indices) and not 0 <= indices[0] <= indices[-1] < len(self.steps):
            raise ValueError(f'{self.name}: it has the steps 0 to {len(self.steps) - 1}, not {indices[0]} to {indices[-1]}')
        return indices


def software() -> str:
    """This package and its version."""
    return f'vla_policy_ros {__version__}'


def robot_digest(robot: Robot) -> str:
    """SHA-256 of what a robot file says, without the path of its URDF, hexadecimal."""
    return hashlib.sha256(robot.model_dump_json(exclude={'workspace'}).encode()).hexdigest()


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as an indented JSON file, all at once."""
    part = file.with_name(file.name + '.part')
    part.write_text(json.dumps(data, indent=4, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(part, file)


def next_number(folder: Path) -> int:
    """Number of the next ``episode_<number>`` in ``folder``: after those that are there, finished or not."""
    found = [int(match[1]) for child in folder.iterdir() if (match := _NUMBERED.fullmatch(child.name))]
    return max(found, default=-1) + 1


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `PROVENANCE_FILE` in ``folder`` says; empty where there is none. Raises EpisodeError where it is not JSON."""
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EpisodeError(f'{file} cannot be read ({error}); remove it, the recording can be read without') from error
    if not isinstance(data, dict):
        raise EpisodeError(f'{file} must hold a JSON object; remove it, the recording can be read without')
    return data
