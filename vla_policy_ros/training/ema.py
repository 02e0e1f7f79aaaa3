"""The moving average of the trained weights, which becomes the checkpoint.

Enters: parameters, plain or sharded (each process averages its own part). Leaves: the same parameters, exchanged for their average
while a context lasts. The thread that trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, detached and sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MovingAverage:
    """``average = decay * average + (1 - decay) * weight``, with a smaller decay in the first steps.

    Args:
        parameters: what to average.
        decay: 0 is no average: the weights themselves are the result.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = [local(parameter) for parameter in parameters]
        self.values = [weight.clone() for weight in self._weights] if decay else []

    def update(self, step: int) -> None:
        """After optimiser step ``step`` (the first is 0)."""
        if self.decay:
            torch._foreach_lerp_(self.values, self._weights, 1.0 - min(self.decay, (1 + step) / (10 + step)))

    def like(self, index: int, parameter: Tensor) -> Tensor:
        """The average of parameter ``index``, sharded like it."""
        value = self.values[index]
        if not isinstance(parameter, DTensor):
            return value
        return DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average inside, and their own values again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for weight, average in zip(self._weights, self.values, strict=bool(self.decay)):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
