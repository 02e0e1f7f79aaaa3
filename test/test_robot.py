"""The robot file: strict, every problem named with a remedy, every shipped file valid, the reference pages up to date."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vla_policy_ros.robot import Robot, RobotFileError, load_robot, parse_robot

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / 'config' / 'robots').glob('*.yaml'))


def two_joint_robot() -> dict[str, Any]:
    """The smallest robot file that uses every section."""
    limit = {'position': [-1.0, 1.0], 'velocity': 1.0, 'acceleration': 2.0}
    return {
        'name': 'arm',
        'cameras': {'scene': {'topic': '/scene/image_raw', 'camera_info': '/scene/camera_info'}},
        'state': {'topic': '/joint_states', 'joints': ['shoulder', 'elbow'], 'fields': ['position']},
        'instruction': {'topic': '/instruction'},
        'action': {'joints': ['elbow', 'shoulder'], 'period': 0.1, 'horizon': 8},
        'limits': {'shoulder': dict(limit), 'elbow': dict(limit)},
        'controllers': {'arm': {'topic': '/arm/joint_trajectory', 'joints': ['shoulder', 'elbow']}},
        'timing': {'max_image_age': 0.5},
    }


def parse(data: dict[str, Any]) -> Robot:
    return parse_robot(yaml.safe_dump(data, sort_keys=False))


def problem(data: dict[str, Any]) -> str:
    """The message that refuses ``data``."""
    with pytest.raises(RobotFileError) as error:
        parse(data)
    return str(error.value)


def at(data: dict[str, Any], path: str) -> Any:
    for key in path.split('.'):
        data = data[key]
    return data


class TestShippedFiles:
    @pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
    def test_every_shipped_robot_file_loads_under_its_own_name(self, path: Path) -> None:
        assert load_robot(path).name == path.stem

    def test_the_robots_of_the_demo_and_of_the_recording_are_shipped(self) -> None:
        assert {'tabletop', 'g1_bottle'} <= {path.stem for path in SHIPPED}

    @pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
    def test_a_chunk_reaches_further_than_the_oldest_usable_image(self, path: Path) -> None:
        robot = load_robot(path)
        assert robot.action.horizon * robot.action.period > robot.timing.max_image_age


class TestMeaning:
    def test_action_positions_follow_the_action_order_whatever_the_state_order(self) -> None:
        robot = parse(two_joint_robot())
        np.testing.assert_array_equal(robot.action_positions(np.array([1.0, 2.0])), [2.0, 1.0])

    def test_state_names_are_one_block_per_field(self) -> None:
        data = two_joint_robot()
        data['state']['fields'] = ['position', 'velocity']
        assert parse(data).state.names == ('shoulder.position', 'elbow.position', 'shoulder.velocity', 'elbow.velocity')

    def test_delta_mask_spares_absolute_joints(self) -> None:
        data = two_joint_robot()
        data['action'] |= {'representation': 'delta', 'absolute_joints': ['elbow']}
        np.testing.assert_array_equal(parse(data).action.delta_mask, [False, True])
        assert not parse(two_joint_robot()).action.delta_mask.any()

    def test_fixed_K_is_row_major(self) -> None:
        data = two_joint_robot()
        data['cameras']['scene'] = {'topic': '/i', 'K': [500, 0, 320, 0, 510, 240, 0, 0, 1], 'width': 640, 'height': 480}
        K = parse(data).cameras['scene'].fixed_K
        assert K is not None
        np.testing.assert_array_equal(K, [[500, 0, 320], [0, 510, 240], [0, 0, 1]])

    def test_a_loaded_robot_cannot_be_changed(self) -> None:
        robot = parse(two_joint_robot())
        with pytest.raises(ValueError, match='frozen'):
            robot.action.horizon = 3  # type: ignore[misc]


class TestStrictness:
    @pytest.mark.parametrize(
        ('section', 'wrong', 'meant'),
        [
            ('', 'camera', 'cameras'),
            ('cameras.scene', 'camera_inf', 'camera_info'),
            ('state', 'joint', 'joints'),
            ('instruction', 'topics', 'topic'),
            ('action', 'horizn', 'horizon'),
            ('limits.elbow', 'velocty', 'velocity'),
            ('controllers.arm', 'update_rat', 'update_rate'),
            ('timing', 'max_image_ag', 'max_image_age'),
        ],
    )
    def test_an_unknown_key_is_refused_with_the_key_that_was_meant(self, section: str, wrong: str, meant: str) -> None:
        data = two_joint_robot()
        (at(data, section) if section else data)[wrong] = 1
        message = problem(data)
        assert f"'{wrong}' is not a key here; did you mean '{meant}'?" in message
        assert f'{section}.{wrong}' in message if section else wrong in message

    @pytest.mark.parametrize('section', ['name', 'cameras', 'state', 'action', 'limits', 'controllers'])
    def test_a_missing_section_is_named(self, section: str) -> None:
        data = two_joint_robot()
        del data[section]
        assert f'{section}: is required' in problem(data)

    def test_all_problems_are_listed_at_once(self) -> None:
        data = two_joint_robot()
        data['action']['horizon'] = 0
        data['timing']['max_image_age'] = -1
        data['limits']['elbow']['velocity'] = 0
        message = problem(data)
        assert '3 problem(s)' in message
        assert all(place in message for place in ('action.horizon', 'timing.max_image_age', 'limits.elbow.velocity'))

    def test_a_wrong_value_is_quoted(self) -> None:
        data = two_joint_robot()
        data['cameras']['scene']['transport'] = 'theora'
        message = problem(data)
        assert 'cameras.scene.transport' in message and "'theora'" in message and "'compressed'" in message

    def test_a_key_given_twice_is_refused(self) -> None:
        text = yaml.safe_dump(two_joint_robot()) + 'name: other\n'
        with pytest.raises(RobotFileError, match="key 'name' is given twice"):
            parse_robot(text)

    def test_a_nested_key_given_twice_is_refused(self) -> None:
        text = 'name: arm\nlimits:\n  elbow: {velocity: 1.0, velocity: 9.0}\n'
        with pytest.raises(RobotFileError, match="'velocity' is given twice"):
            parse_robot(text)


class TestCrossChecks:
    def test_an_action_joint_without_limits(self) -> None:
        data = two_joint_robot()
        del data['limits']['elbow']
        assert "limits: no limits for action joint 'elbow'" in problem(data)

    def test_limits_of_an_unknown_joint(self) -> None:
        data = two_joint_robot()
        data['limits']['elbw'] = data['limits']['elbow']
        assert "limits: 'elbw' is not known; did you mean 'elbow'?" in problem(data)

    def test_a_joint_that_no_controller_executes(self) -> None:
        data = two_joint_robot()
        data['controllers']['arm']['joints'] = ['shoulder']
        assert "no controller executes joint 'elbow'" in problem(data)

    def test_a_joint_of_two_controllers(self) -> None:
        data = two_joint_robot()
        data['controllers']['other'] = {'topic': '/other', 'joints': ['elbow']}
        assert "joint 'elbow' belongs to both 'arm' and 'other'" in problem(data)

    def test_two_controllers_on_one_topic(self) -> None:
        data = two_joint_robot()
        data['controllers'] = {
            'one': {'topic': '/same', 'joints': ['shoulder']},
            'two': {'topic': '/same', 'joints': ['elbow']},
        }
        assert "'one' and 'two' share topic /same" in problem(data)

    def test_a_controller_of_an_unknown_joint(self) -> None:
        data = two_joint_robot()
        data['controllers']['arm']['joints'] = ['shoulder', 'elbow', 'wrist']
        assert "controllers.arm.joints: 'wrist' is not known" in problem(data)

    @pytest.mark.parametrize('place', ['state.joints', 'action.joints', 'controllers.arm.joints'])
    def test_a_joint_listed_twice(self, place: str) -> None:
        data = two_joint_robot()
        at(data, place).append('elbow')
        assert f"{place}: 'elbow' is listed twice" in problem(data)

    def test_a_state_field_listed_twice(self) -> None:
        data = two_joint_robot()
        data['state']['fields'] = ['position', 'position']
        assert "state.fields: 'position' is listed twice" in problem(data)

    def test_an_action_joint_that_is_not_measured(self) -> None:
        data = two_joint_robot()
        data['state']['joints'] = ['shoulder']
        assert "missing ['elbow']" in problem(data)

    def test_a_state_without_positions(self) -> None:
        data = two_joint_robot()
        data['state']['fields'] = ['velocity']
        assert 'positions of all action joints are needed' in problem(data)

    def test_an_unknown_absolute_joint(self) -> None:
        data = two_joint_robot()
        data['action'] |= {'representation': 'delta', 'absolute_joints': ['gripper']}
        assert "action.absolute_joints: 'gripper' is not known; known: elbow, shoulder" in problem(data)

    def test_position_limits_in_the_wrong_order(self) -> None:
        data = two_joint_robot()
        data['limits']['elbow']['position'] = [1.0, -1.0]
        assert 'limits.elbow.position: lower limit 1.0 must be below upper limit -1.0' in problem(data)

    @pytest.mark.parametrize(
        ('camera', 'words'),
        [
            ({'K': [1, 0, 0, 0, 1, 0, 0, 0, 1], 'camera_info': '/c'}, 'either camera_info or K'),
            ({'K': [1, 0, 0, 0, 1, 0, 0, 0, 1]}, 'needs width and height'),
            ({'K': [0] * 9, 'width': 4, 'height': 4}, 'fx > 0'),
            ({'K': [1, 0, 0, 0, 1, 0, 0, 0, 0], 'width': 4, 'height': 4}, 'K[8] = 1'),
        ],
    )
    def test_intrinsics_that_cannot_hold(self, camera: dict[str, Any], words: str) -> None:
        data = two_joint_robot()
        data['cameras']['scene'] = {'topic': '/i', **camera}
        assert words in problem(data)


class TestUnreadableFiles:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(RobotFileError, match=r'absent\.yaml: cannot be read'):
            load_robot(tmp_path / 'absent.yaml')

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / 'binary.yaml'
        path.write_bytes(b'\xff\xfe\x00')
        with pytest.raises(RobotFileError, match='cannot be read'):
            load_robot(path)

    @pytest.mark.parametrize(('text', 'words'), [('{', 'not valid YAML'), ('- 1', 'must be a mapping'), ('', 'must be a mapping')])
    def test_text_that_is_not_a_robot(self, text: str, words: str) -> None:
        with pytest.raises(RobotFileError, match=words):
            parse_robot(text)


class TestReferencePages:
    def test_they_say_what_the_code_says(self) -> None:
        assert _generator().stale_pages() == []

    def test_a_changed_page_is_noticed(self, tmp_path: Path) -> None:
        generator = _generator()
        generator.write_pages(tmp_path)
        assert generator.stale_pages(tmp_path) == []
        page = tmp_path / 'reference' / 'robot_file.md'
        page.write_text(page.read_text().replace('horizon', 'horison'))
        assert generator.stale_pages(tmp_path) == ['reference/robot_file.md']

    def test_every_key_of_every_section_has_a_description(self) -> None:
        generator = _generator()
        for _, section in (*generator.SECTIONS, *generator.TRAINING_SECTIONS):
            assert [name for name, field in section.model_fields.items() if not field.description] == []

    def test_the_schema_lists_the_sections(self) -> None:
        schema = json.loads(_generator().robot_schema())
        assert list(schema['properties']) == list(Robot.model_fields)
        assert schema['additionalProperties'] is False


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location('docs_generate', ROOT / 'docs' / 'generate.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
