"""`vla-policy replay`: reports that are there as a whole or not at all, and for every bag, however broken, a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from episode_recordings import BEGIN, ROBOT, ROBOT_TEXT, entries, record
from replay_bags import broken
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from typer.testing import CliRunner, Result

from vla_policy_ros.cli import app
from vla_policy_ros.policy.checkpoint import new_checkpoint
from vla_policy_ros.replay import figures
from vla_policy_ros.replay.command import PAGE, REPORT, Policies, ReplayOptions, replay_one
from vla_policy_ros.replay.gate import Gate
from vla_policy_ros.resources import message_path
from vla_policy_ros.types import ActionChunk


@pytest.fixture(scope='module')
def setting(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp('replay')
    robot = folder / 'toy.yaml'
    robot.write_text(ROBOT_TEXT)
    return SimpleNamespace(
        robot=robot, checkpoint=new_checkpoint(ROBOT, 'tiny', folder / 'tiny', seed=1), bag=record(folder / 'bag', entries(15))
    )


def call(setting: SimpleNamespace, out: Path, *arguments: object, bags: list[Path] | None = None) -> Result:
    names = [str(bag) for bag in (bags or [setting.bag])]
    fixed = ['--robot', str(setting.robot), '--checkpoint', str(setting.checkpoint), '--out', str(out)]
    result = CliRunner().invoke(app, ['replay', *names, *fixed, *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_report_is_made_once_and_says_everything(setting: SimpleNamespace, tmp_path: Path) -> None:
    first = call(setting, tmp_path, '--second', setting.checkpoint, '--fail-if', 'mae > 10', '--fail-if', 'rejected > 1000')
    assert first.exit_code == 0, first.stderr
    folder = tmp_path / 'bag'
    report = json.loads((folder / REPORT).read_text())
    assert (report['schema'], report['version']) == ('vla_policy_ros/replay', 1)
    assert report['ground_truth'] == 'commands on /arm/joint_trajectory'
    assert report['metrics']['demands']['chunks'] > 3 and report['metrics']['accuracy']['errors']['hold']['mae'] > 0
    assert report['comparison']['paired']['mae_difference'] == pytest.approx(0.0), 'the same checkpoint, the same noise'
    assert any('looks made up' in note for note in report['bag']['notes'])
    assert set(report['timing']['stages_ms']) >= {'decode', 'prefix', 'denoise', 'plan'}
    again = call(setting, tmp_path, '--second', setting.checkpoint, '--fail-if', 'mae > 10', '--fail-if', 'rejected > 1000')
    assert again.exit_code == 0 and 'done before' in again.stderr
    changed = call(setting, tmp_path, '--latency', '100')
    assert changed.exit_code == 0 and 'done before' not in changed.stderr
    assert json.loads((folder / REPORT).read_text())['settings']['latency'] == '100 ms'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bag'], 'nothing half-written is left'


def test_the_same_question_gives_the_same_bytes(setting: SimpleNamespace, tmp_path: Path) -> None:
    texts = []
    for name in ('a', 'b'):
        assert call(setting, tmp_path / name, '--seed', 3).exit_code == 0
        texts.append(json.dumps(json.loads((tmp_path / name / 'bag' / REPORT).read_text())['metrics']))
    assert texts[0] == texts[1]


def test_the_page_needs_nothing_else(setting: SimpleNamespace, tmp_path: Path) -> None:
    assert call(setting, tmp_path).exit_code == 0
    page = (tmp_path / 'bag' / PAGE).read_text()
    assert page.startswith('<!DOCTYPE html>') and page.count('<svg') == 4 and 'data:image/jpeg;base64,' in page
    outside = [part for part in page.split('"') if part.startswith(('http:', 'https:', '//'))]
    formats = ('www.w3.org', 'purl.org', 'creativecommons.org')
    assert all(any(name in part for name in formats) for part in outside), 'names of formats only'
    assert '<script' not in page and 'nan' not in page.lower().replace('nano', '')


def test_the_annotated_bag_is_on_the_clock_of_the_recording(setting: SimpleNamespace, tmp_path: Path) -> None:
    assert call(setting, tmp_path).exit_code == 0
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg(message_path('ActionChunk').read_text(), 'vla_policy_msgs/msg/ActionChunk'))
    chunks, counts = [], {}
    with AnyReader([tmp_path / 'bag' / 'annotated'], default_typestore=store) as reader:
        for connection, time_ns, data in reader.messages():
            counts[connection.topic] = counts.get(connection.topic, 0) + 1
            if connection.topic.endswith('chunk'):
                chunks.append((time_ns, reader.deserialize(data, connection.msgtype)))
    report = json.loads((tmp_path / 'bag' / REPORT).read_text())['metrics']
    assert len(chunks) == report['demands']['chunks'] and counts['/policy_node/state'] == len(report['health']['changes'])
    time_ns, chunk = chunks[0]
    assert BEGIN < time_ns / 1e9 < BEGIN + 2 and chunk.actions.shape == (8,) and chunk.instruction == 'pick up the cup'
    assert list(chunk.input_names) == ['camera:top', 'state']


def test_topics_of_other_names_are_remapped(setting: SimpleNamespace, tmp_path: Path) -> None:
    renamed = tmp_path / 'renamed'
    record(renamed, [(topic.replace('/top', '/cam0'), at, message) for topic, at, message in entries(15)])
    refused = call(setting, tmp_path / 'out', bags=[renamed])
    assert refused.exit_code == 2 and '/cam0' in refused.stderr, 'what the bag has is listed'
    rules = ['--remap', '/cam0:=/top', '--remap', '/cam0/info:=/top/info']
    done = call(setting, tmp_path / 'out', *rules, bags=[renamed])
    assert done.exit_code == 0, done.stderr
    assert call(setting, tmp_path / 'out').exit_code == 0
    found = [json.loads((tmp_path / 'out' / name / REPORT).read_text())['metrics'] for name in ('bag', 'renamed')]
    assert found[0]['accuracy'] == found[1]['accuracy'] and found[0]['demands'] == found[1]['demands']
    assert '/cam0' in json.dumps(found[1]['health']), 'reasons name the topics of the bag'


@pytest.mark.parametrize(('rule', 'words'), [('/cam0', 'not of the form'), ('/cam0:=/tip', 'no topic /tip; it has /arm')])
def test_a_rule_that_means_nothing_is_refused(setting: SimpleNamespace, tmp_path: Path, rule: str, words: str) -> None:
    refused = call(setting, tmp_path / 'out', '--remap', rule)
    assert refused.exit_code == 2 and words in refused.stderr and not (tmp_path / 'out').exists()


def test_a_gate_that_does_not_hold_ends_with_1(setting: SimpleNamespace, tmp_path: Path) -> None:
    failed = call(setting, tmp_path, '--fail-if', 'chunks > 3', '--fail-if', 'mae < 0')
    assert failed.exit_code == 1 and 'fails: chunks is' in failed.stderr and 'mae' not in failed.stderr
    assert (tmp_path / 'bag' / REPORT).is_file(), 'the report is there all the same'


@pytest.mark.parametrize(
    ('condition', 'words'),
    [('rmze > 1', "did you mean 'rmse'"), ('mae', 'not of the form'), ('mae > high', "'high' is not a number")],
)
def test_a_condition_that_means_nothing_is_refused_before_anything_runs(
    setting: SimpleNamespace, tmp_path: Path, condition: str, words: str
) -> None:
    refused = call(setting, tmp_path / 'out', '--fail-if', condition)
    assert refused.exit_code == 2 and words in refused.stderr and not (tmp_path / 'out').exists()


def test_a_number_that_is_not_known_fails() -> None:
    unknown = {'metrics': {'accuracy': None, 'continuity': {'aligned_error': None}, 'demands': {'rejected': {'EXPIRED': 2}}}}
    assert all('not known' in str(Gate.parse(text).failure(unknown)) for text in ('mae > 1', 'aligned_mae>1'))
    assert Gate.parse('rejected >= 2').failure(unknown) and not Gate.parse('rejected > 2').failure(unknown)


def test_several_bags_and_one_that_is_of_another_robot(setting: SimpleNamespace, tmp_path: Path) -> None:
    other = [(topic.replace('/joint_states', '/joint_state'), at, message) for topic, at, message in entries(8)]
    bags = [setting.bag, record(tmp_path / 'other', other), record(tmp_path / 'third', entries(8))]
    result = call(setting, tmp_path / 'out', '--jobs', 2, bags=bags)
    assert result.exit_code == 2
    assert 'no topic /joint_states; closest: /joint_state' in result.stderr
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['bag', 'third'], 'what could be replayed was'


def test_what_cannot_begin_ends_with_2_and_a_sentence(setting: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / 'mine' / 'bag').mkdir(parents=True)
    (tmp_path / 'mine' / 'bag' / 'notes.txt').write_text('x')
    silent = record(tmp_path / 'silent', [entry for entry in entries(8) if entry[0] != '/instruction'])
    blind = record(tmp_path / 'blind', [entry for entry in entries(8) if entry[0] not in ('/top', '/joint_states')])
    for arguments, bags, words in (
        (['--latency', 'soon'], None, 'neither milliseconds'),
        (['--playback-duration', '-1'], None, 'must be positive'),
        (['--start-offset', '99'], None, 'no message in the span'),
        ([], [tmp_path / 'nowhere'], 'does not exist'),
        ([], [silent], 'give one with --instruction'),
        ([], [blind], "camera 'top': no topic /top"),
    ):
        result = call(setting, tmp_path / 'out', *arguments, bags=bags)
        assert result.exit_code == 2 and words in result.stderr, (arguments, result.stderr)
        assert not list((tmp_path / 'out').iterdir() if (tmp_path / 'out').exists() else [])
    cut = Path(shutil.copytree(setting.bag, tmp_path / 'cut'))
    storage = next(cut.glob('*.mcap'))
    storage.write_bytes(storage.read_bytes()[:900])
    for live, words in ((cut, 'whose chunks are to be compared, is damaged'), (setting.bag, 'has no topic of type')):
        compared = call(setting, tmp_path / 'out', '--live', live)
        assert compared.exit_code == 2 and words in compared.stderr and not list((tmp_path / 'out').iterdir())
    kept = call(setting, tmp_path / 'mine')
    assert kept.exit_code == 2 and 'was not written by a replay' in kept.stderr
    assert (tmp_path / 'mine' / 'bag' / 'notes.txt').is_file()
    assert call(setting, tmp_path / 'out', '--instruction', 'pick up the cup', bags=[silent]).exit_code == 0


class Still:
    """A policy that stays where it is, so that what a test takes is the bag's."""

    checkpoint_hash = stats_hash = 'none'

    def __init__(self) -> None:
        self.summary = {'num_steps': 1, 'solver': 'euler'}

    def infer(self, observation: object, known: object = None) -> ActionChunk:
        period = ROBOT.action.period_ns
        actions = np.repeat(observation.state[None], ROBOT.action.horizon, axis=0)
        return ActionChunk(observation.stamp_ns + period, period, ROBOT.action.joints, actions, observation.stamp_ns, '')


