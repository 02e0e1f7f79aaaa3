"""The expert arrives, from anywhere, within the limits it promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim.expert import ArmKinematics, expert_chunk
from vla_policy_ros.sim.world import TabletopWorld

PERIOD = 0.1
ROBOT = load_robot(Path(__file__).parents[2] / 'config/robots/tabletop.yaml')


@pytest.fixture(scope='module')
def kinematics():
    return ArmKinematics()


@pytest.fixture(scope='module')
def world():
    world = TabletopWorld()
    yield world
    world.close()


def test_expert_reaches_the_named_object_on_20_seeds_in_physics(world, kinematics):
    for seed in range(20):
        world.reset(seed)
        name = world.objects[seed % 3].name
        for _ in range(8):  # replanned from the measured state, as a policy is
            before = world.joint_state()[0]
            for target in expert_chunk(kinematics, before, world.goal_point(name), 8, PERIOD):
                for part in np.linspace(0.1, 1.0, 10):
                    world.set_position_targets(before + part * (target - before), (target - before) / PERIOD)
                    world.step(0.01)
                before = target
        assert world.distance(name) < 0.01, (seed, name)
        assert world.success(name) and not any(world.success(o.name) for o in world.objects if o.name != name)


def test_expert_stays_below_45_percent_of_the_velocity_limit_and_inside_the_joint_limits(world, kinematics):
    velocity = np.array([ROBOT.limits[joint].velocity for joint in ROBOT.action.joints])
    lower = np.array([ROBOT.limits[joint].position[0] for joint in ROBOT.action.joints])
    upper = np.array([ROBOT.limits[joint].position[1] for joint in ROBOT.action.joints])
    rng = np.random.default_rng(0)
    for seed in range(30):
        world.reset(seed)
        q = world.scene.start + rng.normal(0.0, 0.2, size=7)
        q = np.clip(q, lower, upper)
        chunk = expert_chunk(kinematics, q, world.goal_point(world.objects[0].name), 40, PERIOD)
        assert np.all(np.abs(np.diff(np.vstack([q, chunk]), axis=0)) <= 0.45 * velocity * PERIOD + 1e-12)
        assert np.all((chunk > lower) & (chunk < upper))


def test_expert_comes_back_from_any_disturbance_and_then_rests(world, kinematics):
    rng = np.random.default_rng(1)
    for seed in range(20):
        world.reset(seed)
        goal = world.goal_point(world.objects[1].name)
        q = np.clip(world.scene.start + rng.normal(0.0, 0.3, size=7), kinematics.lower + 0.05, kinematics.upper - 0.05)
        chunk = expert_chunk(kinematics, q, goal, 80, PERIOD)
        assert np.linalg.norm(kinematics.place(chunk[-1])[0] - goal) < 0.01, seed
        assert np.abs(chunk[-1] - chunk[-2]).max() < 0.005


def test_expert_is_memoryless(world, kinematics):
    world.reset(3)
    goal = world.goal_point(world.objects[0].name)
    whole = expert_chunk(kinematics, world.scene.start, goal, 20, PERIOD)
    rest = expert_chunk(kinematics, whole[7], goal, 12, PERIOD)
    assert np.array_equal(rest, whole[8:])


def test_expert_travels_above_the_other_objects(world, kinematics):
    """While more than 9 cm away horizontally, the tool stays clear of the tallest object."""
    for seed in range(20):
        world.reset(seed)
        for spec in world.objects:
            goal = world.goal_point(spec.name)
            for q in expert_chunk(kinematics, world.scene.start, goal, 40, PERIOD):
                tcp = kinematics.place(q)[0]
                if np.hypot(*(tcp - goal)[:2]) > 0.09:
                    assert tcp[2] > 0.08


def test_expert_does_not_disturb_the_simulation(world, kinematics):
    world.reset(4)
    state = world.data.qpos.copy(), world.tcp()
    expert_chunk(kinematics, world.joint_state()[0], world.goal_point(world.objects[0].name), 16, PERIOD)
    assert np.array_equal(world.data.qpos, state[0]) and np.array_equal(world.tcp(), state[1])


def test_kinematics_agree_with_the_simulated_arm(world, kinematics):
    for seed in range(5):
        world.reset(seed)
        assert np.allclose(kinematics.place(world.joint_state()[0])[0], world.tcp(), atol=1e-12)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'q': np.full(7, np.nan)}, 'finite'),
        ({'goal': np.zeros(2)}, 'finite'),
        ({'horizon': 0}, 'horizon'),
        ({'period': 0.0}, 'period'),
    ],
)
def test_bad_input_is_refused(kinematics, change, text):
    arguments = {'q': np.zeros(7), 'goal': np.array([0.5, 0.0, 0.1]), 'horizon': 4, 'period': PERIOD} | change
    with pytest.raises(ValueError, match=text):
        expert_chunk(kinematics, **arguments)
