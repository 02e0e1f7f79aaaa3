"""Recordings of one kind to the other, with a report of what was found in them.

The result is written into a folder beside its destination and renamed when it is complete: an interrupted conversion leaves no
destination, and nothing that was there before is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from vla_policy_ros.episodes.bag_writer import write_bag
from vla_policy_ros.episodes.episode import PROVENANCE_FILE, Episode, EpisodeError, robot_digest, software, write_json
from vla_policy_ros.episodes.lerobot_writer import LeRobotWriter
from vla_policy_ros.episodes.quality import EpisodeQuality, StaleCounter, judge_episode, look_at
from vla_policy_ros.episodes.sources import EpisodeSource
from vla_policy_ros.episodes.video import VideoError, choose_codec
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S

PARTIAL_SUFFIX = '.partial'
# Rates that differ by more are worth a note: LeRobot's timestamps are nominal.
_RATE_TOLERANCE = 0.05

Format = Literal['lerobot', 'bag']
Progress = Callable[[str], None]


@dataclass(frozen=True)
class EpisodeOutcome:
    """What became of one source episode.

    Attributes:
        quality: of the source; None where it could not be read.
        written: names in the result; several where it was split at a gap, none where nothing is written.
        problem: why it was left out, or ''.
    """

    name: str
    quality: EpisodeQuality | None
    written: tuple[str, ...] = ()
    problem: str = ''


@dataclass(frozen=True)
class DatasetReport:
    """What was found, and written.

    Attributes:
        source: the recording.
        destination, format: of the result; None where it was only looked at.
        robot: name of the robot.
        details: how the result was written (rate, codec).
        episodes: in order.
    """

    source: str
    destination: str | None
    format: Format | None
    robot: str
    details: dict[str, Any]
    episodes: tuple[EpisodeOutcome, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        rows = [
            {
                'name': episode.name,
                'problem': episode.problem,
                'written': list(episode.written),
                'quality': episode.quality.to_dict() if episode.quality else None,
            }
            for episode in self.episodes
        ]
        head = {'source': self.source, 'destination': self.destination, 'format': self.format, 'robot': self.robot}
        return {**head, 'software': software(), **self.details, 'episodes': rows}


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        fps: rows per second of a LeRobot dataset; None takes the rate of the first episode.
        codec: of its videos.
        max_gap: a longer time between two steps begins a new episode of a LeRobot dataset, whose rows have no gaps; s.
        skip_damaged: leave out episodes that cannot be read, and report them, instead of ending with the error.
    """

    fps: int | None = None
    codec: str = 'auto'
    max_gap: float = 0.5
    skip_damaged: bool = False


def format_named(name: str) -> Format:
    """``lerobot`` or ``bag``. Raises EpisodeError for another name."""
    for known in get_args(Format):
        if known == name:
            return cast(Format, known)
    raise EpisodeError(f'{name!r} cannot be written; write lerobot or bag')


def inspect(sources: Sequence[EpisodeSource], name: str, robot: Robot, progress: Progress, skip_damaged: bool) -> DatasetReport:
    """Look at every episode and image. Raises EpisodeError for one that cannot be read, unless those are to be skipped."""
    outcomes: list[EpisodeOutcome] = []
    for source in sources:
        progress(source.name)
        with _damage(source, outcomes, skip_damaged):
            outcomes.append(EpisodeOutcome(source.name, look_at(source.open())))
    return DatasetReport(name, None, None, robot.name, {}, tuple(outcomes))


def convert(
    sources: Sequence[EpisodeSource],
    name: str,
    destination: Path,
    to: Format,
    robot: Robot,
    options: Options,
    progress: Progress = lambda _: None,
) -> DatasetReport:
    """Write episodes into a new LeRobot dataset, or into new bags.

    Args:
        sources: the episodes.
        name: of their recording, for report and provenance.
        destination: a folder that does not exist, or is empty.
        to: the kind of recording to write.
        robot: whose episodes they are.
        options: how.
        progress: hears the name of each episode as its turn comes.

    Raises:
        EpisodeError: the destination exists, no episode is left, or one cannot be read.
    """
    with _made_whole(destination) as folder:
        write = _to_lerobot if to == 'lerobot' else _to_bags
        outcomes, details = write(sources, folder, robot, options, progress)
        report = DatasetReport(name, destination.name, to, robot.name, details, tuple(outcomes))
        if not any(outcome.written for outcome in outcomes):
            problems = [f'{outcome.name}: {outcome.problem}' for outcome in outcomes[:4]]
            raise EpisodeError('\n  '.join([f'no episode of {name} is left to write:', *problems]))
        provenance = {'software': software(), 'robot': robot.model_dump(mode='json', exclude={'workspace'})}
        provenance |= {'robot_digest': robot_digest(robot), 'conversion': report.to_dict()}
        write_json((folder / 'meta' if to == 'lerobot' else folder) / PROVENANCE_FILE, provenance)
    return report


