"""The policy: shapes, stamps, provenance, reproducibility."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_policy_ros.policy import Policy, new_checkpoint
from vla_policy_ros.policy.checkpoint import RobotSignature, new_model, new_processor, save_checkpoint
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.types import NS_PER_S, CameraView, Observation

K = np.array([[500.0, 0.0, 319.5], [0.0, 500.0, 239.5], [0.0, 0.0, 1.0]])


@pytest.fixture(scope='module')
def robot() -> Robot:
    return load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')


@pytest.fixture(scope='module')
def fresh(robot: Robot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(robot, 'tiny', tmp_path_factory.mktemp('policy') / 'fresh')


@pytest.fixture(scope='module')
def lively(robot: Robot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose answers depend on everything: no matrix is zero."""
    model = new_model(robot, 'tiny', seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=(2.0 if name.startswith('language') else 1.0) * parameter[0].numel() ** -0.5)
    path = tmp_path_factory.mktemp('policy') / 'lively'
    return save_checkpoint(path, model, new_processor(robot, 'tiny', model.config), RobotSignature.of(robot))


def observation(seed: int = 0, stamp_ns: int = 5 * NS_PER_S) -> Observation:
    rng = np.random.default_rng(seed)
    views = {
        name: CameraView(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8), K, stamp_ns - index * 7_000_000)
        for index, name in enumerate(('scene', 'wrist'))
    }
    return Observation(stamp_ns, views, rng.normal(size=7) * 0.1, stamp_ns - 1, 'reach the red cube')


def test_chunk_speaks_about_the_time_after_the_observation(robot: Robot, fresh: Path) -> None:
    policy = Policy.load(fresh, robot, seed=0)
    chunk = policy.infer(observation())
    assert chunk.actions.shape == (16, 7) and chunk.actions.dtype == np.float64
    assert (chunk.stamp_ns, chunk.dt_ns, chunk.observation_stamp_ns) == (5_100_000_000, 100_000_000, 5_000_000_000)
    assert chunk.joint_names == robot.action.joints and chunk.instruction == 'reach the red cube'
    assert set(chunk.stages_ms) == {'preprocess', 'prefix', 'denoise', 'postprocess'} and min(chunk.stages_ms.values()) > 0
    assert len(chunk.checkpoint_hash) == 64 and len(chunk.stats_hash) == 64
    assert (chunk.checkpoint_hash, chunk.stats_hash) == (policy.checkpoint_hash, policy.stats_hash)
    assert policy.infer(observation()).sequence == chunk.sequence + 1 == 1


def test_same_seed_and_observation_give_the_same_chunk_whatever_came_before(robot: Robot, lively: Path) -> None:
    first, second = Policy.load(lively, robot, seed=3), Policy.load(lively, robot, seed=3)
    second.warm_up()
    second.infer(observation(seed=1, stamp_ns=1))
    assert np.array_equal(first.infer(observation()).actions, second.infer(observation()).actions)
    assert first.infer(observation()).sequence == 1, 'warming up is not counted'
    other = Policy.load(lively, robot, seed=4).infer(observation()).actions
    later = first.infer(observation(stamp_ns=6 * NS_PER_S)).actions
    reference = first.infer(observation()).actions
    assert not np.array_equal(other, reference) and not np.array_equal(later, reference)


def test_without_a_seed_noise_is_fresh(robot: Robot, lively: Path) -> None:
    policy = Policy.load(lively, robot)
    assert not np.array_equal(policy.infer(observation()).actions, policy.infer(observation()).actions)


def test_pixels_intrinsics_state_and_words_all_reach_the_actions(robot: Robot, lively: Path) -> None:
    policy, base = Policy.load(lively, robot, seed=0), observation()
    reference = policy.infer(base).actions
    for camera in ('scene', 'wrist'):
        view = base.cameras[camera]
        darker = dataclasses.replace(view, rgb=view.rgb // 2)
        zoomed = dataclasses.replace(view, K=K * [[1.5], [1.5], [1.0]])
        unknown = dataclasses.replace(view, K=None)
        for changed in (darker, zoomed, unknown):
            other = policy.infer(dataclasses.replace(base, cameras={**base.cameras, camera: changed})).actions
            assert np.abs(other - reference).max() > 1e-6
    moved = policy.infer(dataclasses.replace(base, state=base.state + 0.1)).actions
    spoken = policy.infer(dataclasses.replace(base, instruction='reach the blue ball')).actions
    assert np.abs(moved - reference).max() > 1e-6 and np.abs(spoken - reference).max() > 1e-6


def test_number_of_steps_is_the_callers_choice(robot: Robot, lively: Path) -> None:
    one, ten = (Policy.load(lively, robot, seed=0, num_steps=steps) for steps in (1, 10))
    assert not np.array_equal(one.infer(observation()).actions, ten.infer(observation()).actions)
    assert (one.summary['num_steps'], ten.summary['num_steps']) == (1, 10)
    assert np.array_equal(ten.infer(observation()).actions, Policy.load(lively, robot, seed=0).infer(observation()).actions)
    with pytest.raises(ValueError, match='num_steps is 0'):
        Policy.load(lively, robot, num_steps=0)


def test_solver_is_the_callers_choice_and_checked_before_anything_moves(robot: Robot, lively: Path) -> None:
    reference = Policy.load(lively, robot, seed=0, num_steps=80).infer(observation()).actions
    errors = {}
    for solver in ('euler', 'ab2', 'midpoint'):
        policy = Policy.load(lively, robot, seed=0, num_steps=8, solver=solver)
        assert policy.summary['solver'] == solver
        errors[solver] = np.abs(policy.infer(observation()).actions - reference).mean()
    assert errors['midpoint'] < errors['euler'] and errors['ab2'] < errors['euler']
    with pytest.raises(ValueError, match=r"'heun'.*midpoint"):
        Policy.load(lively, robot, solver='heun')


def test_bfloat16_answers_like_float32(robot: Robot, lively: Path) -> None:
    full, half = (Policy.load(lively, robot, seed=0, dtype=dtype).infer(observation()).actions for dtype in ('float32', 'bfloat16'))
    assert np.isfinite(half).all() and np.abs(half - full).max() < 0.2 * full.std()


def test_a_camera_that_is_not_there_is_left_out_and_an_unknown_one_refused(robot: Robot, lively: Path) -> None:
    policy, base = Policy.load(lively, robot, seed=0), observation()
    alone = dataclasses.replace(base, cameras={'scene': base.cameras['scene']})
    assert np.isfinite(policy.infer(alone).actions).all()
    strange = dataclasses.replace(base, cameras={**base.cameras, 'side': base.cameras['scene']})
    with pytest.raises(ValueError, match="'side' is not one of scene, wrist"):
        policy.infer(strange)
    with pytest.raises(ValueError, match=r'state is \(1, 6\)'):
        policy.infer(dataclasses.replace(base, state=np.zeros(6)))


@pytest.mark.parametrize('instruction', ['', 'ß ☃ 机器人 抓住 杯子', 'x' * 256, 'a\nb\tc </s> <image>'])
def test_any_sentence_is_answered(robot: Robot, lively: Path, instruction: str) -> None:
    policy = Policy.load(lively, robot, seed=0)
    assert np.isfinite(policy.infer(dataclasses.replace(observation(), instruction=instruction)).actions).all()
