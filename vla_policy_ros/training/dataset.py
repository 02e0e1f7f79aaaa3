"""Examples as tensors: every image resized once, examples of one scene sharing their pixels.

Enters: an iterable of examples (an observation, the actions of an expert, optionally the pixels of the object that is meant).
Leaves: an `ExampleSet`, which fits into memory and into one safetensors file. Any thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.types import Observation

DEPTH_SIDE = 16
TARGETS = 2


class PictureLabels(Protocol):
    """What a simulator knows about the pictures of a scene beyond what a robot sees; see `sim.dataset.SceneLabels`."""

    @property
    def kinds(self) -> NDArray[np.int64]: ...

    @property
    def pixels(self) -> Mapping[str, NDArray[np.float64]]: ...

    @property
    def points(self) -> NDArray[np.float64]: ...

    @property
    def depth(self) -> Mapping[str, NDArray[np.float32]]: ...

    @property
    def fixed(self) -> tuple[str, ...]: ...


class TrainingExample(Protocol):
    """What an example must have. Beside that it may have

    - ``action_is_pad``: bool ``[T]``, actions beyond the end of the recording, which no loss counts;
    - ``labels``: `PictureLabels` of its scene;
    - ``target_pixels``: camera name to the pixels ``(u, v)`` in that camera's image of the `TARGETS` that the sentence names, an
      object and where to bring it; None where one is not seen or not named.

    Attributes:
        observation: what the policy would see.
        actions: float64 ``[T, A]`` absolute actions in robot units; row i is the target at the stamp plus (i + 1) periods.
        scene_id: examples with the same id share their images.
    """

    @property
    def observation(self) -> Observation: ...

    @property
    def actions(self) -> NDArray[np.float64]: ...

    @property
    def scene_id(self) -> int: ...


@dataclass(frozen=True)
class ExampleSet:
    """N examples over M scenes with V cameras and, where a simulator labels them, O objects (else O is 0).

    Attributes:
        pixel_values: uint8 ``[M, V, 3, H, W]``.
        intrinsic: float32 ``[M, V, 3, 3]`` in pixels of ``pixel_values``.
        intrinsic_mask, image_masks: bool ``[M, V]``.
        object_kinds: long ``[M, O, 2]``, colour and shape.
        object_pixels: float32 ``[M, V, O, 2]`` in pixels of ``pixel_values``; NaN where not seen.
        object_points: float32 ``[M, V, O, 3]`` in the base frame, m; NaN in cameras that move with the arm.
        depth: float32 ``[M, V, DEPTH_SIDE, DEPTH_SIDE]``, m, at the centres of equal tiles of ``pixel_values``; NaN where unknown.
        scene: long ``[N]``, index of each example's scene.
        state: float64 ``[N, S]``, robot units.
        actions: float64 ``[N, T, A]``, robot units, absolute.
        action_is_pad: bool ``[N, T]``.
        target_pixels: float32 ``[N, V, TARGETS, 2]`` in pixels of ``pixel_values``; NaN where a target is not seen or not named.
        instructions: N sentences.
    """

    pixel_values: Tensor
    intrinsic: Tensor
    intrinsic_mask: Tensor
    image_masks: Tensor
    object_kinds: Tensor
    object_pixels: Tensor
    object_points: Tensor
    depth: Tensor
    scene: Tensor
    state: Tensor
    actions: Tensor
    action_is_pad: Tensor
    target_pixels: Tensor
    instructions: list[str]

    def __len__(self) -> int:
        return len(self.scene)

    @classmethod
    def build(cls, examples: Iterable[TrainingExample], processor: MapAnythingLlava3DProcessor) -> ExampleSet:
        """Resize the images and collect everything. Raises ValueError where there are no examples."""
        views: list[dict[str, Tensor]] = []
        index_of: dict[int, int] = {}
        scene, state, actions, padding, pixels, instructions = [], [], [], [], [], []
        for example in examples:
            observation = example.observation
            if example.scene_id not in index_of:
                index_of[example.scene_id] = len(views)
                views.append(_scene_tensors(example, processor))
            scene.append(index_of[example.scene_id])
            state.append(observation.state)
            actions.append(example.actions)
            padding.append(getattr(example, 'action_is_pad', np.zeros(len(example.actions), dtype=np.bool_)))
            pixels.append(_target_pixels(example, processor))
            instructions.append(observation.instruction)
        if not views:
            raise ValueError('there are no examples to train on')
        stacked = {name: torch.stack([view[name] for view in views]) for name in views[0]}
        return cls(
            **stacked,
            scene=torch.tensor(scene),
            state=torch.from_numpy(np.stack(state).astype(np.float64)),
            actions=torch.from_numpy(np.stack(actions).astype(np.float64)),
            action_is_pad=torch.from_numpy(np.stack(padding)),
            target_pixels=torch.from_numpy(np.stack(pixels)),
            instructions=instructions,
        )

    @classmethod
    def join(cls, parts: list[ExampleSet]) -> ExampleSet:
        """All examples of several sets, in order.

        Raises:
            ValueError: the sets differ in cameras, sizes or labels.
        """
        for name in _TENSORS:
            shapes = {tuple(getattr(part, name).shape[1:]) for part in parts}
            if len(shapes) > 1:
                raise ValueError(f'example sets whose {name} are {" and ".join(map(str, sorted(shapes)))} cannot be joined')
        offsets = np.cumsum([0, *(len(part.pixel_values) for part in parts)])
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS if name != 'scene'}
        scene = torch.cat([part.scene + int(offset) for part, offset in zip(parts, offsets, strict=False)])
        return cls(**tensors, scene=scene, instructions=[text for part in parts for text in part.instructions])

    def save(self, file: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, str(file), metadata={'instructions': json.dumps(self.instructions)})

    @classmethod
    def load(cls, file: str | Path) -> ExampleSet:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is truncated, or not an example set; the message names it.
        """
        try:
            with safe_open(str(file), framework='pt') as handle:
                instructions = json.loads(handle.metadata()['instructions'])
                return cls(**{name: handle.get_tensor(name) for name in _TENSORS}, instructions=instructions)
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f'{file} is not a whole example set ({error}): delete it, and it is made again') from error


