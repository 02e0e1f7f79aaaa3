"""No scene that is reported was trained on, or used for a choice."""

from __future__ import annotations

import pytest

pytest.importorskip('mujoco')

from vla_policy_ros.evaluation.seeds import BLOCK, PURPOSES, scene_seeds
from vla_policy_ros.evaluation.variations import conditions_of
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim.dataset import SCENE_SEED_BASE, examples
from vla_policy_ros.sim.scene import Scene, Variation, sample_scene
from vla_policy_ros.sim.tasks import TASKS
from vla_policy_ros.sim.tasks.reach import ATTEMPT_SHIFT


def all_scenes(purpose: str) -> range:
    """From the first scene of the first seed to the last scene of the last."""
    last = PURPOSES[purpose] // BLOCK - 1
    return range(scene_seeds(0, BLOCK, purpose).start, scene_seeds(last, BLOCK, purpose).stop)


def test_the_ranges_of_reports_choices_and_training_share_no_scene() -> None:
    test, choice = all_scenes('test'), all_scenes('choice')
    assert set(PURPOSES) == {'test', 'choice'}
    assert 1_000_000 < choice.start < choice.stop <= test.start < test.stop <= 1 << ATTEMPT_SHIFT < SCENE_SEED_BASE


@pytest.mark.parametrize('purpose', PURPOSES)
def test_scenes_that_are_drawn_again_stay_apart_too(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no scene fulfils its conditions, a task asks for none that is trained, or of another purpose by its last bits."""
    asked: list[int] = []

    def sample(seed: int, variation: Variation) -> Scene:
        asked.append(seed)
        return sample_scene(seed, variation)

    monkeypatch.setattr('vla_policy_ros.sim.tasks.reach.sample_scene', sample)
    monkeypatch.setattr('vla_policy_ros.sim.tasks.reach.can_name', lambda *_: False)
    for seed in (all_scenes(purpose)[0], all_scenes(purpose)[-1]):
        with pytest.raises(ValueError, match='no scene'):
            TASKS['reach'].sample(seed, conditions_of('shape_only'))
    assert len(asked) > 100 and max(asked) < SCENE_SEED_BASE
    assert all(seed % (1 << ATTEMPT_SHIFT) in all_scenes(purpose) for seed in asked)


def test_training_examples_come_from_above() -> None:
    robot = load_robot(robot_path('tabletop'))
    ids = {example.scene_id for seed in (0, 10_000) for example in examples(robot, seed, 4)}
    assert ids and min(ids) >= SCENE_SEED_BASE


def test_seeds_share_no_scene_and_longer_evaluations_begin_with_shorter_ones() -> None:
    assert not set(scene_seeds(3, BLOCK)) & set(scene_seeds(4, BLOCK))
    assert list(scene_seeds(3, 20))[:10] == list(scene_seeds(3, 10))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ((-1, 10), 'seed is -1'),
        ((PURPOSES['test'] // BLOCK, 10), 'must lie in 0..8191'),
        ((0, 0), 'episodes is 0'),
        ((0, BLOCK + 1), 'use several seeds'),
        ((0, 1, 'training'), 'purpose'),
    ],
)
def test_what_would_leave_a_range_is_refused(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scene_seeds(*arguments)
