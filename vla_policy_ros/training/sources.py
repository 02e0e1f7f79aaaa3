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
from vla_policy_ros.training.tabletop import SAMPLING, ExampleMaker


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
    drawn = {name: value for name in SAMPLING if (value := getattr(data, name, None))}
    by_experts = ExampleMaker(robot, processor, folder, drawn)
    training = by_experts.training(data.examples, data.seed)
    if data.visited is not None:
        drawn = {name: value for name in SAMPLING if (value := getattr(data.visited, name, None))}
        by_policy = ExampleMaker(robot, processor, folder, drawn, data.visited.by)
        training = ExampleSet.join([training, by_policy.training(data.visited.examples, data.seed)])
    held_out = ExampleScenes(by_experts.validation(data.validation_examples)) if data.validation_examples else None
    return TrainingData(ExampleScenes(training), held_out)


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
