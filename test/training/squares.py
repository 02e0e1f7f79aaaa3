"""Scenes of coloured squares that a network can learn in seconds, for the tests of the training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_policy_ros.policy.checkpoint import new_model, new_processor
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.sim.dataset import SceneLabels
from vla_policy_ros.training.config import TrainingConfig
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.scenes import ExampleScenes
from vla_policy_ros.training.trainer import Trainer, fit_statistics
from vla_policy_ros.types import CameraView, Observation

ROOT = Path(__file__).resolve().parents[2]
K = np.array([[70.0, 0.0, 39.5], [0.0, 70.0, 29.5], [0.0, 0.0, 1.0]])
WORDS = ('red', 'blue')


@dataclass
class Sample:
    """A scene of two coloured squares; the arm should move by where the named one is."""

    observation: Observation
    actions: np.ndarray
    target_pixels: dict[str, tuple[tuple[float, float], None]]
    scene_id: int
    labels: SceneLabels


def samples(scenes: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for scene in range(scenes):
        image = np.full((60, 80, 3), 90, dtype=np.uint8)
        centres = {'red': (int(rng.integers(8, 36)), int(rng.integers(8, 52))), 'blue': (int(rng.integers(46, 72)), 30)}
        for word, (u, v) in centres.items():
            image[v - 6 : v + 7, u - 6 : u + 7] = (220, 30, 30) if word == 'red' else (30, 30, 220)
        views = {name: CameraView(image, K, 0) for name in ('scene', 'wrist')}
        state = rng.normal(size=7) * 0.1
        labels = _labels([centres[word] for word in WORDS])
        for word in WORDS:
            u, v = centres[word]
            goal = np.array([u / 40 - 1, v / 30 - 1, 0, 0, 0, 0, 0.3])
            actions = state + (goal - state) * np.linspace(0.1, 1.0, 16)[:, None]
            observation = Observation(0, views, state, 0, f'go to the {word} one')
            made.append(Sample(observation, actions, {'scene': ((u, v), None)}, scene, labels))
    return made


def _labels(centres: list[tuple[int, int]]) -> SceneLabels:
    """Both cameras see every square, on a plane one metre away."""
    pixels = np.array(centres, dtype=np.float64)
    points = np.concatenate([(pixels - K[:2, 2]) / K[0, 0], np.ones((len(centres), 1))], axis=1)
    kinds = np.stack([np.arange(len(centres)), np.zeros(len(centres), dtype=np.int64)], axis=1)
    depth = {name: np.ones((48, 64), dtype=np.float32) for name in ('scene', 'wrist')}
    return SceneLabels(kinds, {'scene': pixels, 'wrist': pixels}, points, depth, ('scene',))


def tabletop_robot() -> Robot:
    """The robot file that all of these tests use."""
    return load_robot(ROOT / 'config' / 'robots' / 'tabletop.yaml')


def example_set(scenes: int, seed: int = 0, preset: str = 'tiny') -> ExampleSet:
    """Two examples per scene, in the picture size of a preset."""
    robot = tabletop_robot()
    return ExampleSet.build(samples(scenes, seed), new_processor(robot, preset, new_model(robot, preset).config))


def settings(folder: Path, data: Path | None = None, **sections: Any) -> dict[str, Any]:
    """A small training file, as a mapping; ``sections`` are merged into it."""
    file = str(data or folder / 'examples.safetensors')
    made: dict[str, Any] = {
        'robot': 'tabletop',
        'preset': 'tiny',
        'data': {'source': 'examples', 'files': [file], 'validation_files': [file]},
        'optimisation': {'steps': 6, 'scenes_per_step': 4, 'repeats': 2},
        'logging': {'log_every': 3, 'validate_every': 100, 'state_every': 3, 'tensorboard': False},
        'run': str(folder / 'run'),
        'out': str(folder / 'out'),
    }
    for name, value in sections.items():
        made[name] = {**made[name], **value} if isinstance(value, dict) and isinstance(made.get(name), dict) else value
    return made


def config(folder: Path, **sections: Any) -> TrainingConfig:
    """The same, validated."""
    return TrainingConfig.model_validate(settings(folder, **sections))


def make_trainer(robot: Robot, data: ExampleSet, folder: Path, **sections: Any) -> Trainer:
    """A trainer of the tiny network, or of another preset, with a small training file, whose ``sections`` are changed."""
    scenes, options = ExampleScenes(data), config(folder, **sections)
    model = new_model(robot, options.preset or 'tiny', changes=options.network)
    processor = new_processor(robot, options.preset or 'tiny', model.config)
    processor = new_processor(robot, options.preset or 'tiny', model.config, fit_statistics(scenes, processor))
    return Trainer(model, processor, scenes, options, folder, scenes)


def rows(folder: Path, event: str) -> list[dict[str, Any]]:
    """The rows of the log in a run folder of one kind of event."""
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [line for line in lines if line['event'] == event]
