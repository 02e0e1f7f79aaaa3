"""A real recording (Unitree G1, compressed camera, 26 joints) played over DDS at its own pace into the real node, in dry run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from vla_policy_ros.control.jtc_rules import ControllerParameters, lint, validate
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.demo.processes import Child
from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.policy import Policy, new_checkpoint
from vla_policy_ros.replay.reproduce import LiveChunk, foreign, reproduce
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.types import NS_PER_S

ROOT = Path(__file__).resolve().parents[2]
BAG = ROOT.parent / 'shared' / 'data' / 'g1_bottle' / 'bag'
ROBOT_FILE = ROOT / 'config' / 'robots' / 'g1_bottle.yaml'
REPLAN_RATE = 5.0
SEED = 1
PREVIEW = '/policy_node/preview/upper_body'

pytestmark = [
    pytest.mark.dds,
    pytest.mark.slow,
    pytest.mark.skipif(not BAG.is_dir(), reason=f'the recording is not on this machine: {BAG}'),
]


@dataclass(frozen=True)
class Played:
    """What the node said while the recording was played: (node clock in ns, message) per topic."""

    robot: Robot
    begin_ns: int
    end_ns: int
    messages: dict[str, list[tuple[int, Any]]]
    node_log: str
    checkpoint: Path


@pytest.fixture(scope='module')
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Play the recording once; every test looks at the same run."""
    folder = tmp_path_factory.mktemp('g1')
    robot = load_robot(ROBOT_FILE)
    checkpoint = new_checkpoint(robot, 'tiny', folder / 'checkpoint')
    with pytest.MonkeyPatch.context() as environment:
        _play(environment, folder, robot, checkpoint)
    with AnyReader([BAG]) as reader:
        begin_ns, end_ns = reader.start_time, reader.end_time
    with AnyReader([folder / 'answers']) as reader:
        messages: dict[str, list[tuple[int, Any]]] = {}
        for connection, time_ns, raw in reader.messages():
            messages.setdefault(connection.topic, []).append((time_ns, reader.deserialize(raw, connection.msgtype)))
    yield Played(robot, begin_ns, end_ns, messages, (folder / 'node.log').read_text(), checkpoint)


def _play(environment: pytest.MonkeyPatch, folder: Path, robot: Robot, checkpoint: Path) -> None:
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter
    from trajectory_msgs.msg import JointTrajectory

    from vla_policy_msgs.msg import ActionChunk, PolicyStatus
    from vla_policy_ros.demo.processes import free_domain
    from vla_policy_ros.ros import qos
    from vla_policy_ros.ros.recorder import BagRecorder, RecordedTopic

    domain = free_domain()
    environment.setenv('ROS_DOMAIN_ID', str(domain))
    inputs = [robot.cameras['head'].topic, str(robot.cameras['head'].camera_info), robot.state.topic, robot.instruction.topic]
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    executor = SingleThreadedExecutor(context=context)
    overrides = [Parameter('use_sim_time', value=True)]
    listener = rclpy.create_node('listener', context=context, parameter_overrides=overrides)
    recorder = BagRecorder(
        listener,
        folder / 'answers',
        [
            RecordedTopic('/policy_node/chunk', ActionChunk, qos.REPORT),
            RecordedTopic('/policy_node/status', PolicyStatus, qos.REPORT),
            RecordedTopic(PREVIEW, JointTrajectory, qos.REPORT),
            RecordedTopic('/upper_body_controller/joint_trajectory', JointTrajectory, qos.REPORT),
        ],
    )
    executor.add_node(listener)
    node = Child(
        'policy node',
        'vla_policy_ros.ros.policy_node',
        [
            '--ros-args', '-p', f'robot_file:={ROBOT_FILE}', '-p', f'checkpoint:={checkpoint}', '-p', 'use_sim_time:=true',
            '-p', 'dry_run:=true', '-p', 'autostart:=true', '-p', f'replan_rate:={REPLAN_RATE}', '-p', f'seed:={SEED}',
        ],
        folder / 'node.log',
    )  # fmt: skip
    player = Child('bag player', 'vla_policy_ros.ros.bag_player', [str(BAG), '--wait-for', *inputs], folder / 'player.log')
    try:
        deadline = time.monotonic() + 120.0
        while player.running and time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.2)
            node.check()
        assert player.stop(), f'the bag player failed:\n{player.tail()}'
    finally:
        player.stop()
        clean = node.stop()
        recorder.close()
        executor.remove_node(listener)
        listener.destroy_node()
        context.shutdown()
    assert clean, f'the policy node did not end cleanly:\n{node.tail()}'


