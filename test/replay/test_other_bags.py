"""`vla-policy replay` of ROS 1 bags, and of many bags at once: the same reports, wherever the work is done."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from episode_recordings import ROBOT, ROBOT_TEXT, entries, record
from rosbags.convert.converter import convert
from rosbags.typesys import Stores, get_typestore
from typer.testing import CliRunner, Result

from vla_policy_ros.bags.reading import Bag
from vla_policy_ros.cli import app
from vla_policy_ros.policy.checkpoint import new_checkpoint
from vla_policy_ros.replay.command import REPORT


@pytest.fixture(scope='module')
def setting(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp('replay')
    robot = folder / 'toy.yaml'
    robot.write_text(ROBOT_TEXT)
    bag, ros1 = record(folder / 'bag', entries(15)), folder / 'ros1.bag'
    convert([bag], ros1, 'mcap', 9, None, 'message', None, get_typestore(Stores.ROS1_NOETIC), (), (), (), ())
    return SimpleNamespace(robot=robot, checkpoint=new_checkpoint(ROBOT, 'tiny', folder / 'tiny', seed=1), bag=bag, ros1=ros1)


def call(setting: SimpleNamespace, out: Path, bags: list[Path], *arguments: object) -> Result:
    fixed = ['--robot', str(setting.robot), '--checkpoint', str(setting.checkpoint), '--out', str(out), '--no-annotated']
    result = CliRunner().invoke(app, ['replay', *map(str, bags), *fixed, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def metrics(out: Path, name: str) -> str:
    return json.dumps(json.loads((out / name / REPORT).read_text())['metrics'])


def test_a_ros_1_bag_is_read_byte_by_byte_as_the_rosbag2_that_it_came_from(setting: SimpleNamespace) -> None:
    with Bag(setting.bag) as wanted, Bag(setting.ros1) as found:
        assert found.types == wanted.types
        both = [[(m.topic, m.type, m.receive_ns, m.data) for m in bag.messages(set(bag.types))] for bag in (wanted, found)]
    assert both[0] == both[1] and len(both[0]) > 20


def test_a_ros_1_bag_gives_the_same_metrics(setting: SimpleNamespace, tmp_path: Path) -> None:
    done = call(setting, tmp_path, [setting.bag, setting.ros1])
    assert done.exit_code == 0, done.stderr
    assert metrics(tmp_path, 'bag') == metrics(tmp_path, 'ros1.bag')


@pytest.mark.parametrize('kept', [0, 10, 4000])
def test_a_ros_1_bag_that_is_cut_short_is_named_with_what_helps(setting: SimpleNamespace, tmp_path: Path, kept: int) -> None:
    cut = tmp_path / 'cut.bag'
    cut.write_bytes(setting.ros1.read_bytes()[:kept])
    refused = call(setting, tmp_path / 'out', [cut])
    assert refused.exit_code == 2 and str(cut) in refused.stderr and 'rosbag reindex' in refused.stderr
    assert 'Traceback' not in refused.stderr and not list((tmp_path / 'out').iterdir())


def test_processes_give_what_one_gives(setting: SimpleNamespace, tmp_path: Path) -> None:
    second = Path(shutil.copytree(setting.bag, tmp_path / 'second'))
    assert call(setting, tmp_path / 'one', [setting.bag]).exit_code == 0
    done = call(setting, tmp_path / 'two', [setting.bag, second], '--jobs', 2)
    assert done.exit_code == 0 and '[2/2]' in done.stderr, done.stderr
    assert metrics(tmp_path / 'one', 'bag') == metrics(tmp_path / 'two', 'bag') == metrics(tmp_path / 'two', 'second')


@pytest.mark.skipif(importlib.util.find_spec('ray') is not None, reason='Ray is installed here')
def test_without_ray_its_option_says_what_to_install(setting: SimpleNamespace, tmp_path: Path) -> None:
    refused = call(setting, tmp_path, [setting.bag], '--ray')
    assert refused.exit_code == 2 and 'requirements/ray.txt' in refused.stderr


@pytest.mark.skipif(importlib.util.find_spec('ray') is None, reason='Ray is not installed: pip install -r requirements/ray.txt')
def test_ray_gives_what_one_process_gives(setting: SimpleNamespace, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(setting.bag, tmp_path / 'broken'))
    for file in broken.iterdir():
        file.write_bytes(b'')
    assert call(setting, tmp_path / 'one', [setting.bag]).exit_code == 0
    done = call(setting, tmp_path / 'ray', [setting.bag, broken], '--ray')
    assert done.exit_code == 2 and 'broken' in done.stderr, done.stderr
    assert metrics(tmp_path / 'one', 'bag') == metrics(tmp_path / 'ray', 'bag')
