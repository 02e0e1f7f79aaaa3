"""Real-time chunking: guided (inference-time inpainting, with the network's true Jacobian) and trained (clean action prefixes)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import (
    ACTION_DIM,
    HORIZON,
    RIGHT,
    backbone_inputs,
    every_solver,
    fixed_state,
    flow_loss,
    mild,
    noise,
    padded_on_either_side,
    policy_inputs,
    sampled,
    toy_model,
    velocity_field,
)

from vla_policy_ros.model.flow_matching import TimeFeatures
from vla_policy_ros.model.real_time_chunking import RealTimeGuidance, guidance_weight, guided, prefix_weights
from vla_policy_ros.model.solvers import evaluation_times, integrate

DELAY, OVERLAP = 1, 4
per_action_time = pytest.mark.parametrize('conditioning', ['concat_mlp', 'adarms'])


def guidance(**changes: Any) -> RealTimeGuidance:
    previous = noise(seed=21) * 0.5
    given = {'previous': previous, 'inference_delay': DELAY, 'execution_horizon': OVERLAP, 'max_weight': 5.0}
    return RealTimeGuidance(**{**given, **changes})


def trained_model(conditioning: str, longest: int = 3, **expert: Any) -> Any:
    return toy_model(expert_config={'time_conditioning': conditioning, 'rtc_max_delay': longest, **expert})


# Guided


@pytest.mark.parametrize('solver_and_time', ['euler-token', 'ab2-concat_mlp', 'midpoint-adarms'])
@padded_on_either_side
def test_guidance_of_weight_zero_is_plain_sampling(pads: list[list[int]], solver_and_time: str) -> None:
    """O37."""
    solver, conditioning = solver_and_time.split('-')
    model = toy_model(expert_config={'time_conditioning': conditioning})
    given = backbone_inputs(model, pads)
    plain = sampled(model, given, solver=solver)
    assert torch.equal(sampled(model, given, solver=solver, guidance=guidance(max_weight=0.0)), plain)
    assert not torch.equal(sampled(model, given, solver=solver, guidance=guidance()), plain)


def test_guidance_of_weight_zero_is_plain_prediction_of_the_whole_model() -> None:
    """O37: exactly on one cache; prediction without guidance may choose another cache and kernel."""
    model, inputs, nothing = mild(toy_model()), policy_inputs(), guidance(max_weight=0.0)
    prefix = model.encode_prefix(inputs, 'immutable')
    plain = model.denoise(prefix, 4, noise=noise())
    got = model.predict_action(inputs, 4, noise=noise(), guidance=nothing)
    assert torch.equal(got, plain) and not got.requires_grad
    torch.testing.assert_close(model.predict_action(inputs, 4, noise=noise()), got, atol=1e-5, rtol=0)


def test_gamma_has_the_published_values() -> None:
    table = {
        1.0: 10.0, 0.9: 9.11, 0.8: 4.25, 0.7: 2.76, 0.6: 2.17, 0.5: 2.0, 0.4: 2.17, 0.3: 2.76, 0.2: 4.25, 0.1: 9.11, 0.0: 10.0,
    }  # fmt: skip
    assert {time: round(guidance_weight(time, 10.0), 2) for time in table} == table
    assert guidance_weight(0.9, 5.0) == 5.0 and guidance_weight(0.5, 5.0) == pytest.approx(2.0)


@pytest.mark.parametrize(('delay', 'end'), [(0, 5), (1, 4), (2, 2), (3, 5), (0, 0), (5, 5)])
def test_weights_are_one_for_the_delay_fade_in_the_overlap_and_vanish_behind(delay: int, end: int) -> None:
    for schedule in ('exponential', 'linear', 'ones', 'zeros'):
        weights = prefix_weights(guidance(inference_delay=delay, execution_horizon=end, schedule=schedule)).tolist()
        for row, weight in enumerate(weights):
            share = (end - row) / (end - delay + 1)
            fade = {
                'exponential': share * (math.exp(share) - 1) / (math.e - 1), 'linear': share, 'ones': 1.0, 'zeros': 0.0,
            }[schedule]  # fmt: skip
            expected = 1.0 if row < delay else fade if row < end else 0.0
            assert weight == pytest.approx(expected, abs=1e-6), (schedule, row)
        assert all(first >= second for first, second in pairwise(weights))


def correction(model: torch.nn.Module, given: dict[str, Tensor], x: Tensor, time: float) -> Tensor:
    """What guidance adds to the velocity at one evaluation."""
    field = velocity_field(model, given)
    with torch.no_grad():
        return guided(lambda y, _: field(y, time), [time], guidance())(x, 0) - field(x, time)


@pytest.mark.parametrize('conditioning', ['token', 'adarms'])
@pytest.mark.parametrize('time', [0.75, 0.3])
def test_correction_is_the_product_with_the_jacobian_of_the_network(time: float, conditioning: str) -> None:
    """Against the Jacobian written out row by row; leaving the network out of it gives something else."""
    model = toy_model(expert_config={'time_conditioning': conditioning})
    given, x = backbone_inputs(model, RIGHT), noise()
    field = velocity_field(model, given)
    size = x.numel()
    jacobian = torch.autograd.functional.jacobian(lambda y: y - time * field(y, time), x).reshape(size, size)
    with torch.no_grad():
        ahead = x - time * field(x, time)
    share = [1.0] + [(4 - row) / 4 for row in (1, 2, 3)] + [0.0]
    weights = torch.tensor([1.0] + [c * (math.exp(c) - 1) / (math.e - 1) for c in share[1:4]] + [0.0])[None, :, None]
    error = (guidance().previous - ahead) * weights
    gamma = min(5.0, time / (1 - time) * ((1 - time) ** 2 + time**2) / time**2)
    expected = -gamma * (jacobian.T @ error.flatten()).view_as(x)
    got = correction(model, given, x, time)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    without_network = -gamma * error
    assert (got - without_network).abs().max() > 0.1 * got.abs().max()
    # Its reach shows the difference, too: only the Jacobian carries the error of the overlap to the steps behind it.
    assert (got[:, OVERLAP:] != 0).any() and (without_network[:, OVERLAP:] == 0).all()


def overlap_distance(chunk: Tensor, towards: RealTimeGuidance) -> float:
    return float((prefix_weights(towards)[None, :, None] * (chunk - towards.previous).square()).mean())


@every_solver
def test_guidance_draws_the_overlap_towards_the_previous_chunk(solver: str) -> None:
    """On a network whose field is mild enough for the solver to follow."""
    model = mild(toy_model())
    given, towards = backbone_inputs(model, RIGHT), guidance(max_weight=10.0)
    plain = overlap_distance(sampled(model, given, 20, solver=solver), towards)
    assert overlap_distance(sampled(model, given, 20, solver=solver, guidance=towards), towards) < 0.5 * plain


@every_solver
def test_guidance_of_a_known_distribution_continues_the_previous_chunk(solver: str) -> None:
    """Normal chunks whose steps are correlated: the overlap comes near the old one, and the steps behind it follow."""
    steps, rows = 20, torch.arange(HORIZON)
    covariance = 0.9 ** (rows[:, None] - rows[None]).abs().float()
    times = evaluation_times(solver, steps)

    def field(x: Tensor, index: int) -> Tensor:
        t = times[index]
        spread = torch.linalg.inv((1 - t) ** 2 * covariance + t**2 * torch.eye(HORIZON))
        return (t * spread - (1 - t) * covariance @ spread) @ x

    towards = guidance(previous=torch.full((2, HORIZON, ACTION_DIM), 1.5), inference_delay=2, max_weight=10.0)
    plain = integrate(field, noise(), steps, solver)
    got = integrate(guided(field, times, towards), noise(), steps, solver)
    assert overlap_distance(got, towards) < 0.1 * overlap_distance(plain, towards)
    assert (got - towards.previous)[:, OVERLAP:].abs().mean() < 0.7 * (plain - towards.previous)[:, OVERLAP:].abs().mean()


def test_what_lies_behind_the_overlap_may_be_anything() -> None:
    model = toy_model()
    given, previous = backbone_inputs(model, RIGHT), guidance().previous.clone()
    expected = sampled(model, given, guidance=guidance())
    previous[:, OVERLAP:] = float('nan')
    assert torch.equal(sampled(model, given, guidance=guidance(previous=previous)), expected)
    previous[:, OVERLAP - 1] = float('nan')
    with pytest.raises(ValueError, match='NaN or infinite values inside the overlap'):
        sampled(model, given, guidance=guidance(previous=previous))


def test_guidance_leaves_no_gradient_behind() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    assert not sampled(model, given, guidance=guidance()).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_guidance_that_cannot_work_is_refused() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    with torch.inference_mode(), pytest.raises(RuntimeError, match='no_grad'):
        sampled(model, given, guidance=guidance())
    with pytest.raises(ValueError, match=r'\(1, 5, 3\); expected \(2, 5, 3\)'):
        sampled(model, given, guidance=guidance(previous=torch.zeros(1, HORIZON, ACTION_DIM)))
    for wrong, message in (
        ({'previous': torch.zeros(HORIZON, ACTION_DIM)}, r'\(5, 3\)'),
        ({'inference_delay': 5}, 'inference_delay 5 and execution_horizon 4'),
        ({'execution_horizon': 6}, 'execution_horizon 6.*<= 5'),
        ({'schedule': 'cubic'}, "'cubic' is unknown; use one of exponential"),
        ({'max_weight': -1.0}, 'max_weight is -1'),
        ({'max_weight': float('nan')}, 'max_weight is nan'),
    ):
        with pytest.raises(ValueError, match=message):
            guidance(**wrong)


# Trained


@per_action_time
@every_solver
@pytest.mark.parametrize('steps', [1, 3])
def test_known_actions_come_back_bit_for_bit(steps: int, solver: str, conditioning: str) -> None:
    """O37."""
    model = trained_model(conditioning)
    given = backbone_inputs(model, RIGHT)
    plain = sampled(model, given, solver=solver)
    known = noise(seed=21)[:, :steps]
    chunk = sampled(model, given, solver=solver, action_prefix=known)
    assert torch.equal(chunk[:, :steps], known)
    assert (chunk[:, steps:] - plain[:, steps:]).abs().max() > 1e-3, 'the others are drawn to continue them'
    other = sampled(model, given, solver=solver, action_prefix=known + 0.5)
    assert (other[:, steps:] - chunk[:, steps:]).abs().max() > 1e-3


@per_action_time
def test_an_empty_action_prefix_is_plain_sampling(conditioning: str) -> None:
    model = trained_model(conditioning)
    given = backbone_inputs(model, RIGHT)
    assert torch.equal(sampled(model, given, action_prefix=torch.zeros(2, 0, ACTION_DIM)), sampled(model, given))


@per_action_time
@torch.no_grad()
def test_sampling_after_known_actions_equals_a_loop_with_a_time_per_token(conditioning: str) -> None:
    model = mild(trained_model(conditioning))
    given, steps, known = backbone_inputs(model, RIGHT), 4, noise(seed=21)[:, :2]
    x = torch.cat((known, noise()[:, 2:]), dim=1)
    for k in range(steps):
        now = 1.0 - k / steps
        x = x - velocity_with_times(model, given, x, torch.tensor([[0.0, 0.0, now, now, now]] * 2)) / steps
        x = torch.cat((known, x[:, 2:]), dim=1)
    torch.testing.assert_close(sampled(model, given, steps, action_prefix=known), x, atol=1e-5 * steps, rtol=0)


def velocity_with_times(model: Any, given: dict[str, Tensor], x: Tensor, times: Tensor) -> Tensor:
    """The network at one time per action ``[B, T]``, each of them embedded on its own; the state token has the last one's."""
    expert = model.action_expert
    per_token = torch.cat((times[:, -1:], times), dim=1)
    ones = [[expert.time_features(time[None]) for time in row] for row in per_token]

    def stacked(pick: Any) -> Tensor:
        return torch.stack([torch.cat([pick(one) for one in row]) for row in ones])

    if ones[0][0].modulation is None:
        features = TimeFeatures(stacked(lambda one: one.mixed), None)
    else:
        count = range(len(ones[0][0].modulation.layers))
        layers = tuple(stacked(lambda one, i=index: one.modulation.layers[i]) for index in count)
        features = TimeFeatures(None, type(ones[0][0].modulation)(layers, stacked(lambda one: one.modulation.final)))
    condition = expert.prepare(given['prefix'], fixed_state(), given['mask'], given['positions'], None, 2)
    return expert.velocity(x, features, condition)


