"""The workspace of a robot file: found beside the file, mapped to the action joints, every mistake named before anything moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vla_policy_ros.control.workspace import Workspace
from vla_policy_ros.robot import RobotFileError, load_robot

# Two parallel links of 0.4 and 0.3 m in a plane, a gripper, and a lift that nobody commands.
URDF = """<?xml version="1.0"?>
<robot name="planar">
  <link name="floor"/><link name="column"/><link name="upper"/><link name="lower"/><link name="tool"/><link name="jaw"/>
  <joint name="lift" type="prismatic"><parent link="floor"/><child link="column"/><axis xyz="0 0 1"/>
    <limit lower="0.1" upper="0.6" velocity="1" effort="1"/></joint>
  <joint name="shoulder" type="revolute"><parent link="column"/><child link="upper"/><axis xyz="0 0 1"/>
    <limit lower="-2" upper="2" velocity="1" effort="1"/></joint>
  <joint name="elbow" type="revolute"><parent link="upper"/><child link="lower"/><origin xyz="0.4 0 0"/><axis xyz="0 0 1"/>
    <limit lower="-2" upper="2" velocity="1" effort="1"/></joint>
  <joint name="flange" type="fixed"><parent link="lower"/><child link="tool"/><origin xyz="0.3 0 0"/></joint>
  <joint name="jaws" type="prismatic"><parent link="tool"/><child link="jaw"/><axis xyz="0 1 0"/>
    <limit lower="0" upper="0.05" velocity="1" effort="1"/></joint>
