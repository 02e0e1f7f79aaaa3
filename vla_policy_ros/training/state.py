"""The state that an interrupted run continues from: written whole or not at all, checked before it is used.

    RUN/state/step_00000250/part_000.safetensors ...   weights, moving average and optimiser state that are trained
                            state.json                 step, checksums, and what the run was made of

A state is written into a folder of another name, every file is forced to the disk, and then the folder gets its name. The state
before it stays until the next one, so that there is always a whole one. A damaged state is refused, not skipped: a complete folder
can only be damaged by a failing disk or by hand, and going on silently would hide that. The message says which folder to delete to
go on from the state before.

Nothing is pickled. Enters: named tensors (of a sharded run, each process's part). Leaves: the same, in place. The thread that
trains.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from vla_policy_ros.training.ema import local

FOLDER = 'state'
STATE_FILE = 'state.json'
KEEP = 2
FORMAT = 1


class StateError(ValueError):
    """The saved state cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class SavedState:
    """A state on the disk.

    Attributes:
        folder: where it is.
        step: optimiser steps that it has behind it.
        parts: files that its tensors are split over, along their first axis.
        run: what the run was made of, flat.
    """

    folder: Path
    step: int
    parts: int
    run: dict[str, Any]


def save_state(
    run_folder: Path, step: int, tensors: dict[str, Tensor], run: dict[str, Any], rank: int, world: int, wait: Callable[[], None]
) -> None:
    """Write a state; every process calls this, with its part of the tensors if they are sharded, else with the whole ones."""
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    final = run_folder / FOLDER / f'step_{step:08d}'
    partial = final.with_name(f'{final.name}.part')
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    written = []
    if sharded or rank == 0:
        file = partial / f'part_{rank:03d}.safetensors'
        save_file({name: local(tensor).cpu().contiguous() for name, tensor in tensors.items()}, str(file))
        written.append({'name': file.name, 'bytes': file.stat().st_size, 'sha256': _synced_digest(file)})
    files = gather_object(written) if world > 1 else written
    if rank == 0:
        content = {'format': FORMAT, 'step': step, 'files': files, 'run': run}
        (partial / STATE_FILE).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
        _synced_digest(partial / STATE_FILE)
        _sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync_folder(final.parent)
        for old in _states(run_folder)[:-KEEP]:
            shutil.rmtree(old)
    wait()


def newest_state(run_folder: Path, *, check: bool = True) -> SavedState | None:
    """The newest state of a run, checked byte by byte; None where there is none.

    Args:
        run_folder: of the run.
        check: whether to read everything; one of several processes is enough.

    Raises:
        StateError: a file of it is missing, cut short or changed.
    """
    found = _states(run_folder)
    if not found:
        return None
    folder = found[-1]
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding='utf-8'))
        if content['format'] != FORMAT:
            raise ValueError(f'format {content["format"]}, this version reads {FORMAT}')
        state = SavedState(folder, int(content['step']), len(content['files']), dict(content['run']))
        for entry in content['files']:
            file = folder / entry['name']
            if file.stat().st_size != entry['bytes']:
                raise ValueError(f'{file.name} has {file.stat().st_size} bytes, not {entry["bytes"]}')
            if check and _digest(file) != entry['sha256']:
                raise ValueError(f'{file.name} has another checksum than when it was written')
    except (OSError, KeyError, TypeError, ValueError) as error:
        before = f'to go on from {found[-2].name}' if len(found) > 1 else 'to start from the beginning'
        raise StateError(
            f'the saved state {folder} is damaged ({error}). Check the disk; then delete that folder {before}'
        ) from error
    return state


def load_tensors(state: SavedState, into: dict[str, Tensor], rank: int, world: int) -> None:
    """Copy the saved tensors over those of the same names; the number of processes may have changed.

    Raises:
        StateError: the names or shapes differ.
    """
    handles = [safe_open(str(state.folder / f'part_{part:03d}.safetensors'), framework='pt') for part in range(state.parts)]
    names = set(handles[0].keys())
    if names != set(into):
        odd = sorted(names ^ set(into))
        raise StateError(f'{state.folder} and this run have other trained tensors, first {odd[0]!r}: the software has changed')
    for name, target in into.items():
        mine = local(target)
        if state.parts == world and isinstance(target, DTensor):
            saved = handles[rank].get_tensor(name)
        else:
            parts = [handle.get_tensor(name) for handle in handles]
            saved = torch.cat(parts) if state.parts > 1 and parts[0].dim() else parts[0]
            if isinstance(target, DTensor):
                chunks = saved.chunk(world)
                saved = chunks[rank] if rank < len(chunks) else saved[:0]
        if saved.shape != mine.shape:
            raise StateError(f'{state.folder}: {name} is {tuple(saved.shape)}, this run has {tuple(mine.shape)}')
        mine.copy_(saved)


def _states(run_folder: Path) -> list[Path]:
    """Complete states, oldest first."""
    return sorted(path for path in (run_folder / FOLDER).glob('step_*') if path.suffix != '.part')


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open('rb') as handle:
        while block := handle.read(1 << 22):
            yield block


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _synced_digest(file: Path) -> str:
    with file.open('rb') as handle:
        os.fsync(handle.fileno())
    return _digest(file)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