@per_action_time
@torch.no_grad()
def test_loss_of_delayed_samples_is_that_of_the_remaining_steps(conditioning: str) -> None:
    """Computed by hand: clean leading actions at time 0, squared errors of the other steps only."""
    model = trained_model(conditioning)
    given, actions, eps = backbone_inputs(model, RIGHT), noise(seed=9), noise()
    time, delay = torch.tensor([0.35, 0.8]), torch.tensor([2, 0])
    times = torch.tensor([[0.0, 0.0, 0.35, 0.35, 0.35], [0.8] * 5])
    x = times[..., None] * eps + (1 - times[..., None]) * actions
    assert torch.equal(x[0, :2], actions[0, :2])
    squared = (velocity_with_times(model, given, x, times) - (eps - actions)).square()
    counts = torch.tensor([[False, False, True, True, True], [True] * 5])
    fixed = {'noise': eps, 'time': time, 'delay': delay}
    per_element = flow_loss(model, given, reduction='none', **fixed)
    assert (per_element[~counts] == 0).all()
    torch.testing.assert_close(per_element[counts], squared[counts], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(flow_loss(model, given, **fixed), squared[counts].mean(), atol=1e-5, rtol=1e-5)
    pad = torch.zeros(2, HORIZON, dtype=torch.bool)
    pad[:, 4:] = True
    both = flow_loss(model, given, action_is_pad=pad, **fixed)
    torch.testing.assert_close(both, squared[counts & ~pad].mean(), atol=1e-5, rtol=1e-5)


@per_action_time
@torch.no_grad()
def test_no_delay_is_the_plain_loss(conditioning: str) -> None:
    plain = toy_model(expert_config={'time_conditioning': conditioning})
    trained = trained_model(conditioning)
    given, fixed = backbone_inputs(plain, RIGHT), {'noise': noise(), 'time': torch.tensor([0.35, 0.8])}
    torch.testing.assert_close(
        flow_loss(trained, given, delay=torch.zeros(2, dtype=torch.long), **fixed),
        flow_loss(plain, given, **fixed),
        atol=1e-5,
        rtol=1e-6,
    )


@torch.no_grad()
def test_delays_are_drawn_uniformly_up_to_the_longest() -> None:
    model = trained_model('concat_mlp')
    given = backbone_inputs(model, RIGHT)
    error = flow_loss(model, given, repeats=2000, reduction='none', generator=torch.Generator().manual_seed(0))
    lengths = (error == 0).all(dim=-1).cumprod(dim=1).sum(dim=1)
    shares = torch.bincount(lengths, minlength=HORIZON + 1) / len(lengths)
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]), atol=0.03, rtol=0)
    draws = [flow_loss(model, given, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_known_actions_that_cannot_be_used_are_refused() -> None:
    token, model = toy_model(), trained_model('adarms', longest=2)
    given = backbone_inputs(token, RIGHT)
    with pytest.raises(ValueError, match="delay needs a time per action; use time_conditioning 'concat_mlp' or 'adarms'"):
        flow_loss(token, given, delay=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match='action_prefix has 1 steps; this expert was trained for at most 0'):
        sampled(token, given, action_prefix=torch.zeros(2, 1, ACTION_DIM))
    given = backbone_inputs(model, RIGHT)
    for wrong, message in (
        (torch.zeros(2, 3, ACTION_DIM), 'has 3 steps; this expert was trained for at most 2'),
        (torch.zeros(1, 2, ACTION_DIM), r'\(1, 2, 3\); expected \[2, steps, 3\]'),
        (torch.zeros(2, 2, 5), r'\(2, 2, 5\)'),
        (torch.full((2, 2, ACTION_DIM), float('nan')), 'action_prefix has NaN'),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(model, given, action_prefix=wrong)
    with pytest.raises(ValueError, match=r'noise, time and delay are .*\(3,\)'):
        flow_loss(model, given, delay=torch.tensor([1, 0, 1]))
