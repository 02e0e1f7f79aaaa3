"""Examples of the simulated tabletop for the trainer, made once and kept in files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.policy import Policy
from vla_policy_ros.policy.checkpoint import RobotSignature
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.dataset import ExampleSet

SHARD_EXAMPLES = 6000
SHARDS_PER_SEED = 20_000
VALIDATION_SHARD = 10_000
"""The shard of seed 0 that holds the validation examples; no training examples of any seed reach it."""
VISITED_SHARD = 11_000
"""The first shard of a seed that holds states which a policy has visited."""
GENERATOR_VERSION = 14
"""Raise it with every change of what the simulator draws or its experts do: files of an older version are then made again."""

SAMPLING = ('mix', 'arrived', 'strays', 'attempted', 'misled')
"""What `sim.dataset.Sampling` can be told."""


@dataclass(frozen=True)
class ExampleMaker:
    """Examples of one kind, written to ``cache`` in shards of `SHARD_EXAMPLES`; an interrupted run goes on with those that exist.

    Attributes:
        robot: the robot file.
        processor: resizes the pictures.
        cache: folder of the shards.
        sampling: some of `SAMPLING`.
        visited_by: checkpoint folder of the policy whose states are taken (see `sim.visited`); None takes those of experts.
    """

    robot: Robot
    processor: MapAnythingLlava3DProcessor
    cache: Path
    sampling: Mapping[str, Any] = field(default_factory=dict)
    visited_by: Path | None = None

    def training(self, count: int, seed: int = 0) -> ExampleSet:
        """``count`` examples; different seeds share no scene.

        Raises:
            ValueError: more examples than a seed has; a shard is damaged; the policy's checkpoint cannot be used.
            RobotMismatch: the simulated arm cannot play the robot.
        """
        if count > (SHARDS_PER_SEED - VISITED_SHARD) * SHARD_EXAMPLES:
            raise ValueError(f'{count} examples of one seed; there are {(SHARDS_PER_SEED - VISITED_SHARD) * SHARD_EXAMPLES}')
        return self._shards(count, seed * SHARDS_PER_SEED + (VISITED_SHARD if self.visited_by else 0))

    def validation(self, count: int) -> ExampleSet:
        """``count`` held-out examples, of scenes that no training seed has. Raises as `training`."""
        return self._shards(count, VALIDATION_SHARD)

    def _shards(self, count: int, first: int) -> ExampleSet:
        self.cache.mkdir(parents=True, exist_ok=True)
        made_for, sizes = self._made_for(), {}
        for index in range(-(-count // SHARD_EXAMPLES)):
            size = min(SHARD_EXAMPLES, count - index * SHARD_EXAMPLES)
            sizes[self.cache / f'{self.robot.name}_{first + index:05d}_{size}_{made_for}.safetensors'] = (first + index, size)
        missing = [file for file in sizes if not file.exists()]
        if len(missing) == 1:
            self.make_shard(*sizes[missing[0]], missing[0])
        elif missing:
            # A process for each core: rendering in software keeps one busy, and an OpenGL context belongs to one process.
            with ProcessPoolExecutor(min(len(missing), os.cpu_count() or 1), get_context('spawn')) as pool:
                running = [pool.submit(self.make_shard, *sizes[file], file) for file in missing]
                for done, future in enumerate(as_completed(running), start=1):
                    future.result()
                    print(f'examples: {done} of {len(running)} files made', flush=True)
        return ExampleSet.join([ExampleSet.load(file) for file in sizes])

    def make_shard(self, seed: int, size: int, file: Path) -> None:
        """Write the ``size`` examples of a shard to ``file``, which then is whole or absent."""
        # The simulator needs OpenGL, which a machine that trains from finished shards may lack.
        from vla_policy_ros.sim.dataset import Sampling, examples
        from vla_policy_ros.sim.visited import visited_examples

        sampling = Sampling(**self.sampling)
        if self.visited_by is None:
            drawn = examples(self.robot, seed, size, sampling)
        else:
            drawn = visited_examples(self.robot, self._policy(self.visited_by).infer, seed, size, sampling)
        partial = file.with_suffix('.part')
        ExampleSet.build(drawn, self.processor).save(partial)
        partial.rename(file)

    def _policy(self, folder: Path) -> Policy:
        return Policy.load(folder, self.robot, seed=0)

    def _made_for(self) -> str:
        """A short hash of all that the tensors depend on beside their seed. Actions are kept absolute, whatever is predicted."""
        translation = {name: asdict(self.processor.config)[name] for name in ('cameras', 'image_size')}
        signature = asdict(RobotSignature.of(self.robot))
        del signature['representation'], signature['absolute_joints']
        content = [GENERATOR_VERSION, signature, translation, *([dict(self.sampling)] if self.sampling else [])]
        if self.visited_by is not None:
            content.append(self._policy(self.visited_by).checkpoint_hash)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
