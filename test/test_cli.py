"""The command line: each command opens the door to its room, and mistakes end in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla_policy_ros import __version__
from vla_policy_ros.policy.checkpoint import load_checkpoint
from vla_policy_ros.robot import load_robot

ROOT = Path(__file__).resolve().parents[1]


def vla_policy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'vla_policy_ros.cli', *arguments],
        cwd=ROOT,
        env=os.environ | {'COLUMNS': '160'},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_version() -> None:
    result = vla_policy('--version')
    assert (result.returncode, result.stdout.strip()) == (0, f'vla_policy_ros {__version__}')


def test_help_lists_the_commands() -> None:
    result = vla_policy('--help')
    assert result.returncode == 0
    assert all(command in result.stdout for command in ('demo', 'new', 'check', 'lint', 'train', 'evaluate'))


@pytest.mark.parametrize('robot', ['tabletop', 'g1_bottle', str(ROOT / 'config' / 'robots' / 'g1_bottle.yaml')])
def test_check_prints_what_a_robot_file_resolves_to(robot: str) -> None:
    result = vla_policy('check', robot)
    resolved = load_robot(ROOT / 'config' / 'robots' / f'{Path(robot).stem}.yaml')
    assert result.returncode == 0
    assert 'valid' in result.stdout
    assert all(joint in result.stdout for joint in resolved.action.joints)
    folded = ''.join(result.stdout.replace('│', ' ').split())
    assert all(camera.topic.split('/')[1] in folded for camera in resolved.cameras.values())


def test_check_lists_every_problem(tmp_path: Path) -> None:
    path = tmp_path / 'bad.yaml'
    path.write_text('name: bad\ncamera: {}\n')
    result = vla_policy('check', str(path))
    assert result.returncode == 2
    assert "did you mean 'cameras'?" in result.stderr and 'action: is required' in result.stderr
    assert 'Traceback' not in result.stderr


def test_an_unknown_robot_names_the_shipped_ones() -> None:
    result = vla_policy('check', 'g1_bottl')
    assert result.returncode == 2
    assert 'g1_bottle, tabletop' in result.stderr


def test_new_makes_a_checkpoint_that_fits_the_robot(tmp_path: Path) -> None:
    result = vla_policy('new', '--robot', 'g1_bottle', '--preset', 'tiny', '--out', str(tmp_path / 'checkpoint'))
    assert result.returncode == 0, result.stderr
    robot = load_robot(ROOT / 'config' / 'robots' / 'g1_bottle.yaml')
    assert load_checkpoint(tmp_path / 'checkpoint', robot).signature.action_joints == list(robot.action.joints)


def test_new_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / 'precious').write_text('x')
    result = vla_policy('new', '--robot', 'tabletop', '--out', str(tmp_path))
    assert result.returncode == 2
    assert 'is not empty' in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['precious']


def test_new_refuses_an_unknown_preset(tmp_path: Path) -> None:
    result = vla_policy('new', '--robot', 'tabletop', '--preset', 'huge', '--out', str(tmp_path / 'c'))
    assert result.returncode == 2
    assert 'huge' in result.stderr and 'tiny' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(('option', 'words'), [('--robot', "robot file 'nothing'"), ('--checkpoint', "checkpoint 'nothing'")])
def test_demo_refuses_what_does_not_exist(tmp_path: Path, option: str, words: str) -> None:
    result = vla_policy('demo', '--out', str(tmp_path / 'out'), option, 'nothing')
    assert result.returncode == 2
    assert words in result.stderr
    assert not (tmp_path / 'out').exists()


def test_lint_refuses_a_bag_that_does_not_exist(tmp_path: Path) -> None:
    result = vla_policy('lint', str(tmp_path / 'absent'))
    assert (result.returncode, result.stdout) == (2, '')
    assert 'absent does not exist; give the folder of a rosbag2 bag' in result.stderr
    assert 'Traceback' not in result.stderr


def test_a_training_file_with_a_misspelt_key_is_refused_before_anything_begins(tmp_path: Path) -> None:
    file = tmp_path / 'a.yaml'
    file.write_text('robot: tabletop\npreset: tiny\ndata: {source: tabletop, exampels: 3}\nrun: a\nout: b\n')
    result = vla_policy('train', str(file), '--set', 'optimisation.step=3')
    assert (result.returncode, result.stdout) == (2, '')
    assert "data.tabletop.exampels: 'exampels' is not a key here; did you mean 'examples'?" in result.stderr
    assert "optimisation.step: 'step' is not a key here; did you mean 'steps'?" in result.stderr
    assert 'Traceback' not in result.stderr
