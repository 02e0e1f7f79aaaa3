"""Scenes of recorded episodes: LeRobot datasets and bags as the trainer's data.

Every window of an episode is a scene of its own. Pictures are resized once and kept in memory, three times the square of the
model's image side in bytes per camera and window; the recordings are read image by image.

Enters: sources of episodes. Leaves: scenes. The thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.episodes.sources import EpisodeSource, count_episodes, find_episodes
from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.augmentation import AugmentedScenes
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.recorded_config import Augmentation, RecordedData
from vla_policy_ros.training.scenes import ExampleScenes, SceneDataset
from vla_policy_ros.training.windows import Window, windows


def open_recorded(
    data: RecordedData, robot: Robot, processor: MapAnythingLlava3DProcessor, tell: Callable[[str], None]
) -> tuple[SceneDataset, SceneDataset | None]:
    """Scenes to train on and held-out ones, as a training file says; ``tell`` hears about each episode.

    Raises:
        EpisodeError: an episode is not there or cannot be read, or none is left.
    """
    chosen = data.episodes
    if chosen is None and data.validation_episodes:
        there = count_episodes(data.path, robot, data.mapping)
        chosen = tuple(number for number in there if number not in data.validation_episodes)
    training, held_out = (
        None
        if only == ()
        else recorded_scenes(
            find_episodes(data.path, robot, mapping=data.mapping, instruction=data.instruction, only=only),
            processor,
            data.stride,
            augmentation,
            data.skip_damaged,
            tell,
        )
        for only, augmentation in ((chosen, data.augmentation), (data.validation_episodes, None))
    )
    if training is None:
        raise EpisodeError(f'{data.path}: every episode is held out, none is left to train on')
    return training, held_out


def recorded_scenes(
    sources: Sequence[EpisodeSource],
    processor: MapAnythingLlava3DProcessor,
    stride: int,
    augmentation: Augmentation | None,
    skip_damaged: bool,
    tell: Callable[[str], None],
) -> SceneDataset:
    """The windows of all episodes.

    Args:
        sources: the episodes.
        processor: resizes the pictures.
        stride: steps between the beginnings of two windows.
        augmentation: changes pictures at every draw, or None.
        skip_damaged: leave out, and tell, episodes that cannot be read.
        tell: hears about each episode.

    Raises:
        EpisodeError: an episode cannot be read, or none is left.
    """
    examples = ExampleSet.build(_windows(sources, stride, skip_damaged, tell), processor)
    scenes = ExampleScenes(examples)
    return scenes if augmentation is None else AugmentedScenes(scenes, augmentation)


def _windows(sources: Sequence[EpisodeSource], stride: int, skip_damaged: bool, tell: Callable[[str], None]) -> Iterator[Window]:
    found = 0
    for number, source in enumerate(sources):
        count = 0
        try:
            episode = source.open()
            for window in windows(episode, number, stride):
                yield window
                count += 1
        except EpisodeError as error:
            if not skip_damaged:
                raise
            tell(f'{source.name} is left out after {count} windows: {error}')
        else:
            skipped = sum(episode.skipped.values())
            tell(
                f'{source.name}: {count} windows, actions from {episode.commands.source}'
                + (f', {skipped} skipped' if skipped else '')
            )
        found += count
    if not found:
        raise EpisodeError('no window is left to train on')
