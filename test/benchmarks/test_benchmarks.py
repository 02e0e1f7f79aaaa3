"""The score card and the latency sweep: what they claim, on a part of them that takes seconds."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SECONDS = 4.5


@pytest.fixture(scope='module', name='bench')
def _bench() -> Any:
    """The modules of benchmarks/ by name."""
    folder = str(Path(__file__).resolve().parents[2] / 'benchmarks')
    sys.path.insert(0, folder)
    try:
        names = ('fault_cases', 'harness', 'senders', 'measures', 'faults', 'latency_sweep')
        return type('Bench', (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(folder)


def fault_named(fault_cases: ModuleType, name: str) -> Any:
    return next(fault for fault in fault_cases.all_faults() if fault.name == name)


def test_our_sender_keeps_its_promises_on_the_card(bench: Any) -> None:
    card = bench.faults.score(['ours, replace'], ['none', 'NaN action', 'dead sender'], seeds=1)
    assert bench.faults.judge(card) == []
    assert card['ours, replace', 'dead sender'].time_to_rest > 0.1, 'it was moving when it died'
    assert not card['ours, replace', 'NaN action'].at_rest, 'it goes on when the fault has passed'


def test_the_naive_patterns_fail_on_the_same_card(bench: Any) -> None:
    card = bench.faults.score(list(bench.senders.NAIVE), ['none', 'NaN state'], seeds=1)
    stamped = card['single_point_now', 'none']
    assert stamped.rejected == stamped.sent > 0 and stamped.step == 0.0
    for sender in ('single_point_zero', 'whole_chunk', 'whole_chunk_ahead', 'step_queue'):
        assert card[sender, 'none'].rejected == 0
        assert card[sender, 'none'].step > 1.0 and card[sender, 'none'].acceleration > 10.0
        assert card[sender, 'NaN state'].non_finite > 0
    assert bench.faults.judge(card) == [], 'only our sender promises anything'


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        ({'rejected': 1}, 'rejected'),
        ({'non_finite': 1}, 'NaN'),
        ({'sent': 0}, 'nothing was sent'),
        ({'step': 1.01}, 'step'),
        ({'velocity': 1.01}, 'velocity'),
        ({'acceleration': 1.01}, 'acceleration'),
        ({'jerk': 1.01}, 'jerk'),
        ({'at_rest': False}, 'still moves'),
    ],
)
def test_a_broken_promise_is_named(bench: Any, change: dict[str, Any], word: str) -> None:
    good = bench.measures.Measures(9, 0, 0, 1.0, 1.0, 1.0, 1.0, 0.01, 1.0, 0.01, 1.5, True, '')
    cases = {('ours, replace', 'dead model'): good}
    assert bench.faults.judge(cases) == []
    broken = bench.faults.judge({key: replace(row, **change) for key, row in cases.items()})
    assert len(broken) == 1 and word in broken[0]


def test_every_fault_acts_and_lateness_doubles_and_order_do_not_move_our_arm(bench: Any) -> None:
    """A fault that changes nothing proves nothing: what our sender does not feel at all, another one does."""

    def commands(sender: str, fault: str) -> Any:
        return np.array(bench.senders.run(sender, fault_named(bench.fault_cases, fault), 100, 0, SECONDS).commands)

    before = bench.fault_cases.ON_NS // bench.harness.CONTROL_NS
    healthy = commands('ours, replace', 'none')
    unmoved = []
    for fault in bench.fault_cases.all_faults()[1:]:
        faulty = commands('ours, replace', fault.name)
        assert np.array_equal(faulty[:before], healthy[:before]), f'{fault.name} acts before its time'
        if np.allclose(faulty, healthy, rtol=0.0, atol=1e-6):
            unmoved.append(fault.name)
    assert unmoved == ['jittered commands', 'duplicated', 'reordered joints']
    naive = commands('step_queue', 'none')
    assert np.abs(commands('step_queue', 'jittered commands') - naive).max() > 1e-3
    assert np.abs(commands('step_queue', 'duplicated') - naive).max() > 1e-3


def test_reordered_joint_states_keep_each_value_with_its_name(bench: Any) -> None:
    fault = fault_named(bench.fault_cases, 'reordered joints')
    message = type('JointState', (), {'name': ['a', 'b'], 'position': [1.0, 2.0]})()
    states, rng = bench.fault_cases.Channel.STATES, np.random.default_rng(0)
    [(changed, _)] = fault.messages(states, message, bench.fault_cases.ON_NS, rng)
    assert (changed.name, changed.position) == (['b', 'a'], [2.0, 1.0])


def test_the_same_seed_gives_the_same_run(bench: Any) -> None:
    jitter = 'jittered commands'
    runs = [
        bench.senders.run('step_queue', fault_named(bench.fault_cases, jitter), 100, seed, SECONDS).commands for seed in (0, 0, 1)
    ]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_sweep_keeps_the_promised_seams_and_draws_them(bench: Any, tmp_path: Path) -> None:
    senders = ['ours, replace', 'ours, rtc_guided', 'ours, rtc_trained', 'whole_chunk_ahead']
    found = bench.latency_sweep.sweep(senders, [200], seeds=1)
    assert bench.latency_sweep.judge(found) == []
    key = ('whole_chunk_ahead', 200)
    smooth = {**found, key: replace(found[key], seam_jump=found['ours, rtc_guided', 200].seam_jump)}
    assert len(bench.latency_sweep.judge(smooth)) == 3, 'a tenth of the naive seam is what each is judged by'
    bench.latency_sweep.plot(found, tmp_path / 'sweep.png')
    assert 5_000 < (tmp_path / 'sweep.png').stat().st_size < 300_000


def test_known_actions_are_continued(bench: Any) -> None:
    """The synthetic policy honours real-time chunking: a trained one exactly, a guided one nearly."""
    machine, path = bench.harness.robot(), bench.harness.ReferencePath(0)
    pixels = np.frombuffer(bench.harness.image(2 * 10**9, 5 * 10**9).data, np.uint8).reshape(4, 4, 3)
    view = bench.senders.CameraView(pixels, None, 5 * 10**9)
    observation = bench.senders.Observation(5 * 10**9, {'front': view}, path(2 * 10**9), 5 * 10**9, '')
    free = bench.harness.Policy(machine, path, 0)(observation).actions
    known = bench.harness.KnownActions(free + 0.1, 6, 30)
    for guided in (False, True):
        continued = bench.harness.Policy(machine, path, 0, guided)(observation, known).actions - free
        np.testing.assert_allclose(continued[:6], 0.1)
        np.testing.assert_allclose(continued[30:], 0.0)
        assert np.all(np.diff(continued[5:], axis=0) <= 1e-12), 'the difference fades out'


@pytest.mark.parametrize(('script', 'option'), [('faults', ['--fault', 'none']), ('latency_sweep', ['--latency', '200'])])
def test_numbers_are_machine_readable(root: Path, script: str, option: list[str]) -> None:
    command = [sys.executable, f'benchmarks/{script}.py', '--json', '-', '--seeds', '1', '--sender', 'whole_chunk', *option]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    numbers = json.loads(answer.stdout)
    assert numbers['schema'] == f'vla_policy_ros/benchmarks/{script}' and numbers['version'] == 1
    [row] = numbers['rows']
    assert row['sender'] == 'whole_chunk' and row['step'] > 1.0 and numbers['broken_promises'] == []


def test_the_experts_are_measured_with_worse_and_worse_hands(root: Path) -> None:
    command = [sys.executable, 'benchmarks/experts.py', '--json', '-', '--task', 'reach', '--episodes', '3']
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    numbers = json.loads(answer.stdout)
    assert numbers['schema'] == 'vla_policy_ros/benchmarks/experts' and numbers['version'] == 1
    rows = numbers['rows']
    assert [(row['task'], row['hand_rad'], row['eye_m'], row['episodes']) for row in rows] == [
        ('reach', 0.0, 0.0, 3),
        ('reach', 0.01, 0.005, 3),
        ('reach', 0.015, 0.01, 3),
        ('reach', 0.02, 0.01, 3),
    ]
    assert rows[0]['success_rate'] == 1.0 and rows[0]['median_error_m'] < rows[-1]['median_error_m']


def test_the_page_shows_the_whole_card(bench: Any, root: Path) -> None:
    """Every sender, fault and column that the card has now stands in docs/robustness.md."""
    page = (root / 'docs' / 'robustness.md').read_text()
    rows = {tuple(cell.strip(' `') for cell in line.strip('|').split('|')) for line in page.splitlines() if line.startswith('|')}
    first = {row[0] for row in rows}
    assert ('fault', *bench.faults.COLUMNS.values()) in rows
    assert {fault.name for fault in bench.fault_cases.all_faults()} <= first
    assert set(bench.faults.SENDERS) <= first
    for name, unit, _ in bench.latency_sweep.FIGURES.values():
        shown = {row[1] for row in rows if row[0] == f'{name}, {unit}'}
        assert shown == {*bench.senders.OURS, *bench.senders.NAIVE}
    assert (root / 'docs' / 'latency_sweep.png').stat().st_size < 300_000
