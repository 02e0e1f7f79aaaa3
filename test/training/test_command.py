"""The training command, from the simulator to a checkpoint that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip('mujoco')

from vla_policy_ros.policy import Policy
from vla_policy_ros.robot import load_robot
from vla_policy_ros.training.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
ROBOT = ROOT / 'config' / 'robots' / 'tabletop.yaml'


def train(monkeypatch: pytest.MonkeyPatch, run: Path, out: Path, *more: str) -> None:
    sizes = ['--preset', 'tiny', '--examples', '12', '--validation-examples', '6', '--scenes-per-step', '2']
    places = ['--robot', str(ROBOT), '--run', str(run), '--out', str(out), '--data', str(run.parent / 'examples')]
    monkeypatch.setattr('sys.argv', ['training', *places, *sizes, *more])
    main()


def test_command_trains_continues_and_starts_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    robot = load_robot(ROBOT)
    train(monkeypatch, tmp_path / 'run', tmp_path / 'out', '--steps', '3')
    first = Policy.load(tmp_path / 'out', robot)
    capsys.readouterr()
    train(monkeypatch, tmp_path / 'run', tmp_path / 'out', '--steps', '5')
    started = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"start"' in line]
    assert started[0]['step'] == 3, 'the second call goes on where the first one ended'
    second = Policy.load(tmp_path / 'out', robot)
    assert second.stats_hash == first.stats_hash and second.checkpoint_hash != first.checkpoint_hash
    train(monkeypatch, tmp_path / 'other', tmp_path / 'tuned', '--steps', '1', '--start-from', str(tmp_path / 'out'))
    assert Policy.load(tmp_path / 'tuned', robot).stats_hash == first.stats_hash
