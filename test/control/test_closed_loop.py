"""Planner, delayed transport and emulated controller together: what the arm is commanded, tick by tick."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_policy_ros.control.planner import Emission

MODES = ('zero', 'start')
seeds = st.integers(0, 2**32 - 1)


def wandering(rng: np.random.Generator, joints: int, spread: float = 0.12) -> Any:
    """A path that wanders like a noisy policy, often faster and further than allowed."""
    points = np.cumsum(rng.normal(0, spread, (200, joints)), axis=0).clip(-2.85, 2.85)
    return lambda t: points[int(np.clip(round(t * 10), 0, 199))]


def rates(commands: np.ndarray, emission: Emission) -> tuple[np.ndarray, np.ndarray]:
    """Commanded velocity and acceleration by differences between ticks."""
    period = emission.controller_period_ns * 1e-9
    velocity = np.diff(commands, axis=0) / period
    return velocity, np.diff(velocity, axis=0) / period


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(MODES), st.sampled_from([50.0, 100.0, 250.0]), st.sampled_from([100, 200, 330]))
def test_no_tick_steps_further_than_the_velocity_limit_allows(
    tools: Any, seed: int, mode: str, rate: float, replan_ms: int
) -> None:
    rng = np.random.default_rng(seed)
    limits = tools.limits()
    emission = Emission.for_controller(rate, mode)  # type: ignore[arg-type]
    loop = tools.loop(limits, emission, wandering(rng, 3), rng, replan_ms=replan_ms, noise=0.02)
    velocity, _ = rates(loop.run(2.5), emission)
    assert any(plan.trajectory is not None for plan in loop.plans)
    assert np.abs(velocity).max() <= limits.velocity[0] * (1 + 1e-9)


class NothingOrAll(np.random.Generator):
    """Draws either nothing or all of the admitted delay, never in between: the worst jitter."""

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return (low, high)[int(self.integers(0, 2))]


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('rate', [50.0, 100.0, 500.0])
def test_full_speed_with_the_worst_jitter_keeps_the_step_within_the_limit(tools: Any, rate: float, mode: str) -> None:
    limits = tools.limits(position=30.0)
    emission = Emission.for_controller(rate, mode)  # type: ignore[arg-type]
    full_speed = limits.velocity[0] * emission.velocity_fraction
    rng = NothingOrAll(np.random.PCG64(2))
    commands = tools.loop(limits, emission, lambda t: np.full(3, full_speed * max(t, 0.0)), rng).run(4.0)
    velocity, _ = rates(commands, emission)
    assert full_speed * (1 - 1e-6) <= np.abs(velocity).max() <= limits.velocity[0] * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(seeds, st.booleans())
def test_with_a_start_stamp_the_acceleration_limit_holds_at_every_tick_from_any_start_state(
    tools: Any, seed: int, from_desired: bool
) -> None:
    rng = np.random.default_rng(seed)
    limits = tools.limits()
    emission = Emission.for_controller(100.0, 'start')
    loop = tools.loop(limits, emission, wandering(rng, 3), rng, from_desired=from_desired, noise=0.02)
    velocity, acceleration = rates(loop.run(3.0), emission)
    assert np.abs(velocity).max() <= limits.velocity[0] * (1 + 1e-9)
    assert np.abs(acceleration).max() <= limits.acceleration[0] * (1 + 1e-6)


@pytest.mark.parametrize(('mode', 'bound'), [('start', 1e-3), ('zero', 0.04)])
def test_a_feasible_path_is_tracked_through_latency_replanning_and_jitter(tools: Any, mode: str, bound: float) -> None:
    emission = Emission.for_controller(100.0, mode)  # type: ignore[arg-type]
    limits = tools.limits()
    phase = np.array([0.0, 1.0, 2.5])

    def path(t: float) -> np.ndarray:
        return 0.5 * np.sin(1.1 * t + phase) - 0.5 * np.sin(phase)

    commands = tools.loop(limits, emission, path, np.random.default_rng(3)).run(6.0)
    period = emission.controller_period_ns * 1e-9
    wanted = np.array([path(index * period) for index in range(len(commands))])
    assert np.abs(commands - wanted)[200:].max() <= bound


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dies_at', [0.55, 0.8, 1.31])
def test_when_the_policy_dies_the_arm_comes_to_rest_within_the_deceleration_limit(
    tools: Any, mode: str, dies_at: float
) -> None:
    emission = Emission.for_controller(100.0, mode)  # type: ignore[arg-type]
    limits = tools.limits()
    loop = tools.loop(
        limits, emission, lambda t: np.array([1.0, -0.8, 0.3]) * 0.6 * t, np.random.default_rng(4), dies_at=dies_at, horizon=8
    )
    commands = loop.run(4.0)
    velocity, acceleration = rates(commands, emission)
    death = int(dies_at * 100)
    assert np.abs(velocity[death]).max() > 0.3, 'it was moving'
    assert np.all(commands[-20:] == commands[-1]), 'it rests'
    settled = death + 15 if mode == 'zero' else 0  # stamp 'zero' lets the controller bridge the last message first
    assert np.abs(acceleration[settled:]).max() <= limits.acceleration[0] * (1 + 1e-6)


@pytest.mark.parametrize('mode', MODES)
def test_noise_in_the_chunks_never_moves_the_arm_out_of_its_position_limits(tools: Any, mode: str) -> None:
    emission = Emission.for_controller(100.0, mode)  # type: ignore[arg-type]
    limits = tools.limits(position=0.5)
    rng = np.random.default_rng(5)
    loop = tools.loop(limits, emission, lambda t: 0.5 * np.sign(np.sin(2.0 * t + np.arange(3))), rng, noise=0.01)
    commands = loop.run(6.0)
    assert any(plan.clamped_joints for plan in loop.plans)
    assert np.abs(commands).max() <= 0.5 + (1e-9 if mode == 'start' else 0.02)
    assert np.abs(commands).max() > 0.45
