"""Intrinsics, joint states and instructions: what is taken, what is refused and with which words."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_messages import camera_info, joint_state

from vla_policy_ros.observation.instruction import InstructionError, clean_instruction
from vla_policy_ros.observation.intrinsics import IntrinsicsError, intrinsics_of
from vla_policy_ros.observation.joints import JointStateError, state_vector
from vla_policy_ros.robot import State

STATE = State(topic='/joint_states', joints=('a', 'b', 'c'), fields=('position',))


def test_region_of_interest_and_binning_move_the_intrinsics_with_the_pixels():
    info = camera_info(640, 480, [500.0, 0, 320, 0, 500, 240, 0, 0, 1], binning_x=2, binning_y=2)
    info.roi = SimpleNamespace(x_offset=100, y_offset=40, width=400, height=200)
    K = intrinsics_of(info, 200, 100)
    point = np.array([0.3, -0.1, 2.0])
    full = np.array([[500, 0, 320], [0, 500, 240], [0, 0, 1]]) @ point / 2.0
    np.testing.assert_allclose((K @ point / 2.0)[:2], (full[:2] - [100, 40]) / 2)


@pytest.mark.parametrize(
    ('info', 'names'),
    [
        (camera_info(K=[0.0] * 9), 'all zeros'),
        (camera_info(K=[float('nan'), 0, 1, 0, 1, 1, 0, 0, 1]), 'nan'),
        (camera_info(K=[-5.0, 0, 1, 0, 1, 1, 0, 0, 1]), '-5.0'),
        (camera_info(width=320, height=240), 'image is 64x48 but camera_info describes 320x240'),
    ],
)
def test_intrinsics_that_do_not_describe_the_image_are_refused(info, names):
    with pytest.raises(IntrinsicsError, match=names):
        intrinsics_of(info, 64, 48)


def test_joints_are_found_by_name_in_any_order():
    np.testing.assert_array_equal(state_vector(joint_state(['x', 'c', 'a', 'b'], [9, 3, 1, 2]), STATE), [1, 2, 3])


def test_state_fields_form_blocks():
    state = State(topic='/joint_states', joints=('a', 'b'), fields=('position', 'velocity'))
    message = joint_state(['b', 'a'], [2, 1], velocities=[20, 10])
    np.testing.assert_array_equal(state_vector(message, state), [1, 2, 10, 20])
    assert state.names == ('a.position', 'b.position', 'a.velocity', 'b.velocity')


@pytest.mark.parametrize(
    ('message', 'names'),
    [
        (joint_state(['a', 'b'], [1, 2]), "'c' is missing"),
        (joint_state(['a', 'b', 'c', 'a'], [1, 2, 3, 4]), "'a' is listed twice"),
        (joint_state(['a', 'b', 'c'], [1, float('nan'), 3]), "position of joint 'b' is nan"),
        (joint_state(['a', 'b', 'c'], [1, 2]), '3 names but 2 position'),
    ],
)
def test_bad_joint_states_are_refused_by_joint(message, names):
    with pytest.raises(JointStateError, match=names):
        state_vector(message, STATE)


def test_instructions_in_any_language_are_taken_and_folded():
    assert clean_instruction('  pick   up\nthe  cup ', 50) == 'pick up the cup'
    assert clean_instruction('nimm die grüne Flasche', 50) == 'nimm die grüne Flasche'
    assert clean_instruction('拿起黄色的瓶子', 50) == '拿起黄色的瓶子'
    assert clean_instruction('   ', 50) == ''


@pytest.mark.parametrize(('text', 'names'), [('x' * 51, '51 characters'), ('stop\x07now', r'U\+0007')])
def test_instructions_that_are_not_text_or_too_long_are_refused(text, names):
    with pytest.raises(InstructionError, match=names):
        clean_instruction(text, 50)
