"""The checkpoint that a run writes, with how it was made beside it.

    OUT/   the checkpoint folder (`policy.checkpoint`), and training.json: recipe, data, step, measurements

Enters: a trainer whose averaged weights are in place. Leaves: a checkpoint folder, replaced as a whole. Every process calls; the
main one writes.
"""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from vla_policy_ros import __version__
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.policy.checkpoint import DTYPES, RobotSignature, save_checkpoint
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.parallel import whole
from vla_policy_ros.training.parameters import plain_weights
from vla_policy_ros.training.trainer import Trainer

TRAINING_FILE = 'training.json'
RUN_FILE = 'run.json'


def run_id(folder: Path) -> str:
    """The name of the run in ``folder``, drawn when it begins. Raises ValueError where the file that holds it is damaged."""
    file = folder / RUN_FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({'id': secrets.token_hex(8)}) + '\n', encoding='utf-8')
    try:
        return str(json.loads(file.read_text(encoding='utf-8'))['id'])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file} is damaged ({error}); delete it, and give an out folder that does not exist') from error


def check_out(out: Path, run: str) -> None:
    """Raises ValueError where ``out`` holds anything that run ``run`` has not written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    file = out / TRAINING_FILE
    try:
        mine = json.loads(file.read_text(encoding='utf-8'))['run'] == run
    except (OSError, ValueError, KeyError, TypeError):
        mine = False
    if not mine:
        raise ValueError(f'{out} is not empty and was not written by this run; give a new folder, so that nothing is overwritten')


def write_checkpoint(out: Path, trainer: Trainer, robot: Robot, run: str, made: dict[str, Any]) -> None:
    """Write the model as it is now, adapters merged, in `save_dtype`; ``made`` goes into ``training.json``.

    The folder gets its name when it is complete; what it held before is removed then.
    """
    full = {name: whole(value) for name, value in trainer.model.state_dict().items()}
    if not trainer.parallel.main:
        return
    dtype = DTYPES[trainer.config.save_dtype]
    weights = dict(plain_weights(trainer.model, full, dtype))
    with torch.device('meta'):
        skeleton = MapAnythingLlava3DForConditionalGeneration(trainer.model.config).to(dtype)
    partial, former = (out.with_name(f'.{out.name}.{state}') for state in ('partial', 'former'))
    shutil.rmtree(partial, ignore_errors=True)
    save_checkpoint(partial, skeleton, trainer.processor, RobotSignature.of(robot), weights)
    record = {
        'run': run,
        **made,
        'baselines': trainer.baselines,
        'software': {'vla_policy_ros': __version__, 'torch': torch.__version__},
        'made_of': trainer.made_of,
        'config': trainer.config.model_dump(mode='json'),
    }
    (partial / TRAINING_FILE).write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    shutil.rmtree(former, ignore_errors=True)
    if out.exists():
        out.rename(former)
    partial.rename(out)
    shutil.rmtree(former, ignore_errors=True)
