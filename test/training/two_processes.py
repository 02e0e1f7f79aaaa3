"""What `test_parallel` starts with torchrun: the same training in several ways. Arguments: a file of examples, a folder."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from squares import make_trainer, tabletop_robot
from torch.distributed.tensor import DTensor

from vla_policy_ros.training.dataset import ExampleSet

RECIPE: dict[str, Any] = {
    'precision': 'float32',
    'optimisation': {'steps': 6, 'learning_rate': 3e-3, 'warmup_steps': 1},
    'logging': {'log_every': 1, 'validate_every': 3, 'checkpoint_every': 3},
}
"""Long enough that an average that is swapped in, a state that is read and a second step with momentum all come in."""

LARGE = {
    'precision': 'bfloat16',
    'frozen_dtype': 'bfloat16',
    'gradient_checkpointing': True,
    'lora': {'rank': 4},
    'freeze': {'vision': True, 'geometry': True, 'embeddings': True},
}
"""How a large network is fine-tuned."""

MUON = {'optimisation': {**RECIPE['optimisation'], 'optimizer': 'muon'}}
"""Each of the copies moves half of the matrices."""

TOWERS = {**MUON, 'losses': {'flow': 0.0, 'grounding': 0.0, 'perception': 1.0}}
"""Nothing acts: the language model and the expert have no gradients."""

SHARED = {'network': {'expert_config': {'mode': 'shared', 'hidden_size': 64, 'time_conditioning': 'concat_mlp'}}}
"""Both streams run through the same layers, so that each gathers and gives gradients twice in a step."""


class Interrupted(Exception):
    """Stands for a kill after the state of a step was written."""


def train(data: ExampleSet, folder: Path, *, interrupt: bool = False, **sections: Any) -> bool:
    """Train to the end, or to the state after three steps; whether a state was continued."""
    trainer = make_trainer(tabletop_robot(), data, folder, **{**RECIPE, **sections})
    resumed = trainer.resume()
    whole = [name for name, parameter in trainer.objective.named_parameters() if not isinstance(parameter, DTensor)]
    assert bool(whole) != (sections.get('sharding') == 'fsdp' and trainer.parallel.world > 1), whole[:3]

    def checkpoint(_: dict[str, Any]) -> None:
        if interrupt:
            raise Interrupted

    with suppress(Interrupted):
        trainer.run(on_checkpoint=checkpoint)
    assert trainer.step == (3 if interrupt else 6)
    return resumed


def main() -> None:
    data, folder = ExampleSet.load(sys.argv[1]), Path(sys.argv[2])
    train(data, folder / 'copies')
    train(data, folder / 'muon', **MUON)
    train(data, folder / 'muon_continued', interrupt=True, **MUON)
    assert train(data, folder / 'muon_continued', **MUON)
    train(data, folder / 'muon_moved', interrupt=True, **MUON)
    train(data, folder / 'towers', **TOWERS)
    train(data, folder / 'sharded', sharding='fsdp')
    train(data, folder / 'continued', interrupt=True, sharding='fsdp')
    assert train(data, folder / 'continued', sharding='fsdp')
    train(data, folder / 'moved', interrupt=True, sharding='fsdp')
    train(data, folder / 'large', sharding='fsdp', **LARGE)
    train(data, folder / 'shared', sharding='fsdp', **SHARED)


if __name__ == '__main__':
    main()