_TENSORS = tuple(field.name for field in fields(ExampleSet) if field.name != 'instructions')


def _scene_tensors(example: TrainingExample, processor: MapAnythingLlava3DProcessor) -> dict[str, Tensor]:
    """What the examples of a scene share."""
    cameras = example.observation.cameras
    views = processor.prepare_views(
        {name: view.rgb for name, view in cameras.items()}, {name: view.K for name, view in cameras.items()}
    )
    names, labels = list(processor.config.cameras), getattr(example, 'labels', None)
    count = 0 if labels is None else len(labels.kinds)
    kinds = np.zeros((0, 2), dtype=np.int64)
    pixels = np.full((count, len(names), 2), np.nan, dtype=np.float32)
    points = np.full((len(names), count, 3), np.nan, dtype=np.float32)
    depth = np.full((len(names), DEPTH_SIDE, DEPTH_SIDE), np.nan, dtype=np.float32)
    if labels is not None:
        kinds = labels.kinds
        for index in range(count):
            pixels[index] = _model_pixels({name: tuple(labels.pixels[name][index]) for name in labels.pixels}, example, processor)
        for view, name in enumerate(names):
            if name in labels.fixed:
                points[view] = labels.points
            if name in labels.depth and name in cameras:
                depth[view] = _model_depth(labels.depth[name], name, example, processor)
    return {
        **views,
        'object_kinds': torch.from_numpy(kinds),
        'object_pixels': torch.from_numpy(pixels.transpose(1, 0, 2).copy()),
        'object_points': torch.from_numpy(points),
        'depth': torch.from_numpy(depth),
    }


def _target_pixels(example: TrainingExample, processor: MapAnythingLlava3DProcessor) -> NDArray[np.float32]:
    """``[V, TARGETS, 2]`` in pixels of the model's images."""
    of_camera = getattr(example, 'target_pixels', {})
    nothing = (None,) * TARGETS
    rows = [
        _model_pixels({name: of_camera.get(name, nothing)[target] for name in processor.config.cameras}, example, processor)
        for target in range(TARGETS)
    ]
    return np.stack(rows, axis=1)


def _model_pixels(
    pixels: Mapping[str, tuple[float, float] | None], example: TrainingExample, processor: MapAnythingLlava3DProcessor
) -> NDArray[np.float32]:
    """Pixels ``[V, 2]`` of the model's images for pixels of the cameras' images."""
    rows = []
    for name in processor.config.cameras:
        pixel, view = pixels.get(name), example.observation.cameras.get(name)
        if pixel is None or view is None:
            rows.append([np.nan, np.nan])
            continue
        height, width = view.rgb.shape[:2]
        mapped = processor.transform(name, width, height).matrix @ np.array([*pixel, 1.0])
        rows.append([mapped[0], mapped[1]])
    return np.array(rows, dtype=np.float32)


def _model_depth(
    depth: NDArray[np.float32], name: str, example: TrainingExample, processor: MapAnythingLlava3DProcessor
) -> NDArray[np.float32]:
    """``[DEPTH_SIDE, DEPTH_SIDE]`` at the tile centres of the model's image, for a depth map ``[h, w]`` of the camera's image."""
    height, width = example.observation.cameras[name].rgb.shape[:2]
    tile = processor.config.image_size / DEPTH_SIDE
    centre = (np.arange(DEPTH_SIDE) + 0.5) * tile - 0.5
    u, v = np.meshgrid(centre, centre)
    to_source = np.linalg.inv(processor.transform(name, width, height).matrix)
    x, y = (to_source @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)]))[:2]
    column = np.floor((x + 0.5) * depth.shape[1] / width).astype(int)
    row = np.floor((y + 0.5) * depth.shape[0] / height).astype(int)
    inside = (column >= 0) & (column < depth.shape[1]) & (row >= 0) & (row < depth.shape[0])
    sampled = np.full(u.size, np.nan, dtype=np.float32)
    sampled[inside] = depth[row[inside], column[inside]]
    return sampled.reshape(DEPTH_SIDE, DEPTH_SIDE)
