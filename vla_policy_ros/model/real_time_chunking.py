"""Guided real-time chunking: steer a new chunk towards what remains of the previous one while it is being sampled.

The method is inference-time inpainting (Black et al., "Real-Time Execution of Action Chunking Flow Policies", arXiv 2506.07339),
in our time direction (t = 1 is noise; the paper's tau is 1 - t). At each evaluation

    x0_hat = x_t - t v(x_t, t)                          the chunk that the present velocity leads to
    g      = (d x0_hat / d x_t)^T [ w (previous - x0_hat) ]       a vector-Jacobian product through the network
    v     <- v - gamma(t) g

so that the correction respects what the network holds to be likely, instead of pasting the old actions in. The weights w are 1
for the steps that will be executed before the new chunk can arrive, and fade until the end of the overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ('exponential', 'linear', 'ones', 'zeros')


@dataclass(frozen=True)
class RealTimeGuidance:
    """What the previous chunk still says about the new one.

    Attributes:
        previous: ``[B, T, A]``, normalised, row i meant for the same moment as row i of the new chunk. Rows from
            `execution_horizon` on are not used.
        inference_delay: d, steps that will have been executed when the new chunk arrives; they count fully.
        execution_horizon: end of the overlap; rows d .. execution_horizon - 1 fade by `schedule`.
        schedule: ``exponential`` (the paper's), ``linear``, ``ones`` or ``zeros``.
        max_weight: bound of gamma. 0 gives plain sampling.
    """

    previous: Tensor
    inference_delay: int
    execution_horizon: int
    schedule: str = 'exponential'
    max_weight: float = 10.0

    def __post_init__(self) -> None:
        horizon = self.previous.shape[1] if self.previous.dim() == 3 else -1
        if horizon < 0:
            raise ValueError(f'the previous chunk is {tuple(self.previous.shape)}; expected [batch, T, A]')
        if not 0 <= self.inference_delay <= self.execution_horizon <= horizon:
            raise ValueError(
                f'inference_delay {self.inference_delay} and execution_horizon {self.execution_horizon} must satisfy '
                f'0 <= delay <= horizon of execution <= {horizon}'
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f'schedule {self.schedule!r} is unknown; use one of {", ".join(SCHEDULES)}')
        if not (math.isfinite(self.max_weight) and self.max_weight >= 0):
            raise ValueError(f'max_weight is {self.max_weight}; it must be finite and not negative')


def prefix_weights(guidance: RealTimeGuidance) -> Tensor:
    """w, float32 ``[T]``: 1 before the delay, the schedule's fade until the end of the overlap, 0 behind it."""
    delay, end = guidance.inference_delay, guidance.execution_horizon
    rows = torch.arange(guidance.previous.shape[1], dtype=torch.float32)
    # Linear from 1 at row d - 1 to 0 at row `end`, so that the first fading row already counts less than 1.
    fade = ((end - rows) / (end - delay + 1)).clamp(0.0, 1.0)
    if guidance.schedule == 'exponential':
        fade = fade * torch.expm1(fade) / (math.e - 1.0)
    elif guidance.schedule == 'ones':
        fade = torch.ones_like(rows)
    elif guidance.schedule == 'zeros':
        fade = torch.zeros_like(rows)
    return torch.where(rows < delay, 1.0, torch.where(rows < end, fade, 0.0))


def guidance_weight(time: float, max_weight: float) -> float:
    """gamma at time t: ``(t / tau) (tau^2 + t^2) / t^2`` with tau = 1 - t, bounded by ``max_weight``."""
    tau = 1.0 - time
    if tau <= 0.0 or time <= 0.0:
        return max_weight
    return min(max_weight, (time / tau) * (tau**2 + time**2) / time**2)


def guided(
    velocity: Callable[[Tensor, int], Tensor], times: list[float], guidance: RealTimeGuidance
) -> Callable[[Tensor, int], Tensor]:
    """The corrected field of ``velocity(x, index)`` whose evaluations lie at ``times``.

    Raises:
        RuntimeError: called in inference mode, in which there are no gradients.
    """
    previous = guidance.previous.float()
    weights = prefix_weights(guidance).to(previous.device)[None, :, None]
    # What lies behind the overlap may be anything, also NaN: it has weight 0 and must not reach the product.
    previous = torch.where(weights > 0, previous, 0.0)

    def corrected(x: Tensor, index: int) -> Tensor:
        if torch.is_inference_mode_enabled():
            raise RuntimeError('guided real-time chunking needs gradients: use torch.no_grad() instead of torch.inference_mode()')
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, index)
            clean = x - times[index] * v
            error = weights * (previous - clean.detach())
            (pull,) = torch.autograd.grad(clean, x, error)
        return v.detach() - guidance_weight(times[index], guidance.max_weight) * pull

    return corrected
