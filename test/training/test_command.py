"""The training command, from the simulator to a checkpoint that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip('mujoco')

from squares import ROOT, settings, tabletop_robot
from typer.testing import CliRunner

from vla_policy_ros.cli import app
from vla_policy_ros.policy import Policy
from vla_policy_ros.robot import load_robot

DATA = {'source': 'tabletop', 'examples': 12, 'validation_examples': 6}


def train(folder: Path, *changes: str, **sections: Any) -> tuple[int, str]:
    """Exit code and output of the command with a small training file."""
    made = settings(folder, **sections)
    made['data'] = {**DATA, 'folder': str(folder / 'examples')}
    file = folder / 'training.yaml'
    file.write_text(yaml.safe_dump(made))
    arguments = [argument for change in changes for argument in ('--set', change)]
    result = CliRunner().invoke(app, ['train', str(file), *arguments], env={'COLUMNS': '200'})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_command_trains_continues_and_starts_from_a_checkpoint(tmp_path: Path) -> None:
    robot, out = tabletop_robot(), tmp_path / 'out'
    few = 'optimisation.scenes_per_step=2'
    assert train(tmp_path, few, 'optimisation.steps=3')[0] == 0
    first = Policy.load(out, robot)
    code, text = train(tmp_path, few, 'optimisation.steps=5')
    assert code == 0 and 'start  step 3' in text, 'the second call goes on where the first one ended'
    second = Policy.load(out, robot)
    assert second.stats_hash == first.stats_hash and second.checkpoint_hash != first.checkpoint_hash
    record = json.loads((out / 'training.json').read_text())
    assert record['step'] == 5 and record['config']['optimisation']['steps'] == 5
    assert record['validation']['ratio'] > 0 and record['baselines']['zero_velocity'] > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['examples', 'out', 'run', 'training.yaml'], 'nothing is left over'

    more = ('preset=null', f'start_from={out}', 'keep_statistics=true', f'run={tmp_path / "r"}', f'out={tmp_path / "tuned"}')
    assert train(tmp_path, few, 'optimisation.steps=1', *more)[0] == 0
    assert Policy.load(tmp_path / 'tuned', robot).stats_hash == first.stats_hash


def test_a_folder_that_the_run_has_not_written_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'precious.txt').write_text('x')
    code, text = train(tmp_path)
    assert code == 2 and 'out is not empty and was not written by this run; give a new folder' in text
    assert [path.name for path in out.iterdir()] == ['precious.txt'] and not (tmp_path / 'examples').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('preset=llava3d-7b', 'starts from public weights: build its base checkpoint with `vla-policy convert`'),
        ('preset=tinny', "preset 'tinny' is unknown; choose one of tiny, tabletop"),
        ('robot=no_such', "robot file 'no_such': no such file"),
        ('network={expert_config: {num_layer: 1}}', "expert_config has no field 'num_layer'"),
        ('optimisation.steps', "change 'optimisation.steps' is not of the form key=value"),
        ('optimisation.steps.x=3', "change 'optimisation.steps.x=3': 'steps' is a value, not a section"),
        ('optimisation.learning_rate=-1', 'optimisation.learning_rate: Input should be greater than 0 (got -1)'),
        ('start_from=nowhere', "checkpoint 'nowhere': no such folder, and no shipped checkpoint of that name"),
    ],
)
def test_a_training_file_that_cannot_work_is_refused_in_one_sentence(tmp_path: Path, change: str, message: str) -> None:
    code, text = train(tmp_path, change)
    assert code == 2 and message in text, text
    assert not (tmp_path / 'out').exists()


def test_another_robot_starts_from_what_this_one_has_learnt(tmp_path: Path) -> None:
    assert train(tmp_path, 'optimisation.scenes_per_step=2', 'optimisation.steps=2')[0] == 0
    folders = (f'run={tmp_path / "gripper"}', f'out={tmp_path / "gripper_out"}')
    taken = (f'transfer_from={tmp_path / "out"}', 'robot=tabletop_gripper', 'optimisation.steps=1')
    code, text = train(tmp_path, 'optimisation.scenes_per_step=2', *taken, *folders)
    assert code == 0, text
    policy = Policy.load(tmp_path / 'gripper_out', load_robot(ROOT / 'config' / 'robots' / 'tabletop_gripper.yaml'))
    record = json.loads((tmp_path / 'gripper_out' / 'training.json').read_text())
    assert record['config']['transfer_from'] == str(tmp_path / 'out') and policy.checkpoint_hash
