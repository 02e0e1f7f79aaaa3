"""Real-time chunking through the policy: a chunk continues what is known, in robot units, absolute or relative."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import preset_sizes
from vla_policy_ros.model.tokenizer import small_tokenizer
from vla_policy_ros.policy import Policy
from vla_policy_ros.policy.checkpoint import RobotSignature, new_processor, robot_config, save_checkpoint
from vla_policy_ros.robot import Robot, load_robot, parse_robot
from vla_policy_ros.types import CameraView, KnownActions, Observation

LONGEST = 4


@pytest.fixture(scope='module', params=['absolute', 'delta'])
def robot(request: pytest.FixtureRequest) -> Robot:
    plain = load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')
    data = json.loads(plain.model_dump_json())
    data['action']['representation'] = request.param
    return parse_robot(json.dumps(data))


@pytest.fixture(scope='module')
def checkpoint(robot: Robot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with a time per action, whose answers depend on everything."""
    sizes = {**preset_sizes('tiny')}
    sizes['expert_config'] = {**sizes['expert_config'], 'time_conditioning': 'concat_mlp', 'rtc_max_delay': LONGEST}
    torch.manual_seed(1)
    model = MapAnythingLlava3DForConditionalGeneration(robot_config(robot, sizes, small_tokenizer()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    path = tmp_path_factory.mktemp('continuing') / 'checkpoint'
    return save_checkpoint(path, model, new_processor(robot, 'tiny', model.config), RobotSignature.of(robot))


def observation(robot: Robot) -> Observation:
    rng = np.random.default_rng(0)
    views = {name: CameraView(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), None, 0) for name in robot.cameras}
    state = np.array([(low + high) / 2 for low, high in (robot.limits[joint].position for joint in robot.action.joints)])
    return Observation(10**9, views, state, 10**9, 'reach the red cube')


def known(robot: Robot, committed: int, overlap: int = 12) -> KnownActions:
    seen = observation(robot)
    rows = seen.state + 0.02 * np.arange(robot.action.horizon)[:, None]
    rows[overlap:] = rows[overlap - 1]
    return KnownActions(rows, committed, overlap)


def test_trained_chunks_begin_with_what_is_committed(robot: Robot, checkpoint: Path) -> None:
    policy = Policy.load(checkpoint, robot, seed=0, chunking='rtc_trained')
    free = policy.infer(observation(robot)).actions
    for committed in (0, 1, LONGEST):
        decided = known(robot, committed)
        actions = policy.infer(observation(robot), decided).actions
        np.testing.assert_allclose(actions[:committed], decided.actions[:committed], atol=1e-6)
        assert np.array_equal(actions, free) == (committed == 0)
    beyond = policy.infer(observation(robot), known(robot, LONGEST + 3)).actions
    np.testing.assert_allclose(beyond[:LONGEST], known(robot, LONGEST).actions[:LONGEST], atol=1e-6)
    assert np.isfinite(beyond).all()


def test_guided_chunks_come_closer_to_what_is_committed_than_free_ones(robot: Robot, checkpoint: Path) -> None:
    policy = Policy.load(checkpoint, robot, seed=0, chunking='rtc_guided')
    decided = known(robot, 5)
    free, guided = policy.infer(observation(robot)).actions, policy.infer(observation(robot), decided).actions
    distance = [np.abs(actions[:5] - decided.actions[:5]).mean() for actions in (free, guided)]
    assert distance[1] < 0.5 * distance[0]
    again = policy.infer(observation(robot), decided).actions
    assert np.array_equal(guided, again)


@pytest.mark.parametrize('chunking', ['replace', 'ensemble'])
def test_other_modes_leave_the_policy_free(robot: Robot, checkpoint: Path, chunking: str) -> None:
    policy = Policy.load(checkpoint, robot, seed=0, chunking=chunking)
    assert np.array_equal(policy.infer(observation(robot), known(robot, 3)).actions, policy.infer(observation(robot)).actions)


def test_warm_up_runs_both_ways_of_answering(robot: Robot, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunking, expected in (('rtc_guided', {True, False}), ('rtc_trained', {True, False}), ('replace', {False})):
        policy = Policy.load(checkpoint, robot, seed=0, chunking=chunking)
        seen: set[bool] = set()
        answer = policy._answer

        def spy(given: Observation, decided: KnownActions | None, answer=answer, seen=seen):  # type: ignore[no-untyped-def]
            seen.add(decided is not None)
            return answer(given, decided)

        monkeypatch.setattr(policy, '_answer', spy)
        policy.warm_up()
        assert seen == expected


def test_a_checkpoint_that_was_not_trained_for_it_is_refused_when_loaded(tmp_path: Path) -> None:
    from vla_policy_ros.policy import new_checkpoint

    plain = load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')
    path = new_checkpoint(plain, 'tiny', tmp_path / 'plain')
    with pytest.raises(ValueError, match=r'rtc_trained needs a checkpoint.*rtc_guided'):
        Policy.load(path, plain, chunking='rtc_trained')
    assert Policy.load(path, plain, chunking='rtc_guided').warm_up() > 0
