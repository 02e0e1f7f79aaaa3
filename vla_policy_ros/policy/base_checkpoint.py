"""Base checkpoints for a robot: the network from local folders of public weights, the translation from the robot file.

What no folder provides is randomly initialised, and the model card says so; without any folder this writes a random checkpoint of
any size. Everything is written to a folder beside the wanted one, which gets its name when it is complete.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from vla_policy_ros import __version__
from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import preset_sizes
from vla_policy_ros.model.tokenizer import small_tokenizer
from vla_policy_ros.model.weights.plan import Report, plan, stored_tensors
from vla_policy_ros.model.weights.rules import PARTS
from vla_policy_ros.model.weights.sizes import adopt_sizes
from vla_policy_ros.model.weights.sources import Source, WeightsError
from vla_policy_ros.model.weights.writer import SHARD_BYTES, weights_bytes, write_weights
from vla_policy_ros.policy.checkpoint import DTYPES, TOKENIZER_FILE, RobotSignature, new_processor, robot_config, save_translation
from vla_policy_ros.robot import Robot

CARD_FILE = 'README.md'
FOLDER_MODE = 0o755
# What a config.json says beside sizes and choices.
NOT_SIZES = ('architectures', 'dtype', 'model_type', 'transformers_version')
# What a folder is under when its own model card does not say; facts about the public releases, to be checked by the user.
PUBLIC_LICENCES = {
    'language': 'Llama 2 Community License for Vicuna, LLaVA-1.5, CC BY-NC-SA 4.0 beside it for LLaVA-3D; Apache-2.0 for Mistral',
    'vision': 'Apache-2.0 for SigLIP, MIT for CLIP',
    'geometry': 'Apache-2.0 for the map-anything-apache releases, CC BY-NC 4.0 for the others',
}


def write_base_checkpoint(
    robot: Robot,
    out: str | Path,
    *,
    preset: str | None = None,
    sizes_file: str | Path | None = None,
    folders: Mapping[str, str | Path] | None = None,
    dtype: str = 'bfloat16',
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write a checkpoint folder and return what became of every tensor.

    Args:
        robot: gives action, state and camera sizes, and limit statistics.
        out: the new folder.
        preset: network sizes by name, or
        sizes_file: by a JSON file like a ``config.json``.
        folders: any of ``language``, ``vision``, ``geometry`` to a local folder.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        seed: of what is randomly initialised.
        shard_bytes: size of a weights file, at most.
        progress: called with (bytes written, bytes in all).

    Raises:
        WeightsError: a folder cannot be used or does not fit; nothing is left behind.
        ValueError: the sizes or the dtype cannot work, or ``out`` is not empty.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f'dtype {dtype!r} is unknown; use one of {", ".join(DTYPES)}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{out} is not an empty folder; give a new one, so that no checkpoint is overwritten')
    unknown = sorted(set(folders or {}) - set(PARTS))
    if unknown:
        raise ValueError(f'{unknown[0]!r} is not a part; folders can be given for {", ".join(PARTS)}')
    sources = {part: Source(path) for part, path in (folders or {}).items()}
    sizes, changes = adopt_sizes(_sizes(preset, sizes_file), sources)
    tokenizer = _tokenizer(sources.get('language'))
    rows = sizes['text_config'].get('vocab_size', 0) if 'language' in sources else len(tokenizer)
    if rows < len(tokenizer):
        raise WeightsError(
            f'{sources["language"].path}: the tokenizer has {len(tokenizer)} words, the word embedding {rows} rows; '
            'they do not belong together'
        )
    config = robot_config(robot, sizes, tokenizer)
    with torch.device('meta'):
        model = MapAnythingLlava3DForConditionalGeneration(config)
    report = plan(stored_tensors(model), sources, config.vision_config.num_hidden_layers + config.vision_feature_layer + 1)
    report.sizes = changes
    _check_space(out, weights_bytes(model, DTYPES[dtype]))

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    partial.chmod(FOLDER_MODE)
    try:
        write_weights(partial, model, report, sources, dtype=DTYPES[dtype], seed=seed, shard_bytes=shard_bytes, progress=progress)
        _save_config(partial, config, DTYPES[dtype])
        save_translation(partial, new_processor(robot, preset, config, None, tokenizer), RobotSignature.of(robot))
        (partial / CARD_FILE).write_text(model_card(robot, preset, config, sources, report, dtype), encoding='utf-8')
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def model_card(
    robot: Robot, preset: str | None, config: MapAnythingLlava3DConfig, sources: Mapping[str, Source], report: Report, dtype: str
) -> str:
    """The checkpoint's README: what it is, where its weights come from, and under which licences."""
    random = sorted({name.split('.')[0] for name in report.random})
    lines = [
        '---',
        'library_name: transformers',
        'pipeline_tag: robotics',
        f'license: {"other" if sources else "apache-2.0"}',
        '---',
        f'# Base checkpoint for {robot.name}',
        '',
        f'A `{config.model_type}` policy network ({f"preset {preset}" if preset else "sizes of its own"}, {dtype}, '
        f'{sum(report.parameters.values()) / 1e6:.1f} million elements), written by vla_policy_ros {__version__}.',
        '**It has not been trained on any robot**: its action head answers with the noise that it is given. Fine-tune it, then '
        'judge it with `dry_run`.',
        '',
        '## Where the weights come from',
        '',
        '| part | folder | tensors used | licence |',
        '|---|---|---|---|',
    ]
    for part, source in sources.items():
        used = sum(origin.part == part for origin in report.loaded.values())
        stated = source.licence or f'not stated in the folder; check (public releases: {PUBLIC_LICENCES[part]})'
        lines.append(f'| {part} | `{source.path.resolve().name}` | {used} | {stated} |')
    lines.append(f'| {", ".join(random)} | random start | {len(report.random)} | as this software (Apache-2.0) |')
    lines += ['', 'The strictest of these licences applies to the whole.', '', '## Report', '', '```', *report.lines(), '```', '']
    lines += ['Randomly initialised:', '', '```', *_grouped(report.random), '```', '']
    return '\n'.join(lines)


