"""Weights go from one robot to another, and only between networks of one size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vla_policy_ros.policy.checkpoint import new_checkpoint, new_model
from vla_policy_ros.robot import load_robot
from vla_policy_ros.training.transfer import transfer_weights

ROBOTS = Path(__file__).resolve().parents[2] / 'config' / 'robots'
ARM, GRIPPER = (load_robot(ROBOTS / f'{name}.yaml') for name in ('tabletop', 'tabletop_gripper'))


@pytest.fixture(scope='module')
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(ARM, 'tiny', tmp_path_factory.mktemp('donor'), seed=3)


def test_everything_but_the_robot_sized_projections_is_taken(donor: Path) -> None:
    model, fresh, theirs = new_model(GRIPPER, 'tiny', seed=1), new_model(GRIPPER, 'tiny', seed=1), new_model(ARM, 'tiny', seed=3)
    content = transfer_weights(model, donor)
    sized = [name for name, value in theirs.state_dict().items() if value.shape != model.state_dict()[name].shape]
    assert sized and all('action' in name or 'state' in name for name in sized)
    for name, value in model.state_dict().items():
        source = fresh if name in sized else theirs
        assert torch.equal(value, source.state_dict()[name]), name
    assert content == transfer_weights(new_model(GRIPPER, 'tiny', seed=2), donor)


def test_another_size_and_damaged_files_are_refused(donor: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'between robots, not between sizes'):
        transfer_weights(new_model(GRIPPER, 'tabletop'), donor)
    with pytest.raises(ValueError, match=r'no model\.safetensors'):
        transfer_weights(new_model(GRIPPER, 'tiny'), tmp_path)
    whole = (donor / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='is damaged'):
        transfer_weights(new_model(GRIPPER, 'tiny'), tmp_path)


def test_single_groups_go_to_a_network_that_differs_elsewhere(donor: Path) -> None:
    changes = {'expert_config': {'time_conditioning': 'concat_mlp'}, 'fusion_mode': 'patch_concat'}
    model, fresh = (new_model(ARM, 'tiny', 1, changes) for _ in range(2))
    theirs = new_model(ARM, 'tiny', seed=3).state_dict()
    with pytest.raises(ValueError, match=r'time_mlp_in.*leave this group out of transfer_groups'):
        transfer_weights(new_model(ARM, 'tiny', 1, changes), donor)
    transfer_weights(model, donor, ('vision', 'geometry'))
    for name, value in model.state_dict().items():
        taken = name.startswith(('vision_tower.', 'geometry_encoder.'))
        assert torch.equal(value, theirs[name] if taken else fresh.state_dict()[name]), name
