"""Augmented pictures keep their geometry: a point in space stays on the same image content, and labels go along."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.training.augmentation import AugmentedScenes, draw_transforms, jitter, move_points, move_tiles, warp
from vla_policy_ros.training.recorded_config import Augmentation
from vla_policy_ros.training.scenes import Draw, Scene, Trajectories

SIDE = 96
K = torch.tensor([[80.0, 0.0, 47.5], [0.0, 80.0, 47.5], [0.0, 0.0, 1.0]])
POINTS = torch.tensor([[0.1, -0.05, 1.0], [-0.15, 0.1, 1.2], [0.05, 0.12, 0.9]])
GEOMETRIC = Augmentation(zoom=(0.8, 1.3), shift=0.1, brightness=0.0, contrast=0.0, saturation=0.0, probability=1.0)


def project(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Pixels ``[..., 2]``."""
    homogeneous = points @ matrix.mT.to(points.dtype)
    return homogeneous[..., :2] / homogeneous[..., 2:]


def blob(pixel: torch.Tensor) -> torch.Tensor:
    """A picture uint8 ``[3, SIDE, SIDE]`` with a bright spot at ``pixel``."""
    v, u = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing='ij')
    level = 250.0 * torch.exp(-((u - pixel[0]) ** 2 + (v - pixel[1]) ** 2) / (2 * 3.0**2))
    return level.round().to(torch.uint8).repeat(3, 1, 1)


def centre(picture: torch.Tensor) -> torch.Tensor:
    """Where the spot is."""
    level = picture.float().sum(dim=0)
    v, u = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing='ij')
    return torch.stack([(u * level).sum(), (v * level).sum()]) / level.sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_a_point_in_space_stays_on_its_content(seed: int) -> None:
    pictures = torch.stack([blob(project(K, point)) for point in POINTS])
    transforms = draw_transforms(GEOMETRIC, 3, SIDE, SIDE, torch.Generator().manual_seed(seed))
    moved = warp(pictures, transforms)
    for picture, transform, point in zip(moved, transforms, POINTS, strict=True):
        expected = project(transform.float() @ K, point)
        if (expected > 12).all() and (expected < SIDE - 12).all():  # else the spot is cut off
            assert torch.linalg.norm(centre(picture) - expected) < 0.3


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    pictures = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    still = Augmentation(zoom=(1.0, 1.0), shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0, probability=1.0)
    generator = torch.Generator().manual_seed(0)
    transforms = draw_transforms(still, 2, 20, 30, generator)
    assert torch.equal(transforms, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    assert torch.equal(jitter(warp(pictures, transforms), still, generator), pictures)
    never = Augmentation(probability=0.0)
    assert torch.equal(jitter(warp(pictures, draw_transforms(never, 2, 20, 30, generator)), never, generator), pictures)


def test_colours_change_by_as_much_as_is_asked_for() -> None:
    pictures = torch.full((400, 3, 4, 4), 100, dtype=torch.uint8)
    only = Augmentation(zoom=(1.0, 1.0), shift=0.0, brightness=0.3, contrast=0.0, saturation=0.0, probability=1.0)
    levels = jitter(pictures, only, torch.Generator().manual_seed(1)).float().mean(dim=(1, 2, 3))
    assert 69 <= levels.min() < 75 and 125 < levels.max() <= 131 and abs(float(levels.mean()) - 100) < 3
    grey = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(1, 3, 4, 4)
    without = Augmentation(zoom=(1.0, 1.0), shift=0.0, brightness=0.0, contrast=0.9, saturation=0.0, probability=1.0)
    flat = jitter(grey, without, torch.Generator().manual_seed(3)).float()
    assert abs(float(flat.mean()) - 350 / 3) < 0.5 and float(flat.std()) != float(grey.float().std())


class OneScene:
    """One labelled look with two cameras."""

    def __init__(self) -> None:
        spots = torch.stack([project(K, POINTS[0]), project(K, POINTS[1])])
        self.scene = Scene(
            {
                'pixel_values': torch.stack([blob(spot) for spot in spots]),
                'intrinsic': K.repeat(2, 1, 1),
                'object_pixels': torch.stack([spots[0].repeat(2, 1), torch.full((2, 2), float('nan'))]),
                'depth': torch.arange(2 * 16 * 16, dtype=torch.float32).view(2, 16, 16),
            },
            {'target_pixels': spots[None, :, None].repeat(4, 1, 2, 1)},
            ['a'] * 4,
            0,
        )

    def __len__(self) -> int:
        return 1

    def __getitem__(self, draw: Draw) -> Scene:
        return self.scene

    def examples_in(self, scene: int) -> int:
        return 4

    def trajectories(self) -> Trajectories:
        return Trajectories(np.zeros((4, 1)), np.zeros((4, 1, 1)), None)

    def digest(self) -> str:
        return 'one'


def test_intrinsics_and_labels_move_with_the_pictures() -> None:
    plain = OneScene()
    tight = Augmentation(zoom=(0.9, 1.2), shift=0.05, probability=1.0)
    for seed in range(20):
        scene = AugmentedScenes(plain, tight)[Draw(0, seed)]
        for view in range(2):
            spot = project(scene.shared['intrinsic'][view], POINTS[view])
            torch.testing.assert_close(scene.own['target_pixels'][:, view], spot.expand(4, 2, 2), atol=1e-3, rtol=0)
        torch.testing.assert_close(scene.shared['object_pixels'][0, 1], scene.own['target_pixels'][0, 0, 0], atol=1e-3, rtol=0)
        assert scene.shared['object_pixels'][1].isnan().all()
        assert scene.shared['pixel_values'].dtype == torch.uint8
    assert torch.equal(plain.scene.shared['intrinsic'], K.repeat(2, 1, 1))  # the source stays as it is


def test_depths_move_by_whole_tiles_and_are_unknown_where_nothing_was_seen() -> None:
    depth = torch.arange(16, dtype=torch.float32).view(1, 4, 4)
    right = torch.eye(3, dtype=torch.float64)[None].clone()
    right[0, 0, 2] = 10.0  # one tile of ten pixels
    moved = move_tiles(depth, right, 40, 40)[0]
    assert moved[:, 0].isnan().all() and torch.equal(moved[:, 1:], depth[0, :, :3])
    torch.testing.assert_close(move_points(torch.tensor([[1.0, 2.0]]), right), torch.tensor([[11.0, 2.0]]))
