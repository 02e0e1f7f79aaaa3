"""The launch files under a real launch service: processes start, the node comes up as the arguments say, an interrupt ends it all.

``launch`` and ``launch_ros`` come with a ROS 2 installation and have no wheels, so these tests run where ROS 2 is installed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('launch_ros', reason='launch_ros is not installed: it comes with ROS 2, not as a wheel')
pytestmark = pytest.mark.dds

import rclpy  # noqa: E402
from lifecycle_msgs.srv import GetState  # noqa: E402
from rcl_interfaces.srv import GetParameters  # noqa: E402

from vla_policy_ros.resources import share_path  # noqa: E402

PATIENCE_S = 60.0

# What `ros2 launch` does, without needing the command line tools.
LAUNCH = """
import sys
from launch import LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService()
arguments = [tuple(argument.split(':=', 1)) for argument in sys.argv[2:]]
service.include_launch_description(IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments=arguments))
sys.exit(service.run())
"""


class Launched:
    """A launch file that runs, its output in a file."""

    def __init__(self, launch_file: Path, arguments: dict[str, str], output: Path) -> None:
        self._output = output
        environment = {name: value for name, value in os.environ.items() if name != 'FASTRTPS_DEFAULT_PROFILES_FILE'}
        with output.open('w') as log:
            self.process = subprocess.Popen(
                [sys.executable, '-c', LAUNCH, str(launch_file), *(f'{name}:={value}' for name, value in arguments.items())],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1'},
                start_new_session=True,  # a background process of a script would ignore SIGINT
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors='replace')

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.output):
                return match
            time.sleep(0.1)
        raise AssertionError(f'{pattern!r} did not appear in:\n{self.output}')

    def interrupt(self) -> int:
        """Send SIGINT to the launch service alone, as `ros2 launch` gets it; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def start(root: Path, tmp_path: Path, ros_domain: int) -> Iterator[Callable[..., Launched]]:
    """``start('policy', robot_file='tabletop')`` runs a launch file; whatever still runs after the test is killed."""
    running: list[Launched] = []

    def run(name: str, **arguments: str) -> Launched:
        running.append(Launched(root / 'launch' / f'{name}.launch.py', arguments, tmp_path / f'{len(running)}.log'))
        return running[-1]

    yield run
    for launched in running:
        if launched.process.poll() is None:
            os.killpg(launched.process.pid, signal.SIGKILL)
            launched.process.wait()
        for pid in re.findall(r'process started with pid \[(\d+)\]', launched.output):
            if Path(f'/proc/{pid}').exists():
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def ask(ros_domain: int) -> Iterator[Callable[[str, Any, Any], Any]]:
    """``ask('/policy_node/get_state', GetState, request)`` calls a service and returns the response."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=ros_domain)
    node = rclpy.create_node('launch_test', context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def call(service: str, kind: Any, request: Any) -> Any:
        client = node.create_client(kind, service)
        assert client.wait_for_service(PATIENCE_S), f'no service {service}'
        future = client.call_async(request)
        executor.spin_until_future_complete(future, PATIENCE_S)
        assert future.result() is not None, f'{service} gave no answer'
        return future.result()

    yield call
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh, untrained checkpoint for the simulated arm."""
    from vla_policy_ros.policy.checkpoint import new_checkpoint
    from vla_policy_ros.robot import load_robot

    robot = load_robot(share_path('config/robots/tabletop.yaml'))
    return str(new_checkpoint(robot, 'tiny', tmp_path_factory.mktemp('launch') / 'checkpoint'))


def state(ask: Callable[..., Any], node: str) -> str:
    return str(ask(f'{node}/get_state', GetState, GetState.Request()).current_state.label)


def parameters(ask: Callable[..., Any], node: str, *names: str) -> list[Any]:
    values = ask(f'{node}/get_parameters', GetParameters, GetParameters.Request(names=list(names))).values
    return [rclpy.parameter.parameter_value_to_python(value) for value in values]


def wait_for_state(ask: Callable[..., Any], node: str, wanted: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (now := state(ask, node)) != wanted:
        assert time.monotonic() < deadline, f'{node} is {now}, not {wanted}'
        time.sleep(0.2)


def test_policy_comes_up_active_in_its_namespace(start: Callable[..., Launched], ask: Callable[..., Any], checkpoint: str) -> None:
    launched = start('policy', robot_file='tabletop', checkpoint=checkpoint, namespace='left', dry_run='true')
    wait_for_state(ask, '/left/policy_node', 'active')
    names = ('dry_run', 'use_sim_time', 'autostart', 'checkpoint')
    assert parameters(ask, '/left/policy_node', *names) == [True, False, False, checkpoint]
    assert launched.interrupt() == 0, launched.output


def test_without_autostart_the_node_waits_and_the_parameter_file_rules(
    start: Callable[..., Launched], ask: Callable[..., Any], tmp_path: Path
) -> None:
    """What is not given on the command line keeps the file's value, above all a dry run that somebody wrote there."""
    file = tmp_path / 'policy.yaml'
    file.write_text('/**:\n  ros__parameters:\n    dry_run: true\n    replan_rate: 2.5\n    checkpoint: from_the_file\n')
    launched = start('policy', robot_file='tabletop', checkpoint='', params_file=str(file), autostart='false', use_sim_time='true')
    names = ('dry_run', 'replan_rate', 'checkpoint', 'use_sim_time')
    assert parameters(ask, '/policy_node', *names) == [True, 2.5, 'from_the_file', True]
    assert state(ask, '/policy_node') == 'unconfigured'
    pid = launched.wait_for(r'policy_node-1\]: process started with pid \[(\d+)\]')[1]
    environment = Path(f'/proc/{pid}/environ').read_text().split('\0')
    assert f'FASTRTPS_DEFAULT_PROFILES_FILE={share_path("config/fastdds.xml")}' in environment
    assert launched.interrupt() == 0, launched.output


def test_a_node_that_cannot_be_configured_says_so_and_stays(start: Callable[..., Launched], ask: Callable[..., Any]) -> None:
    launched = start('policy', robot_file='tabletop', checkpoint='no_such_folder')
    launched.wait_for('no_such_folder')
    launched.wait_for('could not be configured')
    assert state(ask, '/policy_node') == 'unconfigured'
    assert launched.interrupt() == 0, launched.output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'checkpoint': 'x'}, "required argument 'robot_file'"),
        ({'checkpoint': 'x', 'robot_file': 'tabeltop'}, "robot file 'tabeltop'.*shipped:.*tabletop"),
        ({'checkpoint': 'x', 'robot_file': 'tabletop', 'dry_run': 'maybe'}, 'dry_run'),
    ],
)
def test_bad_arguments_end_the_launch_with_a_sentence(
    start: Callable[..., Launched], arguments: dict[str, str], message: str
) -> None:
    launched = start('policy', **arguments)
    assert launched.process.wait(PATIENCE_S) != 0
    assert re.search(message, launched.output), launched.output


def test_demo_brings_both_nodes_up_on_simulated_time(
    start: Callable[..., Launched], ask: Callable[..., Any], checkpoint: str
) -> None:
    launched = start('demo', checkpoint=checkpoint, seed='3', dry_run='true')
    wait_for_state(ask, '/policy_node', 'active')
    assert parameters(ask, '/policy_node', 'use_sim_time', 'dry_run') == [True, True]
    assert parameters(ask, '/simulator', 'seed') == [3]
    launched.wait_for(r'policy_node\]: active')
    assert launched.interrupt() == 0, launched.output
