"""Checkpoint folders: what is written comes back, and what does not fit is refused with a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from vla_policy_ros.policy import CheckpointError, Policy, new_checkpoint
from vla_policy_ros.policy.checkpoint import limit_statistics, load_checkpoint
from vla_policy_ros.robot import Robot, load_robot, parse_robot


@pytest.fixture(scope='module')
def robot() -> Robot:
    return load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')


@pytest.fixture(scope='module')
def original(robot: Robot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(robot, 'tiny', tmp_path_factory.mktemp('checkpoint') / 'tiny')


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / 'copy'))


def changed(robot: Robot, **sections: object) -> Robot:
    """The robot with some top-level sections replaced."""
    return parse_robot(json.dumps({**json.loads(robot.model_dump_json()), **sections}))


def test_fresh_checkpoint_depends_on_its_seed_only(robot: Robot, original: Path, tmp_path: Path) -> None:
    same, other = (new_checkpoint(robot, 'tiny', tmp_path / str(seed), seed=seed) for seed in (0, 1))
    weights = [(path / 'model.safetensors').read_bytes() for path in (original, same, other)]
    assert weights[0] == weights[1] != weights[2]
    hashes = [load_checkpoint(path, robot).content_hash for path in (original, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_folder_holds_no_pickles(original: Path) -> None:
    assert {file.suffix for file in original.iterdir()} == {'.json', '.safetensors'}


def test_limits_of_the_robot_normalise_an_untrained_checkpoint(robot: Robot) -> None:
    statistics = limit_statistics(robot)
    for index, joint in enumerate(robot.action.joints):
        low, high = robot.limits[joint].position
        np.testing.assert_allclose(statistics.state.unnormalize(np.full(7, -1.0))[index], low)
        np.testing.assert_allclose(statistics.state.unnormalize(np.full(7, 1.0))[index], high)
        extreme = statistics.action.unnormalize(np.full((16, 7), 3.0))[0, index]
        assert low < extreme < high, 'three standard deviations of noise stay inside'


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate_weights(folder: Path) -> None:
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1000])


def truncate_to_header(folder: Path) -> None:
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:100])


def edit_weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / 'model.safetensors')
        change(tensors)
        save_file(tensors, str(folder / 'model.safetensors'), metadata={'format': 'pt'})

    return apply


def poison(tensors: dict) -> None:
    tensors['language_model.model.layers.1.mlp.up_proj.weight'][3, 4] = float('nan')


def rename(tensors: dict) -> None:
    tensors['action_expert.action_out.weight'] = tensors.pop('action_expert.action_out_proj.weight')


def reshape(tensors: dict) -> None:
    tensors['action_expert.action_out_proj.weight'] = tensors['action_expert.action_out_proj.weight'][:3].clone()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (shutil.rmtree, 'does not exist'),
        (remove('config.json'), 'has no config.json'),
        (remove('statistics.json'), 'has no statistics.json'),
        (remove('tokenizer.json'), 'has no tokenizer.json'),
        (remove('robot.json'), 'has no robot.json'),
        (remove('model.safetensors'), 'only safetensors'),
        (truncate_weights, r'model.safetensors \(\d+ bytes\) is damaged.*copy it again'),
        (truncate_to_header, 'is damaged'),
        (edit_weights(poison), r"'language_model.model.layers.1.mlp.up_proj.weight' has values that are not finite"),
        (edit_weights(rename), r"missing tensors, first 'action_expert.action_out_proj.weight'"),
        (edit_weights(reshape), 'action_out_proj|shape|size'),
        (write('config.json', '{'), 'cannot be built'),
        (write('statistics.json', '{}'), 'processor files.*statistics'),
        (write('statistics.json', '{"state": {"mode": "zscore", "offset": [0], "scale": [0]}, "action": {}}'), 'positive'),
        (write('robot.json', '[]'), 'not a robot signature'),
        (write('robot.json', '{"name": 1}'), 'not a robot signature'),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(
    robot: Robot, folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Policy.load(folder, robot)


def test_another_robot_is_refused_by_the_names_that_differ(robot: Robot, original: Path) -> None:
    data = json.loads(robot.model_dump_json())
    cases = [
        ({'cameras': {'scene': data['cameras']['scene']}}, r"cameras: robot file lacks \[\('wrist', 'stretch'\)\]"),
        ({'cameras': dict(reversed(data['cameras'].items()))}, 'cameras: same items in another order'),
        ({'cameras': {**data['cameras'], 'side': data['cameras']['scene']}}, r"checkpoint does not know \[\('side'"),
        ({'action': {**data['action'], 'horizon': 8}}, 'action.horizon: checkpoint has 16, robot file has 8'),
        ({'action': {**data['action'], 'period': 0.05}}, '100000000, robot file has 50000000'),
        ({'action': {**data['action'], 'representation': 'delta'}}, 'checkpoint has absolute, robot file has delta'),
        ({'state': {**data['state'], 'fields': ['position', 'velocity']}}, 'panda_joint1.velocity'),
        ({'action': {**data['action'], 'joints': data['action']['joints'][::-1]}}, 'action.joints: same items in another order'),
    ]
    for sections, message in cases:
        with pytest.raises(CheckpointError, match=message):
            Policy.load(original, changed(robot, **sections))


def test_unusable_device_and_dtype_are_named(robot: Robot, original: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'int8'.*float32"):
        Policy.load(original, robot, dtype='int8')
    with pytest.raises(CheckpointError, match=r"'cuda:77'"):
        Policy.load(original, robot, device='cuda:77')


def test_unknown_preset_is_named(robot: Robot, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'huge'.*tabletop"):
        new_checkpoint(robot, 'huge', tmp_path / 'x')
