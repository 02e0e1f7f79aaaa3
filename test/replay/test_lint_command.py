"""`vla-policy lint` on bags: the exit code says it all, the text says why, and no bag, however broken, ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bag_writing import COMMAND, arm_bag, joint_state, move, point, trajectory, write_bag
from replay_bags import broken
from typer.testing import CliRunner, Result

from vla_policy_ros.cli import app


def lint(*arguments: object) -> Result:
    return CliRunner().invoke(app, ['lint', *(str(argument) for argument in arguments)])


def step_bag(path: Path) -> Path:
    entries = [('/joint_states', 0.0, joint_state([0.0, 0.0])), (COMMAND, 0.1, trajectory([point(0.0, [1.0, 1.0])]))]
    return write_bag(path, entries)


@pytest.mark.parametrize('sqlite', [False, True])
def test_a_smooth_bag_ends_with_0(tmp_path: Path, sqlite: bool) -> None:
    result = lint(arm_bag(tmp_path / 'bag', sqlite=sqlite), '--velocity', '2')
    assert result.exit_code == 0, result.output
    assert f'{COMMAND}: 10 messages, 10 accepted, 0 rejected (2 joints, 100 Hz' in result.output
    assert 'nothing found in 10 messages' in result.output


def test_a_step_ends_with_1_and_is_explained(tmp_path: Path) -> None:
    result = lint(step_bag(tmp_path / 'bag'), '--velocity', '2')
    assert result.exit_code == 1
    assert 'a moves 1.0000 in 10 ms (limit 2 per second allows 0.0200)' in result.output
    assert 'leaves no time to reach point 0' in result.output


def test_rate_limit_and_parameters_are_the_operators(tmp_path: Path) -> None:
    bag = arm_bag(tmp_path / 'bag')
    assert lint(bag, '--velocity', '0.1').exit_code == 1
    assert '250 Hz' in lint(bag, '--update-rate', '250').output
    rejected = lint(bag, '--param', 'joints=a,b,c')
    assert rejected.exit_code == 1 and 'JOINT_COUNT, 10 of 10 messages: rejected' in rejected.output
    assert lint(bag, '--param', 'joints=a,b,c', '--param', 'allow_partial_joints_goal=true', '--topic', COMMAND).exit_code == 0


def test_the_report_as_json_alone_or_beside_the_text(tmp_path: Path) -> None:
    bag = step_bag(tmp_path / 'bag')
    alone = lint(bag, '--velocity', '2', '--json', '-')
    report = json.loads(alone.stdout)
    assert alone.exit_code == 1 and report['version'] == 1 and report['distro'] == 'jazzy' and report['clean'] is False
    topic = report['topics'][0]
    assert {finding['rule'] for finding in topic['findings']} >= {'STEP_TO_FIRST_POINT', 'STEP'}
    assert topic['peaks']['a']['step'] == pytest.approx(1.0)
    beside = lint(bag, '--velocity', '2', '--json', tmp_path / 'report.json')
    assert 'STEP' in beside.stdout and json.loads((tmp_path / 'report.json').read_text()) == report


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--topic', '/arm_controler/joint_trajectory'], f'did you mean {COMMAND}'),
        (['--topic', '/joint_states'], 'not trajectory_msgs/msg/JointTrajectory'),
        (['--robot', 'tabletop'], 'no command topic of the robot'),
        (['--robot', 'tabletpo'], 'shipped: '),
        (['--param', 'cmd_timout=1'], 'did you mean cmd_timeout'),
        (['--velocity', '0'], '--velocity must be above 0'),
        (['--profile', 'noetic'], 'humble'),
    ],
)
def test_what_cannot_begin_ends_with_2_and_a_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = lint(arm_bag(tmp_path / 'bag', 2), *arguments)
    assert result.exit_code == 2
    assert words in result.stderr and result.stdout == ''


def test_without_bag_and_topic_it_asks_for_one() -> None:
    result = lint()
    assert result.exit_code == 2 and 'give a bag, or the command topic' in result.stderr


def test_two_controllers_are_judged_apart(tmp_path: Path) -> None:
    hand = trajectory([point(0.2, [1.0], [0.0]), point(0.3, [1.0], [0.0])], ['finger'])
    bag = write_bag(tmp_path / 'bag', [(COMMAND, 0.0, move(0.1)), ('/hand/joint_trajectory', 0.1, hand)])
    result = lint(bag, '--json', '-')
    assert [topic['joints'] for topic in json.loads(result.stdout)['topics']] == [['a', 'b'], ['finger']]
    assert result.exit_code == 0


@pytest.mark.parametrize('options', [{}, {'compressed': True}, {'sqlite': True}], ids=['mcap', 'mcap-zstd', 'sqlite'])
def test_a_broken_bag_ends_in_a_verdict_or_a_sentence_and_never_in_a_traceback(tmp_path: Path, options: dict[str, bool]) -> None:
    source = arm_bag(tmp_path / 'source', 8, **options)
    codes = set()
    for seed in range(24):
        result = lint(broken(tmp_path / f'bag{seed}', source, seed), '--velocity', '2')
        assert result.exception is None or isinstance(result.exception, SystemExit), (seed, result.exception)
        assert result.exit_code in (0, 1, 2), seed
        told = result.stderr if result.exit_code == 2 else result.stdout
        assert told.strip(), seed
        codes.add(result.exit_code)
    assert len(codes) > 1, 'the damage never mattered, or nothing was ever readable'
