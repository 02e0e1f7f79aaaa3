"""Bags become LeRobot v3.0 as its library lays it out, and bags again, with states, actions, stamps and pictures kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bag_writing import joint_state
from episode_recordings import (
    BEGIN,
    COMMAND,
    FPS,
    IMAGE,
    ROBOT,
    ROBOT_TEXT,
    STATE_TOPIC,
    entries,
    info,
    number_of,
    raw_image,
    record,
)

from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.convert import DatasetReport, Options, convert, inspect
from vla_policy_ros.episodes.episode import Episode, EpisodeError
from vla_policy_ros.episodes.lerobot import LeRobotDataset
from vla_policy_ros.episodes.sources import find_episodes
from vla_policy_ros.episodes.video import ENCODERS, VideoError, choose_codec, frames
from vla_policy_ros.robot import load_robot, parse_robot

ROOT = Path(__file__).resolve().parents[2]
G1 = ROOT.parent / 'shared' / 'data' / 'g1_bottle' / 'bag'


def to_lerobot(source: Path, destination: Path, **options: object) -> DatasetReport:
    return convert(find_episodes(source, ROBOT), source.name, destination, 'lerobot', ROBOT, Options(**options))  # type: ignore[arg-type]


def to_bags(source: Path, destination: Path) -> DatasetReport:
    return convert(find_episodes(source, ROBOT), source.name, destination, 'bag', ROBOT, Options())


def two_bags(folder: Path) -> Path:
    record(folder / 'first', entries(12))
    later = [(t, at, m) for t, at, m in entries(8, start=12)]
    record(folder / 'second', [*later, *[entry for entry in entries(1)[:1]]])
    return folder


def assert_alike(ours: Episode, theirs: Episode, level: float = 4.0) -> None:
    assert [s.stamp_ns for s in ours.steps] == [s.stamp_ns for s in theirs.steps]
    assert [s.state_stamp_ns for s in ours.steps] == [s.state_stamp_ns for s in theirs.steps]
    assert [s.image_stamps_ns for s in ours.steps] == [s.image_stamps_ns for s in theirs.steps]
    assert [s.instruction for s in ours.steps] == [s.instruction for s in theirs.steps]
    np.testing.assert_allclose([s.state for s in ours.steps], [s.state for s in theirs.steps], rtol=1e-6, atol=1e-7)
    times = np.array([s.stamp_ns for s in ours.steps]) + ours.robot.action.period_ns
    mine, its = ours.commands.sample(times), theirs.commands.sample(times)
    np.testing.assert_allclose(mine.positions, its.positions, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(mine.is_pad, its.is_pad)
    for a, b in zip(ours.observations(), theirs.observations(), strict=True):
        for camera, view in a.cameras.items():
            np.testing.assert_array_equal(view.K, b.cameras[camera].K)
            assert np.abs(view.rgb.astype(int) - b.cameras[camera].rgb).mean() < level


def test_a_bag_survives_the_way_to_lerobot_and_back(tmp_path: Path) -> None:
    bag = record(tmp_path / 'bag', entries(12))
    to_lerobot(bag, tmp_path / 'lerobot')
    to_bags(tmp_path / 'lerobot', tmp_path / 'again')
    original = BagEpisode(bag, ROBOT)
    between = LeRobotDataset(tmp_path / 'lerobot', ROBOT).episode(0)
    again = BagEpisode(tmp_path / 'again' / 'episode_000000', ROBOT)
    assert_alike(between, original)
    assert_alike(again, original)
    assert not again.skipped and not again.notes


@pytest.mark.slow
@pytest.mark.skipif(not G1.is_dir(), reason=f'the recording is not on this machine: {G1}')
def test_a_real_recording_survives_the_way_to_lerobot_and_back(tmp_path: Path) -> None:
    robot = load_robot(ROOT / 'config' / 'robots' / 'g1_bottle.yaml')
    report = convert(find_episodes(G1, robot), 'g1', tmp_path / 'lerobot', 'lerobot', robot, Options())
    assert report.details['fps'] == 30
    convert(find_episodes(tmp_path / 'lerobot', robot), 'g1', tmp_path / 'again', 'bag', robot, Options())
    original = BagEpisode(G1, robot)
    assert_alike(LeRobotDataset(tmp_path / 'lerobot', robot).episode(0), original, level=2.5)
    assert_alike(
        BagEpisode(tmp_path / 'again' / 'episode_000000', robot), original, level=3.0
    )  # chroma at half the resolution, and JPEG


def test_the_dataset_is_laid_out_as_version_3(tmp_path: Path) -> None:
    to_lerobot(two_bags(tmp_path / 'bags'), tmp_path / 'd')
    root = tmp_path / 'd'
    assert sorted(str(f.relative_to(root)) for f in root.rglob('*') if f.is_file()) == [
        'data/chunk-000/file-000.parquet',
        'meta/episodes/chunk-000/file-000.parquet',
        'meta/info.json',
        'meta/provenance.json',
        'meta/stats.json',
        'meta/tasks.parquet',
        'videos/observation.images.top/chunk-000/file-000.mp4',
    ]
    description = json.loads((root / 'meta/info.json').read_text())
    totals = {'total_episodes': 2, 'total_frames': 20, 'total_tasks': 1, 'splits': {'train': '0:2'}}
    expected = {'codebase_version': 'v3.0', 'fps': FPS, **totals}
    assert {key: description[key] for key in expected} == expected
    features = description['features']
    assert features['observation.state'] == {'dtype': 'float32', 'shape': [2], 'names': ['a', 'b']}
    assert features['observation.images.top']['shape'] == [48, 64, 3]
    assert features['observation.images.top']['info']['video.fps'] == FPS
    for name in ('timestamp', 'frame_index', 'episode_index', 'index', 'task_index'):
        assert features[name]['shape'] == [1]

    data = pq.read_table(root / 'data/chunk-000/file-000.parquet')
    assert set(data.column_names) == set(features) - {'observation.images.top'}
    assert pq.ParquetFile(root / 'data/chunk-000/file-000.parquet').num_row_groups == 2
    assert str(data.schema.field('action').type) == 'fixed_size_list<element: float>[2]'
    assert data['index'].to_pylist() == list(range(20))
    np.testing.assert_allclose(data['timestamp'].to_numpy(), [i / FPS for i in [*range(12), *range(8)]], rtol=1e-6)

    rows = pq.read_table(root / 'meta/episodes/chunk-000/file-000.parquet').to_pylist()
    assert [(r['dataset_from_index'], r['dataset_to_index'], r['length'], r['tasks']) for r in rows] == [
        (0, 12, 12, ['pick up the cup']), (12, 20, 8, ['pick up the cup'])
    ]  # fmt: skip
    second = rows[1]
    prefix = 'videos/observation.images.top'
    assert (second[f'{prefix}/chunk_index'], second[f'{prefix}/file_index']) == (0, 0)
    assert (second[f'{prefix}/from_timestamp'], second[f'{prefix}/to_timestamp']) == pytest.approx((1.2, 2.0))
    assert second['meta/episodes/chunk_index'] == second['data/file_index'] == 0
    video = root / 'videos/observation.images.top/chunk-000/file-000.mp4'
    assert [number_of(f) for f in frames(video, FPS, [0, 7], begin_s=1.2)] == [12, 19]

    stats = json.loads((root / 'meta/stats.json').read_text())
    states = np.array(data['observation.state'].to_pylist())
    np.testing.assert_allclose(stats['observation.state']['mean'], states.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats['observation.state']['q99'], np.quantile(states, 0.99, axis=0), rtol=1e-5)
    assert stats['observation.state']['count'] == [20] and np.shape(stats['observation.images.top']['mean']) == (3, 1, 1)
    assert 0.0 <= stats['observation.images.top']['min'][0][0][0] <= stats['observation.images.top']['mean'][0][0][0] <= 1.0
    assert second['stats/observation.state/max'] == pytest.approx(states[12:].max(axis=0).tolist())

    tasks = pq.read_table(root / 'meta/tasks.parquet')
    assert tasks.to_pydict() == {'task_index': [0], 'task': ['pick up the cup']}
    assert json.loads(tasks.schema.metadata[b'pandas'])['index_columns'] == ['task']  # so that pandas makes it the index


def test_where_it_comes_from_travels_along(tmp_path: Path) -> None:
    to_lerobot(record(tmp_path / 'bag', entries(4)), tmp_path / 'lerobot')
    to_bags(tmp_path / 'lerobot', tmp_path / 'again')
    said = json.loads((tmp_path / 'lerobot/meta/provenance.json').read_text())
    assert (
        said['robot']['name'] == 'toy' and said['conversion']['source'] == 'bag' and said['software'].startswith('vla_policy_ros ')
    )
    episode = BagEpisode(tmp_path / 'again' / 'episode_000000', ROBOT)
    assert episode.provenance.recorded['format'] == 'LeRobot v3.0'
    assert episode.provenance.recorded['recorded']['conversion']['source'] == 'bag'


def test_a_pause_begins_a_new_episode(tmp_path: Path) -> None:
    paused = [*entries(6), *entries(6, start=16)]
    report = to_lerobot(record(tmp_path / 'bag', paused), tmp_path / 'd')
    dataset = LeRobotDataset(tmp_path / 'd', ROBOT)
    assert [len(dataset.episode(i).steps) for i in dataset.episodes] == [6, 6]
    (outcome,) = report.episodes
    assert outcome.written == ('0', '1') and 'split into 2 episodes' in outcome.quality.notes[-1]
    camera = next(row for row in outcome.quality.inputs if row.name == 'camera:top')
    assert (camera.gaps, camera.missing, round(camera.longest_gap, 3)) == (1, 10, 1.1)


def test_steps_before_the_first_command_are_not_rows(tmp_path: Path) -> None:
    late = [entry for entry in entries(10) if entry[0] != COMMAND or entry[1] > 0.35]
    report = to_lerobot(record(tmp_path / 'bag', late), tmp_path / 'd')
    assert len(LeRobotDataset(tmp_path / 'd', ROBOT).episode(0).steps) == 6
    assert report.episodes[0].quality.skipped['no row: nothing was commanded yet'] == 4


def test_cameras_without_intrinsics_stay_so(tmp_path: Path) -> None:
    uncalibrated = [entry for entry in entries(4) if not entry[0].endswith('info')]
    to_lerobot(record(tmp_path / 'bag', uncalibrated), tmp_path / 'd')
    episode = LeRobotDataset(tmp_path / 'd', ROBOT).episode(0)
    assert episode.uncalibrated == ('top',) and next(episode.observations()).cameras['top'].K is None
    to_bags(tmp_path / 'd', tmp_path / 'again')
    assert BagEpisode(tmp_path / 'again' / 'episode_000000', ROBOT).uncalibrated == ('top',)


@pytest.mark.parametrize('codec', [name for name in ENCODERS])
def test_every_codec_keeps_the_pictures(tmp_path: Path, codec: str) -> None:
    try:
        choose_codec(codec)
    except VideoError as error:
        pytest.skip(str(error))
    to_lerobot(record(tmp_path / 'bag', entries(6)), tmp_path / 'd', codec=codec)
    episode = LeRobotDataset(tmp_path / 'd', ROBOT).episode(0)
    assert [number_of(o.cameras['top'].rgb) for o in episode.observations()] == [0, 1, 2, 3, 4, 5]
    assert (
        json.loads((tmp_path / 'd/meta/info.json').read_text())['features']['observation.images.top']['info']['video.codec']
        == codec
    )


def test_an_unknown_codec_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match="codec 'mpeg' cannot be encoded here; use one of auto"):
        to_lerobot(record(tmp_path / 'bag', entries(3)), tmp_path / 'd', codec='mpeg')
    assert not list(tmp_path.glob('d*'))


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    bag = record(tmp_path / 'bag', entries(3))
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'mine.txt').write_text('precious')
    with pytest.raises(EpisodeError, match='is there already; give a new folder'):
        to_lerobot(bag, tmp_path / 'd')
    assert (tmp_path / 'd' / 'mine.txt').read_text() == 'precious' and [p.name for p in (tmp_path / 'd').iterdir()] == ['mine.txt']


def damaged(folder: Path) -> Path:
    record(folder / 'a', entries(4))
    record(
        folder / 'b',
        [(t, at, raw_image(1, BEGIN + at, width=32, height=24)) if t == IMAGE else (t, at, m) for t, at, m in entries(4)],
    )
    record(folder / 'c', entries(5))
    return folder


def test_an_episode_that_cannot_be_read_ends_the_conversion_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r'b, step 0: .*image is 32x24 but camera_info describes 64x48.*\n\(--skip-damaged'):
        to_lerobot(damaged(tmp_path / 'bags'), tmp_path / 'd')
    assert not list(tmp_path.glob('d*'))


@pytest.mark.parametrize('to', ['lerobot', 'bag'])
def test_or_is_left_out_and_reported(tmp_path: Path, to: str) -> None:
    sources = find_episodes(damaged(tmp_path / 'bags'), ROBOT)
    report = convert(sources, 'bags', tmp_path / 'd', to, ROBOT, Options(skip_damaged=True))  # type: ignore[arg-type]
    assert [bool(o.written) for o in report.episodes] == [True, False, True]
    assert 'image is 32x24' in report.episodes[1].problem
    kept = [source.open() for source in find_episodes(tmp_path / 'd', ROBOT)]
    assert [len(episode.steps) for episode in kept] == [4, 5]
    assert [[number_of(o.cameras['top'].rgb) for o in e.observations()] for e in kept] == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_pictures_of_two_sizes_do_not_fit_one_dataset(tmp_path: Path) -> None:
    record(tmp_path / 'bags' / 'a', entries(3))
    size = {'width': 32, 'height': 24}
    small = [(t, at, raw_image(1, BEGIN + at, **size)) if t == IMAGE else (t, at, info(at, **size)) if 'info' in t else (t, at, m)
             for t, at, m in entries(3)]  # fmt: skip
    record(tmp_path / 'bags' / 'b', small)
    with pytest.raises(EpisodeError, match="camera 'top' has images of 32x24, but 64x48 before"):
        to_lerobot(tmp_path / 'bags', tmp_path / 'd')


def test_a_killed_conversion_leaves_no_dataset_and_can_be_run_again(tmp_path: Path) -> None:
    bags = tmp_path / 'bags'
    for number in range(6):
        record(bags / f'{number}', entries(40, start=0))
    (tmp_path / 'robot.yaml').write_text(ROBOT_TEXT)
    command = [sys.executable, '-m', 'vla_policy_ros.cli', 'dataset', 'bags', 'd', '--robot', 'robot.yaml', '--json', 'report.json']
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=os.environ | {'PYTHONUNBUFFERED': '1'})
    assert process.stderr is not None
    while process.stderr.readline() != b'2\n':
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / 'd').exists() and (tmp_path / 'd.partial').exists()
    began = time.perf_counter()
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert time.perf_counter() - began < 60
    assert LeRobotDataset(tmp_path / 'd', ROBOT).episodes == [0, 1, 2, 3, 4, 5] and not (tmp_path / 'd.partial').exists()
    assert len(json.loads((tmp_path / 'report.json').read_text())['episodes']) == 6


def test_only_looking_reports_and_writes_nothing(tmp_path: Path) -> None:
    repeated = [
        (t, at, raw_image(0, BEGIN + round(at - 0.02, 6))) if t == IMAGE and at > 0.5 else (t, at, m) for t, at, m in entries(10)
    ]
    bag = record(tmp_path / 'bag', repeated)
    report = inspect(find_episodes(bag, ROBOT), 'bag', ROBOT, lambda _: None, False)
    (outcome,) = report.episodes
    assert outcome.quality.stale == {'top': 4}  # 5 pictures alike
    assert outcome.quality.state_skew_ms == (0.0, 0.0)
    camera = next(row for row in outcome.quality.inputs if row.name == 'camera:top')
    assert camera.rate == pytest.approx(FPS) and camera.latency_ms == pytest.approx((20.0, 20.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bag']
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_robot_with_velocities_and_two_controllers(tmp_path: Path) -> None:
    text = ROBOT_TEXT.replace('joints: [a, b]}\naction', 'joints: [a, b], fields: [position, velocity]}\naction')
    two = 'two: {topic: /two/commands, joints: [a], type: forward_command, update_rate: 10}'
    text = text[: text.index('  arm:')] + '  one: {topic: /one/joint_trajectory, joints: [b]}\n  ' + two + '\n'
    robot = parse_robot(text)
    moving = []
    for topic, at, message in entries(6, command=False):
        if topic == STATE_TOPIC:
            message = joint_state([at, -at], at=BEGIN + at - 0.001)
            message.velocity = np.array([1.0, -1.0])
        moving.append((topic, at, message))
    bag = record(tmp_path / 'bag', moving)
    convert(find_episodes(bag, robot), 'bag', tmp_path / 'd', 'lerobot', robot, Options())
    convert(find_episodes(tmp_path / 'd', robot), 'd', tmp_path / 'again', 'bag', robot, Options())
    original, again = BagEpisode(bag, robot), BagEpisode(tmp_path / 'again' / 'episode_000000', robot)
    assert original.steps[0].state.tolist() == pytest.approx([0.001, -0.001, 1.0, -1.0])
    np.testing.assert_allclose([s.state for s in again.steps], [s.state for s in original.steps], rtol=1e-6, atol=1e-7)
    assert again.commands.source == 'commands on /one/joint_trajectory; commands on /two/commands'
    times = np.array([step.stamp_ns for step in original.steps[:5]]) + 100_000_000
    np.testing.assert_allclose(again.commands.sample(times).positions, original.commands.sample(times).positions, atol=1e-6)


def test_full_files_are_followed_by_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('vla_policy_ros.episodes.lerobot_writer.VIDEO_FILE_MB', 0)
    monkeypatch.setattr('vla_policy_ros.episodes.lerobot_writer.DATA_FILE_MB', 0)
    monkeypatch.setattr('vla_policy_ros.episodes.lerobot_writer.CHUNKS_SIZE', 2)
    for number in range(4):
        record(tmp_path / 'bags' / f'{number}', entries(3 + number))
    to_lerobot(tmp_path / 'bags', tmp_path / 'd')
    assert sorted(str(f.relative_to(tmp_path / 'd')) for f in (tmp_path / 'd' / 'data').rglob('*.parquet')) == [
        'data/chunk-000/file-000.parquet', 'data/chunk-000/file-001.parquet',
        'data/chunk-001/file-000.parquet', 'data/chunk-001/file-001.parquet',
    ]  # fmt: skip
    dataset = LeRobotDataset(tmp_path / 'd', ROBOT)
    for number in range(4):
        episode = dataset.episode(number)
        assert [number_of(o.cameras['top'].rgb) for o in episode.observations()] == list(range(3 + number))
