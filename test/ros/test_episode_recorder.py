"""`vla-policy record` writes episodes that can be trained on, also when it is killed, and says what it does not hear."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from episode_recordings import ROBOT, ROBOT_TEXT, K, number_of, picture, position, target

from vla_policy_ros.episodes.bag_episode import BagEpisode

rclpy = pytest.importorskip('rclpy')

pytestmark = [pytest.mark.dds, pytest.mark.slow]
HZ = 20.0


class Robot:
    """Publishes what the small robot of `episode_recordings` publishes, at `HZ`, on a thread of its own."""

    def __init__(self, domain: int) -> None:
        from sensor_msgs.msg import CameraInfo, Image, JointState
        from trajectory_msgs.msg import JointTrajectory

        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain)
        self._node = rclpy.create_node('robot', context=self._context)
        self._images = self._node.create_publisher(Image, '/top', 5)
        self._infos = self._node.create_publisher(CameraInfo, '/top/info', 5)
        self._states = self._node.create_publisher(JointState, '/joint_states', 10)
        self._commands = self._node.create_publisher(JointTrajectory, '/arm/joint_trajectory', 10)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        from sensor_msgs.msg import CameraInfo, Image, JointState
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

        index = 0
        while not self._end.wait(1.0 / HZ):
            stamp = self._node.get_clock().now().to_msg()
            state = JointState(name=['a', 'b'], position=position(index % 30))
            command = JointTrajectory(joint_names=['a', 'b'], points=[JointTrajectoryPoint(positions=target(index % 30))])
            command.points[0].time_from_start.nanosec = round(1e9 / HZ)
            info = CameraInfo(width=64, height=48, k=K)
            image = Image(width=64, height=48, encoding='rgb8', step=192, data=picture(index).tobytes())
            for message in (state, command, info, image):
                message.header.stamp = stamp
            self._states.publish(state)
            self._commands.publish(command)
            self._infos.publish(info)
            self._images.publish(image)
            index += 1

    def call_toggle(self) -> str:
        from std_srvs.srv import Trigger

        client = self._node.create_client(Trigger, '/episode_recorder/toggle')
        assert client.wait_for_service(timeout_sec=10.0)
        future = client.call_async(Trigger.Request())
        rclpy.spin_until_future_complete(self._node, future, rclpy.executors.SingleThreadedExecutor(context=self._context), 10.0)
        answer = future.result()
        assert answer is not None and answer.success
        return str(answer.message)

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._node.destroy_node()
        self._context.shutdown()


@pytest.fixture
def robot(ros_domain: int) -> Iterator[Robot]:
    publisher = Robot(ros_domain)
    yield publisher
    publisher.close()


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / 'robot.yaml').write_text(ROBOT_TEXT)
    command = [sys.executable, '-m', 'vla_policy_ros.cli', 'record', 'out', '--robot', 'robot.yaml', *arguments]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen[str], part: str) -> list[str]:
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if part in line:
            return lines
    raise AssertionError(f'no {part!r} in {"".join(lines)}')


def provenance(bag: Path) -> dict[str, Any]:
    return json.loads((bag / 'provenance.json').read_text())


def test_episodes_of_a_time_each_begin_with_the_instruction(tmp_path: Path, robot: Robot) -> None:
    process = start(tmp_path, '--episodes', '2', '--seconds', '2', '--instruction', 'pick up the cup')
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    bags = sorted((tmp_path / 'out').iterdir())
    assert [bag.name for bag in bags] == ['episode_000000', 'episode_000001']
    ends = 0
    for bag in bags:
        episode = BagEpisode(bag, ROBOT)
        assert len(episode.steps) > HZ and episode.instructions == ('pick up the cup',)
        assert episode.commands.source == 'commands on /arm/joint_trajectory'
        numbers = [number_of(o.cameras['top'].rgb) for o in episode.observations(range(5))]
        assert [(b - a) % 32 for a, b in itertools.pairwise(numbers)] == [1] * 4
        said = provenance(bag)
        assert said['finished'] and said['robot_file'] == ROBOT_TEXT and said['instruction'] == 'pick up the cup'
        assert said['began_ns'] >= ends and said['ended_ns'] - said['began_ns'] == pytest.approx(2e9, abs=0.5e9)
        assert episode.provenance.recorded['robot_digest'] == episode.provenance.robot_digest
        ends = said['ended_ns']


def test_a_killed_recorder_leaves_what_it_heard_and_the_next_one_goes_on(tmp_path: Path, robot: Robot) -> None:
    process = start(tmp_path, '--instruction', 'wave')
    wait_for_line(process, 'recording')
    time.sleep(4.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    bag = tmp_path / 'out' / 'episode_000000'
    assert not (bag / 'metadata.yaml').exists() and provenance(bag)['finished'] is False
    episode = BagEpisode(bag, ROBOT)
    assert len(episode.steps) > 1.5 * HZ  # all but the last second and what the machine was late by
    assert any('was not finished' in note for note in episode.notes)
    again = start(tmp_path, '--instruction', 'wave', '--seconds', '1')
    again.communicate(timeout=60)
    assert again.returncode == 0 and (tmp_path / 'out' / 'episode_000001' / 'metadata.yaml').exists()


def test_the_service_ends_an_episode_and_ctrl_c_finishes_the_last(tmp_path: Path, robot: Robot) -> None:
    process = start(tmp_path, '--episodes', '0', '--instruction', 'wave', '--pause', '0.2')
    wait_for_line(process, 'recording')
    time.sleep(1.0)
    assert robot.call_toggle() == 'the episode ends'
    wait_for_line(process, 'episode_000001: recording')
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [provenance(bag)['finished'] for bag in sorted((tmp_path / 'out').iterdir())] == [True, True]
    assert all(len(BagEpisode(bag, ROBOT).steps) > 5 for bag in (tmp_path / 'out').iterdir())


def test_inputs_that_are_not_heard_are_named(tmp_path: Path, robot: Robot) -> None:
    process = start(tmp_path, '--patience', '6')
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2 and 'not heard within 6 s: /instruction; are they published' in told
    assert 'Traceback' not in told and not list((tmp_path / 'out').iterdir())
