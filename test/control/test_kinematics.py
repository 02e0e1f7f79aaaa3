"""The chain of a URDF has its tip where MuJoCo has it, and the bounds on its motion hold, and are reached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from arm import MS, T0, Array, arm_urdf, dense, joint, simulator, tips
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.kinematics import Chain
from vla_policy_ros.control.workspace import TOLERANCE_M, Workspace
from vla_policy_ros.sim.mjcf import JOINT_NAMES
from vla_policy_ros.sim.scene import HOME
from vla_policy_ros.types import JointTrajectory


@pytest.fixture(scope='session')
def urdf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('urdf') / 'arm.urdf'
    path.write_text(arm_urdf())
    return path


@pytest.fixture(scope='session')
def chain(urdf: Path) -> Chain:
    return Chain.from_urdf(urdf, JOINT_NAMES, 'tcp', 'link0')


def test_the_tip_is_where_the_simulator_has_it(chain: Chain) -> None:
    q = np.random.default_rng(0).uniform(simulator().lower, simulator().upper, (300, 7))
    np.testing.assert_allclose(chain.positions(q), tips(q), rtol=0, atol=1e-9)


def test_positions_are_in_the_frame_of_the_base_link_and_by_default_of_the_root(urdf: Path) -> None:
    turn = np.array([[np.cos(1.0), -np.sin(1.0), 0.0], [np.sin(1.0), np.cos(1.0), 0.0], [0.0, 0.0, 1.0]])
    expected = tips(HOME[None])[0] @ turn.T + [0.5, 0.0, 0.2]
    for base in (None, 'world'):
        np.testing.assert_allclose(Chain.from_urdf(urdf, JOINT_NAMES, 'tcp', base).positions(HOME[None])[0], expected, atol=1e-12)


def test_joints_are_mapped_by_name(urdf: Path) -> None:
    order = np.random.default_rng(1).permutation(7)
    mixed = Chain.from_urdf(urdf, [JOINT_NAMES[index] for index in order], 'tcp', 'link0')
    np.testing.assert_allclose(mixed.positions(HOME[order][None]), tips(HOME[None]), atol=1e-12)


def test_joints_that_are_not_commanded_stay_where_they_are_held(urdf: Path) -> None:
    held = dict(zip(JOINT_NAMES[4:], HOME[4:], strict=True))
    part = Chain.from_urdf(urdf, JOINT_NAMES[:4], 'tcp', 'link0', held)
    np.testing.assert_allclose(part.positions(HOME[None, :4]), tips(HOME[None]), atol=1e-12)
    at_zero = Chain.from_urdf(urdf, JOINT_NAMES[:4], 'tcp', 'link0')
    np.testing.assert_allclose(at_zero.positions(HOME[None, :4]), tips(np.append(HOME[:4], np.zeros(3))[None]), atol=1e-12)


def test_prismatic_mimicking_and_skew_joints_are_where_mujoco_has_them(tmp_path: Path) -> None:
    import mujoco

    skew = '<axis xyz="0.3 -0.5 0.7"/><limit lower="-1" upper="2" velocity="1" effort="1"/>'
    slide = '<axis xyz="1 0.2 0"/><limit lower="0" upper="1" velocity="1" effort="1"/>'
    plain = [
        '<robot name="odd"><link name="root"/>',
        joint('turn', 'root', 'a', xyz='0.1 0.2 0.3', rpy='0.4 -0.5 0.6', rest=skew),
        joint('slide', 'a', 'b', 'prismatic', xyz='0 0.1 0', rpy='1 2 3', rest=slide),
        joint('bolt', 'b', 'c', 'fixed', xyz='0.05 0 0.1', rpy='0.1 0.2 0.3'),
        joint('follow', 'c', 'd', 'continuous', xyz='0.2 0 0', rest='<axis xyz="0 -1 0"/>{mimic}'),
        joint('wrist', 'd', 'tip', xyz='0 0 0.3', rpy='0 1 0', rest=skew),
        '</robot>',
    ]
    text = '\n'.join(plain)
    path = tmp_path / 'odd.urdf'
    path.write_text(text.replace('{mimic}', '<mimic joint="slide" multiplier="-2.5" offset="0.3"/>'))
    chain = Chain.from_urdf(path, ['wrist', 'slide', 'turn'], 'tip')
    # No axis default: MuJoCo and URDF agree on x. Its own reading of the whole file is the reference.
    bare = text.replace('{mimic}', '').replace('package://nowhere/', '')
    start, end = '<visual>', '</visual>'
    while start in bare:
        bare = bare[: bare.index(start)] + bare[bare.index(end) + len(end) :]
    compiler = '<mujoco><compiler fusestatic="false" boundmass="1" boundinertia="1"/></mujoco><link name="root"/>'
    model = mujoco.MjModel.from_xml_string(bare.replace('<link name="root"/>', compiler))
    data = mujoco.MjData(model)
    q = np.random.default_rng(2).uniform(0, 1, (50, 3))
    for row, found in zip(q, chain.positions(q), strict=True):
        wrist, slide_at, turn = row
        for name, value in (('turn', turn), ('slide', slide_at), ('follow', 0.3 - 2.5 * slide_at), ('wrist', wrist)):
            data.qpos[model.joint(name).qposadr[0]] = value
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(found, data.body('tip').xpos, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_tip_never_accelerates_more_than_the_bound(chain: Chain, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, v, a = rng.uniform(-3, 3, 7), rng.normal(0, 1, 7), rng.normal(0, 5, 7)
    if rng.random() < 0.5:  # one or two joints alone: where the bound is closest
        alone = rng.permutation(7)[:2]
        v, a = np.where(np.isin(np.arange(7), alone), v, 0.0), np.zeros(7)
    t = np.array([-1e-3, 0.0, 1e-3])[:, None]
    before, now, after = tips(q + v * t + a * t**2 / 2)
    measured = np.linalg.norm(before - 2 * now + after) / 1e-6
    assert measured <= chain.curvature(np.abs(q), np.abs(v)[None], np.abs(a)[None])[0] * (1 + 1e-3) + 1e-4


@pytest.fixture(scope='session')
def planar(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Two turning links of 0.4 and 0.3 m in a plane; the second is lengthened by a slide."""
    along = '<axis xyz="1 0 0"/><limit lower="0" upper="1" velocity="1" effort="1"/>'
    turn = '<axis xyz="0 0 1"/><limit lower="-9" upper="9" velocity="9" effort="1"/>'
    parts = [
        joint('shoulder', 'root', 'upper', rest=turn),
        joint('elbow', 'upper', 'lower', xyz='0.4 0 0', rest=turn),
        joint('slide', 'lower', 'rod', 'prismatic', xyz='0.1 0 0', rest=along),
        joint('end', 'rod', 'tip', 'fixed', xyz='0.2 0 0'),
    ]
    path = tmp_path_factory.mktemp('planar') / 'planar.urdf'
    path.write_text('\n'.join(['<robot name="planar"><link name="root"/>', *parts, '</robot>']))
    return Chain.from_urdf(path, ['shoulder', 'elbow', 'slide'], 'tip')


