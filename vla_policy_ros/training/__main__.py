"""``python -m vla_policy_ros.training``: train a checkpoint on the simulated tabletop."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from vla_policy_ros.policy.checkpoint import DTYPES, RobotSignature, load_checkpoint, new_model, new_processor, save_checkpoint
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import load_robot
from vla_policy_ros.training.dataset import ExampleSet
from vla_policy_ros.training.tabletop import VALIDATION_SEED, tabletop_examples
from vla_policy_ros.training.trainer import Trainer, TrainingOptions, fit_statistics


def parse_arguments() -> argparse.Namespace:
    """The command line; every option has a default that a small machine can bear."""
    defaults = TrainingOptions()
    parser = argparse.ArgumentParser(prog='python -m vla_policy_ros.training', description=__doc__)
    parser.add_argument('--robot', type=Path, required=True, help='robot file')
    parser.add_argument('--out', type=Path, required=True, help='checkpoint folder to write')
    parser.add_argument('--run', type=Path, required=True, help='folder for log, examples and resumable state')
    parser.add_argument('--preset', default='tabletop', help='network size')
    parser.add_argument('--start-from', type=Path, help='checkpoint whose weights and statistics to start from, not fresh ones')
    parser.add_argument('--examples', type=int, default=48_000, help='examples to train on (3 per scene)')
    parser.add_argument('--validation-examples', type=int, default=240, help='held-out examples')
    parser.add_argument('--data', type=Path, help='folder of the examples (default: RUN/examples)')
    parser.add_argument('--steps', type=int, default=defaults.steps)
    parser.add_argument('--scenes-per-step', type=int, default=defaults.scenes_per_step)
    parser.add_argument('--repeats', type=int, default=defaults.repeats)
    parser.add_argument('--learning-rate', type=float, default=defaults.learning_rate)
    parser.add_argument('--seed', type=int, default=defaults.seed)
    parser.add_argument('--float32', action='store_true', help='no bfloat16 products (for machines without them)')
    parser.add_argument('--save-dtype', choices=sorted(DTYPES), default='float16', help='weights in the checkpoint')
    parser.add_argument('--threads', type=int, default=1, help='torch threads')
    return parser.parse_args()


def main() -> None:
    """Make the examples, train, write the checkpoint; continues an interrupted run in the same folder."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    robot = load_robot(robot_path(arguments.robot))
    if arguments.start_from:
        start = load_checkpoint(arguments.start_from, robot)
        model, processor = start.model, start.processor
    else:
        model = new_model(robot, arguments.preset, arguments.seed)
        processor = new_processor(robot, arguments.preset, model.config)
    folder = arguments.data or arguments.run / 'examples'
    data = tabletop_examples(robot, processor, arguments.examples, folder, seed=arguments.seed)
    held_out: ExampleSet = tabletop_examples(robot, processor, arguments.validation_examples, folder, seed=VALIDATION_SEED)
    if not arguments.start_from:
        processor = new_processor(robot, arguments.preset, model.config, fit_statistics(data, processor))
    options = TrainingOptions(
        steps=arguments.steps,
        scenes_per_step=arguments.scenes_per_step,
        repeats=arguments.repeats,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        bfloat16=not arguments.float32,
    )
    trainer = Trainer(model, processor, data, options, arguments.run, held_out)
    trainer.resume()

    def save() -> None:
        # A copy: casting the model in training would round its rotary tables too, which no state dict restores.
        small = copy.deepcopy(model).to(DTYPES[arguments.save_dtype])
        save_checkpoint(arguments.out, small, processor, RobotSignature.of(robot))

    trainer.run(on_save=save)


if __name__ == '__main__':
    main()
