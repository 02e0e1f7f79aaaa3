"""Where episodes are: a LeRobot dataset, a bag, or a folder of bags. Each episode is opened when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import Episode, EpisodeError
from vla_policy_ros.episodes.lerobot import LeRobotDataset
from vla_policy_ros.episodes.lerobot_layout import INFO_FILE
from vla_policy_ros.episodes.mapping import DatasetMapping
from vla_policy_ros.robot import Robot

STORAGE_SUFFIXES = ('.mcap', '.db3')


@dataclass(frozen=True)
class EpisodeSource:
    """An episode that can be opened. ``open`` raises EpisodeError where it cannot be used."""

    name: str
    open: Callable[[], Episode]


def is_lerobot(path: Path) -> bool:
    """Whether ``path`` is a LeRobot dataset."""
    return (path / INFO_FILE).is_file()


def is_bag(path: Path) -> bool:
    """Whether ``path`` is a bag: a folder of one, or one of its storage files.

    Without ``metadata.yaml``, which a recorder writes at the end, a folder is one bag if it holds one storage file, or only files
    that are named after it; else it is a folder of bags.
    """
    if not path.is_dir():
        return path.suffix in STORAGE_SUFFIXES and path.is_file()
    if (path / 'metadata.yaml').is_file():
        return True
    children = list(path.iterdir())
    files = [child for child in children if child.suffix in STORAGE_SUFFIXES and child.is_file()]
    if any(is_bag(child) for child in children if child.is_dir()):
        return False
    return len(files) == 1 or (len(files) > 1 and all(file.stem.startswith(path.name) for file in files))


def find_episodes(
    path: Path,
    robot: Robot,
    *,
    mapping: DatasetMapping | None = None,
    instruction: str | None = None,
    only: Sequence[int] | None = None,
) -> list[EpisodeSource]:
    """The episodes of a recording.

    Args:
        path: a LeRobot dataset, a bag, or a folder whose folders or files are bags.
        robot: whose episodes they are.
        mapping: names of a LeRobot dataset that differ from the robot's.
        instruction: instead of what is recorded.
        only: numbers of episodes; bags are counted from 0 in the order of their names.

    Raises:
        EpisodeError: there is no recording, or an episode of ``only`` is not there.
    """
    if not path.exists():
        raise EpisodeError(f'{path} does not exist; give a LeRobot dataset, a bag, or a folder of bags')
    if is_lerobot(path):
        mapping = mapping or DatasetMapping()
        if instruction is not None:
            mapping = mapping.model_copy(update={'instruction': instruction})
        dataset = LeRobotDataset(path, robot, mapping)
        numbers = list(dataset.episodes if only is None else only)
        for number in numbers:
            dataset.layout.files(number)  # says which there are
        return [EpisodeSource(f'{path.name}/{number}', partial(dataset.episode, number)) for number in numbers]
    bags = [path] if is_bag(path) else sorted(child for child in path.iterdir() if is_bag(child)) if path.is_dir() else []
    if not bags:
        raise EpisodeError(f'{path} holds no recording; give a LeRobot dataset, a bag (mcap or sqlite3), or a folder of bags')
    unknown = [number for number in only or () if not 0 <= number < len(bags)]
    if unknown:
        raise EpisodeError(f'{path} has no bag {unknown[0]}; it has {len(bags)}, from 0 ({bags[0].name})')
    chosen = bags if only is None else [bags[number] for number in only]
    return [EpisodeSource(bag.name, partial(BagEpisode, bag, robot, instruction)) for bag in chosen]


def count_episodes(path: Path, robot: Robot, mapping: DatasetMapping | None = None) -> list[int]:
    """Numbers of all episodes of a recording, as ``only`` of `find_episodes` takes them. Raises EpisodeError as that does."""
    if is_lerobot(path):
        return list(LeRobotDataset(path, robot, mapping).episodes)
    return list(range(len(find_episodes(path, robot))))