def still(options: ReplayOptions) -> Policies:
    made = Policies.__new__(Policies)
    made.options, made.first, made.second = options, Still(), None
    return made


@pytest.mark.parametrize('storage', [{}, {'compressed': True}, {'sqlite': True}], ids=['mcap', 'mcap-zstd', 'sqlite'])
def test_broken_bags_end_in_a_report_or_a_sentence(
    setting: SimpleNamespace, tmp_path: Path, storage: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing takes most of the time, and draws what the other tests look at.
    for name in ('error_by_step', 'ages', 'timeline'):
        monkeypatch.setattr(figures, name, lambda *_: '<svg/>')
    monkeypatch.setattr(figures, 'trajectories', lambda *_: ('<svg/>', 0))
    source, ends = record(tmp_path / 'source', entries(8), **storage), set()
    for seed in range(67):
        bag = broken(tmp_path / f'bag{seed}', source, seed)
        options = ReplayOptions((bag,), ROBOT, setting.checkpoint, tmp_path / 'out', annotated=False)
        options.out.mkdir(exist_ok=True)
        problem = replay_one(options, bag, still(options))
        report = options.folder_of(bag) / REPORT
        assert (problem is None) == report.is_file(), seed
        if problem is None:
            json.loads(report.read_text())
        else:
            assert len(problem) > 20 and 'Traceback' not in problem, seed
        ends.add(problem is None)
        shutil.rmtree(bag)
    assert ends == {True, False}, 'the damage never mattered, or nothing was ever readable'
    assert not list((tmp_path / 'out').glob('*.part'))