def planar_tip(q: Array) -> Array:
    """By hand: ``[P, 3]`` for shoulder, elbow, slide ``[P, 3]``."""
    length, direction = 0.3 + q[:, 2], q[:, 0] + q[:, 1]
    x = 0.4 * np.cos(q[:, 0]) + length * np.cos(direction)
    y = 0.4 * np.sin(q[:, 0]) + length * np.sin(direction)
    return np.stack([x, y, np.zeros(len(q))], axis=1)


def test_a_stretched_arm_reaches_the_bound(planar: Chain) -> None:
    """Centripetal, of two links that turn alike; tangential; so the bound is not merely large."""
    bound = planar.curvature(np.array([0.0, 0.0, 0.5]), np.array([[1.0, 2.0, 0.0]]), np.array([[0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(bound, 0.4 * 1.0**2 + 0.8 * 3.0**2, rtol=1e-12)
    bound = planar.curvature(np.array([0.0, 0.0, 0.5]), np.zeros((1, 3)), np.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_allclose(bound, 1.2 * 1.0 + 0.8 * 2.0 + 3.0, rtol=1e-12)
    bound = planar.curvature(np.array([0.0, 0.0, 0.5]), np.array([[1.0, 0.0, 2.0]]), np.zeros((1, 3)))
    np.testing.assert_allclose(bound, 1.2 * 1.0**2 + 2 * 1.0 * 2.0, rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_between_two_samples_the_tip_stays_as_close_to_the_line_as_is_claimed(planar: Chain, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, rows = rng.choice([0.1, 1.0, 10.0], 3), int(rng.integers(2, 5))
    q = rng.normal(0, 1, (rows, 3)) * size
    v = rng.normal(0, 1, (rows, 3)) * size * rng.choice([0.0, 1.0, 5.0], 3)
    q[:, 2] = np.abs(q[:, 2])
    assert_close_to_the_lines(planar, q, v)


def assert_close_to_the_lines(planar: Chain, q: Array, v: Array) -> None:
    motion = JointTrajectory(T0, ('shoulder', 'elbow', 'slide'), 500 * MS * np.arange(len(q), dtype=np.int64), q, v)
    path = Workspace(motion.joint_names, planar, -np.ones(3), np.ones(3))._path(motion.times_ns, q, v)
    curve = planar_tip(dense(motion))
    moments = np.union1d(np.arange(0, motion.times_ns[-1], MS // 2), motion.times_ns)
    index = np.clip(np.searchsorted(path.times_ns, moments, side='right') - 1, 0, len(path.sagitta) - 1)
    start, end = path.times_ns[index], path.times_ns[index + 1]
    part = ((moments - start) / (end - start))[:, None]
    line = (1 - part) * path.tip[index] + part * path.tip[index + 1]
    # The moments are rounded to ns: at 1000 m/s that is a micrometre.
    assert np.all(np.linalg.norm(curve - line, axis=1) <= path.sagitta[index] + 1e-5)
    assert np.all(path.sagitta <= TOLERANCE_M * (1 + 1e-9)) or len(path.sagitta) >= 1000


@pytest.mark.parametrize(
    ('end', 'velocities'),
    [
        # The slide runs out and back between the knots while the arm turns: its reach between them counts, not that at them.
        ([20.0, 0.0, 0.0], [[40.0, 0.0, 4.0], [40.0, 0.0, -4.0]]),
        # The acceleration grows from nothing.
        ([0.0, 0.0, 0.5], [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]),
        # From rest to rest: the speed between the knots counts.
        ([12.0, 0.0, 0.0], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_what_happens_between_two_knots_alone_is_bounded_too(
    planar: Chain, end: list[float], velocities: list[list[float]]
) -> None:
    assert_close_to_the_lines(planar, np.array([[0.0, 0.0, 0.0], end]), np.array(velocities))


def test_a_mirrored_joint_bounds_the_motion_by_its_multiplier(tmp_path: Path) -> None:
    turn, path = '<axis xyz="0 0 1"/>', tmp_path / 'geared.urdf'
    mimic = f'{turn}<mimic joint="motor" multiplier="-3"/>'
    parts = [joint('motor', 'root', 'a', 'continuous', rest=turn), joint('hand', 'root', 'b', 'continuous', rest=mimic)]
    tip = joint('end', 'b', 'tip', 'fixed', xyz='0.5 0 0')
    path.write_text('\n'.join(['<robot name="geared"><link name="root"/>', *parts, tip, '</robot>']))
    geared = Chain.from_urdf(path, ['motor'], 'tip')
    np.testing.assert_allclose(geared.positions(np.array([[np.pi / 6]])), [[0.0, -0.5, 0.0]], atol=1e-12)
    np.testing.assert_allclose(geared.curvature(np.zeros(1), np.array([[1.0]]), np.array([[2.0]])), [0.5 * 9.0 + 0.5 * 6.0])
