"""What a network that ignores the observation can reach; a loss means little without it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.model.configuration import ActionExpertConfig

QUADRATURE_POINTS = 4001


def zero_velocity_loss(actions: NDArray[np.float64], action_is_pad: NDArray[np.bool_] | None = None) -> float:
    """Loss of a network that always answers 0: ``1 + E[a^2]`` for normalised actions ``[N, T, A]``, over those that count.

    Nearly so under ``regression``, whose fixed start has about the variance of noise.
    """
    counted = actions if action_is_pad is None else actions[~action_is_pad]
    return 1.0 + float(np.mean(np.square(counted)))


def unconditional_loss(actions: NDArray[np.float64], config: ActionExpertConfig) -> float:
    """Flow loss of the best network that sees only (x_t, t), if the normalised actions ``[N, T, A]`` were Gaussian.

    Along each principal axis of the chunk, with variance s, the best answer leaves ``E_t[s / (t^2 + (1 - t)^2 s)]``. Chunks are
    strongly correlated over time, which makes this much smaller than the value for independent elements.
    Under regression it is the variance.
    """
    flat = actions.reshape(len(actions), -1)
    variances = np.linalg.eigvalsh(np.cov(flat, rowvar=False, bias=True)).clip(min=0.0)
    if config.objective == 'regression':
        return float(np.mean(variances))
    quantile = (np.arange(QUADRATURE_POINTS) + 0.5) / QUADRATURE_POINTS
    if config.time_sampling == 'beta':
        if config.time_beta != 1.0:
            raise ValueError(f'the baseline knows Beta(a, 1) times only, not Beta({config.time_alpha}, {config.time_beta})')
        quantile = config.time_scale * quantile ** (1.0 / config.time_alpha) + config.time_offset
    t = quantile[:, None]
    return float(np.mean(variances / (t**2 + (1.0 - t) ** 2 * variances)))
