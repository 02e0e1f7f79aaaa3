"""LeRobot folders become episodes: found by name, read lazily, and what is damaged or differs is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episode_recordings import FPS, ROBOT, ROBOT_TEXT, number_of, picture, position, target

from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.episodes.lerobot import FIRST_STAMP_NS, LeRobotDataset
from vla_policy_ros.episodes.mapping import CameraMapping, DatasetMapping, load_mapping, with_cameras
from vla_policy_ros.episodes.video import VideoWriter, choose_codec
from vla_policy_ros.robot import load_robot, parse_robot

ROOT = Path(__file__).resolve().parents[2]
G1 = ROOT.parent / 'shared' / 'data' / 'g1_bottle'
CAM_HIGH = DatasetMapping(cameras={'head': CameraMapping(feature='observation.images.cam_high')})

Columns = dict[str, Any]


def dataset_v21(root: Path, steps: int = 12, change: Callable[[Columns], None] = lambda _: None, episodes: int = 1) -> Path:
    """A dataset of version 2.1 as others write it: joints in another order, without stamps and intrinsics."""
    names = ['b', 'a']
    features: Columns = {
        'observation.state': {'dtype': 'float32', 'shape': [2], 'names': {'motors': names}},
        'action': {'dtype': 'float32', 'shape': [2], 'names': [names]},
        'observation.images.top': {'dtype': 'video', 'shape': [48, 64, 3], 'names': ['height', 'width', 'channel']},
    }
    info = {
        'codebase_version': 'v2.1', 'robot_type': 'toy', 'fps': FPS, 'chunks_size': 1000, 'features': features,
        'data_path': 'data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
        'video_path': 'videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4',
    }  # fmt: skip
    (root / 'meta').mkdir(parents=True)
    (root / 'meta/info.json').write_text(json.dumps(info))
    (root / 'meta/tasks.jsonl').write_text('{"task_index": 0, "task": "pick up  the cup"}\n')
    lines = [json.dumps({'episode_index': i, 'tasks': ['pick up the cup'], 'length': steps}) for i in range(episodes)]
    (root / 'meta/episodes.jsonl').write_text('\n'.join(lines) + '\n')
    for episode in range(episodes):
        columns: Columns = {
            'observation.state': [position(i)[::-1] for i in range(steps)],
            'action': [target(i + 1)[::-1] for i in range(steps)],
            'timestamp': [i / FPS for i in range(steps)],
            'frame_index': list(range(steps)),
            'episode_index': [episode] * steps,
            'index': list(range(steps)),
            'task_index': [0] * steps,
        }
        change(columns)
        types = {'observation.state': pa.list_(pa.float32(), 2), 'action': pa.list_(pa.float32()), 'timestamp': pa.float32()}
        table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
        file = root / f'data/chunk-000/episode_{episode:06d}.parquet'
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
        video = root / f'videos/chunk-000/observation.images.top/episode_{episode:06d}.mp4'
        video.parent.mkdir(parents=True, exist_ok=True)
        writer = VideoWriter(video, choose_codec('auto'), FPS, 64, 48)
        for index in range(steps):
            writer.add(picture(index))
        writer.close()
    return root


def test_rows_become_steps_by_name(tmp_path: Path) -> None:
    episode = LeRobotDataset(dataset_v21(tmp_path / 'd'), ROBOT).episode(0)
    assert [step.stamp_ns - FIRST_STAMP_NS for step in episode.steps] == [i * 100_000_000 for i in range(12)]
    np.testing.assert_allclose([s.state for s in episode.steps], [position(i) for i in range(12)], atol=1e-6)
    times = np.array([episode.steps[4].stamp_ns]) + 100_000_000
    np.testing.assert_allclose(episode.commands.sample(times).positions, [target(5)], atol=1e-6)
    assert episode.instructions == ('pick up the cup',)
    assert [number_of(o.cameras['top'].rgb) for o in episode.observations()] == list(range(12))
    assert [number_of(o.cameras['top'].rgb) for o in episode.observations([3, 4, 11])] == [3, 4, 11]


def test_intrinsics_come_from_the_mapping_or_the_robot_file_or_are_absent(tmp_path: Path) -> None:
    root = dataset_v21(tmp_path / 'd', 2)
    absent = LeRobotDataset(root, ROBOT).episode(0)
    assert absent.uncalibrated == ('top',) and next(absent.observations()).cameras['top'].K is None
    K = (40.0, 0, 31, 0, 40, 23, 0, 0, 1)
    mapping = DatasetMapping(cameras={'top': CameraMapping(feature='observation.images.top', K=K)})
    given = LeRobotDataset(root, ROBOT, mapping).episode(0)
    np.testing.assert_array_equal(next(given.observations()).cameras['top'].K, np.reshape(K, (3, 3)))
    fixed = ROBOT_TEXT.replace('camera_info: /top/info', f'K: {list(K)}, width: 32, height: 48')
    with pytest.raises(EpisodeError, match='row 0: image is 64x48 but K in the robot file is for 32x48'):
        next(LeRobotDataset(root, parse_robot(fixed)).episode(0).observations())


def test_names_that_differ_are_listed_with_what_there_is_and_the_closest(tmp_path: Path) -> None:
    root = dataset_v21(tmp_path / 'd', 2)
    other = parse_robot(ROBOT_TEXT.replace('top:', 'tip:').replace('[a, b]', '[a, c]').replace('  b:', '  c:'))
    with pytest.raises(EpisodeError) as error:
        LeRobotDataset(root, other)
    told = str(error.value)
    assert "camera 'tip': no image feature 'observation.images.tip', closest: 'observation.images.top'" in told
    assert '--camera tip=FEATURE' in told
    assert "state: no position of joint 'c'" in told and "action: no position of joint 'c'" in told and 'it has b, a' in told
    mapping = with_cameras(DatasetMapping(joints={'c': 'b'}), ['tip=observation.images.top'])
    np.testing.assert_allclose(LeRobotDataset(root, other, mapping).episode(0).steps[1].state, position(1), atol=1e-6)


def test_a_mapping_file_is_strict(tmp_path: Path) -> None:
    file = tmp_path / 'mapping.yaml'
    file.write_text('cameras: {top: {feature: observation.images.left}}\njoint: {a: b}\n')
    with pytest.raises(EpisodeError, match="'joint' is not a key here; did you mean 'joints'"):
        load_mapping(file)
    with pytest.raises(EpisodeError, match='cannot be used'):
        load_mapping(tmp_path / 'none.yaml')
    with pytest.raises(EpisodeError, match='CAMERA=FEATURE'):
        with_cameras(DatasetMapping(), ['top'])
    with pytest.raises(EpisodeError, match=r"mapping.cameras: 'tap' is not known; did you mean 'top'"):
        LeRobotDataset(dataset_v21(tmp_path / 'd', 2), ROBOT, with_cameras(DatasetMapping(), ['tap=observation.images.top']))


def test_elements_without_names_need_them(tmp_path: Path) -> None:
    root = dataset_v21(tmp_path / 'd', 2)
    info = json.loads((root / 'meta/info.json').read_text())
    info['features']['action']['names'] = None
    (root / 'meta/info.json').write_text(json.dumps(info))
    with pytest.raises(EpisodeError, match="feature 'action' has 2 elements without names"):
        LeRobotDataset(root, ROBOT)
    given = LeRobotDataset(root, ROBOT, DatasetMapping(action_names=('b', 'a'))).episode(0)
    np.testing.assert_allclose(given.commands.streams[0].positions[0], target(1), atol=1e-6)
    with pytest.raises(EpisodeError, match='2 elements but 1 names'):
        LeRobotDataset(root, ROBOT, DatasetMapping(action_names=('b',)))


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    def spoil(columns: Columns) -> None:
        columns['observation.state'][3] = [0.0, float('nan')]
        columns['action'][5] = [float('inf'), 0.0]

    episode = LeRobotDataset(dataset_v21(tmp_path / 'd', change=spoil), ROBOT).episode(0)
    assert len(episode.steps) == 11
    assert episode.skipped == {'no step: state a.position is not finite': 1, 'action: a value is not finite': 1}
    assert [number_of(o.cameras['top'].rgb) for o in episode.observations([2, 3])] == [2, 4]


def test_images_in_the_table_do_as_well(tmp_path: Path) -> None:
    import cv2

    def embed(columns: Columns) -> None:
        columns['observation.images.top'] = [
            {'bytes': cv2.imencode('.png', cv2.cvtColor(picture(i), cv2.COLOR_RGB2BGR))[1].tobytes(), 'path': None}
            for i in range(12)
        ]

    root = dataset_v21(tmp_path / 'd', change=embed)
    info = json.loads((root / 'meta/info.json').read_text())
    info['features']['observation.images.top']['dtype'] = 'image'
    (root / 'meta/info.json').write_text(json.dumps(info))
    episode = LeRobotDataset(root, ROBOT).episode(0)
    for index, observation in zip((1, 7), episode.observations([1, 7]), strict=True):
        np.testing.assert_array_equal(observation.cameras['top'].rgb, picture(index))


def reorder(columns: Columns) -> None:
    columns['timestamp'][5] = 0.2


def drop_rows(columns: Columns) -> None:
    for values in columns.values():
        del values[4]


def drop_column(columns: Columns) -> None:
    del columns['task_index']


def rename_task(columns: Columns) -> None:
    columns['task_index'][0] = 7


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (reorder, 'time goes from 0.4000 s to 0.2000 s at row 5'),
        (drop_rows, 'row 4 has frame_index 5: rows are missing'),
        (drop_column, "has no column 'task_index'; it has observation.state, action"),
        (rename_task, r'task_index 7 is not in meta/tasks; it has \[0\]'),
    ],
)
def test_tables_that_are_not_in_order_are_refused_by_row(tmp_path: Path, change: Callable[[Columns], None], says: str) -> None:
    with pytest.raises(EpisodeError, match=says):
        LeRobotDataset(dataset_v21(tmp_path / 'd', change=change), ROBOT).episode(0)


def cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])


@pytest.mark.parametrize(
    ('file', 'says'),
    [
        ('data/chunk-000/episode_000000.parquet', 'parquet cannot be read, it is damaged'),
        ('meta/info.json', 'info.json cannot be read, it is damaged'),
        ('meta/episodes.jsonl', 'episodes.jsonl cannot be read, it is damaged'),
        ('meta/tasks.jsonl', 'tasks.jsonl cannot be read, it is damaged'),
        ('videos/chunk-000/observation.images.top/episode_000000.mp4', 'mp4 cannot be decoded at frame 0'),
    ],
)
def test_a_file_that_breaks_off_is_named(tmp_path: Path, file: str, says: str) -> None:
    root = dataset_v21(tmp_path / 'd')
    cut(root / file, 0.6)
    with pytest.raises(EpisodeError, match=says):
        list(LeRobotDataset(root, ROBOT).episode(0).observations())


def test_a_video_that_is_shorter_than_the_table_is_told_by_frame(tmp_path: Path) -> None:
    root = dataset_v21(tmp_path / 'd', 12)
    file = root / 'videos/chunk-000/observation.images.top/episode_000000.mp4'
    writer = VideoWriter(file, choose_codec('auto'), FPS, 64, 48)
    for index in range(5):
        writer.add(picture(index))
    writer.close()
    stream = LeRobotDataset(root, ROBOT).episode(0).observations()
    assert [number_of(next(stream).cameras['top'].rgb) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(EpisodeError, match=r'row 5: .*no frame at 0.500 s \(frame 5 at 10 Hz\): it is shorter than the table'):
        next(stream)
    file.unlink()
    with pytest.raises(EpisodeError, match='mp4 is missing'):
        next(LeRobotDataset(root, ROBOT).episode(0).observations())


def test_only_the_episodes_that_were_fetched_are_there(tmp_path: Path) -> None:
    root = dataset_v21(tmp_path / 'd', 3, episodes=4)
    (root / 'data/chunk-000/episode_000002.parquet').unlink()
    dataset = LeRobotDataset(root, ROBOT)
    assert dataset.episodes == [0, 1, 3]
    with pytest.raises(EpisodeError, match='has no episode 2; it has 0-1, 3'):
        dataset.episode(2)


def test_what_is_no_dataset_or_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r'is not a LeRobot dataset: it has no meta/info\.json'):
        LeRobotDataset(tmp_path, ROBOT)
    root = dataset_v21(tmp_path / 'd', 2)
    info = json.loads((root / 'meta/info.json').read_text())
    for change, says in (({'codebase_version': 'v1.6'}, 'LeRobot v1.6 cannot be read'), ({'fps': None}, 'fps is missing')):
        (root / 'meta/info.json').write_text(json.dumps(info | change))
        with pytest.raises(EpisodeError, match=says):
            LeRobotDataset(root, ROBOT)


needs_g1 = pytest.mark.skipif(not G1.is_dir(), reason=f'the recording is not on this machine: {G1}')


@needs_g1
def test_a_real_recording_is_the_same_through_both_readers() -> None:
    robot = load_robot(ROOT / 'config' / 'robots' / 'g1_bottle.yaml')
    bag = BagEpisode(G1 / 'bag', robot)
    rows = LeRobotDataset(G1 / 'lerobot_v2.1', robot, CAM_HIGH).episode(18)
    assert len(bag.steps) == len(rows.steps) == 348
    np.testing.assert_array_equal(bag.commands.streams[0].positions, rows.commands.streams[0].positions)
    begin, first = bag.steps[0].stamp_ns, rows.steps[0].stamp_ns
    # The bag's stamps were made of float32 seconds: they are within a microsecond of the grid.
    for theirs, ours in zip(bag.steps, rows.steps, strict=True):
        assert abs((theirs.stamp_ns - begin) - (ours.stamp_ns - first)) < 1000
    # The live order of arrival pairs some pictures with the state after theirs; each state is that of the row of its own stamp.
    states = {round((step.stamp_ns - first) / 1e6): step.state for step in rows.steps}
    for step in bag.steps:
        np.testing.assert_array_equal(step.state, states[round((step.state_stamp_ns - begin) / 1e6)])
    for theirs, ours in zip(bag.observations(range(0, 348, 29)), rows.observations(range(0, 348, 29)), strict=True):
        difference = np.abs(theirs.cameras['head'].rgb.astype(int) - ours.cameras['head'].rgb)
        assert difference.mean() < 2.0 and np.percentile(difference, 99) < 12  # JPEG of quality 85


@needs_g1
def test_stale_pictures_of_a_real_recording_are_counted() -> None:
    from vla_policy_ros.episodes.quality import look_at

    robot = load_robot(ROOT / 'config' / 'robots' / 'g1_bottle.yaml')
    quality = look_at(LeRobotDataset(G1 / 'lerobot_v2.1', robot, CAM_HIGH).episode(18))
    assert quality.stale == {'head': 104}  # counted by hand when the recording was prepared
    assert quality.rate == pytest.approx(30.0) and quality.uncalibrated == ('head',)