@contextmanager
def _made_whole(destination: Path) -> Iterator[Path]:
    """A folder that becomes ``destination`` if all goes well, and is removed otherwise."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise EpisodeError(f'{destination} is there already; give a new folder, so that nothing is overwritten')
    folder = destination.with_name(destination.name + PARTIAL_SUFFIX)
    if folder.exists():  # what an interrupted conversion left
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _damage(source: EpisodeSource, outcomes: list[EpisodeOutcome], skip: bool) -> Iterator[None]:
    """Note an episode that cannot be read, where those are to be skipped."""
    try:
        yield
    except (EpisodeError, VideoError) as error:
        if not skip:
            raise EpisodeError(f'{source.name}: {error}\n(--skip-damaged leaves out what cannot be read)') from error
        outcomes.append(EpisodeOutcome(source.name, None, problem=str(error)))


def _to_lerobot(
    sources: Sequence[EpisodeSource], folder: Path, robot: Robot, options: Options, progress: Progress
) -> tuple[list[EpisodeOutcome], dict[str, Any]]:
    try:
        codec = choose_codec(options.codec)
    except VideoError as error:
        raise EpisodeError(str(error)) from error
    outcomes: list[EpisodeOutcome] = []
    writer: LeRobotWriter | None = None
    try:
        for source in sources:
            progress(source.name)
            with _damage(source, outcomes, options.skip_damaged):
                episode = source.open()
                if writer is None:
                    writer = LeRobotWriter(folder, robot, options.fps or _rate_of(episode), codec)
                outcomes.append(_add_to(writer, episode, options.max_gap))
        if writer is None or not writer.episodes:
            return outcomes, {}
        writer.close()
    except BaseException:
        if writer is not None:
            writer.abort()
        raise
    return outcomes, {'fps': writer.fps, 'codec': codec, 'max_gap': options.max_gap}


def _add_to(writer: LeRobotWriter, episode: Episode, max_gap: float) -> EpisodeOutcome:
    counter, written = StaleCounter(), []
    times = np.array([step.stamp_ns for step in episode.steps], dtype=np.int64) + round(NS_PER_S / writer.fps)
    early = episode.commands.sample(times).early
    if early.any():
        episode.skipped['no row: nothing was commanded yet'] += int(early.sum())
    for steps in _pieces(times, early, max_gap):
        number = writer.episodes
        writer.add(episode, steps, counter.add)
        written.append(str(number))
    quality = judge_episode(episode, counter.counts)
    notes = [] if len(written) < 2 else [f'split into {len(written)} episodes at gaps longer than {max_gap:g} s']
    if abs(quality.rate / writer.fps - 1.0) > _RATE_TOLERANCE:
        notes.append(f'its {quality.rate:.2f} steps per second are written as {writer.fps}; stamps_ns has the true times')
    quality = replace(quality, notes=(*quality.notes, *notes))
    return EpisodeOutcome(episode.name, quality, tuple(written), '' if written else 'nothing was commanded')


def _pieces(times: Any, early: Any, max_gap: float) -> Iterator[range]:
    """Ranges of steps without a gap, from the first that has an action."""
    usable = np.flatnonzero(~early)
    if not usable.size:
        return
    first = int(usable[0])
    ends = [*(np.flatnonzero(np.diff(times[first:]) > max_gap * NS_PER_S) + first + 1).tolist(), len(times)]
    for end in ends:
        yield range(first, end)
        first = end


def _rate_of(episode: Episode) -> int:
    rate = judge_episode(episode).rate
    if rate < 0.5:
        raise EpisodeError(f'{episode.name}: its rate of {rate:.2f} steps per second cannot be a whole number: give one with --fps')
    return round(rate)


def _to_bags(
    sources: Sequence[EpisodeSource], folder: Path, robot: Robot, options: Options, progress: Progress
) -> tuple[list[EpisodeOutcome], dict[str, Any]]:
    outcomes: list[EpisodeOutcome] = []
    for number, source in enumerate(sources):
        progress(source.name)
        with _damage(source, outcomes, options.skip_damaged):
            episode, counter = source.open(), StaleCounter()
            path = folder / f'episode_{number:06d}'
            try:
                write_bag(episode, path, counter.add)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
            write_json(path / PROVENANCE_FILE, episode.provenance.to_dict())
            outcomes.append(EpisodeOutcome(episode.name, judge_episode(episode, counter.counts), (path.name,)))
    return outcomes, {}
