"""Streams a planned network into sharded safetensors files: never more than one shard and one piece in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from vla_policy_ros.model.weights.plan import Report, stored_tensors
from vla_policy_ros.model.weights.random_start import RandomStart
from vla_policy_ros.model.weights.sources import INDEX_SUFFIX, Source, WeightsError

SHARD_BYTES = 2**30


def write_weights(
    folder: Path,
    model: PreTrainedModel,
    report: Report,
    sources: Mapping[str, Source],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``model*.safetensors`` and, for more than one shard, the index, into ``folder``.

    Args:
        folder: an existing folder.
        model: the network on the meta device; gives names, shapes and the rules of initialisation.
        report: from `plan.plan`, for the same network and folders.
        sources: part to folder.
        dtype: of all floating-point tensors.
        seed: of the tensors that no folder provides.
        shard_bytes: size of a file, at most (a single larger tensor has a file of its own).
        progress: called with (bytes written, bytes in all) after every file.

    Raises:
        WeightsError: a tensor of a folder cannot be read or is not finite.
    """
    target = stored_tensors(model)
    shards = _shards(target, dtype, shard_bytes)
    start = RandomStart(model, seed)
    names = ['model.safetensors'] if len(shards) == 1 else [
        f'model-{number:05d}-of-{len(shards):05d}.safetensors' for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    total, written = sum(_bytes(value, dtype) for value in target.values()), 0
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: _tensor(name, target[name], report, sources, start, dtype) for name in shard}
        save_file(tensors, str(folder / file), metadata={'format': 'pt'})
        written += sum(_bytes(target[name], dtype) for name in shard)
        del tensors
        if progress is not None:
            progress(written, total)
    if len(shards) > 1:
        index = {
            'metadata': {'total_size': total},
            'weight_map': {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / f'model{INDEX_SUFFIX}').write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')


def weights_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """What `write_weights` will write."""
    return sum(_bytes(value, dtype) for value in stored_tensors(model).values())


def _tensor(
    name: str, like: Tensor, report: Report, sources: Mapping[str, Source], start: RandomStart, dtype: torch.dtype
) -> Tensor:
    origin = report.loaded.get(name)
    value = start.get(name) if origin is None else sources[origin.part].get(origin.name)
    if not like.is_floating_point():
        return value.clone()
    if not bool(torch.isfinite(value).all()):
        where = 'the random start' if origin is None else f'{sources[origin.part].path}: {origin.name}'
        raise WeightsError(f'{where} has values that are not finite; the file is damaged or its training had failed')
    # A copy of its own, also where the dtype stays: the source's memory is a slice of a mapped file.
    converted = torch.empty(value.shape, dtype=dtype).copy_(value)
    if not bool(torch.isfinite(converted).all()):
        raise WeightsError(f'{name} does not fit into {dtype}; choose bfloat16 or float32')
    return converted


def _bytes(value: Tensor, dtype: torch.dtype) -> int:
    return value.numel() * (dtype.itemsize if value.is_floating_point() else value.element_size())


def _shards(target: Mapping[str, Tensor], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Names in the order of the state dict, cut before a file would become larger than ``limit``."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, value in target.items():
        size = _bytes(value, dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
