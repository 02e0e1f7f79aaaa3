"""Checkpoint folders: writing a fresh one, reading one back, and refusing what does not fit.

A folder holds ``config.json`` and ``model.safetensors`` (the network), ``processor_config.json``, ``statistics.json`` and the
tokenizer files (the translation), and ``robot.json``, the robot's signature: what the weights take for granted about the robot
they were trained for. Weights are safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import FROM_NOTHING as FROM_NOTHING
from vla_policy_ros.model.presets import fitted_config, initialise_from_nothing, preset_sizes
from vla_policy_ros.model.processing import (
    PROCESSOR_FILE,
    STATISTICS_FILE,
    VICUNA_SYSTEM,
    MapAnythingLlava3DProcessor,
    ProcessorConfig,
)
from vla_policy_ros.model.statistics import Normalizer, Statistics
from vla_policy_ros.model.tokenizer import small_tokenizer
from vla_policy_ros.robot import Robot

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
WEIGHTS_INDEX = 'model.safetensors.index.json'
ROBOT_FILE = 'robot.json'
# The safetensors writer leaves files that only their owner may read.
READABLE = 0o644
TOKENIZER_FILE = 'tokenizer.json'
REQUIRED_FILES = (CONFIG_FILE, PROCESSOR_FILE, STATISTICS_FILE, TOKENIZER_FILE, ROBOT_FILE)
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# vicuna_v1, which the large language model was tuned with; models trained from nothing do without its tokens, and their small
# tokenizer knows words with a leading space.
PROMPTS = {'tabletop': ('', '\n '), 'tiny': (VICUNA_SYSTEM, '\n ')}
VICUNA_V1 = (VICUNA_SYSTEM, '\n')


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message says what is wrong and what to do about it."""


@dataclass(frozen=True)
class RobotSignature:
    """What the weights take for granted about a robot.

    Attributes:
        name: name in the robot file; informative.
        cameras: camera name to resize mode, in order.
        state_names: elements of the state vector.
        action_joints: columns of the action vector.
        representation: ``absolute`` or ``delta``.
        absolute_joints: joints that stay absolute under ``delta``.
        period_ns: time between two actions.
        horizon: actions per chunk.
    """

    name: str
    cameras: dict[str, str]
    state_names: list[str]
    action_joints: list[str]
    representation: str
    absolute_joints: list[str]
    period_ns: int
    horizon: int

    @classmethod
    def of(cls, robot: Robot) -> RobotSignature:
        """The signature of a robot file."""
        action = robot.action
        return cls(
            robot.name,
            {name: camera.resize for name, camera in robot.cameras.items()},
            list(robot.state.names),
            list(action.joints),
            action.representation,
            list(action.absolute_joints),
            action.period_ns,
            action.horizon,
        )

    def differences(self, robot: RobotSignature) -> list[str]:
        """One sentence per item in which ``robot`` is not what this checkpoint was made for."""
        found = []
        for label, ours, theirs in (
            ('cameras', list(self.cameras.items()), list(robot.cameras.items())),
            ('state.joints and state.fields', self.state_names, robot.state_names),
            ('action.joints', self.action_joints, robot.action_joints),
            ('action.absolute_joints', self.absolute_joints, robot.absolute_joints),
        ):
            if ours != theirs:
                found.append(f'{label}: {_list_difference(ours, theirs)}')
        for label, mine, other in (
            ('action.representation', self.representation, robot.representation),
            ('action.period (ns)', self.period_ns, robot.period_ns),
            ('action.horizon', self.horizon, robot.horizon),
        ):
            if mine != other:
                found.append(f'{label}: checkpoint has {mine}, robot file has {other}')
        return found


