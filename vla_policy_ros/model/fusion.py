"""Vision tower input and the fusion of vision with geometry.

Pixel contract of the whole network: RGB, uint8 or float in [0, 1]. Each tower applies its own normalisation, once, in here or in
`geometry`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.initial import start_as

VISION_MEAN = 0.5
VISION_STD = 0.5


def unit_rgb(pixel_values: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1].

    Raises:
        ValueError: a float image leaves [0, 1] or is not finite, or the dtype is neither uint8 nor float.
    """
    if pixel_values.dtype == torch.uint8:
        return pixel_values.float() / 255.0
    if not pixel_values.is_floating_point():
        raise ValueError(f'pixel_values are {pixel_values.dtype}; give uint8, or float in [0, 1]')
    low, high = (float(value) for value in torch.aminmax(pixel_values.detach()))
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f'pixel_values span [{low:g}, {high:g}]; give uint8, or float RGB in [0, 1] that is not normalised yet')
    return pixel_values.float()


def vision_pixels(rgb: Tensor) -> Tensor:
    """[0, 1] RGB to the range the vision tower was trained on."""
    return (rgb - VISION_MEAN) / VISION_STD


class GeometryFusion(nn.Module):
    """Joins projected vision tokens with geometry features; the number of tokens stays.

    ``patch_add``: v + W LN(g), W initialised with ``fusion_init_std`` (0: identity at start).
    ``patch_concat``: F [v; W LN(g)], F initialised to [I, 0].
    ``global_concat``: F [v; mean of W g over all tokens of all views], both with random initialisation.
    """

    def __init__(self, config: MapAnythingLlava3DConfig) -> None:
        super().__init__()
        width, geometry = config.hidden_size, config.geometry_config.info_dim
        self.mode = config.fusion_mode
        self.geometry_norm = None if self.mode == 'global_concat' else nn.LayerNorm(geometry)
        self.geometry_projector = nn.Linear(geometry, width)
        self.fusion_projector = None if self.mode == 'patch_add' else nn.Linear(2 * width, width)
        if self.mode == 'patch_add':
            start_as(self.geometry_projector, config.fusion_init_std)
        elif self.mode == 'patch_concat' and self.fusion_projector is not None:
            start_as(self.fusion_projector, 'identity')

    def forward(self, vision: Tensor, geometry: Tensor, view_mask: Tensor) -> Tensor:
        """``vision`` ``[B, V, N, D]``, ``geometry`` ``[B, V, M, C]``, present views bool ``[B, V]`` to ``[B, V, N, D]``."""
        if self.geometry_norm is not None:
            geometry = self.geometry_norm(_match_grid(geometry, vision.shape[2]))
        projected = self.geometry_projector(geometry)
        if self.fusion_projector is None:
            return vision + projected
        if self.geometry_norm is None:
            present = view_mask[:, :, None, None].to(projected.dtype)
            total = (projected * present).sum(dim=(1, 2), keepdim=True)
            count = (present.sum(dim=(1, 2), keepdim=True) * projected.shape[2]).clamp_min(1)
            projected = (total / count).expand_as(vision)
        return self.fusion_projector(torch.cat((vision, projected), dim=-1))


def _match_grid(features: Tensor, tokens: int) -> Tensor:
    """Bilinear resampling of square patch grids ``[B, V, M, C]`` to ``tokens`` patches; a matching grid passes through."""
    batch, views, count, width = features.shape
    if count == tokens:
        return features
    side, target = math.isqrt(count), math.isqrt(tokens)
    grid = features.reshape(batch * views, side, side, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(target, target), mode='bilinear', align_corners=False)
    return grid.flatten(2).transpose(1, 2).reshape(batch, views, tokens, width)
