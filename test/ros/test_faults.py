"""What must happen when a part dies: the real simulator and the real node over DDS.

The policy is untrained and draws fresh noise for every chunk, so that the arm never stands still by itself.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy')

from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue  # noqa: E402
from rcl_interfaces.srv import SetParameters  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from vla_policy_msgs.msg import ActionChunk, PolicyStatus  # noqa: E402
from vla_policy_msgs.srv import SetInstruction  # noqa: E402
from vla_policy_ros.demo.processes import Child  # noqa: E402
from vla_policy_ros.policy import new_checkpoint  # noqa: E402
from vla_policy_ros.robot import load_robot  # noqa: E402
from vla_policy_ros.ros import qos  # noqa: E402
from vla_policy_ros.ros.inputs import controller_state_type  # noqa: E402

pytestmark = [pytest.mark.dds, pytest.mark.slow]

ROBOT_FILE = Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml'
ROBOT = load_robot(ROBOT_FILE)
REPLAN_RATE = 5.0


def seconds(stamp: Any) -> float:
    return stamp.sec + 1e-9 * stamp.nanosec


class Rig:
    """Simulator and node as processes, and an observer of what they publish. Times are simulated seconds."""

    def __init__(self, folder: Path) -> None:
        checkpoint = new_checkpoint(ROBOT, 'tiny', folder / 'checkpoint')
        # The untrained policy sometimes pushes the arm against the table, which would rightly stop the node.
        robot_file = folder / 'tabletop.yaml'
        robot_file.write_text(Path(ROBOT_FILE).read_text().replace(', following_error: 0.4', ''))
        common = ['--ros-args', '-p', f'robot_file:={robot_file}']
        self.simulator = Child('simulator', 'vla_policy_ros.sim.ros_node', common, folder / 'simulator.log')
        arguments = [*common, '-p', f'checkpoint:={checkpoint}', '-p', 'use_sim_time:=true', '-p', 'autostart:=true']
        arguments += ['-p', f'replan_rate:={REPLAN_RATE}', '-p', 'seed:=1']
        self.policy = Child('policy node', 'vla_policy_ros.ros.policy_node', arguments, folder / 'policy.log')
        self.statuses: list[PolicyStatus] = []
        self.chunks: list[ActionChunk] = []
        self.commanded: list[tuple[float, np.ndarray, np.ndarray]] = []
        self.context = rclpy.Context()
        self.context.init()
        self.node = rclpy.create_node('observer', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.node.create_subscription(PolicyStatus, '/policy_node/status', self.statuses.append, qos.LATCHED)
        self.node.create_subscription(ActionChunk, '/policy_node/chunk', self.chunks.append, qos.REPORT)
        state_topic = ROBOT.controllers['arm'].state_topic
        self.node.create_subscription(controller_state_type(), state_topic, self._on_controller_state, qos.STATE)

    def _on_controller_state(self, message: Any) -> None:
        reference = message if hasattr(message, 'position') else message.reference
        positions = message.position if hasattr(message, 'position') else reference.positions
        velocities = message.velocity if hasattr(message, 'velocity') else reference.velocities
        self.commanded.append((seconds(message.header.stamp), np.array(positions), np.array(velocities)))

    def spin_until(self, condition: Callable[[], bool], patience: float = 60.0) -> None:
        """Spin until ``condition``, or fail with the last status and the logs."""
        deadline = time.monotonic() + patience
        while not condition():
            self.executor.spin_once(timeout_sec=0.02)
            if time.monotonic() > deadline:
                said = self.statuses[-1].reason if self.statuses else 'nothing'
                pytest.fail(f'waited {patience} s; last status: {said}\n{self.policy.tail()}\n{self.simulator.tail()}')

    def spin(self, simulated: float) -> None:
        """Spin for an amount of simulated time, read off the controller state."""
        until = self.commanded[-1][0] + simulated
        self.spin_until(lambda: self.commanded[-1][0] >= until, 20 * simulated + 10)

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, name)
        self.spin_until(client.service_is_ready)
        future = client.call_async(request)
        self.spin_until(future.done)
        return future.result()

    def disable_cameras(self, *names: str) -> None:
        value = ParameterValue(type=ParameterType.PARAMETER_STRING_ARRAY, string_array_value=list(names) or [''])
        request = SetParameters.Request(parameters=[Parameter(name='disabled_cameras', value=value)])
        assert self.call(SetParameters, '/simulator/set_parameters', request).results[0].successful

    @property
    def state(self) -> str:
        return self.statuses[-1].state_name if self.statuses else ''

    def wait_for_state(self, name: str) -> None:
        self.spin_until(lambda: self.state == name)

    def close(self) -> None:
        self.policy.stop()
        self.simulator.stop()
        self.node.destroy_node()
        self.context.shutdown()


@pytest.fixture
def rig(ros_domain: int, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    try:
        rig.wait_for_state('WAITING')
        rig.spin_until(lambda: bool(rig.commanded))
        assert rig.call(SetInstruction, '/policy_node/set_instruction', SetInstruction.Request(instruction='go')).success
        rig.wait_for_state('RUNNING')
        rig.spin(2.0)
        yield rig
    finally:
        rig.close()


def largest_acceleration_ratio(states: list[tuple[float, np.ndarray, np.ndarray]]) -> float:
    """Largest |commanded acceleration| over its limit, from the commanded velocities of consecutive controller states."""
    limits = np.array([ROBOT.limits[joint].acceleration for joint in ROBOT.action.joints])
    ratios = [
        np.max(np.abs(v1 - v0) / (t1 - t0) / limits)
        for (t0, _, v0), (t1, _, v1) in pairwise(states)
        if t1 > t0
    ]
    return float(max(ratios))


def rests(states: list[tuple[float, np.ndarray, np.ndarray]], for_seconds: float) -> bool:
    """Whether the last ``for_seconds`` of ``states`` show no commanded motion."""
    last = [state for state in states if state[0] > states[-1][0] - for_seconds]
    return all(not velocity.any() and np.array_equal(position, last[0][1]) for _, position, velocity in last)


def test_killing_the_policy_while_moving_ends_in_a_smooth_stop(rig: Rig) -> None:
    rig.spin_until(lambda: np.abs(rig.commanded[-1][2]).max() > 0.1)
    before = len(rig.commanded)
    os.kill(rig.policy.pid, signal.SIGKILL)
    rig.spin(4.0)
    after = rig.commanded[before - 1 :]
    assert np.abs(after[0][2]).max() > 0.1, 'the arm must be moving when the node dies'
    assert rests(after, 1.0)
    assert largest_acceleration_ratio(after) <= 1.02
    steps = [np.abs(p1 - p0).max() for (_, p0, _), (_, p1, _) in pairwise(after)]
    assert max(steps) < 0.1, 'no jump at the end'


def test_losing_one_camera_brakes_holds_and_recovers(rig: Rig) -> None:
    limit = ROBOT.timing.max_image_age + 1.0 / REPLAN_RATE
    rig.disable_cameras('wrist')
    # The untrained policy may be refused now and then, which holds too.
    rig.spin_until(lambda: rig.state == 'HOLDING' and "'wrist'" in rig.statuses[-1].reason)
    holding = rig.statuses[-1]
    wrist = next(health for health in holding.inputs if health.name == 'camera:wrist')
    assert wrist.age <= limit
    began = len(rig.commanded)
    rig.spin(3.0)
    assert rig.state == 'HOLDING', rig.statuses[-1].reason
    assert rests(rig.commanded, 1.0)
    assert largest_acceleration_ratio(rig.commanded[began - 1 :]) <= 1.02
    chunks = len(rig.chunks)
    rig.spin(1.0)
    assert len(rig.chunks) == chunks, 'nothing is planned on a dead camera'
    rig.disable_cameras()
    rig.wait_for_state('RUNNING')
    rig.spin(1.0)
    assert len(rig.chunks) > chunks
    assert np.abs(rig.commanded[-1][2]).max() > 0.0


def test_soft_stop_brakes_and_stays_until_reset(rig: Rig) -> None:
    assert rig.call(Trigger, '/policy_node/stop', Trigger.Request()).success
    rig.wait_for_state('STOPPED')
    began = len(rig.commanded)
    rig.spin(3.0)
    assert rests(rig.commanded, 1.0)
    assert largest_acceleration_ratio(rig.commanded[began - 1 :]) <= 1.02
    assert rig.call(Trigger, '/policy_node/reset', Trigger.Request()).success
    rig.wait_for_state('RUNNING')


def test_ending_the_node_brakes_first(rig: Rig) -> None:
    began = len(rig.commanded)
    assert rig.policy.stop(), 'SIGINT must end the node by itself'
    rig.spin(3.0)
    after = rig.commanded[began - 1 :]
    assert rests(after, 1.0)
    assert largest_acceleration_ratio(after) <= 1.02
    moving = [t for t, _, velocity in after if velocity.any()]
    assert moving[-1] - after[0][0] < 1.5, 'a brake ends sooner than the tail of a chunk would'