def _grouped(names: list[str]) -> list[str]:
    """Names with the numbers of their layers left open, each once, with how many there are."""
    counts = Counter(re.sub(r'\.\d+\.', '.*.', name) for name in names)
    return [f'{name}{f"  ({count})" if count > 1 else ""}' for name, count in counts.items()]


def _sizes(preset: str | None, sizes_file: str | Path | None) -> Mapping[str, Any]:
    if (preset is None) == (sizes_file is None):
        raise ValueError('give either a preset or a file of network sizes')
    if preset is not None:
        return preset_sizes(preset)
    assert sizes_file is not None
    try:
        sizes = json.loads(Path(sizes_file).read_text(encoding='utf-8'))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{sizes_file} is not a JSON file of network sizes ({error})') from error
    if not isinstance(sizes, dict):
        raise ValueError(f'{sizes_file} does not hold a JSON object')
    return {name: value for name, value in sizes.items() if name not in NOT_SIZES}


def _tokenizer(language: Source | None) -> PreTrainedTokenizerFast:
    """The language folder's tokenizer, or the small one where there is no language folder."""
    if language is None:
        return small_tokenizer()
    if not (language.path / TOKENIZER_FILE).is_file():
        raise WeightsError(
            f'{language.path} has no {TOKENIZER_FILE}; save its tokenizer in the fast form '
            '(needs sentencepiece: AutoTokenizer.from_pretrained(folder).save_pretrained(folder))'
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(language.path))
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise WeightsError(f'{language.path}: the tokenizer has no bos or eos token; copy tokenizer_config.json too')
    if tokenizer.pad_token_id is None:
        # As LLaVA and Vicuna do.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _check_space(out: Path, needed: int) -> None:
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f'{out} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free')


def _save_config(folder: Path, config: MapAnythingLlava3DConfig, dtype: torch.dtype) -> None:
    config.dtype = dtype
    config.architectures = [MapAnythingLlava3DForConditionalGeneration.__name__]
    config.save_pretrained(str(folder))
