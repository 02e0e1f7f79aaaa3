"""From one robot to another: the weights of a checkpoint that do not depend on the robot it was trained for.

What a network has learnt to see and to understand is of use on another robot; only the projections of state and actions in and
out of the action expert have the robot's sizes. These, where they differ, start anew. So can whole parts, where networks are to be
compared that differ in them.

Enters: a fresh network for the new robot, a checkpoint folder of another. Leaves: the network with the weights taken over. The
thread that trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.training.parameters import group_of

ROBOT_SIZED = ('action_expert.action_in_proj.', 'action_expert.action_out_proj.', 'action_expert.state_proj.')


@torch.no_grad()
def transfer_weights(
    model: MapAnythingLlava3DForConditionalGeneration, folder: Path, groups: Collection[str] | None = None
) -> str:
    """Copy into ``model`` what fits, and return a hash of what was copied.

    Args:
        model: the fresh network.
        folder: the checkpoint.
        groups: of weights (see `parameters.group_of`) that are copied, the others start anew; None copies all.

    Raises:
        ValueError: a weight of ``groups`` outside the action expert's projections is missing or has another shape, or the files are
            damaged.
    """
    files = sorted(folder.glob('model*.safetensors'))
    if not files:
        raise ValueError(f'{folder} has no model.safetensors to take weights from; give the folder of a checkpoint')
    wanted = {name: value for name, value in model.state_dict().items() if groups is None or group_of(f'model.{name}') in groups}
    digest = hashlib.sha256()
    taken: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework='pt') as handle:
                for name in sorted(handle.keys()):
                    value = handle.get_tensor(name)
                    if name in wanted and _fits(name, wanted[name], value):
                        wanted[name].copy_(value)
                        taken.add(name)
                        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        except (SafetensorError, OSError) as error:
            raise ValueError(f'{file} is damaged ({error}); copy it again') from error
    missing = [name for name in wanted if name not in taken and not name.startswith(ROBOT_SIZED)]
    if missing:
        raise ValueError(f'{folder} has no {missing[0]!r} ({len(missing)} weights are missing): it holds a network of another kind')
    return digest.hexdigest()


def _fits(name: str, mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape == theirs.shape:
        return True
    if name.startswith(ROBOT_SIZED):
        return False
    raise ValueError(
        f'{name} is {tuple(theirs.shape)} in the checkpoint and {tuple(mine.shape)} here: weights can be transferred between '
        'robots, not between sizes of networks; give the preset of that checkpoint, or leave this group out of transfer_groups'
    )
