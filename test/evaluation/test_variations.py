"""Variations: every name means what it says, and a slip of the pen is refused."""

from __future__ import annotations

import pytest

pytest.importorskip('mujoco')

from vla_policy_ros.evaluation.variations import NOMINAL, conditions_of
from vla_policy_ros.sim.instructions import HELD_OUT_TEMPLATES
from vla_policy_ros.sim.scene import HELD_OUT_KINDS
from vla_policy_ros.sim.tasks import TASKS, Conditions


def test_parts_add_up() -> None:
    found = conditions_of('camera=0.025+shape_only+held_out_phrasings')
    assert (found.scene.camera, found.scene.camera_shift) == ('shifted', 0.025)
    assert (found.naming, found.phrasing) == ('shape', 'held_out')
    assert conditions_of(NOMINAL) == Conditions()


def test_held_out_kinds_and_phrasings_reach_the_episode() -> None:
    episode = TASKS['reach'].sample(1 << 25, conditions_of('held_out_kinds+held_out_phrasings+full_name'))
    target = episode.scene.objects[episode.targets[0]]
    assert (target.colour, target.shape) in HELD_OUT_KINDS
    assert episode.instruction in {template.format(target.name) for template in HELD_OUT_TEMPLATES}


def test_a_moved_camera_leaves_objects_sentence_and_start_alone() -> None:
    nominal, moved = (TASKS['reach'].sample(1 << 25, conditions_of(name)) for name in (NOMINAL, 'camera=0.025'))
    assert (nominal.scene.camera_position != moved.scene.camera_position).all()
    assert abs(nominal.scene.camera_position - moved.scene.camera_position).max() <= 0.025
    assert nominal.scene.objects == moved.scene.objects and nominal.instruction == moved.instruction
    assert (nominal.scene.start == moved.scene.start).all()


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('', 'unknown part'),
        ('camera', 'unknown part'),
        ('full_name+shape_only', 'full_name and shape_only, which exclude one another'),
        ('camera=0.02+trained', 'exclude one another'),
        ('camera=far', 'number of metres'),
        ('camera=3', 'camera_shift'),
        ('shape_only+shape_only', 'twice'),
        ('camera=0.1+camera=0.2', 'twice'),
        ('nominal+shape_only', 'unknown part'),
        ('shape-only', 'held_out_kinds'),
    ],
)
def test_other_names_are_refused_with_the_ones_that_exist(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        conditions_of(name)