def _list_difference(ours: list[Any], theirs: list[Any]) -> str:
    missing = [item for item in ours if item not in theirs]
    extra = [item for item in theirs if item not in ours]
    if not missing and not extra:
        return f'same items in another order; the checkpoint expects {ours}'
    parts = [f'robot file lacks {missing}'] if missing else []
    parts += [f'checkpoint does not know {extra}'] if extra else []
    return ', '.join(parts)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder."""

    path: Path
    model: MapAnythingLlava3DForConditionalGeneration
    processor: MapAnythingLlava3DProcessor
    signature: RobotSignature
    content_hash: str


def new_processor(
    robot: Robot,
    preset: str | None,
    config: MapAnythingLlava3DConfig,
    statistics: Statistics | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> MapAnythingLlava3DProcessor:
    """The processor of a fresh model; `limit_statistics` and the small tokenizer unless given."""
    system_prompt, image_separator = PROMPTS.get(preset or '', VICUNA_V1)
    action = robot.action
    names = robot.state.names
    shape = (action.horizon, len(action.joints))
    delta = tuple(
        names.index(f'{joint}.position') if relative else None
        for joint, relative in zip(action.joints, action.delta_mask, strict=True)
    )
    processor = ProcessorConfig(
        cameras={name: camera.resize for name, camera in robot.cameras.items()},
        image_size=config.vision_config.image_size,
        image_seq_length=config.image_seq_length,
        image_token_index=config.image_token_index,
        system_prompt=system_prompt,
        image_separator=image_separator,
        state_dim=len(names),
        action_shape=shape,
        delta_state_index=delta,
    )
    return MapAnythingLlava3DProcessor(tokenizer or small_tokenizer(), processor, statistics or limit_statistics(robot))


def limit_statistics(robot: Robot) -> Statistics:
    """Statistics for a checkpoint that has seen no data, from the robot file's limits alone.

    Positions span [-1, 1] over the range of the joint. An absolute action of size 1 lies an eighth of the range from its middle, a
    delta half of what the velocity limit allows per period, so that an untrained policy's noise rarely leaves the limits.
    """
    ranges = {joint: limit.position for joint, limit in robot.limits.items()}
    known = [name.removesuffix('.position') if name.endswith('.position') else '' for name in robot.state.names]
    low, high = np.array([ranges.get(joint, (-1.0, 1.0)) for joint in known]).T
    state = Normalizer('limits', (low + high) / 2, (high - low) / 2)
    low, high = np.array([ranges[joint] for joint in robot.action.joints]).T
    speed = np.array([robot.limits[joint].velocity for joint in robot.action.joints])
    delta = robot.action.delta_mask
    offset = np.where(delta, 0.0, (low + high) / 2)
    scale = np.where(delta, speed * robot.action.period / 2, (high - low) / 8)
    shape = (robot.action.horizon, len(robot.action.joints))
    return Statistics(state, Normalizer('limits', np.tile(offset, (shape[0], 1)), np.tile(scale, (shape[0], 1))))


def robot_config(robot: Robot, sizes: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> MapAnythingLlava3DConfig:
    """The configuration of network sizes (as `presets` has them) for a robot and a tokenizer.

    Raises:
        ValueError: a size cannot work, or the sizes lack the language model's or the expert's.
    """
    for part in ('text_config', 'expert_config'):
        if not isinstance(sizes.get(part), Mapping):
            raise ValueError(f'the network sizes have no {part}; a robot policy needs it')
    return fitted_config(
        sizes,
        action_dim=len(robot.action.joints),
        state_dim=len(robot.state.names),
        horizon=robot.action.horizon,
        vocab_size=len(tokenizer),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )


def new_model(
    robot: Robot, preset: str, seed: int = 0, changes: Mapping[str, Any] | None = None
) -> MapAnythingLlava3DForConditionalGeneration:
    """A model of a preset that is trained from nothing, with fresh weights that depend on ``seed`` only.

    Args:
        robot: gives action, state and camera sizes.
        preset: network sizes by name.
        seed: of the weights.
        changes: to single sizes, such as ``{'expert_config': {'num_layers': 2}}``.

    Raises:
        ValueError: the preset is unknown, is one that starts from public weights, or a change cannot work.
    """
    sizes = preset_sizes(preset, changes)
    if preset not in FROM_NOTHING:
        raise ValueError(f'preset {preset!r} starts from public weights; make its checkpoint with new or convert, and load that')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MapAnythingLlava3DForConditionalGeneration(robot_config(robot, sizes, small_tokenizer()))
        initialise_from_nothing(model)
    return model.eval()


def new_checkpoint(robot: Robot, preset: str, path: str | Path, seed: int = 0, dtype: str = 'float32') -> Path:
    """Write an untrained checkpoint of matching sizes, with `limit_statistics`, for a preset that is trained from nothing.

    The action head starts at zero velocity, so that its chunks are the noise they were drawn from: fit for trying the machinery,
    not for moving a robot. The other presets are written by `base_checkpoint.write_base_checkpoint`, without their public parts.

    Raises:
        ValueError: as `new_model`, or an unknown ``dtype``.
    """
    if dtype not in DTYPES:
        raise ValueError(f'dtype {dtype!r} is unknown; use one of {", ".join(DTYPES)}')
    model = new_model(robot, preset, seed).to(DTYPES[dtype])
    return save_checkpoint(path, model, new_processor(robot, preset, model.config), RobotSignature.of(robot))


def save_checkpoint(
    path: str | Path,
    model: MapAnythingLlava3DForConditionalGeneration,
    processor: MapAnythingLlava3DProcessor,
    signature: RobotSignature,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint folder and return its path.

    ``weights`` are written in place of the model's own, which may then be on the meta device.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with _without_progress_bars():
        model.save_pretrained(str(path), state_dict=weights)
    save_translation(path, processor, signature)
    return path


def save_translation(path: Path, processor: MapAnythingLlava3DProcessor, signature: RobotSignature) -> None:
    """Write everything of a checkpoint that is not the network, beside it."""
    processor.save_pretrained(path)
    for file in path.glob('*.safetensors'):
        file.chmod(READABLE)
    (path / ROBOT_FILE).write_text(json.dumps(asdict(signature), indent=1) + '\n', encoding='utf-8')


def load_checkpoint(path: str | Path, robot: Robot, *, device: str = 'cpu', dtype: str = 'float32') -> Checkpoint:
    """Open a checkpoint for a robot.

    Raises:
        CheckpointError: a file is missing or damaged, the weights are incomplete or not finite, or the checkpoint was made for a
            robot with other cameras, state, joints or timing.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise CheckpointError(f'dtype {dtype!r} is unknown; use one of {", ".join(DTYPES)}')
    weights = _required_files(path)
    signature = _read_signature(path)
    differences = signature.differences(RobotSignature.of(robot))
    if differences:
        raise CheckpointError(
            f'checkpoint {path} was made for robot {signature.name!r} and does not fit robot {robot.name!r}: '
            f'{"; ".join(differences)}. Use the robot file it was trained with, or train a checkpoint for this robot'
        )
    for file in weights:
        _check_weights_file(file)
    processor = read_processor(path)
    model = _read_model(path, DTYPES[dtype], device)
    return Checkpoint(path, model, processor, signature, _content_hash(path, weights))


