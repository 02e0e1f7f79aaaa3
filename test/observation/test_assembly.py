"""An observation is made only from inputs that are complete, fresh and of one moment, judged by header stamps."""

from __future__ import annotations

import numpy as np
import pytest
from fake_messages import camera_info, image, joint_state

from vla_policy_ros.observation import ObservationAssembler, ObservationError
from vla_policy_ros.robot import parse_robot

ROBOT = parse_robot("""
name: toy
cameras:
  left: {topic: /left, camera_info: /left/info}
  right: {topic: /right}
state: {topic: /joint_states, joints: [a, b]}
action: {joints: [a, b], period: 0.1, horizon: 4}
limits:
  a: {position: [-1, 1], velocity: 1, acceleration: 4}
  b: {position: [-1, 1], velocity: 1, acceleration: 4}
controllers:
  arm: {topic: /arm/joint_trajectory, joints: [a, b]}
timing: {max_image_age: 0.5, max_state_age: 0.2, max_camera_skew: 0.1, max_state_skew: 0.2, max_future: 0.05}
""")
S = 10**9
MS = 10**6
PIXELS = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)


def complete(now_ns: int = S) -> ObservationAssembler:
    inputs = ObservationAssembler(ROBOT)
    assert inputs.put_image('left', image(PIXELS, stamp_ns=now_ns), now_ns) is None
    assert inputs.put_image('right', image(PIXELS, stamp_ns=now_ns - 30 * MS), now_ns) is None
    assert inputs.put_camera_info('left', camera_info(), now_ns) is None
    assert inputs.put_joint_state(joint_state(['b', 'a'], [0.2, 0.1], now_ns - 10 * MS), now_ns) is None
    assert inputs.put_instruction('reach the red cube', now_ns) is None
    return inputs


def only_problem(inputs: ObservationAssembler, now_ns: int) -> str:
    (problem,) = inputs.problems(now_ns)
    return problem


def test_complete_inputs_become_an_observation():
    inputs = complete()
    assert inputs.problems(S) == []
    observation = inputs.snapshot().decode()
    assert observation.stamp_ns == S
    assert list(observation.cameras) == ['left', 'right']
    np.testing.assert_array_equal(observation.cameras['left'].rgb, PIXELS)
    assert observation.cameras['left'].K[0, 0] == 50.0
    assert observation.cameras['right'].K is None
    np.testing.assert_array_equal(observation.state, [0.1, 0.2])
    assert inputs.snapshot().input_stamps == {'camera:left': S, 'camera:right': S - 30 * MS, 'state': S - 10 * MS}


def test_every_missing_input_is_named():
    problems = ObservationAssembler(ROBOT).problems(S)
    assert [p.split(':')[0] for p in problems] == [
        "camera 'left'", "camera 'right'", "camera_info of 'left'", 'joint state', 'instruction'
    ]  # fmt: skip


@pytest.mark.parametrize(('later_ms', 'who'), [(250, 'joint state'), (520, "camera 'left'")])
def test_old_inputs_are_named_with_age_limit_and_topic(later_ms, who):
    inputs = complete()
    later = S + later_ms * MS
    problem = next(p for p in inputs.problems(later) if p.startswith(who))
    assert 's old (limit' in problem
    assert '/joint_states' in problem or '/left' in problem


def test_cameras_of_different_moments_are_refused():
    inputs = complete()
    inputs.put_image('left', image(PIXELS, stamp_ns=S + 80 * MS), S + 80 * MS)
    assert "camera 'right' is 0.110 s behind camera 'left' (limit 0.1 s)" in only_problem(inputs, S + 80 * MS)


def test_joint_state_of_another_moment_is_refused():
    inputs = complete()
    for camera in ('left', 'right'):
        inputs.put_image(camera, image(PIXELS, stamp_ns=S - 250 * MS), S)
    late = ObservationAssembler(ROBOT)
    late.put_image('left', image(PIXELS, stamp_ns=S - 250 * MS), S)
    late.put_image('right', image(PIXELS, stamp_ns=S - 250 * MS), S)
    late.put_camera_info('left', camera_info(), S)
    late.put_joint_state(joint_state(['a', 'b'], [0, 0], S), S)
    late.put_instruction('go', S)
    assert 'joint state and camera' in only_problem(late, S)


@pytest.mark.parametrize(
    ('stamp_ns', 'words'),
    [(0, 'header.stamp is zero'), (S + 100 * MS, 'in the future'), (S - 100 * MS, 'older than that of the message')],
)
def test_unsound_stamps_never_replace_a_good_value(stamp_ns, words):
    inputs = complete()
    refusal = inputs.put_image('left', image(PIXELS[::-1].copy(), stamp_ns=stamp_ns), S)
    assert refusal is not None and words in refusal and '/left' in refusal
    np.testing.assert_array_equal(inputs.snapshot().decode().cameras['left'].rgb, PIXELS)


def test_bad_joint_state_ages_out_with_its_reason():
    inputs = complete()
    assert "'a' is nan" in inputs.put_joint_state(joint_state(['a', 'b'], [float('nan'), 0], S), S)
    assert inputs.problems(S) == []
    assert "last message refused: position of joint 'a' is nan" in ' '.join(inputs.problems(S + 400 * MS))


def test_a_camera_that_loses_its_calibration_is_not_used_with_the_old_one():
    inputs = complete()
    assert 'all zeros' in inputs.put_camera_info('left', camera_info(K=[0.0] * 9), S)
    assert 'all zeros' in only_problem(inputs, S)


def test_image_of_another_size_than_its_camera_info_is_refused_by_name():
    inputs = complete()
    inputs.put_camera_info('left', camera_info(width=320, height=240), S)
    with pytest.raises(ObservationError, match="camera 'left': image is 64x48 but camera_info describes 320x240"):
        inputs.snapshot().decode()


def test_unknown_encoding_is_refused_on_arrival():
    assert "encoding 'pink'" in complete().put_image('left', image(PIXELS, 'pink', S + 1), S)


def test_refused_or_empty_instruction_ends_the_old_one():
    inputs = complete()
    assert '300 characters' in inputs.put_instruction('x' * 300, S)
    assert '300 characters' in only_problem(inputs, S)
    inputs.put_instruction('go', S)
    assert inputs.problems(S) == []
    assert inputs.put_instruction('', S) is None
    assert 'instruction: none' in only_problem(inputs, S)


def test_rate_is_measured_by_arrival():
    inputs = ObservationAssembler(ROBOT)
    for i in range(20):
        now = S + i * 50 * MS
        inputs.put_image('left', image(PIXELS, stamp_ns=now), now)
    assert inputs.health(S + 950 * MS)[0].rate == pytest.approx(20.0)
    assert inputs.health(S + 5 * S)[0].rate == 0.0
