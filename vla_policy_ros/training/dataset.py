"""Examples as tensors: every image resized once, examples of one scene sharing their pixels.

Enters: an iterable of examples (an observation, the actions of an expert, optionally the pixels of the object that is meant).
Leaves: an `ExampleSet`, which fits into memory and into one safetensors file. Any thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.types import Observation


class TrainingExample(Protocol):
    """What an example must have.

    Attributes:
        observation: what the policy would see.
        actions: float64 ``[T, A]`` absolute actions in robot units; row i is the target at the stamp plus (i + 1) periods.
        target_pixels: camera name to pixel ``(u, v)`` of the named object in that camera's image, None where it is not seen.
        scene_id: examples with the same id share their images.
    """

    @property
    def observation(self) -> Observation: ...

    @property
    def actions(self) -> NDArray[np.float64]: ...

    @property
    def target_pixels(self) -> Mapping[str, tuple[float, float] | None]: ...

    @property
    def scene_id(self) -> int: ...


@dataclass(frozen=True)
class ExampleSet:
    """N examples over M scenes with V cameras.

    Attributes:
        pixel_values: uint8 ``[M, V, 3, H, W]``.
        intrinsic: float32 ``[M, V, 3, 3]`` in pixels of ``pixel_values``.
        intrinsic_mask, image_masks: bool ``[M, V]``.
        scene: long ``[N]``, index of each example's scene.
        state: float64 ``[N, S]``, robot units.
        actions: float64 ``[N, T, A]``, robot units, absolute.
        target_pixels: float32 ``[N, V, 2]`` in pixels of ``pixel_values``; NaN where the target is not seen.
        instructions: N sentences.
    """

    pixel_values: Tensor
    intrinsic: Tensor
    intrinsic_mask: Tensor
    image_masks: Tensor
    scene: Tensor
    state: Tensor
    actions: Tensor
    target_pixels: Tensor
    instructions: list[str]

    def __len__(self) -> int:
        return len(self.scene)

    @classmethod
    def build(cls, examples: Iterable[TrainingExample], processor: MapAnythingLlava3DProcessor) -> ExampleSet:
        """Resize the images and collect everything. Raises ValueError where there are no examples."""
        views: list[dict[str, Tensor]] = []
        index_of: dict[int, int] = {}
        scene, state, actions, pixels, instructions = [], [], [], [], []
        for example in examples:
            observation = example.observation
            if example.scene_id not in index_of:
                index_of[example.scene_id] = len(views)
                views.append(
                    processor.prepare_views(
                        {name: view.rgb for name, view in observation.cameras.items()},
                        {name: view.K for name, view in observation.cameras.items()},
                    )
                )
            scene.append(index_of[example.scene_id])
            state.append(observation.state)
            actions.append(example.actions)
            pixels.append(_model_pixels(example, processor))
            instructions.append(observation.instruction)
        if not views:
            raise ValueError('there are no examples to train on')
        stacked = {name: torch.stack([view[name] for view in views]) for name in views[0]}
        return cls(
            **stacked,
            scene=torch.tensor(scene),
            state=torch.from_numpy(np.stack(state).astype(np.float64)),
            actions=torch.from_numpy(np.stack(actions).astype(np.float64)),
            target_pixels=torch.from_numpy(np.stack(pixels)),
            instructions=instructions,
        )

    @classmethod
    def join(cls, parts: list[ExampleSet]) -> ExampleSet:
        """All examples of several sets, in order."""
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
        """Read what `save` wrote."""
        with safe_open(str(file), framework='pt') as handle:
            instructions = json.loads(handle.metadata()['instructions'])
            return cls(**{name: handle.get_tensor(name) for name in _TENSORS}, instructions=instructions)


_TENSORS = ('pixel_values', 'intrinsic', 'intrinsic_mask', 'image_masks', 'scene', 'state', 'actions', 'target_pixels')


def _model_pixels(example: TrainingExample, processor: MapAnythingLlava3DProcessor) -> NDArray[np.float32]:
    rows = []
    for name in processor.config.cameras:
        target, view = example.target_pixels.get(name), example.observation.cameras.get(name)
        if target is None or view is None:
            rows.append([np.nan, np.nan])
            continue
        height, width = view.rgb.shape[:2]
        mapped = processor.transform(name, width, height).matrix @ np.array([*target, 1.0])
        rows.append([mapped[0], mapped[1]])
    return np.array(rows, dtype=np.float32)
