"""Ablations that need training: each variant with each seed is trained for the same steps and evaluated on the same scenes.

A cell, one variant with one seed, lives in a folder ``VARIANT/seed_N``: the run of `vla-policy train`, its log, its checkpoint, and
``evaluation.json`` when all is done. A second call goes on where the first one ended: finished cells are not touched, a run that
was killed is resumed. Cells share the rendered examples.

With a first training file (`first`), each cell trains that one too and starts the second from its checkpoint, as the shipped
checkpoint is made; the first part depends on what changes the network, and on the seed.

Main thread; training and evaluation run in processes of lower priority.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vla_policy_ros.evaluation.ablations.inference import INFERENCE, tell
from vla_policy_ros.evaluation.ablations.tables import Table, check_name
from vla_policy_ros.evaluation.evaluate import EvaluationOptions, evaluate

NICENESS = 10
RESULT = 'evaluation.json'


@dataclass(frozen=True)
class Variant:
    """One row: what is changed, in words and in the training file.

    Attributes:
        what: for the table.
        network: changes to the network's sizes, as the training file's ``network``.
        action: changes to the ``action`` of the robot file.
        changes: other changes of the training file, as ``--set`` takes them.
    """

    what: str
    network: dict[str, Any] = field(default_factory=dict)
    action: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


BASE = 'deep_fusion'
# The width of the shared expert is that of the language model in the preset `tabletop`.
VARIANTS: dict[str, Variant] = {
    BASE: Variant('deep fusion, separate expert, `token` time, absolute actions, `patch_add` geometry'),
    'late_fusion': Variant('late fusion: the suffix reads the last layer only', {'expert_config': {'fusion_depth': 'late'}}),
    'shared_expert': Variant(
        "shared expert: the language model's own layers",
        {'expert_config': {'mode': 'shared', 'hidden_size': 192}},
    ),
    'time_concat_mlp': Variant('time by `concat_mlp` (π0)', {'expert_config': {'time_conditioning': 'concat_mlp'}}),
    'time_adarms': Variant('time by `adarms` (π0.5)', {'expert_config': {'time_conditioning': 'adarms'}}),
    'geometry_patch_concat': Variant('geometry by `patch_concat`', {'fusion_mode': 'patch_concat'}),
    'geometry_global_concat': Variant('geometry by `global_concat`', {'fusion_mode': 'global_concat'}),
    'geometry_tokens': Variant('geometry by `tokens`', {'fusion_mode': 'tokens'}),
    'geometry_no_rays': Variant('geometry without K', {'use_rays': False}),
    'delta_actions': Variant('actions relative to the state', action={'representation': 'delta'}),
    'regression': Variant('regression instead of flow matching', {'expert_config': {'objective': 'regression'}}),
}


@dataclass(frozen=True)
class TrainingAblation:
    """What to train and how to judge it.

    Attributes:
        config: training file: a path, or the name of a shipped one.
        runs: folder of all cells.
        budget_steps: optimiser steps of every cell.
        seeds: of the trainings.
        options: how every cell is evaluated; its checkpoint is replaced.
        first: training file of a first part, or None; ``first_steps`` are its steps.
        changes: ``key=value`` changes of both training files, for all cells.
        table: name of the table.
    """

    config: str
    runs: Path
    budget_steps: int
    seeds: tuple[int, ...]
    options: EvaluationOptions
    first: str | None = None
    first_steps: int = 0
    changes: tuple[str, ...] = ()
    table: str = 'training'

    def __post_init__(self) -> None:
        check_name(self.table)
        if self.table in INFERENCE:
            raise ValueError(f'{self.table!r} is the name of another table: choose one that is not among {", ".join(INFERENCE)}')
        if self.budget_steps < 1 or (self.first is not None and self.first_steps < 1):
            raise ValueError('a training needs steps: give --budget-steps, and --first-steps with --first')
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f'seeds are {self.seeds}; give different ones that are not negative')


def run(ablation: TrainingAblation, names: Sequence[str], jobs: int = 1) -> Table:
    """Train and evaluate all cells that are not finished yet, and tabulate all of them.

    Raises:
        ValueError: a variant is unknown, or a finished cell was made with other settings.
        CellError: a training failed; its log is named. Finished cells stay finished.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f'variant {unknown[0]!r} is unknown; choose among {", ".join(VARIANTS)}')
    # Seed by seed, so that an early end leaves whole comparisons.
    for seed in ablation.seeds:
        for name in names:
            finish(ablation, name, seed, jobs)
    return tabulate(ablation, names)


