"""Whatever is wrong is said at configure time, in a sentence, and the node stays alive and unconfigured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

rclpy = pytest.importorskip('rclpy')

from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402

from vla_policy_ros.policy import new_checkpoint  # noqa: E402
from vla_policy_ros.robot import load_robot, parse_robot  # noqa: E402
from vla_policy_ros.ros import parameters  # noqa: E402
from vla_policy_ros.ros.policy_node import PolicyNode  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TABLETOP = ROOT / 'config' / 'robots' / 'tabletop.yaml'
OK, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(load_robot(TABLETOP), 'tiny', tmp_path_factory.mktemp('checkpoint'))


@pytest.fixture
def make_node(ros_domain: int) -> Iterator[Callable[..., PolicyNode]]:
    context = rclpy.Context()
    context.init()
    nodes = []

    def make(**values: Any) -> PolicyNode:
        overrides = [Parameter(name, value=str(value) if isinstance(value, Path) else value) for name, value in values.items()]
        nodes.append(PolicyNode(context=context, parameter_overrides=overrides))
        return nodes[-1]

    yield make
    for node in nodes:
        node.brake_and_release()
        node.destroy_node()
    context.shutdown()


def failure(node: PolicyNode) -> str:
    assert node.trigger_configure() == FAILURE
    return node.fault


def test_missing_parameters_are_named(make_node):
    assert 'parameter robot_file is empty' in failure(make_node())
    assert 'parameter checkpoint is empty' in failure(make_node(robot_file=TABLETOP))


def test_missing_files_are_named(make_node, checkpoint, tmp_path):
    assert 'no such file' in failure(make_node(robot_file='/nowhere.yaml', checkpoint=checkpoint))
    assert 'no such folder' in failure(make_node(robot_file=TABLETOP, checkpoint='/nowhere'))
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert str(empty) in failure(make_node(robot_file=TABLETOP, checkpoint=empty))


def test_a_misspelt_key_of_the_robot_file_is_named_with_the_right_one(make_node, checkpoint, tmp_path):
    broken = tmp_path / 'robot.yaml'
    broken.write_text(TABLETOP.read_text().replace('camera_info: /wrist', 'camera_inof: /wrist'))
    assert "cameras.wrist.camera_inof: 'camera_inof' is not a key here; did you mean 'camera_info'?" in failure(
        make_node(robot_file=broken, checkpoint=checkpoint)
    )


def test_a_checkpoint_of_another_robot_is_refused_by_difference(make_node, checkpoint, tmp_path):
    data = yaml.safe_load(TABLETOP.read_text())
    data['action']['horizon'] = 8
    other = tmp_path / 'robot.yaml'
    other.write_text(yaml.safe_dump(data, sort_keys=False))
    parse_robot(other.read_text())
    assert 'horizon' in failure(make_node(robot_file=other, checkpoint=checkpoint))


def test_truncated_weights_are_refused(make_node, checkpoint, tmp_path):
    broken = tmp_path / 'broken'
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == '.safetensors' else None])
    assert 'model.safetensors' in failure(make_node(robot_file=TABLETOP, checkpoint=broken))


def test_a_failed_configure_can_be_mended_and_repeated(make_node, checkpoint):
    node = make_node(robot_file=TABLETOP, checkpoint='/nowhere')
    failure(node)
    assert node.set_parameters([Parameter('checkpoint', value=str(checkpoint))])[0].successful
    assert node.trigger_configure() == OK
    assert node.fault == ''
    assert node.trigger_activate() == OK
    assert node.trigger_deactivate() == OK
    assert node.trigger_cleanup() == OK
    assert node.trigger_configure() == OK, 'cleanup must leave a node that configures again'


def test_parameters_change_only_when_that_is_safe(make_node, checkpoint):
    node = make_node(robot_file=TABLETOP, checkpoint=checkpoint)
    assert not node.set_parameters([Parameter('replan_rate', value=1000.0)])[0].successful
    assert node.trigger_configure() == OK
    answer = node.set_parameters([Parameter('device', value='cuda')])[0]
    assert not answer.successful and 'clean it up first' in answer.reason
    assert node.set_parameters([Parameter('dry_run', value=True)])[0].successful
    assert node.trigger_activate() == OK
    answer = node.set_parameters([Parameter('dry_run', value=False)])[0]
    assert not answer.successful and 'deactivate it first' in answer.reason
    assert node.set_parameters([Parameter('replan_rate', value=2.0)])[0].successful


def test_an_unknown_trajectory_stamp_is_refused(make_node, checkpoint):
    assert "'zero' or 'start'" in failure(make_node(robot_file=TABLETOP, checkpoint=checkpoint, trajectory_stamp='soon'))


def test_the_parameter_file_holds_the_declared_defaults():
    given = yaml.safe_load((ROOT / 'config' / 'policy.yaml').read_text())['/**']['ros__parameters']
    declared = {parameter.name: parameter.default for parameter in parameters.PARAMETERS}
    assert given == {name: declared[name] for name in given}
    assert set(declared) - set(given) == {'robot_file', 'checkpoint', 'autostart'}
