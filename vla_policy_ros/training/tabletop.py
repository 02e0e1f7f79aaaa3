"""Examples of the simulated tabletop for the trainer, made once and kept in files."""

from __future__ import annotations

from pathlib import Path

from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.dataset import ExampleSet

SHARD_EXAMPLES = 6000
VALIDATION_SEED = 10_000


def tabletop_examples(robot: Robot, processor: MapAnythingLlava3DProcessor, count: int, cache: Path, seed: int = 0) -> ExampleSet:
    """``count`` examples of the simulator, in shards of `SHARD_EXAMPLES` that are written to ``cache`` as they are made.

    An interrupted run goes on with the shards that exist. Shard i is drawn from seed ``seed + i``.
    """
    # Imported here: the simulator needs OpenGL, which a machine that trains from finished shards may lack.
    from vla_policy_ros.sim.dataset import examples

    cache.mkdir(parents=True, exist_ok=True)
    parts = []
    for index in range(-(-count // SHARD_EXAMPLES)):
        size = min(SHARD_EXAMPLES, count - index * SHARD_EXAMPLES)
        file = cache / f'{robot.name}_{seed + index:05d}_{size}_{processor.config.image_size}.safetensors'
        if not file.exists():
            made = ExampleSet.build(examples(robot, seed + index, size), processor)
            partial = file.with_suffix('.part')
            made.save(partial)
            partial.rename(file)
        parts.append(ExampleSet.load(file))
        print(f'examples {sum(len(part) for part in parts)} / {count}', flush=True)
    return ExampleSet.join(parts)
