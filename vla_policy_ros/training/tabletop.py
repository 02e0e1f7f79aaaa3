"""Examples of the simulated tabletop for the trainer, made once and kept in files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.policy.checkpoint import RobotSignature
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.dataset import ExampleSet

SHARD_EXAMPLES = 6000
SHARDS_PER_SEED = 20_000
VALIDATION_SHARD = 10_000
"""Shards from here on belong to no seed's training examples; a count that would reach them is refused."""
GENERATOR_VERSION = 3
"""Raise it with every change of what the simulator draws or its experts do: files of an older version are then made again."""


SAMPLING = ('mix', 'arrived', 'strays')
"""What `sim.dataset.Sampling` can be told."""


def tabletop_examples(
    robot: Robot,
    processor: MapAnythingLlava3DProcessor,
    count: int,
    cache: Path,
    seed: int = 0,
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> ExampleSet:
    """``count`` training examples of the simulator; different seeds share no scene. ``sampling``: some of `SAMPLING`.

    Written to ``cache`` in shards of `SHARD_EXAMPLES` as they are made; an interrupted run goes on with the shards that exist.

    Raises:
        ValueError: more examples than a seed has; a shard is damaged.
        RobotMismatch: the simulated arm cannot play the robot.
    """
    if count > VALIDATION_SHARD * SHARD_EXAMPLES:
        raise ValueError(f'{count} examples of one seed; there are {VALIDATION_SHARD * SHARD_EXAMPLES}')
    return _shards(robot, processor, count, cache, seed * SHARDS_PER_SEED, sampling)


def validation_examples(
    robot: Robot,
    processor: MapAnythingLlava3DProcessor,
    count: int,
    cache: Path,
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> ExampleSet:
    """``count`` held-out examples, of scenes that no training seed has. As `tabletop_examples`."""
    return _shards(robot, processor, count, cache, VALIDATION_SHARD, sampling)


def _shards(
    robot: Robot, processor: MapAnythingLlava3DProcessor, count: int, cache: Path, first: int, sampling: Mapping[str, Any]
) -> ExampleSet:
    cache.mkdir(parents=True, exist_ok=True)
    made_for, sizes = _made_for(robot, processor, sampling), {}
    for index in range(-(-count // SHARD_EXAMPLES)):
        size = min(SHARD_EXAMPLES, count - index * SHARD_EXAMPLES)
        sizes[cache / f'{robot.name}_{first + index:05d}_{size}_{made_for}.safetensors'] = (first + index, size)
    missing = [file for file in sizes if not file.exists()]
    if len(missing) == 1:
        _make_shard(robot, processor, *sizes[missing[0]], missing[0], dict(sampling))
    elif missing:
        # A process for each core: rendering in software keeps one busy, and an OpenGL context belongs to one process.
        with ProcessPoolExecutor(min(len(missing), os.cpu_count() or 1), get_context('spawn')) as pool:
            running = [pool.submit(_make_shard, robot, processor, *sizes[file], file, dict(sampling)) for file in missing]
            for done, future in enumerate(as_completed(running), start=1):
                future.result()
                print(f'examples: {done} of {len(running)} files made', flush=True)
    return ExampleSet.join([ExampleSet.load(file) for file in sizes])


def _make_shard(
    robot: Robot, processor: MapAnythingLlava3DProcessor, seed: int, size: int, file: Path, sampling: dict[str, Any]
) -> None:
    # The simulator needs OpenGL, which a machine that trains from finished shards may lack.
    from vla_policy_ros.sim.dataset import Sampling, examples

    made = ExampleSet.build(examples(robot, seed, size, Sampling(**sampling)), processor)
    partial = file.with_suffix('.part')
    made.save(partial)
    partial.rename(file)


def _made_for(robot: Robot, processor: MapAnythingLlava3DProcessor, sampling: Mapping[str, Any]) -> str:
    """A short hash of all that the tensors depend on beside their seed. Actions are kept absolute, whatever is predicted."""
    translation = {name: asdict(processor.config)[name] for name in ('cameras', 'image_size')}
    signature = asdict(RobotSignature.of(robot))
    del signature['representation'], signature['absolute_joints']
    content = json.dumps([GENERATOR_VERSION, signature, translation, *([dict(sampling)] if sampling else [])], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
