"""`vla-policy demo` as an operator runs it: two processes, real topics, the shipped checkpoint; then everything it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from vla_policy_ros.robot import load_robot

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0
# Half speed: a machine that runs other tests at the same time must not look like a slow policy.
COMMAND = [sys.executable, '-m', 'vla_policy_ros.cli', 'demo', '--headless', '--realtime-factor', '0.5']

pytestmark = [pytest.mark.dds, pytest.mark.slow]


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """One run: its folder, the summary given by ``--json``, and what it printed."""
    folder = tmp_path_factory.mktemp('demo')
    command = [*COMMAND, '--seconds', f'{SECONDS}', '--out', str(folder / 'out'), '--json', str(folder / 'd.json')]
    result = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stdout + result.stderr
    yield folder / 'out', json.loads((folder / 'd.json').read_text()), result.stdout


def _environment() -> dict[str, str]:
    """Without a domain, so that the demo looks for a free one."""
    return {name: value for name, value in os.environ.items() if name != 'ROS_DOMAIN_ID'} | {'COLUMNS': '120'}


def test_the_summary_has_the_promised_keys(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, summary, _ = finished
    assert summary.keys() >= {
        'observations', 'chunks', 'trajectories', 'replan_rate_hz', 'replan_rate_wanted_hz', 'max_command_step_rad',
        'velocity_limit_times_period_rad', 'initial_distance_m', 'final_distance_m', 'success', 'latency_ms', 'instructions',
        'state_seconds', 'real_time_factor',
    }  # fmt: skip
    assert summary['trajectories'].keys() >= {'published', 'accepted', 'rejected'}
    assert summary['latency_ms'].keys() >= {'p50', 'p99'}
    assert json.loads((out / 'summary.json').read_text()) == summary


def test_every_published_trajectory_is_accepted_by_the_controller(finished: tuple[Path, dict[str, Any], str]) -> None:
    trajectories = finished[1]['trajectories']
    assert trajectories['rejected'] == 0
    assert trajectories['accepted'] == trajectories['published'] > 0


def test_the_replan_rate_is_kept(finished: tuple[Path, dict[str, Any], str]) -> None:
    summary = finished[1]
    assert summary['replan_rate_hz'] == pytest.approx(summary['replan_rate_wanted_hz'], rel=0.1)
    assert summary['chunks'] == pytest.approx(SECONDS * summary['replan_rate_wanted_hz'], rel=0.15)
    assert 0.0 < summary['latency_ms']['p50'] <= summary['latency_ms']['p99']
    assert summary['state_seconds']['RUNNING'] > 0.9 * SECONDS


def test_commanded_steps_stay_within_the_velocity_limits(finished: tuple[Path, dict[str, Any], str]) -> None:
    summary = finished[1]
    assert 0.0 < summary['max_command_step_rad'] <= summary['velocity_limit_times_period_rad'] + 1e-9
    assert summary['max_command_step_ratio'] <= 1.0 + 1e-6


def test_the_arm_moves_toward_the_named_object(finished: tuple[Path, dict[str, Any], str]) -> None:
    summary = finished[1]
    for reach in summary['instructions']:
        assert reach['target'] in reach['instruction']
        assert reach['target'] in summary['objects']
        assert reach['minimum_distance_m'] < 0.03 < reach['initial_distance_m']


def test_the_bag_reads_back_and_tells_the_same_story(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, summary, _ = finished
    robot = load_robot(ROOT / 'config' / 'robots' / 'tabletop.yaml')
    counts: dict[str, int] = {}
    accelerations: list[float] = []
    with AnyReader([out / 'bag']) as reader:
        assert 0.9 * SECONDS < (reader.end_time - reader.start_time) / 1e9 < SECONDS + 15.0
        for connection, _, raw in reader.messages():
            message: Any = reader.deserialize(raw, connection.msgtype)
            counts[connection.topic] = counts.get(connection.topic, 0) + 1
            if connection.msgtype == 'trajectory_msgs/msg/JointTrajectory':
                accelerations += [len(point.accelerations) for point in message.points]
    assert counts['/policy_node/chunk'] == summary['chunks']
    assert counts[robot.controllers['arm'].topic] == summary['trajectories']['published']
    assert counts['/policy_node/preview/arm'] == summary['trajectories']['published']
    assert counts[robot.instruction.topic] == len(summary['instructions'])
    assert set(accelerations) == {0}
    for camera in robot.cameras.values():
        assert counts[f'{camera.topic}/compressed'] > 5 * SECONDS
        assert counts[str(camera.camera_info)] > 5 * SECONDS
    assert counts[robot.state.topic] > 50 * SECONDS
    size = sum(file.stat().st_size for file in (out / 'bag').iterdir())
    assert size < 50e6 * SECONDS / 30.0


def test_the_video_shows_motion_at_the_speed_of_simulated_time(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, summary, _ = finished
    with av.open(str(out / 'demo.mp4')) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == 'h264' and stream.codec_context.pix_fmt == 'yuv420p'
        assert (stream.width, stream.height) == (1280, 560)
        frames = list(container.decode(video=0))
    assert len(frames) == summary['video_frames'] > 5 * SECONDS
    times = np.array([float(frame.pts * frame.time_base) for frame in frames])
    assert 0.9 * SECONDS < times[-1] - times[0] < SECONDS + 15.0
    first, last = (frames[k].to_ndarray(format='gray').astype(float)[:480, :640] for k in (0, -1))
    assert (np.abs(first - last) > 25.0).mean() > 0.01


def test_the_operator_gets_a_readable_summary(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, printed = finished
    assert f'{summary["trajectories"]["accepted"]} accepted, 0 rejected' in printed
    assert all(reach['instruction'] in printed for reach in summary['instructions'])


@contextmanager
def _moving_demo(out: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A long demo that has planned its first chunks, and what it prints from there on; ended at the latest on leaving."""
    demo = subprocess.Popen(
        [*COMMAND, '--seconds', '600', '--out', str(out)],
        cwd=ROOT, env=_environment() | {'PYTHONUNBUFFERED': '1'}, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if 'RUNNING' in line and ' 0 chunks' not in line:
                break
        yield demo, demo.stdout
    finally:
        demo.terminate()
        demo.wait()


def test_an_interrupted_demo_still_writes_its_results(tmp_path: Path) -> None:
    with _moving_demo(tmp_path) as (demo, output):
        demo.send_signal(signal.SIGINT)
        output.read()
        assert demo.wait(60) == 0
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['interrupted'] and summary['chunks'] > 0 and summary['trajectories']['rejected'] == 0
    assert (tmp_path / 'demo.mp4').is_file()
    assert _children_of(tmp_path) == []


def test_a_policy_that_cannot_work_ends_the_demo_with_the_reason(tmp_path: Path) -> None:
    empty = tmp_path / 'empty'
    empty.mkdir()
    command = [*COMMAND, '--out', str(tmp_path / 'out'), '--checkpoint', str(empty)]
    result = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert 'the policy node cannot work' in result.stdout and f'{empty} has no config.json' in result.stdout
    assert _children_of(tmp_path) == []


def test_a_killed_policy_node_ends_the_demo_with_its_last_words(tmp_path: Path) -> None:
    with _moving_demo(tmp_path) as (demo, output):
        (victim,) = _children_of(tmp_path, 'vla_policy_ros.ros.policy_node')
        os.kill(victim, signal.SIGKILL)
        printed = output.read()
        assert demo.wait(60) == 1
    assert 'the policy was killed by signal 9' in printed and 'policy.log' in printed
    assert _children_of(tmp_path) == []


def _children_of(folder: Path, module: str = '') -> list[int]:
    """Processes whose log lies below ``folder`` and whose command line names ``module``."""
    found = []
    for process in Path('/proc').iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            output = os.readlink(process / 'fd' / '1')
            words = (process / 'cmdline').read_bytes().decode(errors='replace')
        except OSError:
            continue
        if output.startswith(f'{folder}/') and module in words:
            found.append(int(process.name))
    return found
