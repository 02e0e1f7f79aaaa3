"""`vla-policy train CONFIG --dry-run`: what a training would take, before anything is loaded or written.

Enters: a validated training configuration and the numbers of devices. Leaves: tables on a console. Main thread.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vla_policy_ros.episodes.quality_report import REPORT_WIDTH
from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.presets import preset_sizes
from vla_policy_ros.model.tokenizer import small_tokenizer
from vla_policy_ros.policy.checkpoint import CONFIG_FILE, robot_config
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.training.config import TrainingConfig
from vla_policy_ros.training.memory import RESERVE_BYTES, Way, memory, scenes_per_pass, ways
from vla_policy_ros.training.parameters import group_of

EXAMPLES_PER_SCENE = {'tabletop': 3}
"""Of the sources whose scenes have more than one; the tabletop's name an object each."""
COLUMNS = ('weights', 'gradients', 'optimizer', 'average', 'copies', 'activations')


def dry_run(config: TrainingConfig, devices: Sequence[int], device_gb: float, console: Console | None = None) -> None:
    """Print weights by group, and memory per device for several ways to train.

    Raises:
        ValueError, OSError: the robot, the sizes or the recipe cannot work.
    """
    console = console or Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    robot = load_robot(robot_path(config.robot))
    network, name = _network(config, robot)
    made = ways(config, network)
    console.print(_weights(made, name))
    console.print(_memory(made, robot, config, devices, device_gb))
    options = config.optimisation
    console.print(
        f'GB of 1e9 bytes. A step takes {options.scenes_per_step} scenes in {options.gradient_accumulation} part(s) per device, '
        f'{options.repeats} draws per prefix; with more than one device weights are '
        f'{"sharded (fsdp)" if config.sharding == "fsdp" else "copied (DDP); sharding: fsdp shards them"}. Activations are an '
        f'estimate (vla_policy_ros.training.memory has the formula), everything else is counted. "fits" leaves '
        f'{RESERVE_BYTES / 1e9:g} GB of {device_gb:g} free.'
    )


def _network(config: TrainingConfig, robot: Robot) -> tuple[MapAnythingLlava3DConfig, str]:
    """The configuration of the network, and what to call it."""
    if config.start_from is not None and (Path(config.start_from) / CONFIG_FILE).is_file():
        return MapAnythingLlava3DConfig.from_pretrained(config.start_from), str(config.start_from)
    if config.preset is None:
        raise ValueError(f'start_from {str(config.start_from)!r} does not exist yet: add preset, which gives the sizes until then')
    return robot_config(robot, preset_sizes(config.preset, config.network), small_tokenizer()), config.preset


def _weights(made: Sequence[Way], name: str) -> Table:
    table = Table(title=f'{name}: millions of weights', title_justify='left')
    table.add_column('group')
    for way in made:
        table.add_column(f'trained: {way.name}', justify='right')
    table.add_column('all', justify='right')
    groups: dict[str, list[int]] = {}
    for index, way in enumerate(made):
        for key, parameter in way.objective.named_parameters():
            counts = groups.setdefault(group_of(key), [0] * (len(made) + 1))
            counts[index] += parameter.numel() if parameter.requires_grad else 0
            counts[-1] += parameter.numel() if index == 0 else 0
    for group, counts in groups.items():
        table.add_row(group, *(f'{count / 1e6:,.1f}' for count in counts))
    table.add_section()
    table.add_row('total', *(f'{sum(column) / 1e6:,.1f}' for column in zip(*groups.values(), strict=True)))
    return table


def _memory(made: Sequence[Way], robot: Robot, config: TrainingConfig, devices: Sequence[int], device_gb: float) -> Table:
    table = Table(title='GB per device', title_justify='left')
    for column in ('trained', 'devices', 'scenes per pass', *COLUMNS, 'total', f'fits {device_gb:g} GB'):
        table.add_column(column, justify='left' if column == 'trained' else 'right')
    examples = EXAMPLES_PER_SCENE.get(config.data.source, 1)
    for way in made:
        for count in devices:
            taken = memory(way, count, len(robot.cameras), examples)
            numbers = [getattr(taken, column) for column in COLUMNS]
            verdict = '[green]yes[/green]' if taken.fits(device_gb * 1e9) else '[red]no[/red]'
            cells = [f'{number / 1e9:.1f}' for number in (*numbers, taken.total)]
            table.add_row(way.name, f'{count}', f'{scenes_per_pass(config, count)}', *cells, verdict)
        table.add_section()
    return table