</robot>
"""


def robot_file(folder: Path, urdf: str | None = URDF, joints: tuple[str, ...] = ('elbow', 'shoulder'), **workspace: Any) -> Path:
    """A robot file and its URDF in a folder beside it; ``workspace`` changes the section."""
    if urdf is not None:
        (folder / 'urdf').mkdir(exist_ok=True)
        (folder / 'urdf' / 'planar.urdf').write_text(urdf)
    section = {
        'urdf': 'urdf/planar.urdf',
        'tip': 'tool',
        'base': 'column',
        'box': {'lower': [0.1, -0.3, -0.1], 'upper': [0.8, 0.3, 0.1]},
        'margin': 0.02,
    }
    limit = {'position': [-1.0, 1.0], 'velocity': 1.0, 'acceleration': 2.0}
    data = {
        'name': 'arm',
        'cameras': {'scene': {'topic': '/scene/image_raw'}},
        'state': {'joints': list(joints)},
        'action': {'joints': list(joints), 'period': 0.1, 'horizon': 8},
        'limits': {joint: limit for joint in joints},
        'controllers': {'arm': {'topic': '/arm/joint_trajectory', 'joints': list(joints)}},
        'workspace': {**section, **workspace},
    }
    path = folder / 'arm.yaml'
    path.write_text(yaml.safe_dump(data))
    return path


def workspace(*arguments: Any, **changes: Any) -> Workspace:
    found = Workspace.from_robot(load_robot(robot_file(*arguments, **changes)))
    assert found is not None
    return found


def problem(*arguments: Any, **changes: Any) -> str:
    with pytest.raises(RobotFileError) as error:
        workspace(*arguments, **changes)
    return str(error.value)


def test_positions_are_those_of_the_tip_for_the_action_order(tmp_path: Path) -> None:
    found = workspace(tmp_path)
    shoulder, elbow = 0.3, -0.8
    x = 0.4 * np.cos(shoulder) + 0.3 * np.cos(shoulder + elbow)
    y = 0.4 * np.sin(shoulder) + 0.3 * np.sin(shoulder + elbow)
    np.testing.assert_allclose(
        found.positions(np.array([[elbow, shoulder], [0.0, 0.0]])), [[x, y, 0.0], [0.7, 0.0, 0.0]], atol=1e-12
    )
    assert found.names == ('elbow', 'shoulder') and found.margin == 0.02
    np.testing.assert_array_equal(found.upper, [0.8, 0.3, 0.1])


def test_the_urdf_is_found_from_wherever_the_node_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = robot_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    robot = load_robot(path.name)
    monkeypatch.chdir('/')
    assert Workspace.from_robot(robot) is not None


def test_a_robot_file_without_the_section_has_no_workspace(tmp_path: Path) -> None:
    data = yaml.safe_load(robot_file(tmp_path).read_text())
    del data['workspace']
    (tmp_path / 'plain.yaml').write_text(yaml.safe_dump(data))
    assert Workspace.from_robot(load_robot(tmp_path / 'plain.yaml')) is None


def test_the_default_base_is_the_root_and_a_joint_that_nobody_commands_is_where_it_is_held(tmp_path: Path) -> None:
    lifted = workspace(tmp_path, base=None, held={'lift': 0.25})
    np.testing.assert_allclose(lifted.positions(np.zeros((1, 2))), [[0.7, 0.0, 0.25]], atol=1e-12)


def test_a_gripper_that_the_urdf_does_not_have_is_allowed_where_it_is_listed(tmp_path: Path) -> None:
    joints = ('grip', 'shoulder', 'elbow')
    assert "commanded joint 'grip' is no moving joint of the URDF; it has lift, shoulder, elbow, jaws" in problem(
        tmp_path, joints=joints
    )
    found = workspace(tmp_path, joints=joints, unrelated=['grip'])
    np.testing.assert_allclose(found.positions(np.array([[0.9, 0.0, np.pi / 2]])), [[0.4, 0.3, 0.0]], atol=1e-12)
    assert "workspace.unrelated: 'gripp' is not known; did you mean 'grip'?" in problem(
        tmp_path, joints=joints, unrelated=['gripp']
    )


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'tip': 'tol'}, "tip 'tol' is no link of the URDF; did you mean 'tool'? it has floor, column, upper, lower, tool, jaw"),
        ({'base': 'table'}, "base 'table' is no link of the URDF"),
        ({'base': 'jaw'}, "base 'jaw' does not lie between the root and tip 'tool'; use one of floor, column, upper, lower"),
        ({'tip': 'column', 'base': None, 'held': {'lift': 0.2}}, "no commanded joint moves link 'column' relative to 'floor'"),
        ({'base': None}, "joint 'lift' moves the tip but is not commanded, and 0 is outside its limits [0.1, 0.6]"),
        ({'held': {'lfit': 0.2}}, "held joint 'lfit' is no moving joint of the URDF; did you mean 'lift'?"),
        ({'held': {'elbow': 0.2}}, "joint 'elbow' is commanded, or mimics another, and cannot be held"),
        ({'joints': ('elbow', 'sholder')}, "commanded joint 'sholder' is no moving joint of the URDF; did you mean 'shoulder'?"),
        ({'urdf': None}, 'cannot be read as a URDF'),
        ({'box': {'lower': [0.1, 0.3, 0.0], 'upper': [0.5, 0.3, 0.1]}}, 'box is empty in y: from 0.3 to 0.3 m'),
        ({'margin': 0.1}, 'box is empty in z: from -0.1 to 0.1 m with a margin of 0.1 m'),
        ({'box': {'lower': [0, 0, 0], 'uper': [1, 1, 1]}}, "box.uper: 'uper' is not a key here; did you mean 'upper'?"),
        ({'tipp': 'tool'}, "workspace.tipp: 'tipp' is not a key here; did you mean 'tip'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_section_is_named_with_what_there_is(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in problem(tmp_path, **changes)


XACRO = 'xmlns:xacro="http://www.ros.org/wiki/xacro"'
LIFT = '<parent link="floor"/>'


@pytest.mark.parametrize(
    ('base', 'old', 'new', 'expected'),
    [
        ('column', '</robot>', '', 'cannot be read as a URDF'),
        ('column', '</robot>', f'<xacro:arm {XACRO}/></robot>', 'expand it with `xacro planar.urdf'),
        ('column', 'name="elbow" type="revolute"', 'name="elbow" type="planar"', "joint 'elbow' above the tip is 'planar'"),
        ('column', 'name="elbow"', 'name="shoulder"', 'two joints have the same name'),
        ('column', '<parent link="column"/>', '<parent link="tool"/>', 'form a circle'),
        ('column', '<origin xyz="0.4 0 0"/><axis xyz="0 0 1"/>', '<axis xyz="0 0 0"/>', 'MuJoCo cannot compile'),
        (None, LIFT, f'<mimic joint="nobody"/>{LIFT}', "joint 'lift' mimics 'nobody', which is no other joint"),
        (None, LIFT, f'<mimic joint="lift"/>{LIFT}', "joint 'lift' mimics 'lift', which is no other joint"),
        (None, LIFT, f'<mimic joint="elbow" offset="x"/>{LIFT}', "of joint 'lift' has offset = 'x', which is not a number"),
        (None, 'lower="0.1"', 'lower="low"', "<limit> of joint 'lift' has lower = 'low', which is not a number"),
    ],
)  # fmt: skip
def test_a_urdf_that_gives_no_chain_is_refused_with_the_place(
    tmp_path: Path, base: str | None, old: str, new: str, expected: str
) -> None:
    assert old in URDF
    assert expected in problem(tmp_path, urdf=URDF.replace(old, new), base=base)


@pytest.mark.parametrize(
    ('old', 'new'),
    [('lower="0.1"', 'lower="low"'), ('"lift" type="prismatic"', '"lift" type="planar"'), ('<robot ', f'<robot {XACRO} ')],
)
def test_what_lies_outside_the_chain_does_not_matter(tmp_path: Path, old: str, new: str) -> None:
    assert old in URDF
    np.testing.assert_allclose(workspace(tmp_path, urdf=URDF.replace(old, new)).positions(np.zeros((1, 2))), [[0.7, 0, 0]])
