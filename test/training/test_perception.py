"""The perception losses ask the right token, and say nothing where nothing is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vla_policy_ros.training.perception import LOSS_WEIGHTS, PerceptionHead

GRID, PATCH, WIDTH = 4, 10, 12
NAN = float('nan')


@pytest.fixture
def head() -> PerceptionHead:
    torch.manual_seed(0)
    return PerceptionHead(WIDTH, PATCH, GRID, colours=3, shapes=2)


def labels(pixel: tuple[float, float], kind: tuple[int, int] = (1, 0), point: float = 0.5, depth: float = 1.0) -> dict[str, Tensor]:
    """One scene, one camera, one object."""
    return {
        'kinds': torch.tensor([[list(kind)]]),
        'pixels': torch.tensor([[[list(pixel)]]]),
        'points': torch.full((1, 1, 1, 3), point),
        'depth': torch.full((1, 1, 16, 16), depth),
    }


def test_only_the_token_under_the_object_is_asked_what_it_is(head: PerceptionHead) -> None:
    tokens = torch.randn(1, 1, GRID * GRID, WIDTH, requires_grad=True)
    losses = head(tokens, **labels((21.0, 35.0)))
    for name in ('colour', 'shape', 'offset', 'point'):
        (gradient,) = torch.autograd.grad(losses[name], tokens, retain_graph=True)
        asked = gradient.abs().sum(dim=-1)[0, 0].nonzero().flatten().tolist()
        assert asked == [3 * GRID + 2], name
    for name in ('centre', 'depth'):
        (gradient,) = torch.autograd.grad(losses[name], tokens, retain_graph=True)
        assert (gradient.abs().sum(dim=-1) > 0).all(), name


def test_a_right_answer_costs_nothing(head: PerceptionHead) -> None:
    with torch.no_grad():
        for module in (head.offset, head.point, head.depth, head.colour, head.shape):
            module.weight.zero_()
            module.bias.zero_()
        head.offset.bias.copy_(torch.tensor([(21.5 / PATCH) % 1 - 0.5, (35.5 / PATCH) % 1 - 0.5]))
        head.point.bias.copy_(torch.tensor([0.0, 5.0, 4.7]))
        head.depth.bias.fill_(torch.tensor(0.7).log())
        head.colour.bias[2] = head.shape.bias[1] = 50.0
    with torch.no_grad():
        losses = head(torch.randn(1, 1, GRID * GRID, WIDTH), **labels((21.0, 35.0), kind=(2, 1), depth=0.7))
    for name in ('colour', 'shape', 'offset', 'point', 'depth'):
        assert float(losses[name]) == pytest.approx(0.0, abs=1e-6), name
    assert float(losses['colour_accuracy']) == float(losses['shape_accuracy']) == 1.0


def test_unknown_labels_cost_nothing_and_leave_finite_gradients(head: PerceptionHead) -> None:
    tokens = torch.randn(1, 1, GRID * GRID, WIDTH, requires_grad=True)
    losses = head(tokens, **labels((NAN, NAN), point=NAN, depth=NAN))
    assert all(float(losses[name]) == 0.0 for name in ('colour', 'shape', 'offset', 'point', 'depth'))
    total = sum(losses[name] * weight for name, weight in LOSS_WEIGHTS.items())
    total.backward()
    assert torch.isfinite(tokens.grad).all()
    nothing = {'kinds': torch.zeros(1, 0, 2).long(), 'pixels': torch.zeros(1, 1, 0, 2), 'points': torch.zeros(1, 1, 0, 3)}
    losses = head(tokens, **nothing, depth=torch.full((1, 1, 16, 16), NAN))
    assert all(float(losses[name]) == 0.0 for name in LOSS_WEIGHTS)


def test_a_moving_camera_is_not_asked_for_places(head: PerceptionHead) -> None:
    given = labels((21.0, 35.0))
    given['points'][..., 0] = NAN
    tokens = torch.randn(1, 1, GRID * GRID, WIDTH)
    assert float(head(tokens, **given)['point']) == 0.0 and float(head(tokens, **given)['offset']) > 0.0
