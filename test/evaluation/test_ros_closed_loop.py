"""`vla-policy evaluate --ros`: the real node and topics play the same episodes, and the numbers have the same names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip('mujoco')

from vla_policy_ros.cli import app
from vla_policy_ros.resources import checkpoint_path

COMMAND = [sys.executable, '-m', 'vla_policy_ros.cli', 'evaluate', '--ros', '--rows', '--json', '-']
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Without a domain, so that the evaluation looks for a free one."""
    return {name: value for name, value in os.environ.items() if name != 'ROS_DOMAIN_ID'}


def run(*arguments: str, patience: float = 200.0) -> tuple[int, str, str]:
    """Exit code and output of an evaluation over ROS. One that takes too long is ended so that it ends its own processes."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, errors = process.communicate()
    return process.returncode, output, errors


@pytest.mark.dds
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_episodes_over_ros_are_those_of_the_evaluation_in_process(tmp_path: Path) -> None:
    arguments = ['--episodes', '3', '--seed', '5', '--choice', '--variation', 'full_name+distinct_colours']
    code, output, errors = run(*arguments, '--pace', '--logs', str(tmp_path))
    assert code == 0, errors
    found: dict[str, Any] = json.loads(output)
    inside = CliRunner().invoke(app, ['evaluate', '--rows', '--json', '-', *arguments])
    same: dict[str, Any] = json.loads(inside.stdout)
    reach, expected = found['tasks']['reach'], same['tasks']['reach']
    assert reach.keys() == expected.keys() and found.keys() - {'ros', 'failure'} == same.keys() and found['failure'] == ''
    assert found['mode'] == 'ros' and found['checkpoint']['hash'] == same['checkpoint']['hash']
    assert [(row['seed'], row['instruction']) for row in reach['rows']] == [
        (row['seed'], row['instruction']) for row in expected['rows']
    ]
    ros = found['ros']
    assert ros['trajectories']['accepted'] >= ros['chunks'] > 0 and ros['trajectories']['rejected'] == 0
    assert ros['unexpected_stops'] == 0 and ros['max_command_step_ratio'] <= 1.0 + 1e-6
    assert 12.0 <= ros['simulated_s'] < 13.5 and 0.05 < ros['real_time_factor'] <= 1.1
    assert 0.3 * ros['replan_rate_hz'] < ros['chunk_rate_hz'] < 1.3 * ros['replan_rate_hz']
    # The arm went somewhere: each episode began anew, far from its goal, and most ended near it.
    assert sum(row['error_m'] < 0.1 for row in reach['rows']) >= 2, reach['rows']
    assert 'scene' in (tmp_path / 'simulator.log').read_text()


@pytest.mark.dds
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_checkpoint_that_does_not_fit_ends_it_with_the_reason_of_the_node(tmp_path: Path) -> None:
    code, output, errors = run('--checkpoint', str(tmp_path), '--episodes', '1', patience=100.0)
    assert (code, output) == (2, '')
    assert 'the policy node cannot work' in errors and 'Traceback' not in errors


@pytest.mark.dds
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize('what', ['interrupt', 'killed node'])
def test_an_early_end_reports_what_was_finished(tmp_path: Path, what: str) -> None:
    command = [*COMMAND, '--episodes', '50', '--seconds', '1', '--logs', str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / 'simulator.log', time.monotonic() + 120.0
    try:
        while not (log.is_file() and log.read_text().count(': scene ') >= 4):  # the first is not of an episode
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = _children(process.pid, 'vla_policy_ros.')
        victim = process.pid if what == 'interrupt' else _children(process.pid, 'vla_policy_ros.ros.policy_node')[0]
        os.kill(victim, signal.SIGINT if what == 'interrupt' else signal.SIGKILL)
    except BaseException:
        process.terminate()
        raise
    output, errors = process.communicate(timeout=60)
    found = json.loads(output)
    assert process.returncode == 1 and found['interrupted'] is True
    assert 2 <= found['tasks']['reach']['episodes'] < 50
    assert ('the policy was killed by signal 9' in errors) == ('killed by signal 9' in found['failure']) == (what != 'interrupt')
    assert len(children) == 2 and not any(Path(f'/proc/{child}').exists() for child in children), 'no process is left behind'


def _children(parent: int, module: str) -> list[int]:
    """Processes started by ``parent`` whose command line names ``module``."""
    found = []
    for process in Path('/proc').iterdir():
        try:
            fields = (process / 'stat').read_text().rpartition(')')[2].split()
            words = (process / 'cmdline').read_bytes().decode(errors='replace')
        except (OSError, NotADirectoryError):
            continue
        if int(fields[1]) == parent and module in words and fields[0] != 'Z':
            found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [(['--wrong-k', '1.3'], '--wrong-k'), (['--no-k'], '--no-k'), (['--videos', 'v'], '--videos'), (['--jobs', '2'], '--jobs')],
)
def test_what_only_one_process_can_do_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ['evaluate', '--ros', '--checkpoint', str(checkpoint_path('tabletop')), *arguments])
    assert result.exit_code == 2 and words in result.stderr and 'cannot be had over ROS' in result.stderr
