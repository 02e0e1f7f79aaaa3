"""Scenes: what one step of the training takes, and which ones.

A scene is one look of the robot with everything that was to be done there: its examples share the pictures, so that the towers see
each picture once. A `SceneDataset` answers scenes by index; `StepPlan` says which of them a step takes, as a function of the seed
and the step alone, however many processes share it; `Collator` makes tensors of them.

Enters: a dataset, a processor. Leaves: batches of tensors. Any thread, and worker processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vla_policy_ros.model.processing import MapAnythingLlava3DProcessor
from vla_policy_ros.training.dataset import ExampleSet


def derived_seed(*parts: int | str) -> int:
    """A seed below 2^63 that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), 'big') >> 1


class Draw(NamedTuple):
    """Which scene to take, and the seed of everything random about it: augmentation, noise, time."""

    scene: int
    seed: int


@dataclass(frozen=True)
class Scene:
    """n examples of one look.

    Attributes:
        shared: tensors of the scene: ``pixel_values`` uint8 ``[V, 3, H, W]``, ``intrinsic [V, 3, 3]``, ``intrinsic_mask`` and
            ``image_masks`` bool ``[V]``, and labels of auxiliary losses.
        own: tensors of the examples, first axis n: ``state [n, S]`` and ``actions [n, T, A]`` in robot units (float64, absolute),
            ``action_is_pad`` bool ``[n, T]`` where actions may lie beyond the end of an episode, and labels.
        instructions: n sentences.
        seed: of the draws of this scene.
    """

    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    instructions: list[str]
    seed: int


@dataclass(frozen=True)
class Trajectories:
    """What statistics and baselines come from: ``state [N, S]``, ``actions [N, T, A]``, ``action_is_pad [N, T]`` or None."""

    state: NDArray[np.float64]
    actions: NDArray[np.float64]
    action_is_pad: NDArray[np.bool_] | None


class SceneDataset(Protocol):
    """M scenes. ``__getitem__`` must depend on the draw alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Scene: ...

    def examples_in(self, scene: int) -> int:
        """How many examples scene ``scene`` has."""
        ...

    def trajectories(self) -> Trajectories:
        """All examples, or an even sample of very many."""
        ...

    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal: a resumed run checks that its data are the same."""
        ...


class ExampleScenes:
    """An `ExampleSet` as a `SceneDataset`."""

    def __init__(self, data: ExampleSet) -> None:
        self.data = data
        order = torch.argsort(data.scene, stable=True)
        counts = torch.bincount(data.scene, minlength=len(data.pixel_values))
        parts = torch.split(order, counts.tolist())
        self._scenes = [index for index, part in enumerate(parts) if len(part)]
        self._examples = [part for part in parts if len(part)]
        tensors = {field.name: getattr(data, field.name) for field in fields(data)}
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and name != 'scene'}
        tensors = {name: value for name, value in tensors.items() if name not in LABELS or _says_something(value)}
        # Per example are those that say what to do; everything else belongs to the look.
        self._own = {name: tensors.pop(name) for name in OF_EXAMPLES if name in tensors}
        self._shared = tensors

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, draw: Draw) -> Scene:
        row, examples = self._scenes[draw.scene], self._examples[draw.scene]
        return Scene(
            {name: value[row] for name, value in self._shared.items()},
            {name: value[examples] for name, value in self._own.items()},
            [self.data.instructions[int(example)] for example in examples],
            draw.seed,
        )

    def examples_in(self, scene: int) -> int:
        return len(self._examples[scene])

    def trajectories(self) -> Trajectories:
        pad = self._own.get('action_is_pad')
        return Trajectories(self.data.state.numpy(), self.data.actions.numpy(), None if pad is None else pad.numpy())

    def digest(self) -> str:
        whole = hashlib.sha256('\n'.join(self.data.instructions).encode())
        for name, value in sorted({**self._shared, **self._own, 'scene': self.data.scene}.items()):
            whole.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            whole.update(value.contiguous().numpy().reshape(-1).view(np.uint8).data)
        return whole.hexdigest()


LABELS = ('object_kinds', 'object_pixels', 'object_points', 'depth', 'target_pixels')
"""What auxiliary losses ask for; left out of a dataset in which no example has it."""
OF_EXAMPLES = ('state', 'actions', 'action_is_pad', 'target_pixels')


def _says_something(value: Tensor) -> bool:
    return value.numel() > 0 and not (value.is_floating_point() and bool(torch.isnan(value).all()))


@dataclass(frozen=True)
class StepPlan:
    """Which scenes each step takes: one shuffled pass over the dataset after the other, without gaps.

    Attributes:
        scenes: scenes in the dataset.
        per_step: scenes of one step, over all processes.
        seed: of the order and of the draws.
    """

    scenes: int
    per_step: int
    seed: int

    def step(self, step: int) -> list[Draw]:
        """All scenes of a step, the same for every number of processes."""
        draws = []
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, index = divmod(position, self.scenes)
            draws.append(Draw(_order(self.scenes, self.seed, epoch)[index], derived_seed(self.seed, 'draw', position)))
        return draws

    def parts(self, first: int, last: int, part: int, parts: int, accumulation: int) -> Iterator[list[Draw]]:
        """The micro-batches of one of ``parts`` processes for the steps ``first`` .. ``last - 1``, ``accumulation`` per step."""
        size = self.per_step // (parts * accumulation)
        for step in range(first, last):
            draws = self.step(step)
            for turn in range(accumulation):
                start = (turn * parts + part) * size
                yield draws[start : start + size]


@lru_cache(maxsize=2)
def _order(scenes: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derived_seed(seed, 'order', epoch))
    return torch.randperm(scenes, generator=generator).tolist()


class Collator:
    """Scenes to one batch for the `Objective`: prompts, normalised state and actions, and which scene each example belongs to."""

    def __init__(self, processor: MapAnythingLlava3DProcessor) -> None:
        self.processor = processor

    def __call__(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Tensors of the M scenes stacked, those of their B examples joined, and

        - ``scene``: long ``[B]``, row of each example's scene;
        - ``seeds``: long ``[M]``, seed of each scene's draws;
        - the prompts (`MapAnythingLlava3DProcessor.prompt_batch`), ``state [B, S]`` and ``actions [B, T, A]`` normalised;
        - ``robot_state`` and ``robot_actions``: the same in robot units, float64.
        """
        batch = {name: torch.stack([scene.shared[name] for scene in scenes]) for name in scenes[0].shared}
        own = {name: torch.cat([scene.own[name] for scene in scenes]) for name in scenes[0].own}
        state, actions = own.pop('state'), own.pop('actions')
        counts = torch.tensor([len(scene.instructions) for scene in scenes])
        return {
            **batch,
            **own,
            **self.processor.prompt_batch([text for scene in scenes for text in scene.instructions]),
            'scene': torch.repeat_interleave(counts),
            'seeds': torch.tensor([scene.seed for scene in scenes]),
            'state': self.processor.normalize_state(state.numpy()),
            'actions': self.processor.normalize_actions(actions.numpy(), state.numpy()),
            'robot_state': state,
            'robot_actions': actions,
        }