def _required_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise CheckpointError(f'checkpoint folder {path} does not exist; give the folder that holds {CONFIG_FILE}, or make one')
    for name in REQUIRED_FILES:
        if not (path / name).is_file():
            raise CheckpointError(f'checkpoint {path} has no {name}; copy the whole folder, or make a new checkpoint')
    weights = sorted(path.glob('model*.safetensors'))
    if not weights:
        raise CheckpointError(f'checkpoint {path} has no {WEIGHTS_FILE}; only safetensors weights are read')
    return weights


def _read_signature(path: Path) -> RobotSignature:
    try:
        return RobotSignature(**json.loads((path / ROBOT_FILE).read_text(encoding='utf-8')))
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f'{path / ROBOT_FILE} is not a robot signature ({error}); make the checkpoint again') from error


def _check_weights_file(file: Path) -> None:
    try:
        with safe_open(file, framework='pt') as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f'{file} ({file.stat().st_size} bytes) is damaged or was copied only in part ({error}); copy it again'
        ) from error


def read_processor(path: Path) -> MapAnythingLlava3DProcessor:
    try:
        return MapAnythingLlava3DProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f'checkpoint {path}: the processor files cannot be read: {error}') from error


def _read_model(path: Path, dtype: torch.dtype, device: str) -> MapAnythingLlava3DForConditionalGeneration:
    try:
        with _without_progress_bars():
            model, report = MapAnythingLlava3DForConditionalGeneration.from_pretrained(
                str(path), dtype=dtype, local_files_only=True, output_loading_info=True, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f'checkpoint {path}: the network cannot be built from its files: {error}') from error
    for label, keys in (('missing', report['missing_keys']), ('unknown', report['unexpected_keys'])):
        if keys:
            raise CheckpointError(
                f'checkpoint {path}: {len(keys)} {label} tensors, first {min(keys)!r}; '
                f'{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together'
            )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f'checkpoint {path}: tensor {name!r} has values that are not finite as {dtype}; '
                'the training run that wrote it has failed, or the dtype is too narrow for it'
            )
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f'device {device!r} cannot be used ({error}); choose cpu or a device that is present') from error


def _content_hash(path: Path, weights: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in (path / CONFIG_FILE, *weights):
        with file.open('rb') as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
