"""`vla-policy evaluate`: the same command gives the same numbers; what cannot be evaluated is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip('mujoco')

from vla_policy_ros.cli import app
from vla_policy_ros.policy import new_checkpoint
from vla_policy_ros.policy.checkpoint import load_checkpoint, save_checkpoint
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import load_robot


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, but not a blank: a network that starts from nothing has zeros where its answer would depend on what it sees."""
    folder, robot = tmp_path_factory.mktemp('untrained'), load_robot(robot_path('tabletop'))
    new_checkpoint(robot, 'tiny', folder / 'blank', 0, 'float32')
    made = load_checkpoint(folder / 'blank', robot)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.3, generator=generator)
    save_checkpoint(folder / 'tiny', made.model, made.processor, made.signature)
    return folder / 'tiny'


def evaluate(checkpoint: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ['evaluate', '--checkpoint', str(checkpoint), '--seconds', '0.8', *arguments])


def numbers(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_same_command_gives_the_same_json_however_many_processes_share_it(checkpoint: Path) -> None:
    arguments = ('--tasks', 'reach,reach_any', '--variation', 'nominal', '--variation', 'camera=0.025', '--episodes', '3', '--rows')
    first, second, shared = (numbers(evaluate(checkpoint, *arguments, '--json', '-', *more)) for more in ((), (), ('--jobs', '2')))
    walls = [found.pop('wall_s') for found in (first, second, shared)]
    assert all(wall > 0.0 for wall in walls)
    assert first == second == shared
    reach = first['tasks']['reach']
    assert (first['schema'], first['version']) == ('vla_policy_ros/evaluation', 1)
    assert set(reach) >= {'success_rate', 'episodes', 'wilson95', 'median_error_m', 'p90_error_m', 'wrong_object_rate', 'failures'}
    assert reach['episodes'] == len(reach['rows']) == 3
    assert [row['seed'] for row in reach['rows']] == list(range(first['seeds']['first'], first['seeds']['last'] + 1))
    moved = reach['variations']['camera=0.025']
    assert [row['instruction'] for row in moved['rows']] == [row['instruction'] for row in reach['rows']]
    assert [row['error_m'] for row in moved['rows']] != [row['error_m'] for row in reach['rows']]
    assert len(first['checkpoint']['hash']) == 64 and len(first['checkpoint']['stats_hash']) == 64


def test_seeds_and_purposes_choose_other_scenes(checkpoint: Path) -> None:
    found = [
        numbers(evaluate(checkpoint, '--episodes', '1', '--rows', '--json', '-', *more))
        for more in ((), ('--seed', '1'), ('--choice',))
    ]
    assert len({run['seeds']['first'] for run in found}) == 3
    assert [run['seeds']['purpose'] for run in found] == ['test', 'test', 'choice']


def test_probes_are_written_down_and_change_what_the_policy_does(checkpoint: Path) -> None:
    def error(*more: str) -> tuple[dict[str, Any], float]:
        found = numbers(evaluate(checkpoint, '--episodes', '1', '--json', '-', *more))
        return found['settings']['probe'], found['tasks']['reach']['median_error_m']

    true, wrong, absent, false = error(), error('--wrong-k', '5'), error('--no-k'), error('--wrong-instruction')
    for told, name in ((wrong, 'focal_scale'), (absent, 'hide_k'), (false, 'wrong_instruction')):
        assert {key for key in told[0] if told[0][key] != true[0][key]} == {name}
    assert (true[0]['focal_scale'], wrong[0]['focal_scale']) == (1.0, 5.0)
    assert absent[0]['hide_k'] and false[0]['wrong_instruction']
    assert len({true[1], wrong[1], absent[1], false[1]}) == 4, (true, wrong, absent, false)


def test_failures_are_filmed_to_their_end(checkpoint: Path, tmp_path: Path) -> None:
    result = evaluate(
        checkpoint, '--episodes', '3', '--videos', str(tmp_path / 'v'), '--max-videos', '2', '--json', str(tmp_path / 'e')
    )
    assert result.exit_code == 0, result.output
    assert 'success' in result.stdout and 'timed out' in result.stdout
    failed = json.loads((tmp_path / 'e').read_text())['tasks']['reach']['failed_seeds']
    films = sorted((tmp_path / 'v').iterdir())
    assert [film.name.split('_')[2] for film in films] == [str(seed) for seed in failed[:2]]
    with av.open(str(films[0])) as container:
        frames = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
        assert container.streams.video[0].duration * container.streams.video[0].time_base > 0.8
    assert len(frames) == 9 + 2, 'one before the first action, one after each of 8, the verdict twice'
    assert (frames[0] != frames[8]).any()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--tasks', 'juggle'), "task 'juggle' is unknown; choose among reach"),
        (('--tasks', 'reach,reach'), 'each task once'),
        (('--variation', 'upside_down'), "unknown part 'upside_down'"),
        (('--tasks', 'reach_any', '--variation', 'shape_only'), 'reach_any'),
        (('--episodes', '0'), 'episodes is 0'),
        (('--tasks', 'pick'), 'needs a gripper'),
        (('--seed', '-1'), 'seed is -1'),
        (('--executed', '17'), 'has 16 actions'),
        (('--jobs', '0'), 'jobs is 0'),
        (('--wrong-k', '0'), 'makes no camera'),
        (('--solver', 'magic'), 'magic'),
        (('--steps', '0'), 'step'),
        (('--robot', 'g1_bottle'), 'robot'),
        (('--json', 'no/such/folder/e.json'), 'no folder'),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(checkpoint: Path, arguments: tuple[str, ...], words: str) -> None:
    result = evaluate(checkpoint, '--episodes', '1', *arguments)
    assert result.exit_code == 2 and words in result.stderr, (result.exit_code, result.output)
    assert 'Traceback' not in result.output and result.stdout == ''


def test_a_checkpoint_that_is_not_there_is_refused() -> None:
    result = evaluate(Path('no_such_checkpoint'))
    assert result.exit_code == 2 and 'no such folder' in result.stderr
