"""What a probe falsifies, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip('mujoco')

from vla_policy_ros.evaluation.probes import Probe, about_another_object
from vla_policy_ros.evaluation.seeds import scene_seeds
from vla_policy_ros.evaluation.variations import conditions_of
from vla_policy_ros.sim.tasks import TASKS
from vla_policy_ros.types import CameraView, Observation

K = np.array([[500.0, 0.0, 320.0], [0.0, 510.0, 240.0], [0.0, 0.0, 1.0]])


def observation() -> Observation:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    return Observation(5, {'scene': CameraView(image, K, 5), 'wrist': CameraView(image, None, 5)}, np.zeros(7), 5, 'reach it')


def test_a_wrong_K_scales_the_focal_lengths_and_nothing_else() -> None:
    true = observation()
    seen = Probe(focal_scale=1.3).seen(true)
    np.testing.assert_allclose(seen.cameras['scene'].K, [[650.0, 0.0, 320.0], [0.0, 663.0, 240.0], [0.0, 0.0, 1.0]])
    assert seen.cameras['scene'].rgb is true.cameras['scene'].rgb and seen.cameras['wrist'].K is None
    assert K[0, 0] == 500.0 and (seen.stamp_ns, seen.instruction) == (5, 'reach it')


def test_no_K_hides_all_of_them_and_the_truth_is_handed_on_as_it_is() -> None:
    true = observation()
    assert all(view.K is None for view in Probe(hide_k=True).seen(true).cameras.values())
    assert Probe().seen(true) is true and Probe().tells_the_truth


@pytest.mark.parametrize('scale', [0.0, -1.0, float('nan'), 100.0])
def test_a_factor_that_makes_no_camera_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match='makes no camera'):
        Probe(focal_scale=scale)


def test_wrong_and_absent_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match='--no-k'):
        Probe(focal_scale=1.3, hide_k=True)


@pytest.mark.parametrize('variation', ['nominal', 'shape_only', 'colour_only', 'held_out_phrasings', 'held_out_kinds'])
def test_a_wrong_instruction_names_exactly_the_object_that_is_now_the_target(variation: str) -> None:
    for seed in scene_seeds(0, 30):
        episode = TASKS['reach'].sample(seed, conditions_of(variation))
        told = about_another_object(episode, seed)
        objects = episode.scene.objects
        assert told.targets != episode.targets and told.scene is episode.scene
        assert [slot for slot, spec in enumerate(objects) if spec.name in told.instruction] == list(told.targets), told.instruction
        assert about_another_object(episode, seed) == told


def test_of_twins_a_wrong_instruction_names_neither() -> None:
    episode = TASKS['reach_any'].sample(scene_seeds(0, 1)[0], conditions_of('nominal'))
    told = about_another_object(episode, 0)
    assert not set(told.targets) & set(episode.targets)
