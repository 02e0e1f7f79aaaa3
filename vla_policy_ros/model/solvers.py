"""Integration of a velocity field from noise (t = 1) to data (t = 0) in K equal steps of h = 1 / K.

    euler      x <- x - h v(x, t_k)                                             first order, one evaluation a step
    ab2        x <- x - h (3/2 v_k - 1/2 v_{k-1}),  the first step is Euler's    second order, one evaluation a step
    midpoint   x <- x - h v(x - h/2 v(x, t_k), t_k - h/2)                       second order, two evaluations a step

with t_k = 1 - k / K computed from the integer k. The times of all evaluations are known beforehand, so that whatever depends on
time alone is computed once, before the loop.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vla_policy_ros.model.configuration import SOLVERS


def evaluation_times(solver: str, num_steps: int) -> list[float]:
    """The times at which `integrate` evaluates the field, in order.

    Raises:
        ValueError: an unknown solver, or no step.
    """
    if solver not in SOLVERS:
        raise ValueError(f'solver {solver!r} is unknown; use one of {", ".join(SOLVERS)}')
    if num_steps < 1:
        raise ValueError(f'num_steps is {num_steps}; at least one step is needed')
    if solver == 'midpoint':
        return [1.0 - half / (2 * num_steps) for half in range(2 * num_steps)]
    return [1.0 - step / num_steps for step in range(num_steps)]


def integrate(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    num_steps: int,
    solver: str = 'euler',
    pin: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``x`` at t = 0 for ``x = noise`` at t = 1.

    Args:
        velocity: ``velocity(x, i)`` is dx/dt at the i-th of `evaluation_times`.
        noise: any shape.
        num_steps: K.
        solver: one of `SOLVERS`.
        pin: puts known elements of x back in place; applied to the noise and after every step.
    """
    evaluations = len(evaluation_times(solver, num_steps))
    pinned = pin or (lambda value: value)
    step = 1.0 / num_steps
    x = pinned(noise)
    if solver == 'midpoint':
        for index in range(0, evaluations, 2):
            half = pinned(x - step / 2 * velocity(x, index))
            x = pinned(x - step * velocity(half, index + 1))
        return x
    before: Tensor | None = None
    for index in range(evaluations):
        now = velocity(x, index)
        slope = now if before is None or solver == 'euler' else 1.5 * now - 0.5 * before
        x, before = pinned(x - step * slope), now
    return x
