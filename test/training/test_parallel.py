"""Two processes, as copies and as shards, train as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from squares import example_set, rows
from two_processes import LARGE, MUON, SHARED, TOWERS, train

from vla_policy_ros.training.dataset import ExampleSet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope='module')
def data() -> ExampleSet:
    return example_set(24)


@pytest.fixture(scope='module')
def runs(data: ExampleSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of two processes, and of one."""
    folder = tmp_path_factory.mktemp('runs')
    data.save(folder / 'examples.safetensors')
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        '2',
        str(HERE / 'two_processes.py'),
    ]
    done = subprocess.run(
        [*command, str(folder / 'examples.safetensors'), str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    train(data, folder / 'one')
    train(data, folder / 'one_large', **LARGE)
    train(data, folder / 'one_shared', **SHARED)
    train(data, folder / 'one_muon', **MUON)
    train(data, folder / 'one_towers', **TOWERS)
    return folder


def losses(folder: Path) -> np.ndarray:
    """``[steps, 3]``: flow loss, grounding loss and gradient norm of every step."""
    return np.array([[row['flow'], row['grounding'], row['grad_norm']] for row in rows(folder, 'train')])


def state(folder: Path, name: str = 'step_00000006') -> dict[str, torch.Tensor]:
    """All tensors of a saved state, its parts joined."""
    parts = [load_file(file) for file in sorted((folder / 'state' / name).glob('*.safetensors'))]
    return {key: torch.cat([part[key] for part in parts]) if parts[0][key].dim() else parts[0][key] for key in parts[0]}


@pytest.mark.parametrize('kind', ['copies', 'sharded'])
def test_two_processes_have_the_losses_of_one(runs: Path, kind: str) -> None:
    assert len(losses(runs / 'one')) == 6
    np.testing.assert_allclose(losses(runs / kind)[:, :2], losses(runs / 'one')[:, :2], atol=1e-5, rtol=0)
    np.testing.assert_allclose(losses(runs / kind)[:, 2], losses(runs / 'one')[:, 2], rtol=1e-4)
    for mine, theirs in zip(rows(runs / kind, 'validation'), rows(runs / 'one', 'validation'), strict=True):
        assert mine['flow'] == pytest.approx(theirs['flow'], abs=1e-5)
        assert mine['action_error'] == pytest.approx(theirs['action_error'], abs=1e-5)


def test_layers_that_run_twice_in_a_step_are_sharded_too(runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / 'shared')[:, :2], losses(runs / 'one_shared')[:, :2], atol=1e-5, rtol=0)
    np.testing.assert_allclose(losses(runs / 'shared')[:, 2], losses(runs / 'one_shared')[:, 2], rtol=1e-4)


def test_two_processes_that_share_the_work_of_muon_have_the_momenta_of_one(runs: Path) -> None:
    """Weights are not compared: where a gradient is next to nothing, Muon makes its rounding as long as all else."""
    mine, theirs = state(runs / 'muon'), state(runs / 'one_muon')
    momenta = [name for name in theirs if name.startswith('momentum_buffer/')]
    assert mine.keys() == theirs.keys() and len(momenta) > 10
    for name in momenta:
        largest = float(theirs[name].abs().max())
        assert largest > 0
        torch.testing.assert_close(mine[name], theirs[name], atol=0.1 * largest, rtol=0, msg=name)
    np.testing.assert_allclose(losses(runs / 'muon')[:, :2], losses(runs / 'one_muon')[:, :2], atol=1e-3, rtol=0)


def test_an_interrupted_run_of_two_processes_with_muon_continues_bit_for_bit_and_also_in_one(runs: Path, data: ExampleSet) -> None:
    whole, continued = state(runs / 'muon'), state(runs / 'muon_continued')
    assert all(torch.equal(continued[name], tensor) for name, tensor in whole.items())
    assert train(data, runs / 'muon_moved', **MUON), 'its state was written by two processes'
    np.testing.assert_allclose(losses(runs / 'muon_moved')[:, :2], losses(runs / 'one_muon')[:, :2], atol=1e-3, rtol=0)


def test_two_processes_learn_to_see_as_one_does_where_nothing_acts(runs: Path) -> None:
    mine, theirs = ([row['perception'] for row in rows(runs / name, 'train')] for name in ('towers', 'one_towers'))
    assert len(theirs) == 6 and theirs[-1] < 0.8 * theirs[0]
    np.testing.assert_allclose(mine, theirs, rtol=1e-3)
    one, both = state(runs / 'one_towers'), state(runs / 'towers')
    still = [name for name in one if name.startswith('momentum_buffer/') and 'language_model' in name]
    assert still and not any(float(both[name].abs().max()) for name in still)


def test_two_processes_have_the_gradients_of_one(runs: Path) -> None:
    """As the optimiser has averaged them. Weights themselves may differ where the true gradient is 0 (the bias under a softmax)."""
    one, sharded = state(runs / 'one'), state(runs / 'sharded')
    assert one.keys() == sharded.keys()
    moments = [name for name in one if name.startswith('exp_avg/')]
    assert len(moments) > 50
    for name in moments:
        torch.testing.assert_close(sharded[name], one[name], atol=1e-4, rtol=1e-3, msg=name)


def test_each_process_keeps_half(runs: Path) -> None:
    sizes = [file.stat().st_size for file in sorted((runs / 'sharded' / 'state' / 'step_00000006').glob('*.safetensors'))]
    whole = (runs / 'one' / 'state' / 'step_00000006' / 'part_000.safetensors').stat().st_size
    assert len(sizes) == 2 and max(sizes) < 0.6 * whole


def test_a_sharded_run_that_was_interrupted_continues_bit_for_bit(runs: Path) -> None:
    whole, continued = state(runs / 'sharded'), state(runs / 'continued')
    assert all(torch.equal(continued[name], tensor) for name, tensor in whole.items())


def test_a_state_of_two_processes_continues_in_one(runs: Path, data: ExampleSet) -> None:
    assert train(data, runs / 'moved'), 'its state was written by two processes'
    np.testing.assert_allclose(losses(runs / 'moved')[:, :2], losses(runs / 'one')[:, :2], atol=1e-5, rtol=0)


def test_adapters_on_sharded_bfloat16_weights_learn_as_in_one_process(runs: Path) -> None:
    mine, theirs = losses(runs / 'large'), losses(runs / 'one_large')
    np.testing.assert_allclose(mine[:, :2], theirs[:, :2], rtol=0.02)
    assert any('.lora_A.' in name for name in state(runs / 'large'))
    assert not any('vision_tower' in name or '.base_layer.' in name for name in state(runs / 'large')), 'only what is trained'
