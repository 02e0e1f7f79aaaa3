"""Fusion of vision tokens with geometry features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.initial import start_as


class GeometryFusion(nn.Module):
    """Joins projected vision tokens with geometry features.

    ``patch_add``: v + W LN(g), W initialised with ``fusion_init_std`` (0: identity at start).
    ``patch_concat``: F [v; W LN(g)], F initialised to [I, 0].
    ``global_concat``: F [v; mean of W g over all tokens of all views], both with random initialisation.
    ``tokens``: v, followed in each view by W LN(g pooled to K tokens); the only mode that makes the prefix longer.
    """

    def __init__(self, config: MapAnythingLlava3DConfig) -> None:
        super().__init__()
        width, geometry = config.hidden_size, config.geometry_config.info_dim
        self.mode = config.fusion_mode
        self.token_side = math.isqrt(config.geometry_tokens_per_view)
        self.geometry_norm = None if self.mode == 'global_concat' else nn.LayerNorm(geometry)
        self.geometry_projector = nn.Linear(geometry, width)
        self.fusion_projector = nn.Linear(2 * width, width) if self.mode in ('patch_concat', 'global_concat') else None
        if self.mode == 'patch_add':
            start_as(self.geometry_projector, config.fusion_init_std)
        elif self.mode == 'patch_concat' and self.fusion_projector is not None:
            start_as(self.fusion_projector, 'identity')

    def forward(self, vision: Tensor, geometry: Tensor, view_mask: Tensor) -> Tensor:
        """Image tokens ``[B, V, N (+ K), D]`` of ``vision`` ``[B, V, N, D]`` and ``geometry`` ``[B, V, M, C]``.

        ``view_mask`` bool ``[B, V]`` says which views are present.
        """
        if self.mode == 'global_concat':
            projected = _mean_of_present(self.geometry_projector(geometry), view_mask).expand_as(vision)
        else:
            assert self.geometry_norm is not None
            pooled = _pooled(geometry, self.token_side) if self.mode == 'tokens' else _match_grid(geometry, vision.shape[2])
            projected = self.geometry_projector(self.geometry_norm(pooled))
        if self.mode == 'tokens':
            return torch.cat((vision, projected), dim=2)
        if self.fusion_projector is None:
            return vision + projected
        return self.fusion_projector(torch.cat((vision, projected), dim=-1))


def _mean_of_present(features: Tensor, view_mask: Tensor) -> Tensor:
    """``[B, 1, 1, D]``: the mean of ``[B, V, M, D]`` over the tokens of all present views."""
    present = view_mask[:, :, None, None].to(features.dtype)
    total = (features * present).sum(dim=(1, 2), keepdim=True)
    return total / (present.sum(dim=(1, 2), keepdim=True) * features.shape[2]).clamp_min(1)


def _as_grid(features: Tensor) -> Tensor:
    side = math.isqrt(features.shape[2])
    return features.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))


def _pooled(features: Tensor, side: int) -> Tensor:
    """Square patch grids ``[B, V, M, C]`` averaged to ``side * side`` tokens."""
    pooled = F.adaptive_avg_pool2d(_as_grid(features), side)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, features.shape[:2])


def _match_grid(features: Tensor, tokens: int) -> Tensor:
    """Bilinear resampling of square patch grids ``[B, V, M, C]`` to ``tokens`` patches; a matching grid passes through."""
    if features.shape[2] == tokens:
        return features
    target = math.isqrt(tokens)
    grid = F.interpolate(_as_grid(features), size=(target, target), mode='bilinear', align_corners=False)
    return grid.flatten(2).transpose(1, 2).unflatten(0, features.shape[:2])