class CellError(RuntimeError):
    """A training of a cell failed; the message has the last lines of its log."""


def finish(ablation: TrainingAblation, name: str, seed: int, jobs: int) -> dict[str, Any]:
    """The document of a cell, trained and evaluated now unless it is finished. Raises as `run`."""
    folder = ablation.runs / name / f'seed_{seed}'
    result, identity = folder / RESULT, _identity(ablation, name, seed)
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text(encoding='utf-8'))
        if found['cell'] != identity:
            different = sorted(key for key in identity if found['cell'].get(key) != identity[key])
            raise ValueError(f'{result} was made with another {", ".join(different)}: remove {folder}, or give another --runs')
        return found
    folder.mkdir(parents=True, exist_ok=True)
    variant = VARIANTS[name]
    robot_file = robot_file_of(ablation.options.robot_file, variant, folder)
    start = None
    if ablation.first is not None:
        start = folder / 'first' / 'checkpoint'
        _train(ablation, ablation.first, ablation.first_steps, variant, robot_file, seed, folder / 'first', None)
    _train(ablation, ablation.config, ablation.budget_steps, variant, robot_file, seed, folder, start)
    tell(f'{name}, seed {seed}: evaluating')
    found = evaluate(_options(ablation, folder / 'checkpoint', robot_file, jobs))
    if found['interrupted']:
        raise KeyboardInterrupt
    found['cell'] = identity
    part = result.with_suffix('.part')
    part.write_text(json.dumps(found, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    part.replace(result)
    return found


def _identity(ablation: TrainingAblation, name: str, seed: int) -> dict[str, Any]:
    """What a cell's numbers depend on, as JSON values."""
    options, variant = ablation.options, VARIANTS[name]
    return {
        'variant': name, 'seed': seed, 'config': ablation.config, 'budget_steps': ablation.budget_steps, 'first': ablation.first,
        'first_steps': ablation.first_steps, 'network': variant.network, 'action': variant.action,
        'changes': [*ablation.changes, *variant.changes], 'tasks': list(options.tasks), 'variations': list(options.variations),
        'episodes': options.episodes, 'evaluation_seed': options.seed, 'purpose': options.purpose, 'seconds': options.loop.seconds,
    }  # fmt: skip


def _options(ablation: TrainingAblation, checkpoint: Path, robot_file: Path, jobs: int) -> EvaluationOptions:
    return replace(ablation.options, checkpoint=checkpoint, robot_file=robot_file, jobs=jobs)


def robot_file_of(base: Path, variant: Variant, folder: Path) -> Path:
    """The robot file of a variant: the base, or a changed copy of it in ``folder``."""
    if not variant.action:
        return base
    robot = yaml.safe_load(base.read_text(encoding='utf-8'))
    robot['action'] |= variant.action
    path = folder / base.name
    path.write_text(yaml.safe_dump(robot, sort_keys=False), encoding='utf-8')
    return path


def _train(
    ablation: TrainingAblation,
    config: str,
    steps: int,
    variant: Variant,
    robot_file: Path,
    seed: int,
    folder: Path,
    start: Path | None,
) -> None:
    """Run, or resume, one training; its checkpoint is ``folder/checkpoint``."""
    if (folder / 'checkpoint' / 'config.json').is_file() and (folder / 'trained').is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    changes = [
        f'robot={robot_file}', f'run={folder}', f'out={folder / "checkpoint"}', f'seed={seed}', f'optimisation.steps={steps}',
        f'data.folder={ablation.runs / "examples"}', *ablation.changes, *variant.changes,
    ]  # fmt: skip
    if start is None:
        changes += ['start_from=null', *places_of(variant.network, 'network')]
    else:
        changes += [f'start_from={start}', 'preset=null', 'transfer_from=null', 'transfer_groups=null']
    tell(f'{folder}: training {steps} steps')
    command = [
        sys.executable,
        '-m',
        'vla_policy_ros.cli',
        'train',
        config,
        *(part for change in changes for part in ('--set', change)),
    ]
    log = folder / 'train.log'
    with log.open('ab') as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=lambda: os.nice(NICENESS)
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # the terminal has interrupted it too; its state is on disk
            raise
    if code != 0:
        last = '\n'.join(log.read_text(encoding='utf-8', errors='replace').splitlines()[-15:])
        raise CellError(f'training in {folder} ended with exit code {code}; the last lines of {log}:\n{last}')
    (folder / 'trained').touch()


def places_of(values: dict[str, Any], place: str) -> list[str]:
    """Changes that set single values, so that what else a training file says of the same section stays."""
    changes: list[str] = []
    for key, value in values.items():
        inner = f'{place}.{key}'
        changes += places_of(value, inner) if isinstance(value, dict) else [f'{inner}={json.dumps(value)}']
    return changes


def tabulate(ablation: TrainingAblation, names: Sequence[str]) -> Table:
    """The table of all finished cells: mean success over the seeds, with the range. Raises ValueError where there is none."""
    tasks, variations = ablation.options.tasks, ablation.options.variations
    columns = [(task, variation) for task in tasks for variation in variations]
    rows, numbers = [], []
    for name in names:
        found = [_finished(ablation, name, seed) for seed in ablation.seeds]
        cells = [cell for cell in found if cell is not None]
        if not cells:
            continue
        texts, measured = [], {}
        for task, variation in columns:
            each = [_numbers(cell, task, variation) for cell in cells]
            rates, errors = [one['success_rate'] for one in each], [one['median_error_m'] for one in each]
            texts += [_with_range([100 * rate for rate in rates]), f'{100 * float(np.mean(errors)):.1f}']
            measured[f'{task} {variation}'] = {'success_rates': rates, 'median_errors_m': errors}
        rows.append((VARIANTS[name].what, str(len(cells)), *texts))
        numbers.append({'variant': name, 'seeds': [cell['cell']['seed'] for cell in cells], **measured})
    if not rows:
        raise ValueError(f'no cell in {ablation.runs} is finished')
    head = ['variant', 'seeds']
    for task, variation in columns:
        place = task if len(variations) == 1 else f'{task}, {variation}'
        head += [f'{place}: success, %', 'median, cm']
    first = next(cell for name in names for seed in ablation.seeds if (cell := _finished(ablation, name, seed)))
    steps = f'{ablation.budget_steps} steps' + (f' after {ablation.first_steps} of `{ablation.first}`' if ablation.first else '')
    changed = ' with ' + ', '.join(f'`{change}`' for change in ablation.changes) if ablation.changes else ''
    notes = [
        f'each trained for {steps} of `{ablation.config}`{changed} and evaluated in {ablation.options.episodes} episodes; '
        'mean over training seeds (smallest–largest)'
    ]
    return Table(ablation.table, tuple(head), 1, tuple(rows), tuple(numbers), {'seeds': first['seeds'], 'notes': notes})


def _finished(ablation: TrainingAblation, name: str, seed: int) -> dict[str, Any] | None:
    path = ablation.runs / name / f'seed_{seed}' / RESULT
    found: dict[str, Any] | None = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else None
    return found


def _numbers(found: dict[str, Any], task: str, variation: str) -> dict[str, Any]:
    of_task = found['tasks'][task]
    numbers: dict[str, Any] = of_task if of_task['variation'] == variation else of_task['variations'][variation]
    return numbers


def _with_range(values: Sequence[float]) -> str:
    mean = f'{float(np.mean(values)):.1f}'
    return mean if len(values) == 1 else f'{mean} ({min(values):.1f}–{max(values):.1f})'
