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


@pytest.mark.dds
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_episodes_over_ros_are_those_of_the_evaluation_in_process(tmp_path: Path) -> None:
    arguments = ['--episodes', '3', '--seed', '5', '--choice', '--variation', 'full_name+distinct_colours']
    run = subprocess.run(
        [*COMMAND, *arguments, '--logs', str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    inside = CliRunner().invoke(app, ['evaluate', '--rows', '--json', '-', *arguments])
    same: dict[str, Any] = json.loads(inside.stdout)
    reach, expected = found['tasks']['reach'], same['tasks']['reach']
    assert reach.keys() == expected.keys() and found.keys() - {'ros'} == same.keys()
    assert found['mode'] == 'ros' and found['checkpoint']['hash'] == same['checkpoint']['hash']
    assert [(row['seed'], row['instruction']) for row in reach['rows']] == [
        (row['seed'], row['instruction']) for row in expected['rows']
    ]
    ros = found['ros']
    assert ros['trajectories']['accepted'] >= ros['chunks'] > 0 and ros['trajectories']['rejected'] == 0
    assert ros['unexpected_stops'] == 0 and ros['max_command_step_ratio'] <= 1.0 + 1e-6
    assert 12.0 <= ros['simulated_s'] < 13.5 and 0.2 < ros['real_time_factor'] <= 1.1
    assert 0.3 * ros['replan_rate_hz'] < ros['chunk_rate_hz'] < 1.3 * ros['replan_rate_hz']
    # The arm went somewhere: each episode began anew, far from its goal, and most ended near it.
    assert sum(row['error_m'] < 0.1 for row in reach['rows']) >= 2, reach['rows']
    assert 'scene' in (tmp_path / 'simulator.log').read_text()


@pytest.mark.dds
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_checkpoint_that_does_not_fit_ends_it_with_the_reason_of_the_node(tmp_path: Path) -> None:
    run = subprocess.run(
        [*COMMAND, '--checkpoint', str(tmp_path), '--episodes', '1'], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (2, '')
    assert 'the policy node cannot work' in run.stderr and 'Traceback' not in run.stderr


@pytest.mark.dds
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_interrupt_reports_what_was_finished(tmp_path: Path) -> None:
    command = [*COMMAND, '--episodes', '50', '--seconds', '1', '--logs', str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    log, deadline = tmp_path / 'simulator.log', time.monotonic() + 90.0
    while not (log.is_file() and log.read_text().count(': scene ') >= 4):  # the first is not of an episode
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    found = json.loads(output)
    assert process.returncode == 1 and found['interrupted'] is True
    assert 2 <= found['tasks']['reach']['episodes'] < 50


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [(['--wrong-k', '1.3'], '--wrong-k'), (['--no-k'], '--no-k'), (['--videos', 'v'], '--videos'), (['--jobs', '2'], '--jobs')],
)
def test_what_only_one_process_can_do_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ['evaluate', '--ros', '--checkpoint', str(checkpoint_path('tabletop')), *arguments])
    assert result.exit_code == 2 and words in result.stderr and 'cannot be had over ROS' in result.stderr
