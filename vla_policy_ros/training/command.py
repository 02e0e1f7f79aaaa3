"""`vla-policy train`: from a training file to a checkpoint.

Enters: a validated training configuration. Leaves: a run folder (log, states, examples) and a checkpoint folder. Main thread of
every process that `torchrun` starts, or of the one there is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import FROM_NOTHING, PRESETS
from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.policy.checkpoint import load_checkpoint, new_model, new_processor, read_processor
from vla_policy_ros.resources import checkpoint_path, robot_path
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.training.config import TrainingConfig
from vla_policy_ros.training.export import check_out, run_id, write_checkpoint
from vla_policy_ros.training.parallel import Parallel
from vla_policy_ros.training.sources import TrainingData, open_data
from vla_policy_ros.training.trainer import Trainer, fit_statistics
from vla_policy_ros.training.transfer import transfer_weights


class Start(NamedTuple):
    """A network, a processor for the pictures, and the hash of the weights where they are not fresh."""

    model: MapAnythingLlava3DForConditionalGeneration
    processor: MapAnythingLlava3DProcessor
    content: str


def train(config: TrainingConfig) -> None:
    """Train and write the checkpoint; goes on where an interrupted run in the same folder ended.

    Raises:
        ValueError, OSError: something cannot begin; the message says what and why.
        FloatingPointError: the training diverged.
    """
    torch.set_num_threads(config.threads)
    # Averages that decay towards zero would otherwise slow the CPU down a hundredfold. Nothing after the training expects it.
    torch.set_flush_denormal(True)
    try:
        _train(config)
    finally:
        torch.set_flush_denormal(False)


def _train(config: TrainingConfig) -> None:
    robot = load_robot(robot_path(config.robot))
    parallel = Parallel(config)
    run = parallel.in_turn_after_main(lambda: run_id(config.run))
    check_out(config.out, run)
    trainer = make_trainer(config, robot, parallel)
    trainer.resume()

    def save(made: dict[str, Any]) -> None:
        write_checkpoint(config.out, trainer, robot, run, made)

    trainer.run(on_checkpoint=save)
    parallel.close()


def make_trainer(config: TrainingConfig, robot: Robot, parallel: Parallel) -> Trainer:
    """The trainer of a configuration, at step 0."""
    model, processor, content = _start(config, robot)
    data: TrainingData = parallel.in_turn_after_main(lambda: open_data(config, robot, processor))
    if not config.keep_statistics:
        statistics = fit_statistics(data.training, processor)
        processor = MapAnythingLlava3DProcessor(processor.tokenizer, processor.config, statistics)
    return Trainer(model, processor, data.training, config, config.run, data.validation, content, parallel)


def _start(config: TrainingConfig, robot: Robot) -> Start:
    if config.transfer_from is not None:
        assert config.preset is not None  # the schema wants it
        model = new_model(robot, config.preset, config.seed, config.network)
        donor = checkpoint_path(config.transfer_from)
        content = transfer_weights(model, donor, config.transfer_groups)
        # Rows of an embedding that is taken over mean what the donor's tokenizer says.
        return Start(model, new_processor(robot, config.preset, model.config, tokenizer=read_processor(donor).tokenizer), content)
    if config.start_from is not None:
        opened = load_checkpoint(checkpoint_path(config.start_from), robot)
        return Start(opened.model, opened.processor, opened.content_hash)
    assert config.preset is not None  # the schema wants one of the two
    if config.preset in PRESETS and config.preset not in FROM_NOTHING:
        raise ValueError(
            f'preset {config.preset!r} starts from public weights: build its base checkpoint with `vla-policy convert`, and give '
            'that folder as start_from'
        )
    model = new_model(robot, config.preset, config.seed, config.network)
    return Start(model, new_processor(robot, config.preset, model.config), '')
