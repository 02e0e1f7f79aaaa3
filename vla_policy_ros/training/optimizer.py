"""The optimizer of a run: AdamW, or Muon for the matrices of the layers and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/, torch.optim.Muon) moves a matrix along its momentum with all singular values made
alike. With the update scaled as AdamW's is (https://arxiv.org/abs/2502.16982) both take the same learning rates. The orthogonal
factor is what a step costs more; copies of one network share that work: each process moves the matrices that are its own and hands
them to the others.

Enters: trained parameters by name, their gradients. Leaves: the parameters, moved. The thread that trains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vla_policy_ros.training.config import Optimisation
from vla_policy_ros.training.parameters import optimizer_groups

_INSIDE_A_LAYER = re.compile(r'(layers|blocks)\.\d+\.\w+\.')


class RunOptimizer:
    """Moves the trained parameters of one run.

    Args:
        parameters: name to trained parameter.
        options: which optimizer, and its numbers.
        rank, world: this process, and how many copies of the network there are.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], options: Optimisation, rank: int = 0, world: int = 1) -> None:
        matrices = muon_matrices(parameters, options)
        rest = {name: parameter for name, parameter in parameters.items() if name not in matrices}
        self._rank, self._world = rank, world
        # The costs of neighbours are alike, so that everybody's share is.
        self._matrices = sorted(matrices.values(), key=lambda parameter: parameter.numel())
        adamw = torch.optim.AdamW(optimizer_groups(rest, options), lr=options.learning_rate, betas=options.betas, fused=True)
        self._optimizers: list[torch.optim.Optimizer] = [adamw]
        for parameter in rest.values():
            adamw.state[parameter] = {
                'step': torch.zeros((), dtype=torch.float32, device=parameter.device),
                'exp_avg': torch.zeros_like(parameter),
                'exp_avg_sq': torch.zeros_like(parameter),
            }
        if matrices:
            muon = torch.optim.Muon(optimizer_groups(matrices, options), lr=options.learning_rate, adjust_lr_fn='match_rms_adamw')
            self._optimizers.append(muon)
            for matrix in self._matrices:
                muon.state[matrix] = {'momentum_buffer': torch.zeros_like(matrix)}

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their ``peak`` and present ``lr``."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Move all parameters by their gradients. Those of matrices that other processes move are gone afterwards."""
        for index, matrix in enumerate(self._matrices):
            if index % self._world != self._rank:
                matrix.grad = None  # which leaves it and its momentum alone
        for optimizer in self._optimizers:
            optimizer.step()
        self._share(list(self._matrices))

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of a parameter from step to step, by kind; of matrices that others move, as of the last `gather`."""
        return next(optimizer.state[parameter] for optimizer in self._optimizers if parameter in optimizer.state)

    def gather(self) -> None:
        """Let every process have the state of all parameters; all must call this."""
        self._share([self.state_of(matrix)['momentum_buffer'] for matrix in self._matrices])

    @torch.no_grad()
    def _share(self, tensors: list[Tensor]) -> None:
        """Copy every tensor from the process whose it is to all others."""
        if self._world == 1:
            return
        for owner in range(min(self._world, len(tensors))):
            owned = tensors[owner :: self._world]
            together = torch.cat([tensor.reshape(-1) for tensor in owned])
            torch.distributed.broadcast(together, owner)
            for tensor, part in zip(owned, together.split([tensor.numel() for tensor in owned]), strict=True):
                tensor.copy_(part.view_as(tensor))


def muon_matrices(parameters: Mapping[str, nn.Parameter], options: Optimisation) -> dict[str, nn.Parameter]:
    """Those of ``parameters`` that Muon moves: the matrices of modules inside layers, between hidden values. So no embedding, no
    projection of inputs, outputs or time, no adapter of low rank."""
    if options.optimizer != 'muon':
        return {}
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.dim() == 2 and _INSIDE_A_LAYER.search(name) and '.lora_' not in name
    }
