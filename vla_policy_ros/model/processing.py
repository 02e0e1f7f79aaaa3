"""From pictures, intrinsics, state and a sentence to model inputs, and from model outputs to actions in robot units.

Enters: per camera RGB uint8 of any size and K in its pixels, a state vector, an instruction. Leaves: tensors for
`MapAnythingLlava3DForConditionalGeneration`; on the way back, absolute actions. Everything that decides about the translation is
saved in the checkpoint folder, with the weights that were trained with it.

The prompt is built by joining token ids, never by expanding a placeholder in text:

    <s> [system] USER: [image tokens of camera 1, camera 2, ...] separator instruction ASSISTANT:

With the system sentence and the separator ``\\n`` this is LLaVA's ``vicuna_v1``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vla_policy_ros.model.image_transform import RESIZE_MODES, ImageTransform
from vla_policy_ros.model.statistics import Statistics

PROCESSOR_FILE = 'processor_config.json'
STATISTICS_FILE = 'statistics.json'
VICUNA_SYSTEM = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class ProcessorConfig:
    """What the processor must know, apart from tokenizer and statistics.

    Attributes:
        cameras: camera name to resize mode, in the order the model sees them.
        image_size: side of the model's square images, pixels.
        image_seq_length: image tokens per camera.
        image_token_index: id that marks image positions.
        system_prompt: sentence before ``USER:``; may be empty.
        image_separator: text between the images and the instruction.
        state_dim: S.
        action_shape: T and A.
        delta_state_index: per action the element of the state that it is relative to, or None where it is absolute.
    """

    cameras: dict[str, str]
    image_size: int
    image_seq_length: int
    image_token_index: int
    system_prompt: str
    image_separator: str
    state_dim: int
    action_shape: tuple[int, int]
    delta_state_index: tuple[int | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, 'action_shape', tuple(self.action_shape))
        object.__setattr__(self, 'delta_state_index', tuple(self.delta_state_index))
        for camera, mode in self.cameras.items():
            if mode not in RESIZE_MODES:
                raise ValueError(f'camera {camera!r}: resize mode {mode!r} is unknown; use one of {", ".join(RESIZE_MODES)}')
        if len(self.delta_state_index) != self.action_shape[1]:
            raise ValueError(f'delta_state_index has {len(self.delta_state_index)} entries for {self.action_shape[1]} actions')


class MapAnythingLlava3DProcessor:
    """Both directions of the translation between robot and network.

    Args:
        tokenizer: a fast tokenizer with a beginning-of-sequence and a padding token.
        config: sizes and cameras.
        statistics: normalisers of state and actions.

    Raises:
        ValueError: the statistics have other sizes than the configuration.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: ProcessorConfig, statistics: Statistics) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.statistics = statistics
        self._fit = lru_cache(maxsize=32)(ImageTransform.fit)
        self._prompt = lru_cache(maxsize=32)(self._encode_prompt)
        horizon, actions = config.action_shape
        if statistics.state.offset.shape != (config.state_dim,):
            raise ValueError(f'state statistics are {statistics.state.offset.shape}; the state has {config.state_dim} elements')
        if statistics.action.offset.shape not in ((actions,), (horizon, actions)):
            raise ValueError(f'action statistics are {statistics.action.offset.shape}; expected [{horizon}, {actions}]')
        self._delta = [(a, s) for a, s in enumerate(config.delta_state_index) if s is not None]

    def __reduce__(self) -> tuple[type[MapAnythingLlava3DProcessor], tuple[PreTrainedTokenizerFast, ProcessorConfig, Statistics]]:
        # Another process makes its own caches.
        return type(self), (self.tokenizer, self.config, self.statistics)

    def __call__(
        self,
        images: Sequence[Mapping[str, NDArray[np.uint8] | None]],
        intrinsics: Sequence[Mapping[str, NDArray[np.float64] | None]],
        state: NDArray[np.float64],
        instructions: Sequence[str],
    ) -> dict[str, Tensor]:
        """Model inputs of a batch.

        Args:
            images: per sample, camera name to RGB uint8 ``[H, W, 3]``; None or missing where the camera is absent.
            intrinsics: per sample, camera name to ``[3, 3]`` in pixels of that image; None or missing where unknown.
            state: ``[B, S]`` in robot units.
            instructions: one sentence per sample.

        Returns:
            ``input_ids, attention_mask, image_token_mask, instruction_token_mask [B, Lp]``, ``pixel_values`` uint8
            ``[B, V, 3, H, W]``, ``intrinsic [B, V, 3, 3]``, ``intrinsic_mask, image_masks [B, V]``, ``state [B, S]``.

        Raises:
            ValueError: an unknown camera, an unusable image, state or intrinsics.
        """
        views = [self.prepare_views(sample, known) for sample, known in zip(images, intrinsics, strict=True)]
        return {
            **self.prompt_batch(instructions),
            'pixel_values': torch.stack([view['pixel_values'] for view in views]),
            'intrinsic': torch.stack([view['intrinsic'] for view in views]),
            'intrinsic_mask': torch.stack([view['intrinsic_mask'] for view in views]),
            'image_masks': torch.stack([view['image_masks'] for view in views]),
            'state': self.normalize_state(state),
        }

    def prepare_views(
        self, images: Mapping[str, NDArray[np.uint8] | None], intrinsics: Mapping[str, NDArray[np.float64] | None]
    ) -> dict[str, Tensor]:
        """The image part of one sample: ``pixel_values [V, 3, H, W]``, ``intrinsic``, ``intrinsic_mask``, ``image_masks``."""
        unknown = sorted(set(images) - set(self.config.cameras))
        if unknown:
            raise ValueError(f'camera {unknown[0]!r} is not one of {", ".join(self.config.cameras)}')
        side, count = self.config.image_size, len(self.config.cameras)
        pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        known, present = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        matrices = torch.eye(3).repeat(count, 1, 1)
        for index, name in enumerate(self.config.cameras):
            rgb, K = images.get(name), intrinsics.get(name)
            if rgb is None:
                continue
            present[index] = True
            transform = self.transform(name, rgb.shape[1], rgb.shape[0])
            pixels[index] = transform.image(rgb)
            if K is not None:
                known[index] = True
                matrices[index] = torch.from_numpy(transform.intrinsics(K)).float()
        return {'pixel_values': pixels, 'intrinsic': matrices, 'intrinsic_mask': known, 'image_masks': present}

    def transform(self, camera: str, width: int, height: int) -> ImageTransform:
        """The geometric transform of a camera whose images are ``width`` x ``height``."""
        side = self.config.image_size
        return self._fit((width, height), (side, side), self.config.cameras[camera])

    def prompt_batch(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """The prompts' part of a batch, ``[B, Lp]`` each, padded on the right to the longest prompt.

        ``input_ids``, ``attention_mask``, and which positions are images (``image_token_mask``) and words of the instruction
        (``instruction_token_mask``).
        """
        prompts = [self._prompt(instruction) for instruction in instructions]
        length = max(len(ids) for ids, _ in prompts)
        pad = int(self.tokenizer.pad_token_id)
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row, _ in prompts], dtype=torch.long)
        valid = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in prompts], dtype=torch.long)
        words = torch.tensor([[*row, *[False] * (length - len(row))] for _, row in prompts])
        return {
            'input_ids': ids,
            'attention_mask': valid,
            'image_token_mask': ids == self.config.image_token_index,
            'instruction_token_mask': words,
        }

    def _encode_prompt(self, instruction: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Ids of a prompt, and which of them are words of the instruction."""
        system = f'{self.config.system_prompt} ' if self.config.system_prompt else ''
        before = self.tokenizer.encode(f'{system}USER: ', add_special_tokens=False)
        words = instruction.strip()
        start = len(self.config.image_separator)
        after = self.tokenizer(
            f'{self.config.image_separator}{words} ASSISTANT:', add_special_tokens=False, return_offsets_mapping=True
        )
        image = [self.config.image_token_index] * (self.config.image_seq_length * len(self.config.cameras))
        ids = (int(self.tokenizer.bos_token_id), *before, *image, *after['input_ids'])
        spoken = (first < start + len(words) and last > start for first, last in after['offset_mapping'])
        return ids, (*[False] * (1 + len(before) + len(image)), *spoken)

    def normalize_state(self, state: NDArray[np.float64]) -> Tensor:
        """float32 ``[B, S]`` for robot states ``[B, S]``. Raises ValueError on a wrong width or a value that is not finite."""
        state = np.asarray(state, dtype=np.float64)
        if state.ndim != 2 or state.shape[1] != self.config.state_dim:
            raise ValueError(f'state is {state.shape}; expected [batch, {self.config.state_dim}]')
        if not np.isfinite(state).all():
            raise ValueError(f'state has values that are not finite: {state}')
        return torch.from_numpy(self.statistics.state.normalize(state)).float()

    def relative_actions(self, actions: NDArray[np.float64], state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Absolute actions ``[B, T, A]`` with the observed state subtracted where the model predicts differences."""
        relative = np.array(actions, dtype=np.float64)
        for action, element in self._delta:
            relative[..., action] -= np.asarray(state)[:, None, element]
        return relative

    def normalize_actions(self, actions: NDArray[np.float64], state: NDArray[np.float64]) -> Tensor:
        """Targets of the network, float32 ``[B, T, A]``, for absolute actions in robot units and the states ``[B, S]``."""
        return torch.from_numpy(self.statistics.action.normalize(self.relative_actions(actions, state))).float()

    def unnormalize_actions(self, actions: Tensor, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Absolute actions in robot units, float64 ``[B, T, A]``, for network outputs and the observed states ``[B, S]``."""
        absolute = self.statistics.action.unnormalize(actions.detach().to('cpu', torch.float64).numpy())
        for action, element in self._delta:
            absolute[..., action] += np.asarray(state, dtype=np.float64)[:, None, element]
        return absolute

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, `PROCESSOR_FILE` and `STATISTICS_FILE` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        (folder / PROCESSOR_FILE).write_text(json.dumps(asdict(self.config), indent=1) + '\n', encoding='utf-8')
        (folder / STATISTICS_FILE).write_text(self.statistics.to_json() + '\n', encoding='utf-8')

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MapAnythingLlava3DProcessor:
        """Read what `save_pretrained` wrote.

        Raises:
            OSError: a file is missing.
            ValueError: a file does not hold what it should.
        """
        folder = Path(folder)
        data: dict[str, Any] = json.loads((folder / PROCESSOR_FILE).read_text(encoding='utf-8'))
        try:
            config = ProcessorConfig(**data)
        except TypeError as error:
            raise ValueError(f'{PROCESSOR_FILE}: {error}') from error
        statistics = Statistics.from_json((folder / STATISTICS_FILE).read_text(encoding='utf-8'))
        return cls(PreTrainedTokenizerFast.from_pretrained(str(folder)), config, statistics)
