"""The checkpoint that comes with the package does what its README says, on scenes it has never seen."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip('mujoco')

from vla_policy_ros.policy import Policy
from vla_policy_ros.robot import load_robot
from vla_policy_ros.training.evaluate import FIRST_SEED, evaluate, summarise

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / 'checkpoints' / 'tabletop'
EPISODES = 10


def test_weights_are_small_enough_to_ship() -> None:
    assert (CHECKPOINT / 'model.safetensors').stat().st_size < 10_000_000


@pytest.mark.slow
def test_shipped_checkpoint_reaches_the_named_object() -> None:
    robot = load_robot(ROOT / 'config' / 'robots' / 'tabletop.yaml')
    policy = Policy.load(CHECKPOINT, robot, seed=0)
    seeds = range(FIRST_SEED, FIRST_SEED + EPISODES)
    episodes = list(evaluate(policy, robot, seeds, seconds=4.0, executed=8, jitter=True))
    summary = summarise(episodes)
    assert summary['success_5cm'] >= 0.6, summary
    assert summary['nearer_to_another_object'] <= 2, summary