def _running_ns(played: Played) -> int:
    """Nanoseconds between the ends of the recording during which the last known state was RUNNING."""
    statuses = [
        (message.header.stamp.sec * NS_PER_S + message.header.stamp.nanosec, message.state_name)
        for _, message in played.messages['/policy_node/status']
    ]
    statuses.append((played.end_ns, 'END'))
    total = 0
    for (begin, state), (end, _) in pairwise(statuses):
        overlap = min(end, played.end_ns) - max(begin, played.begin_ns)
        total += max(0, overlap) if state == 'RUNNING' else 0
    return total


def test_the_node_runs_for_most_of_the_recording(played: Played) -> None:
    share = _running_ns(played) / (played.end_ns - played.begin_ns)
    assert share >= 0.9, f'RUNNING for {100 * share:.0f} % of the recording:\n{played.node_log}'


def test_real_images_become_chunks_at_the_replan_rate(played: Played) -> None:
    chunks = [message for _, message in played.messages['/policy_node/chunk']]
    duration = (played.end_ns - played.begin_ns) / NS_PER_S
    assert len(chunks) >= 0.9 * 0.9 * REPLAN_RATE * duration
    assert {chunk.instruction for chunk in chunks} == {'Pick up the yellow bottle on the table.'}
    for chunk in chunks:
        actions = np.reshape(chunk.actions, (chunk.horizon, len(chunk.joint_names)))
        assert actions.shape == (played.robot.action.horizon, 26)
        assert np.isfinite(actions).all()
        stamp_ns = chunk.header.stamp.sec * NS_PER_S + chunk.header.stamp.nanosec
        assert played.begin_ns <= stamp_ns <= played.end_ns
        assert 0.0 < chunk.latency_ms < 1e3 * chunk.horizon * chunk.dt


def test_every_chunk_answers_another_image(played: Played) -> None:
    stamps = [(m.header.stamp.sec, m.header.stamp.nanosec) for _, m in played.messages['/policy_node/chunk']]
    assert len(set(stamps)) == len(stamps)


def test_every_previewed_trajectory_passes_the_controller(played: Played) -> None:
    controller = played.robot.controllers['upper_body']
    parameters = ControllerParameters(joints=controller.joints, update_rate=controller.update_rate)
    previews = played.messages[PREVIEW]
    assert len(previews) > 0
    for time_ns, message in previews:
        trajectory = _to_trajectory_message(message)
        assert validate(trajectory, parameters, time_ns) is None
        assert lint(trajectory) == []


def test_previewed_points_respect_the_limits_of_the_robot_file(played: Played) -> None:
    limits = [played.robot.limits[joint] for joint in played.robot.controllers['upper_body'].joints]
    lower, upper = np.array([limit.position for limit in limits]).T
    speed = np.array([limit.velocity for limit in limits])
    for _, message in played.messages[PREVIEW]:
        positions = np.array([point.positions for point in message.points])
        velocities = np.array([point.velocities for point in message.points])
        assert (positions >= lower - 1e-9).all() and (positions <= upper + 1e-9).all()
        assert (np.abs(velocities) <= speed + 1e-9).all()
        assert (velocities[-1] == 0.0).all()


def test_a_replay_answers_every_chunk_as_the_live_node_did(played: Played) -> None:
    live = [LiveChunk.of(message) for _, message in played.messages['/policy_node/chunk']]
    policy = Policy.load(played.checkpoint, played.robot, seed=SEED)
    made = reproduce(BagEpisode(BAG, played.robot), policy.infer, live)
    assert made.recorded == made.matched == len(live) > 40
    assert made.largest is not None and made.largest < 1e-6
    assert foreign(live, policy.checkpoint_hash, policy.stats_hash) == 0
    other = Policy.load(played.checkpoint, played.robot, seed=SEED + 1)
    assert (reproduce(BagEpisode(BAG, played.robot), other.infer, live[:5]).largest or 0.0) > 1e-3, 'the comparison would notice'


def test_dry_run_sends_nothing_to_the_controller(played: Played) -> None:
    assert '/upper_body_controller/joint_trajectory' not in played.messages


def _to_trajectory_message(message: Any) -> TrajectoryMessage:
    """A trajectory_msgs/JointTrajectory for the emulator."""
    points = [
        TrajectoryPoint(
            point.time_from_start.sec * NS_PER_S + point.time_from_start.nanosec,
            point.positions, point.velocities, point.accelerations, point.effort,
        )
        for point in message.points
    ]  # fmt: skip
    return TrajectoryMessage(tuple(message.joint_names), points, message.header.stamp.sec * NS_PER_S + message.header.stamp.nanosec)
