"""Bad messages over DDS: the node says what is wrong, once, and commands nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

rclpy = pytest.importorskip('rclpy')

from builtin_interfaces.msg import Time  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, JointState  # noqa: E402
from std_msgs.msg import Header, String  # noqa: E402

from vla_policy_ros.policy import new_checkpoint  # noqa: E402
from vla_policy_ros.robot import load_robot  # noqa: E402
from vla_policy_ros.ros.inputs import OperatorLog  # noqa: E402
from vla_policy_ros.ros.policy_node import PolicyNode  # noqa: E402

pytestmark = pytest.mark.dds

ROBOT_FILE = Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml'
ROBOT = load_robot(ROBOT_FILE)


class Stage:
    """The node and a publisher of its inputs in one process. `good` publishes sound inputs, changed by ``changes`` per kind."""

    def __init__(self, checkpoint: Path) -> None:
        self.context = rclpy.Context()
        self.context.init()
        values = {'robot_file': str(ROBOT_FILE), 'checkpoint': str(checkpoint)}
        self.node = PolicyNode(context=self.context, parameter_overrides=[Parameter(k, value=v) for k, v in values.items()])
        self.said: list[str] = []
        tell = OperatorLog.tell
        self.node._log.tell = lambda s, **k: (self.said.append(s) if s else None, tell(self.node._log, s, **k))  # type: ignore[method-assign]
        assert self.node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        self.driver_context = rclpy.Context()  # of its own: one participant cannot have a topic with two types
        self.driver_context.init()
        self.driver = rclpy.create_node('driver', context=self.driver_context)
        self.publishers: dict[str, Any] = {}
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def publish(self, topic: str, message: Any) -> None:
        if topic not in self.publishers:
            self.publishers[topic] = self.driver.create_publisher(type(message), topic, 1)
        self.publishers[topic].publish(message)

    def good(self, change: Callable[[str, Any], Any]) -> None:
        """One round of inputs; ``change`` gets each topic's message and returns what is published instead."""
        stamp = self.driver.get_clock().now().to_msg()
        joints = list(ROBOT.state.joints)
        messages: dict[str, Any] = {
            ROBOT.state.topic: JointState(header=Header(stamp=stamp), name=joints, position=[0.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0]),
            ROBOT.instruction.topic: String(data='reach the red ball'),
        }
        for camera in ROBOT.cameras.values():
            header = Header(stamp=stamp)
            messages[camera.topic] = Image(header=header, height=48, width=64, encoding='rgb8', step=192, data=bytes(192 * 48))
            k = [60.0, 0.0, 32.0, 0.0, 60.0, 24.0, 0.0, 0.0, 1.0]
            messages[str(camera.camera_info)] = CameraInfo(header=header, height=48, width=64, k=k)
        for topic, message in messages.items():
            self.publish(topic, change(topic, message))

    def run(self, change: Callable[[str, Any], Any], until: Callable[[], bool], patience: float = 20.0) -> None:
        deadline = time.monotonic() + patience
        while not until():
            assert time.monotonic() < deadline, self.reason
            self.good(change)
            for _ in range(8):
                self.executor.spin_once(timeout_sec=0.01)

    @property
    def reason(self) -> str:
        return self.node.runtime.reason if self.node.runtime else self.node.fault

    def close(self) -> None:
        self.node.brake_and_release()
        self.executor.shutdown()
        self.node.destroy_node()
        self.driver.destroy_node()
        self.context.shutdown()
        self.driver_context.shutdown()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(ROBOT, 'tiny', tmp_path_factory.mktemp('checkpoint'))


@pytest.fixture
def stage(ros_domain: int, checkpoint: Path) -> Iterator[Stage]:
    stage = Stage(checkpoint)
    yield stage
    stage.close()


def with_value(topic: str, **values: Any) -> Callable[[str, Any], Any]:
    """Changes fields of the messages on one topic."""

    def change(name: str, message: Any) -> Any:
        if name == topic:
            for field, value in values.items():
                setattr(message, field, value)
        return message

    return change


SCENE = ROBOT.cameras['scene']
NAN = [float('nan'), 0.0, 0.0, -1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (with_value(ROBOT.state.topic, position=NAN), "position of joint 'panda_joint1' is nan"),
        (with_value(ROBOT.state.topic, name=['x', *ROBOT.state.joints[1:]]), "joint 'panda_joint1' is missing"),
        (with_value(SCENE.topic, encoding='pink'), "image encoding 'pink'"),
        (with_value(SCENE.topic, step=10), 'image step is 10 bytes'),
        (with_value(SCENE.topic, header=Header()), 'header.stamp is zero'),
        (with_value(SCENE.topic, header=Header(stamp=Time(sec=4_000_000_000 - 2**31))), 'in the future'),
        (with_value(str(SCENE.camera_info), k=[0.0] * 9), 'K is all zeros'),
        (with_value(ROBOT.instruction.topic, data='x' * 1000), 'instruction has 1000 characters'),
        (lambda t, m: String(data='an image') if t == SCENE.topic else m, 'published as std_msgs/msg/String, not as sensor_msgs'),
    ],
)
def test_bad_input_is_named_and_never_acted_on(stage: Stage, change: Callable[[str, Any], Any], words: str) -> None:
    assert stage.node.trigger_activate() == TransitionCallbackReturn.SUCCESS

    def named() -> bool:
        stage.node.publish_status()
        return words in stage.reason

    stage.run(change, named)
    runtime = stage.node.runtime
    assert runtime is not None
    assert runtime.state.name == 'WAITING'
    assert runtime.counters.observations == 0 and runtime.counters.trajectories_published == 0


def test_an_image_that_contradicts_its_camera_info_holds(stage: Stage) -> None:
    assert stage.node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    stage.run(
        with_value(str(SCENE.camera_info), width=640, height=480),
        lambda: "camera 'scene': image is 64x48 but camera_info describes 640x480" in stage.reason,
    )
    assert stage.node.runtime is not None and stage.node.runtime.counters.trajectories_published == 0


def test_an_operator_hears_each_kind_of_problem_once() -> None:
    said: list[str] = []

    class Recorder:
        def get_logger(self) -> Any:
            return self

        def warning(self, sentence: str) -> None:
            said.append(sentence)

    log = OperatorLog(Recorder())  # type: ignore[arg-type]
    for age in range(5):
        log.tell(f"camera 'cam1': newest message is {age}.2 s old")
        log.tell(f"camera 'cam2': newest message is {age}.2 s old")
    assert said == ["camera 'cam1': newest message is 0.2 s old", "camera 'cam2': newest message is 0.2 s old"]
