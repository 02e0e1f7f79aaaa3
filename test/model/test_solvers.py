"""Integration of closed-form velocity fields: exact ends, order of convergence, evaluations, pinned elements."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from toy import every_solver

from vla_policy_ros.model.solvers import evaluation_times, integrate

STEPS = (1, 2, 3, 5, 10, 20, 40)
POINT = torch.tensor([0.3, -2.0])
ORDERS = {'euler': (1.8, 2.2), 'ab2': (3.4, 4.6), 'midpoint': (3.4, 4.6)}
each_step_count = pytest.mark.parametrize('steps', STEPS)


def start(rows: int = 64) -> Tensor:
    return torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_solver
@each_step_count
def test_constant_field_moves_by_the_constant(steps: int, solver: str) -> None:
    """O16."""
    x = start()
    torch.testing.assert_close(integrate(lambda *_: torch.full_like(x, 0.7), x, steps, solver), x - 0.7, atol=1e-6, rtol=0)


@every_solver
@each_step_count
def test_field_of_one_point_ends_in_that_point_for_any_number_of_steps(steps: int, solver: str) -> None:
    """O17: its trajectories are straight, so that every solver is exact."""
    x, times = start().float(), evaluation_times(solver, steps)
    end = integrate(lambda y, i: (y - POINT) / times[i], x, steps, solver)
    torch.testing.assert_close(end, POINT.expand_as(end), atol=1e-6, rtol=0)


@every_solver
def test_the_opposite_sign_does_not_end_in_the_point(solver: str) -> None:
    """O20."""
    x, times = start(), evaluation_times(solver, 10)
    end = integrate(lambda y, i: -(y - POINT) / times[i], x, 10, solver)
    assert (end - POINT).abs().mean() > 1.0


def linear_growth(solver: str, steps: int, rate: float) -> float:
    """What a solver makes of 1 in the field ``rate * x``, from its definition."""
    z = rate / steps
    if solver == 'midpoint':
        return (1 - z + z**2 / 2) ** steps
    if solver == 'euler':
        return (1 - z) ** steps
    before, now = 1.0, 1 - z
    for _ in range(steps - 1):
        before, now = now, now - z * (1.5 * now - 0.5 * before)
    return now


@every_solver
def test_linear_field_converges_with_the_order_of_the_solver(solver: str) -> None:
    """O18."""
    x, rate, errors = start(), 0.7, []
    for steps in (10, 20, 40):
        end = integrate(lambda y, _: rate * y, x, steps, solver)
        torch.testing.assert_close(end, x * linear_growth(solver, steps, rate), atol=1e-6, rtol=0)
        errors.append(float((end - x * math.exp(-rate)).abs().mean()))
    low, high = ORDERS[solver]
    assert all(low < a / b < high for a, b in pairwise(errors)), errors


def gaussian_error(solver: str, steps: int, mean: float = 0.4, sigma: float = 0.5) -> float:
    """Largest distance from the exact map ``mean + sigma * noise`` in the field whose data are normal."""
    x, times = start(4096), evaluation_times(solver, steps)

    def field(y: Tensor, index: int) -> Tensor:
        t = times[index]
        gain = (t - (1 - t) * sigma**2) / (t**2 + (1 - t) ** 2 * sigma**2)
        return -mean + gain * (y - (1 - t) * mean)

    return float((integrate(field, x, steps, solver) - (mean + sigma * x)).abs().max())


@every_solver
def test_gaussian_field_converges_to_the_exact_map(solver: str) -> None:
    """O19."""
    errors = [gaussian_error(solver, steps) for steps in (5, 10, 20, 40, 80)]
    ratios = [a / b for a, b in pairwise(errors)]
    if solver == 'euler':
        assert all(1.8 < ratio < 2.1 for ratio in ratios), errors
    else:
        # At least the second order: midpoint reaches the third in this field.
        assert all(ratio > 3.4 for ratio in ratios), errors
        assert all(error < gaussian_error('euler', steps) for error, steps in zip(errors, (5, 10, 20, 40, 80), strict=True))


@pytest.mark.parametrize(('solver', 'per_step'), [('euler', 1), ('ab2', 1), ('midpoint', 2)])
@each_step_count
def test_number_and_times_of_evaluations(steps: int, solver: str, per_step: int) -> None:
    seen: list[int] = []

    def field(y: Tensor, index: int) -> Tensor:
        seen.append(index)
        return torch.zeros_like(y)

    integrate(field, start(), steps, solver)
    times = evaluation_times(solver, steps)
    assert seen == list(range(per_step * steps)) and len(times) == len(seen)
    # From the integer step, not by adding up: exact at every step, and the last full step begins at 1 / K.
    assert times[::per_step] == [1.0 - k / steps for k in range(steps)]
    assert times[0] == 1.0 and min(times) > 0.0
    if solver == 'midpoint':
        assert times[1::2] == pytest.approx([1.0 - (k + 0.5) / steps for k in range(steps)], abs=1e-12)


@every_solver
def test_field_is_evaluated_at_the_states_that_belong_to_its_times(solver: str) -> None:
    """In the field of a straight line every evaluation lies on the line at its own time."""
    x, slope, times, seen = start(), 1.7, evaluation_times(solver, 4), []

    def field(y: Tensor, index: int) -> Tensor:
        seen.append((index, y.clone()))
        return torch.full_like(y, slope)

    integrate(field, x, 4, solver)
    for index, state in seen:
        torch.testing.assert_close(state, x - (1.0 - times[index]) * slope, atol=1e-12, rtol=0)


@every_solver
def test_pinned_elements_hold_bit_for_bit_wherever_the_field_looks(solver: str) -> None:
    x, known, seen = start().float(), torch.tensor([0.1, 0.2]), []

    def field(y: Tensor, _: int) -> Tensor:
        seen.append(y[:, 0].clone())
        return 3.0 * y + 1.0

    def pin(y: Tensor) -> Tensor:
        return torch.cat((known.expand(len(y), 1, 2), y[:, 1:]), dim=1)

    end = integrate(field, x, 5, solver, pin)
    for state in (*seen, end[:, 0]):
        assert torch.equal(state, known.expand_as(state))
    assert torch.equal(end[:, 1:], integrate(field, x, 5, solver)[:, 1:]), 'the others go their own way'


def test_what_cannot_be_integrated_is_refused() -> None:
    with pytest.raises(ValueError, match='num_steps is 0'):
        integrate(lambda y, _: y, start(), 0)
    with pytest.raises(ValueError, match=r"solver 'heun' is unknown; use one of euler, ab2, midpoint"):
        integrate(lambda y, _: y, start(), 3, 'heun')
