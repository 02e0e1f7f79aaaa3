"""Pictures changed at random, and their intrinsics with them: a point in space stays on the same image content.

Everything random about a picture follows from one seed. Coordinates are those of ROS: integers are centres of pixels.

Enters: pictures uint8 ``[V, 3, H, W]`` and K ``[V, 3, 3]`` of one scene. Leaves: the same shapes. Any thread, and worker processes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_policy_ros.training.recorded_config import Augmentation
from vla_policy_ros.training.scenes import Draw, Scene, SceneDataset, Trajectories, derived_seed

# Weights of red, green and blue in what the eye calls brightness (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


def draw_transforms(settings: Augmentation, views: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """float64 ``[V, 3, 3]``: for each picture the affine map from its pixels to those of the changed one."""
    uniform = torch.rand(views, 4, generator=generator, dtype=torch.float64)
    low, high = settings.zoom
    scale = low + (high - low) * uniform[:, 0]
    move = settings.shift * (2.0 * uniform[:, 1:3] - 1.0) * torch.tensor([width, height], dtype=torch.float64)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    made = torch.eye(3, dtype=torch.float64).repeat(views, 1, 1)
    made[:, 0, 0] = made[:, 1, 1] = scale
    made[:, :2, 2] = centre * (1.0 - scale[:, None]) + move
    made[uniform[:, 3] >= settings.probability] = torch.eye(3, dtype=torch.float64)
    return made


def warp(pixels: Tensor, transforms: Tensor) -> Tensor:
    """Pictures uint8 ``[V, 3, H, W]`` moved by ``transforms [V, 3, 3]``; edges are repeated where nothing was seen."""
    height, width = pixels.shape[-2:]
    back = torch.linalg.inv(transforms.double())
    v, u = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing='ij')
    where = torch.stack([u, v, torch.ones_like(u)], dim=-1) @ back[:, None, :2].mT  # [V, H, W, 2] in pixels of the source
    grid = (2.0 * where + 1.0) / torch.tensor([width, height], dtype=torch.float64) - 1.0
    moved = F.grid_sample(pixels.float(), grid.float(), mode='bilinear', padding_mode='border', align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


def jitter(pixels: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Pictures uint8 ``[V, 3, H, W]`` with brightness, contrast and saturation changed, each by its own draw."""
    views = len(pixels)
    uniform = torch.rand(views, 4, generator=generator)
    spread = torch.tensor([settings.brightness, settings.contrast, settings.saturation])
    brightness, contrast, saturation = (1.0 + spread * (2.0 * uniform[:, :3] - 1.0)).T[..., None, None, None]
    image = pixels.float() * brightness
    image = image.mean(dim=(1, 2, 3), keepdim=True) * (1.0 - contrast) + image * contrast
    grey = (image * torch.tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    image = grey * (1.0 - saturation) + image * saturation
    changed = image.round().clamp(0, 255).to(torch.uint8)
    return torch.where((uniform[:, 3] < settings.probability)[:, None, None, None], changed, pixels)


def move_points(points: Tensor, transforms: Tensor) -> Tensor:
    """Pixels ``[..., V, 2]`` in the changed pictures; NaN stays NaN."""
    per_view = transforms.to(points.dtype)
    return (per_view[:, :2, :2] @ points[..., None])[..., 0] + per_view[:, :2, 2]


def move_tiles(values: Tensor, transforms: Tensor, height: int, width: int) -> Tensor:
    """Values ``[V, N, N]`` at the centres of equal tiles, of the changed pictures: that of the tile that is seen there now.

    NaN where nothing was seen.
    """
    side = values.shape[-1]
    size = torch.tensor([width, height], dtype=torch.float64) / side
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')
    centre = (torch.stack([column, row], dim=-1) + 0.5) * size - 0.5
    source = (
        torch.cat([centre, torch.ones(side, side, 1, dtype=torch.float64)], dim=-1) @ torch.linalg.inv(transforms)[:, None, :2].mT
    )
    tile = ((source + 0.5) / size).floor().long()
    seen = ((tile >= 0) & (tile < side)).all(dim=-1)
    tile = tile.clamp(0, side - 1)
    view = torch.arange(len(values))[:, None, None]
    return values[view, tile[..., 1], tile[..., 0]].masked_fill(~seen, float('nan'))


class AugmentedScenes:
    """A `SceneDataset` whose pictures are changed anew at every draw. Labels in pixels move along."""

    def __init__(self, scenes: SceneDataset, settings: Augmentation) -> None:
        self._scenes, self._settings = scenes, settings

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, draw: Draw) -> Scene:
        scene = self._scenes[draw]
        pixels = scene.shared['pixel_values']
        height, width = pixels.shape[-2:]
        generator = torch.Generator().manual_seed(derived_seed(draw.seed, 'augmentation'))
        transforms = draw_transforms(self._settings, len(pixels), height, width, generator)
        shared, own = dict(scene.shared), dict(scene.own)
        shared['pixel_values'] = jitter(warp(pixels, transforms), self._settings, generator)
        shared['intrinsic'] = (transforms @ shared['intrinsic'].double()).to(shared['intrinsic'].dtype)
        if 'object_pixels' in shared:
            shared['object_pixels'] = move_points(shared['object_pixels'].transpose(0, 1), transforms).transpose(0, 1)
        if 'depth' in shared:
            shared['depth'] = move_tiles(shared['depth'], transforms, height, width)
        if 'target_pixels' in own:
            own['target_pixels'] = move_points(own['target_pixels'].transpose(1, 2), transforms).transpose(1, 2)
        return replace(scene, shared=shared, own=own)

    def examples_in(self, scene: int) -> int:
        return self._scenes.examples_in(scene)

    def trajectories(self) -> Trajectories:
        return self._scenes.trajectories()

    def digest(self) -> str:
        return self._scenes.digest()
