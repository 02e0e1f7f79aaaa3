"""A training process that is killed at any moment continues bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from squares import ROOT, example_set, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 24
SECTIONS = {
    'optimisation': {'steps': STEPS, 'scenes_per_step': 4, 'repeats': 2, 'gradient_accumulation': 2},
    'logging': {'log_every': 10, 'validate_every': 7, 'state_every': 2, 'checkpoint_every': 10, 'tensorboard': True},
    'lora': {'rank': 4, 'dropout': 0.1},
}
"""Dropout draws inside the network: its draws, too, must not depend on where a run was interrupted."""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The command on a training file whose run is in ``folder``."""
    file = folder / 'training.yaml'
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(settings(folder, folder.parent / 'examples.safetensors', **SECTIONS)))
    command = [sys.executable, '-m', 'vla_policy_ros.cli', 'train', str(file)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'}
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, output
    return output


def states(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / 'run' / 'state').glob('step_*') if path.suffix != '.part')


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    example_set(12).save(tmp_path / 'examples.safetensors')
    whole = start(tmp_path / 'whole')
    process, deadline = start(tmp_path / 'killed'), time.monotonic() + 100
    while len(states(tmp_path / 'killed')) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = int(states(tmp_path / 'killed')[-1].name[5:])
    assert 0 < killed_at < STEPS, 'it was killed on the way'
    # What a kill in the middle of writing leaves is no state, and in nobody's way.
    half = tmp_path / 'killed' / 'run' / 'state' / f'step_{killed_at + 2:08d}.part'
    half.mkdir(exist_ok=True)
    (half / 'part_000.safetensors').write_bytes(b'half')
    assert f'start  step {killed_at}  ' in finish(start(tmp_path / 'killed'))
    finish(whole)

    mine, theirs = tmp_path / 'killed', tmp_path / 'whole'
    assert [path.name for path in states(mine)] == [f'step_{STEPS - 2:08d}', f'step_{STEPS:08d}']
    for name in (f'run/state/step_{STEPS:08d}/part_000.safetensors', 'out/model.safetensors', 'out/config.json'):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
    assert sorted(path.name for path in mine.iterdir()) == ['out', 'run', 'training.yaml'], 'no half-written checkpoint is left'
