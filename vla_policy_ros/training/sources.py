"""Where scenes come from: one function per `source` of the training file's `data` section.

Enters: a training configuration, a robot, a processor for the pictures. Leaves: scenes to train on and scenes to validate with. The
thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.config import ExampleFileData, TabletopData, TrainingConfig
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.recorded_config import RecordedData
from vla_policy_ros.training.scenes import ExampleScenes, SceneDataset
from vla_policy_ros.training.tabletop import SAMPLING, tabletop_examples, validation_examples


class TrainingData(NamedTuple):
    """Scenes to train on, and held-out ones where there are any."""

    training: SceneDataset
    validation: SceneDataset | None


def open_data(config: TrainingConfig, robot: Robot, processor: MapAnythingLlava3DProcessor) -> TrainingData:
    """The data of a training file; may make and write them.

    Raises:
        ValueError, OSError: they cannot be read or do not fit the robot.
    """
    return _SOURCES[config.data.source](config.data, config.run, robot, processor)


def _tabletop(data: TabletopData, run: Path, robot: Robot, processor: MapAnythingLlava3DProcessor) -> TrainingData:
    folder = data.folder or run / 'examples'
    drawn = {name: value for name in SAMPLING if (value := getattr(data, name))}
    training = tabletop_examples(robot, processor, data.examples, folder, data.seed, drawn)
    if not data.validation_examples:
        return TrainingData(ExampleScenes(training), None)
    held_out = validation_examples(robot, processor, data.validation_examples, folder, drawn)
    return TrainingData(ExampleScenes(training), ExampleScenes(held_out))


def _example_files(data: ExampleFileData, run: Path, robot: Robot, processor: MapAnythingLlava3DProcessor) -> TrainingData:
    training, held_out = (
        ExampleScenes(ExampleSet.join([ExampleSet.load(file) for file in files])) if files else None
        for files in (data.files, data.validation_files)
    )
    assert training is not None  # the schema wants at least one file
    return TrainingData(training, held_out)


def _episodes(data: RecordedData, run: Path, robot: Robot, processor: MapAnythingLlava3DProcessor) -> TrainingData:
    # Bags, video and tables, which a machine that trains in simulation need not have.
    from vla_policy_ros.training.recorded import open_recorded

    return TrainingData(*open_recorded(data, robot, processor, lambda line: print(line, flush=True)))


_SOURCES: dict[str, Callable[[Any, Path, Robot, MapAnythingLlava3DProcessor], TrainingData]] = {
    'tabletop': _tabletop,
    'examples': _example_files,
    'episodes': _episodes,
}
