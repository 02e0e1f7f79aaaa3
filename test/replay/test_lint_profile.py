"""The controller that is meant: the operator's word first, then the robot file, then what the recording shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from vla_policy_ros.bags.recording import Received, Recording
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage
from vla_policy_ros.replay.lint_profile import ControllerChoice, ProfileError, parse_changes
from vla_policy_ros.robot import load_robot


def recording(named: Sequence[tuple[str, ...]], topic: str = '/c/joint_trajectory', state: tuple[str, ...] = ()) -> Recording:
    return Recording(topic, tuple(Received(index, TrajectoryMessage(names, [])) for index, names in enumerate(named)), (), state, 0)


@pytest.mark.parametrize(
    ('text', 'name', 'value'),
    [
        ('interpolate_from_desired_state=true', 'interpolate_from_desired_state', True),
        ('allow_partial_joints_goal=False', 'allow_partial_joints_goal', False),
        ('cmd_timeout=0.5', 'cmd_timeout', 0.5),
        ('constraints.goal_time=1', 'goal_time', 1.0),
        ('interpolation_method=none', 'interpolation_method', 'none'),
        ('joints=a, b', 'joints', ('a', 'b')),
        ('trajectory_tolerance=a:0.1,b:0.2', 'trajectory_tolerance', {'a': 0.1, 'b': 0.2}),
    ],
)
def test_a_parameter_is_read_by_its_type(text: str, name: str, value: object) -> None:
    assert parse_changes([text]) == {name: value}


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('cmd_timeout', 'write name=value'),
        ('cmd_timout=1', 'did you mean cmd_timeout'),
        ('cmd_timeout=soon', 'soon'),
        ('cmd_timeout=nan', 'must be finite'),
        ('allow_partial_joints_goal=yes', 'true or false'),
        ('interpolation_method=linear', 'one of splines, none'),
        ('goal_tolerance=0.1', 'joint:value'),
        ('distro=humble', 'use --profile'),
        ('update_rate=100', 'use --update-rate'),
    ],
)
def test_a_parameter_that_is_wrong_is_refused_with_the_remedy(text: str, words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        parse_changes([text])


def test_joints_are_those_of_the_controllers_state_or_those_that_most_messages_name() -> None:
    messages = [('x', 'y'), ('b', 'a'), ('a', 'b'), ()]
    assert ControllerChoice().parameters_for(recording(messages)).joints == ('b', 'a')
    assert ControllerChoice().parameters_for(recording(messages, state=('a', 'b', 'c'))).joints == ('a', 'b', 'c')
    choice = ControllerChoice(changes=parse_changes(['joints=q']))
    assert choice.parameters_for(recording(messages, state=('a', 'b', 'c'))).joints == ('q',)


def test_joints_that_nobody_names_are_asked_for() -> None:
    with pytest.raises(ProfileError, match='--param joints='):
        ControllerChoice().parameters_for(recording([()]))


def test_a_robot_file_gives_joints_rate_and_limits(root: Path) -> None:
    robot = load_robot(root / 'config' / 'robots' / 'tabletop.yaml')
    arm = robot.controllers['arm']
    choice = ControllerChoice(robot=robot)
    assert choice.command_topics == (arm.topic,)
    parameters = choice.parameters_for(recording([('a',)], arm.topic))
    assert (parameters.joints, parameters.update_rate) == (arm.joints, arm.update_rate)
    assert choice.velocity_limits(arm.joints) == {joint: robot.limits[joint].velocity for joint in arm.joints}
    assert ControllerChoice(robot=robot, velocity=0.3).velocity_limits(['a']) == {'a': 0.3}
    assert ControllerChoice(robot=robot, update_rate=250.0).parameters_for(recording([()], arm.topic)).update_rate == 250.0


def test_a_release_does_not_take_a_parameter_that_it_does_not_know() -> None:
    choice = ControllerChoice('kilted', parse_changes(['open_loop_control=true']))
    with pytest.raises(ProfileError, match='open_loop_control'):
        choice.parameters_for(recording([('a',)]))


def test_an_unknown_release_names_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=r'humble.*rolling'):
        ControllerChoice('noetic').parameters_for(recording([('a',)]))


@pytest.mark.parametrize(
    'options', [{'update_rate': 0.0}, {'velocity': -1.0}, {'velocity': float('inf')}, {'update_rate': float('nan')}]
)
def test_rates_and_limits_must_be_positive_numbers(options: dict[str, float]) -> None:
    with pytest.raises(ProfileError, match='above 0'):
        ControllerChoice(**options)
