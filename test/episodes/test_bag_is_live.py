"""An episode of a bag is what the node sees: the same messages through the node's own subscriptions give the same observations.

The node side is the real `ros.inputs.Inputs` with the real runtime, fed with messages that rclpy decoded; only the subscriptions
are called by hand, in the order of the recording and at its times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from episode_recordings import ROBOT, entries, record
from rosbags.highlevel import AnyReader

from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.runtime import PolicyRuntime, Settings
from vla_policy_ros.types import Observation

pytest.importorskip('rclpy')

ROOT = Path(__file__).resolve().parents[2]
G1 = ROOT.parent / 'shared' / 'data' / 'g1_bottle' / 'bag'


class Subscriptions:
    """What `Inputs` asks of its node: it remembers who wants which topic, and as which type."""

    def __init__(self) -> None:
        self.callbacks: dict[str, tuple[type, Callable[[Any], None]]] = {}

    def create_subscription(self, kind: type, topic: str, callback: Callable[[Any], None], profile: Any) -> object:
        self.callbacks[topic] = (kind, callback)
        return object()

    def destroy_subscription(self, subscription: object) -> None:
        pass


def live(bag: Path, robot: Robot) -> Iterator[Observation]:
    """What the node could answer at the moments at which every camera has a new image and nothing is wrong."""
    from rclpy.serialization import deserialize_message

    from vla_policy_ros.ros.inputs import Inputs

    listener = SimpleNamespace(on_state=lambda *_: None, on_warning=lambda *_: None)
    planner = TrajectoryPlanner(JointLimits.from_robot(robot), Emission.for_controller(100.0, 'start'))
    runtime = PolicyRuntime(
        robot, lambda *_: None, planner, SimpleNamespace(submit=lambda *_: True), listener, lambda: None, Settings()
    )
    node, now, told = Subscriptions(), [0], []
    log = SimpleNamespace(tell=lambda sentence, **_: told.append(sentence) if sentence else None)
    inputs = Inputs(node, robot, runtime, lambda: now[0], log)
    cameras = {camera.topic: name for name, camera in robot.cameras.items()}
    fresh: set[str] = set()
    with AnyReader([bag]) as reader:
        for connection, time_ns, data in reader.messages():
            if connection.topic not in node.callbacks:
                continue
            kind, callback = node.callbacks[connection.topic]
            now[0] = time_ns
            callback(deserialize_message(bytes(data), kind))
            if connection.topic in cameras:
                fresh.add(cameras[connection.topic])
                if len(fresh) == len(cameras) and not runtime.inputs.problems(time_ns):
                    fresh.clear()
                    yield runtime.inputs.snapshot().decode()
    inputs.close()
    assert not told


def assert_same(ours: Observation, theirs: Observation) -> None:
    assert (ours.stamp_ns, ours.state_stamp_ns, ours.instruction) == (theirs.stamp_ns, theirs.state_stamp_ns, theirs.instruction)
    np.testing.assert_array_equal(ours.state, theirs.state)
    assert list(ours.cameras) == list(theirs.cameras)
    for name, view in ours.cameras.items():
        assert view.stamp_ns == theirs.cameras[name].stamp_ns
        np.testing.assert_array_equal(view.rgb, theirs.cameras[name].rgb)
        np.testing.assert_array_equal(view.K, theirs.cameras[name].K)


def test_a_small_bag_is_seen_as_by_the_node(tmp_path: Path) -> None:
    bag = record(tmp_path / 'bag', entries(10))
    ours, theirs = list(BagEpisode(bag, ROBOT).observations()), list(live(bag, ROBOT))
    assert len(ours) == len(theirs) == 10
    for mine, its in zip(ours, theirs, strict=True):
        assert_same(mine, its)


@pytest.mark.slow
@pytest.mark.skipif(not G1.is_dir(), reason=f'the recording is not on this machine: {G1}')
def test_a_recording_of_a_real_robot_is_seen_as_by_the_node() -> None:
    robot = load_robot(ROOT / 'config' / 'robots' / 'g1_bottle.yaml')
    episode = BagEpisode(G1, robot)
    count = 0
    for mine, its in zip(episode.observations(), live(G1, robot), strict=True):
        assert_same(mine, its)
        count += 1
    assert count == 348
