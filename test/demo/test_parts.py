"""The parts of the demo that need no ROS: the plan of reaches, the numbers, the processes, the video."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_policy_ros.control.timeline import rate
from vla_policy_ros.demo.captions import RunCaptions
from vla_policy_ros.demo.processes import Child, ChildError, free_domain, ros_environment
from vla_policy_ros.demo.reaches import Reach, Sample, judge, plan_reaches
from vla_policy_ros.demo.results import prepare_folder
from vla_policy_ros.demo.summary import Recorded, percentiles, state_seconds, summarise
from vla_policy_ros.demo.video import write_video
from vla_policy_ros.types import NS_PER_S

OBJECTS = ['red cube', 'blue ball', 'green cylinder']


class TestPlan:
    def test_every_object_gets_an_equal_share(self) -> None:
        plan = plan_reaches(OBJECTS, 4.0, 30.0)
        assert [reach.instruction for reach in plan] == [f'reach the {name}' for name in OBJECTS]
        assert [(reach.begin, reach.end) for reach in plan] == [(4.0, 14.0), (14.0, 24.0), (24.0, 34.0)]

    @pytest.mark.parametrize(('seconds', 'count'), [(1.0, 1), (11.9, 1), (12.0, 2), (18.0, 3), (600.0, 3)])
    def test_a_short_run_asks_for_fewer_objects(self, seconds: float, count: int) -> None:
        assert len(plan_reaches(OBJECTS, 0.0, seconds)) == count

    def test_a_given_instruction_gets_all_the_time(self) -> None:
        assert plan_reaches(OBJECTS, 1.0, 30.0, 'fetch') == [Reach('fetch', 1.0, 31.0)]

    def test_an_empty_scene_needs_an_instruction(self) -> None:
        with pytest.raises(ValueError, match='--instruction'):
            plan_reaches([], 0.0, 30.0)


class TestJudgement:
    reach = Reach('reach the red cube', 2.0, 6.0)

    def sample(self, moment: float, distance: float | None, instruction: str = 'reach the red cube') -> Sample:
        return Sample(moment, instruction, 'red cube', distance, distance is not None and distance < 0.03)

    def test_only_the_share_and_instruction_of_the_reach_count(self) -> None:
        samples = [
            self.sample(1.9, 0.001),
            self.sample(2.1, 0.9, 'reach the blue ball'),
            self.sample(2.2, 0.5),
            self.sample(3.0, 0.02),
            self.sample(6.0, 0.2),
            self.sample(6.1, 0.001),
        ]
        result = judge(self.reach, samples)
        assert (result.initial_distance_m, result.minimum_distance_m, result.final_distance_m) == (0.5, 0.02, 0.2)
        assert result.reached_after_s == pytest.approx(1.0)

    def test_being_there_once_is_not_success(self) -> None:
        assert not judge(self.reach, [self.sample(3.0, 0.01), self.sample(6.0, 0.2)]).success
        assert judge(self.reach, [self.sample(3.0, 0.2), self.sample(6.0, 0.01)]).success

    def test_nothing_measured_is_no_success(self) -> None:
        result = judge(self.reach, [self.sample(3.0, None)])
        assert result.final_distance_m is None and result.reached_after_s is None and not result.success


class TestNumbers:
    def test_rate_is_the_mean_over_the_intervals(self) -> None:
        assert rate([0, NS_PER_S // 5, 2 * NS_PER_S // 5]) == pytest.approx(5.0)
        assert rate([7]) == rate([]) == 0.0

    def test_time_before_the_clock_ran_belongs_to_no_state(self) -> None:
        states = [(0, 'WAITING'), (10 * NS_PER_S, 'WAITING'), (11 * NS_PER_S, 'RUNNING'), (14 * NS_PER_S, 'STOPPED')]
        assert state_seconds(states) == {'WAITING': 1.0, 'RUNNING': 3.0}

    def test_percentiles_of_nothing_are_unknown(self) -> None:
        assert percentiles([]) == {'p50': None, 'p99': None, 'max': None}
        assert percentiles([3.0, 1.0, 2.0])['p50'] == 2.0

    def test_the_summary_speaks_of_the_worst_reach_and_the_tightest_limit(self) -> None:
        status = SimpleNamespace(
            observations=11, chunks=10, trajectories_rejected=1, requests_skipped=0, trajectories_published=9, replan_rate=5.0,
            dry_run=False, checkpoint_hash='c', stats_hash='s',
        )  # fmt: skip
        report = {
            'seed': 3, 'objects': OBJECTS, 'images': {'scene': 100}, 'drive_faults': 0,
            'trajectories': {'accepted': 8, 'rejected': 1, 'rejections': {'why': 1}},
            'commands': {
                'period_s': 0.01, 'max_step_rad': 0.02, 'max_step_ratio': 0.8,
                'joints': {
                    'a': {'velocity_limit': 2.5, 'max_acceleration': 4.0, 'acceleration_limit': 5.0},
                    'b': {'velocity_limit': 1.5, 'max_acceleration': 1.0, 'acceleration_limit': 5.0},
                },
            },
        }  # fmt: skip
        good = judge(Reach('g', 0.0, 1.0), [Sample(0.0, 'g', 'red cube', 0.3, False), Sample(1.0, 'g', 'red cube', 0.01, True)])
        bad = judge(Reach('b', 1.0, 2.0), [Sample(1.0, 'b', 'blue ball', 0.4, False), Sample(2.0, 'b', 'blue ball', 0.2, False)])
        recorded = Recorded(published_ns=[0, NS_PER_S // 4], latency_ms=[80.0, 90.0])
        summary = summarise(recorded, status, report, [good, bad])
        assert summary['max_command_acceleration_ratio'] == 0.8
        assert (summary['initial_distance_m'], summary['final_distance_m'], summary['success']) == (0.4, 0.2, False)
        assert summary['velocity_limit_times_period_rad'] == pytest.approx(0.015)
        assert summary['trajectories'] == {'published': 9, 'accepted': 8, 'rejected': 1, 'rejections': {'why': 1}}
        assert summary['replan_rate_hz'] == pytest.approx(4.0)
        assert summarise(recorded, status, report, [good])['success'] is True
        assert summarise(recorded, status, report, [])['success'] is False


class TestProcesses:
    def test_a_child_that_ends_is_reported_with_its_last_words(self, tmp_path: Path) -> None:
        child = Child('clock', 'calendar', ['no such year'], tmp_path / 'log')
        deadline = time.monotonic() + 20.0
        while child.running and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ChildError, match=r'(?s)the clock ended with exit code 2.*invalid int value'):
            child.check()
        assert not child.stop()

    def test_a_child_that_ignores_the_request_is_killed(self, tmp_path: Path) -> None:
        (tmp_path / 'deaf.py').write_text(
            'import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint("deaf", flush=True)\ntime.sleep(600)\n'
        )
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv('PYTHONPATH', str(tmp_path))
            child = Child('deaf', 'deaf', [], tmp_path / 'log')
        deadline = time.monotonic() + 20.0
        while 'deaf' not in child.tail() and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        assert not child.stop(patience=0.5)
        assert time.monotonic() - began < 5.0
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)

    def test_a_child_that_ends_on_request_ended_well(self, tmp_path: Path) -> None:
        (tmp_path / 'polite.py').write_text(
            'import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(0))\n'
            'print("up", flush=True)\ntime.sleep(600)\n'
        )
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv('PYTHONPATH', str(tmp_path))
            child = Child('polite', 'polite', [], tmp_path / 'log')
        deadline = time.monotonic() + 20.0
        while 'up' not in child.tail() and time.monotonic() < deadline:
            time.sleep(0.05)
        child.check()
        assert child.stop()

    def test_an_environment_that_is_set_stays(self) -> None:
        given = {'ROS_DOMAIN_ID': '42', 'FASTRTPS_DEFAULT_PROFILES_FILE': 'mine.xml', 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'SUBNET'}
        assert ros_environment(given) == {}

    def test_an_empty_environment_is_completed(self) -> None:
        added = ros_environment({})
        assert added['ROS_AUTOMATIC_DISCOVERY_RANGE'] == 'LOCALHOST'
        assert Path(added['FASTRTPS_DEFAULT_PROFILES_FILE']).name == 'fastdds.xml'
        assert 1 <= int(added['ROS_DOMAIN_ID']) <= 101

    def test_a_domain_in_use_is_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr('random.shuffle', lambda domains: domains.sort())
        first = free_domain()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
            participant.bind(('', 7400 + 250 * first + 10))
            assert free_domain() > first


class TestFolder:
    def test_a_former_run_is_replaced_and_other_files_stay(self, tmp_path: Path) -> None:
        (tmp_path / 'bag').mkdir()
        for name in ('bag/metadata.yaml', 'demo.mp4', 'summary.json', 'notes.txt'):
            (tmp_path / name).write_text('x')
        prepare_folder(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']

    def test_a_folder_that_is_not_a_bag_is_never_removed(self, tmp_path: Path) -> None:
        (tmp_path / 'bag').mkdir()
        (tmp_path / 'bag' / 'thesis.txt').write_text('x')
        prepare_folder(tmp_path)
        assert (tmp_path / 'bag' / 'thesis.txt').is_file()


class TestVideo:
    def test_frames_keep_their_times_and_show_every_camera(self, tmp_path: Path) -> None:
        _write_bag(tmp_path / 'bag', {'/a': (255, 0, 0), '/b': (0, 0, 255)}, period_ns=NS_PER_S // 10, count=12)
        frames = write_video(tmp_path / 'bag', tmp_path / 'v.mp4', ['/a', '/b'], lambda *_: ('first line', 'second line'))
        with av.open(str(tmp_path / 'v.mp4')) as container:
            decoded = list(container.decode(video=0))
        # The first image of /a has no companion yet.
        assert len(decoded) == frames == 11
        times = [float(frame.pts * frame.time_base) for frame in decoded]
        np.testing.assert_allclose(np.diff(times), 0.1, atol=1e-3)
        picture = decoded[-1].to_ndarray(format='rgb24')
        assert picture[240, 300, 0] > 200 and picture[240, 300, 2] < 60
        assert picture[240, 1000, 2] > 200 and picture[240, 1000, 0] < 60
        assert (picture[480:].max(axis=2) > 200).any()

    def test_a_bag_without_images_gives_no_video(self, tmp_path: Path) -> None:
        _write_bag(tmp_path / 'bag', {'/a': (255, 0, 0)}, period_ns=NS_PER_S // 10, count=3)
        assert write_video(tmp_path / 'bag', tmp_path / 'v.mp4', ['/a', '/b'], lambda *_: ('', '')) == 0
        assert not (tmp_path / 'v.mp4').exists()

    def test_captions_follow_instruction_distance_and_state(self) -> None:
        captions = RunCaptions('/status', '/report')
        assert captions('/image', None, 5 * NS_PER_S)[0] == 'no instruction yet'
        report = SimpleNamespace(data='{"instruction": "reach the red cube", "distance_m": 0.123, "success": false}')
        task, _ = captions('/report', report, 6 * NS_PER_S)
        assert '"reach the red cube"' in task and '12.3 cm' in task and 'reached' not in task
        there = SimpleNamespace(data='{"instruction": "reach the red cube", "distance_m": 0.01, "success": true}')
        assert 'reached' in captions('/report', there, 7 * NS_PER_S)[0]
        status = SimpleNamespace(
            state_name='HOLDING', dry_run=False, chunks=7, chunk_rate=5.0, latency_p50_ms=80.0, reason='camera died'
        )
        _, state = captions('/status', status, 8 * NS_PER_S)
        assert '3.0 s' in state and 'HOLDING' in state and 'camera died' in state


def test_signals_of_the_terminal_do_not_reach_the_children(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    child = Child('calendar', 'http.server', ['0', '--bind', '127.0.0.1'], tmp_path / 'log')
    try:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    finally:
        child.stop()
    assert not child.running
    assert signal.getsignal(signal.SIGINT) is before


def _write_bag(path: Path, cameras: dict[str, tuple[int, int, int]], period_ns: int, count: int) -> None:
    """Images of one colour (RGB) per camera, all cameras ``count`` times in turn."""
    types: Any = get_typestore(Stores.ROS2_JAZZY)
    image, header, stamp = (
        types.types[name] for name in ('sensor_msgs/msg/CompressedImage', 'std_msgs/msg/Header', 'builtin_interfaces/msg/Time')
    )
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {topic: writer.add_connection(topic, image.__msgtype__, typestore=types) for topic in cameras}
        for index in range(count):
            for topic, colour in cameras.items():
                pixels = np.full((240, 320, 3), colour[::-1], dtype=np.uint8)
                data = np.asarray(cv2.imencode('.jpg', pixels)[1]).ravel()
                message = image(header=header(stamp=stamp(sec=0, nanosec=0), frame_id=''), format='jpeg', data=data)
                time_ns = NS_PER_S + index * period_ns
                writer.write(connections[topic], time_ns, types.serialize_cdr(message, image.__msgtype__))
