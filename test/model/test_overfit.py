"""One batch learnt by heart: the whole chain from pixels to actions can represent it, and uses every input that it needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toy import HORIZON, noise, policy_inputs, toy_config

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

pytestmark = pytest.mark.slow

STEPS, RATE, WARM_UP = 600, 6e-3, 20
INPUTS = ('pixels', 'intrinsics', 'words', 'state')


class Learnt(NamedTuple):
    """A model after training, what it was trained on, and its last losses as a share of that of a zero velocity."""

    model: MapAnythingLlava3DForConditionalGeneration
    rows: dict[str, Tensor]
    targets: Tensor
    losses: Tensor


@pytest.fixture(scope='module')
def learnt() -> Learnt:
    """Five samples: the first, and one for each input that differs from the first in that input alone."""
    rows: dict[str, Any] = {name: value.repeat(5, *[1] * (value.dim() - 1)) for name, value in policy_inputs(batch=1).items()}
    rows['pixel_values'][1, 0] = 255 - rows['pixel_values'][1, 0]
    rows['intrinsic'][2, :, :2] *= 1.6
    rows['input_ids'][3, -2] = (rows['input_ids'][3, -2] + 7) % 90 + 3
    rows['state'][4] = -rows['state'][4]
    targets = torch.randn(5, HORIZON, 3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    config = toy_config(
        text_config={'initializer_range': 0.1, 'num_hidden_layers': 2},
        expert_config={'hidden_size': 64, 'intermediate_size': 128},
        fusion_init_std=0.3,
    )
    model = MapAnythingLlava3DForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group['lr'] = RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        loss = model(**rows, actions=targets, repeats=12, generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    zero_velocity = 1.0 + float(targets.square().mean())
    return Learnt(model.eval(), rows, targets, torch.stack(losses) / zero_velocity)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def test_loss_falls_far_below_that_of_a_zero_velocity(learnt: Learnt) -> None:
    """O36."""
    assert float(learnt.losses[0]) == pytest.approx(1.0, abs=0.3)
    assert float(learnt.losses[-20:].mean()) < 0.02


@pytest.mark.parametrize(('solver', 'steps'), [('euler', 10), ('ab2', 10), ('midpoint', 5)])
def test_sampled_actions_are_the_targets(learnt: Learnt, solver: str, steps: int) -> None:
    """O36: from several noises."""
    for seed in (3, 4):
        chunk = learnt.model.predict_action(learnt.rows, steps, noise=noise(5, seed), solver=solver)
        assert distance(chunk, learnt.targets) < 0.05


@pytest.mark.parametrize('what', INPUTS)
def test_every_input_decides_about_the_actions(learnt: Learnt, what: str) -> None:
    """O36: two samples that differ in one input only, from the same noise, give as different actions as their targets are."""
    row = 1 + INPUTS.index(what)
    answers = learnt.model.predict_action(learnt.rows, 10, noise=noise(1).repeat(5, 1, 1))
    assert distance(answers[row], answers[0]) > 0.9 * distance(learnt.targets[row], learnt.targets[0])
    assert distance(answers[row], learnt.targets[row]) < 0.1 * distance(learnt.targets[row], learnt.targets[0])
