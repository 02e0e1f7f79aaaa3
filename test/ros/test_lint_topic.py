"""`vla-policy lint` on a live topic, over real DDS: what is sent is judged, and silence is explained."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rclpy
from builtin_interfaces.msg import Duration, Time
from rclpy.executors import SingleThreadedExecutor
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import Header, String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_policy_ros.ros import qos

ROOT = Path(__file__).resolve().parents[2]
TOPIC = '/arm/joint_trajectory'

pytestmark = pytest.mark.dds


class Sender:
    """A node that publishes joint states all the time and trajectories when it is told to."""

    def __init__(self, domain: int) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node('sender', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.commands = self.node.create_publisher(JointTrajectory, TOPIC, qos.COMMAND)
        self.states = self.node.create_publisher(JointState, '/joint_states', qos.REPORT)

    def command(self, position: float, seconds: float, stamp: int = 0) -> None:
        lead, rest = int(seconds * 1e9), [0.0, 0.0]
        times = [Duration(sec=ns // 10**9, nanosec=ns % 10**9) for ns in (lead, lead + 100_000_000)]
        points = [JointTrajectoryPoint(positions=[position] * 2, velocities=rest, time_from_start=item) for item in times]
        header = Header(stamp=Time(sec=stamp))
        self.commands.publish(JointTrajectory(header=header, joint_names=['a', 'b'], points=points))

    def spin_until(self, condition: Callable[[], bool], seconds: float = 30.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not condition():
            self.states.publish(JointState(name=['a', 'b'], position=[0.0, 0.0]))
            self.executor.spin_once(timeout_sec=0.05)
        return condition()

    def is_heard(self) -> bool:
        return self.commands.get_subscription_count() > 0 and self.states.get_subscription_count() > 0

    def close(self) -> None:
        self.executor.remove_node(self.node)
        self.node.destroy_node()
        self.executor.shutdown()
        self.context.shutdown()


@pytest.fixture
def sender(ros_domain: int) -> Iterator[Sender]:
    sender = Sender(ros_domain)
    yield sender
    sender.close()


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, '-m', 'vla_policy_ros.cli', 'lint', *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(sender: Sender, process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit code, stdout and stderr, while the sender's states go on."""
    try:
        assert sender.spin_until(lambda: process.poll() is not None, 60.0), 'lint did not end'
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def judged(sender: Sender, process: subprocess.Popen[str], send: Callable[[], None]) -> tuple[int, Any, str]:
    """The exit code, the JSON report and stderr, with ``send`` called once lint hears the sender."""
    assert sender.spin_until(sender.is_heard), 'nobody listens'
    deadline = time.monotonic() + 0.5
    sender.spin_until(lambda: time.monotonic() > deadline)  # a state must have arrived before the first command
    send()
    code, out, err = finish(sender, process)
    assert out, err
    return code, json.loads(out)['topics'][0], err


def test_a_live_topic_is_judged_from_where_the_joints_are(sender: Sender) -> None:
    process = start('--topic', TOPIC, '--seconds', '6', '--velocity', '2', '--json', '-')
    code, topic, err = judged(sender, process, lambda: sender.command(1.0, 0.0))
    assert code == 1
    assert {finding['rule'] for finding in topic['findings']} == {'STEP_TO_FIRST_POINT', 'STEP'}
    assert topic['start'] == '/joint_states' and topic['peaks']['a']['step'] == pytest.approx(1.0)
    assert f'listening to {TOPIC} for 6 s\n' in err and '/clock' not in err


def test_a_smooth_live_topic_ends_with_0(sender: Sender) -> None:
    process = start('--topic', TOPIC, '--seconds', '6', '--velocity', '2', '--json', '-')
    code, topic, _ = judged(sender, process, lambda: sender.command(0.2, 0.5))
    assert (code, topic['messages'], topic['findings']) == (0, 1, [])


def test_where_a_clock_is_published_stamps_are_judged_on_it(sender: Sender) -> None:
    clock = sender.node.create_publisher(Clock, '/clock', 10)
    timer = sender.node.create_timer(0.02, lambda: clock.publish(Clock(clock=Time(sec=50))))
    process = start('--topic', TOPIC, '--seconds', '6', '--velocity', '2', '--json', '-')
    assert sender.spin_until(lambda: clock.get_subscription_count() > 0)
    code, topic, err = judged(sender, process, lambda: sender.command(0.2, 0.5, stamp=50))
    timer.cancel()
    assert (code, topic['findings']) == (0, []), 'a stamp of simulated time has not ended'
    assert '/clock is published: stamps are judged on its time' in err


def test_a_silent_publisher_is_told_from_a_topic_that_is_not_there(sender: Sender) -> None:
    code, out, err = finish(sender, start('--topic', TOPIC, '--seconds', '1'))
    assert (code, out) == (2, '') and 'has a publisher that sent nothing' in err
    code, out, err = finish(sender, start('--topic', '/arms/joint_trajectory', '--seconds', '1'))
    assert (code, out) == (2, '') and f'did you mean {TOPIC}?' in err
    assert 'Traceback' not in err


def test_a_live_topic_of_another_type_is_refused(sender: Sender) -> None:
    sender.node.create_publisher(String, '/words', 10)
    code, out, err = finish(sender, start('--topic', '/words', '--seconds', '1'))
    assert (code, out) == (2, '')
    assert 'topic /words is of type' in err and 'Traceback' not in err
