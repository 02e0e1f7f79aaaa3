"""Flow matching: interpolation, time, loss identities, sampling with and without a cache, suffix layout, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import (
    ACTION_DIM,
    FULL,
    HORIZON,
    LEFT,
    RIGHT,
    backbone_inputs,
    every_conditioning,
    every_solver,
    fixed_state,
    flow_loss,
    mild,
    noise,
    padded_on_either_side,
    sampled,
    toy_model,
    velocity_field,
)

from vla_policy_ros.model.configuration import ActionExpertConfig
from vla_policy_ros.model.flow_matching import SuffixLayout, interpolate, time_embedding
from vla_policy_ros.model.solvers import evaluation_times, integrate


def test_interpolation_ends_in_actions_and_noise() -> None:
    """O22."""
    actions, eps = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    x0, u0 = interpolate(actions, eps, torch.zeros(3))
    x1, u1 = interpolate(actions, eps, torch.ones(3))
    assert torch.equal(x0, actions) and torch.equal(x1, eps)
    assert torch.equal(u0, u1) and torch.equal(u0, eps - actions)


@pytest.mark.parametrize('time', [0.0, 1e-3, 0.37, 0.5, 1.0])
def test_time_embedding_equals_its_formula_in_double_precision(time: float) -> None:
    """O24."""
    width = 1024
    got = time_embedding(torch.tensor([time]), width)[0].double().numpy()
    j = np.arange(width // 2)
    period = 4e-3 * 1000.0 ** (j / (width // 2 - 1))
    t = float(torch.tensor(time))
    expected = np.concatenate((np.sin(2 * np.pi * t / period), np.cos(2 * np.pi * t / period)))
    assert period[0] == pytest.approx(4e-3) and period[-1] == pytest.approx(4.0)
    np.testing.assert_allclose(got, expected, atol=5e-4)


def test_beta_times_have_their_distribution() -> None:
    """O23."""
    expert = toy_model().action_expert
    config = expert.config
    time = expert.sample_time(400_000, torch.device('cpu'), torch.Generator().manual_seed(0)).double()
    assert float(time.min()) >= config.time_offset and float(time.max()) <= config.time_offset + config.time_scale + 1e-6
    assert float(time.mean()) == pytest.approx(0.6, abs=2e-3)
    uniform = torch.sort(((time - config.time_offset) / config.time_scale) ** config.time_alpha).values
    distance = (uniform - torch.linspace(0, 1, len(uniform), dtype=torch.float64)).abs().max()
    assert float(distance) < 0.005


def test_general_beta_times_have_their_mean() -> None:
    expert = toy_model(expert_config={'time_alpha': 2.0, 'time_beta': 3.0}).action_expert
    time = expert.sample_time(200_000, torch.device('cpu'), torch.Generator().manual_seed(0))
    assert float(time.mean()) == pytest.approx(0.4, abs=3e-3)


def test_loss_is_zero_for_the_true_velocity_and_the_target_energy_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """O21, and O20 for the target."""
    model, actions, eps = toy_model(), noise(seed=9), noise()
    given, expert = backbone_inputs(model, RIGHT), model.action_expert
    monkeypatch.setattr(expert, 'velocity', lambda *_: eps - actions)
    assert float(flow_loss(model, given, noise=eps)) == pytest.approx(0.0, abs=1e-6)
    monkeypatch.setattr(expert, 'velocity', lambda *_: actions - eps)
    assert float(flow_loss(model, given, noise=eps)) > 1.0, 'the opposite sign is not a solution'
    monkeypatch.setattr(expert, 'velocity', lambda x, *_: torch.zeros_like(x))
    many = flow_loss(model, given, repeats=4000, generator=torch.Generator().manual_seed(0))
    assert float(many) == pytest.approx(1.0 + float(actions.square().mean()), rel=0.01)


@every_conditioning
@torch.no_grad()
def test_loss_equals_the_velocity_at_the_interpolated_actions(conditioning: str) -> None:
    model, actions, eps, time = toy_model(expert_config={'time_conditioning': conditioning}), noise(seed=9), noise(), [0.3, 0.8]
    given = backbone_inputs(model, LEFT)
    x = torch.stack([t * e + (1 - t) * a for t, e, a in zip(time, eps, actions, strict=True)])
    squared = (velocity_field(model, given)(x, torch.tensor(time)) - (eps - actions)).square()
    torch.testing.assert_close(flow_loss(model, given, noise=eps, time=torch.tensor(time)), squared.mean(), atol=1e-5, rtol=1e-5)


def test_padded_steps_do_not_count() -> None:
    model, eps, time = toy_model(), noise(), torch.tensor([0.2, 0.9])
    given = backbone_inputs(model, RIGHT)
    pad = torch.zeros(2, HORIZON, dtype=torch.bool)
    pad[0, 3:] = True
    per_element = flow_loss(model, given, noise=eps, time=time, reduction='none')
    masked = flow_loss(model, given, noise=eps, time=time, reduction='none', action_is_pad=pad)
    assert per_element.shape == (2, HORIZON, ACTION_DIM)
    assert torch.equal(masked[~pad], per_element[~pad]) and (masked[pad] == 0).all()
    mean = flow_loss(model, given, noise=eps, time=time, action_is_pad=pad)
    torch.testing.assert_close(mean, per_element[~pad].mean())


def test_repeated_draws_share_a_prefix_without_changing_the_loss() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    eps, time = torch.randn(6, HORIZON, ACTION_DIM), torch.rand(6)
    together = flow_loss(model, given, noise=eps, time=time, repeats=3, reduction='none')
    for draw in range(3):
        rows = torch.tensor([draw, 3 + draw])
        alone = flow_loss(model, given, noise=eps[rows], time=time[rows], reduction='none')
        torch.testing.assert_close(together[rows], alone, atol=1e-4, rtol=1e-5)


@every_solver
@every_conditioning
@padded_on_either_side
@torch.no_grad()
def test_sampling_with_and_without_a_cache_equals_the_formula(pads: list[list[int]], conditioning: str, solver: str) -> None:
    """O2: the same bits from a cache and without one; and the formula, which runs the prefix again before every evaluation."""
    model, steps = toy_model(expert_config={'time_conditioning': conditioning}), 4
    given = backbone_inputs(model, pads)
    cache = model.language_model_with_expert.prefix_pass(given['prefix'], given['mask'], given['positions']).cache
    alone = sampled(model, given, steps, solver=solver)
    assert torch.equal(sampled(model, given, steps, cache, solver=solver), alone)
    assert torch.equal(sampled(model, given, steps, cache, solver=solver), alone)

    field, times = velocity_field(mild(model), given), evaluation_times(solver, steps)
    expected = integrate(lambda x, index: field(x, times[index]), noise(), steps, solver)
    torch.testing.assert_close(sampled(model, given, steps, cache, solver=solver), expected, atol=1e-5 * steps, rtol=0)


@every_conditioning
@torch.no_grad()
def test_euler_sampling_is_the_published_loop(conditioning: str) -> None:
    """O2, without our solver: x + v * (-1 / K) at t_k = 1 - k / K."""
    model, steps = mild(toy_model(expert_config={'time_conditioning': conditioning})), 5
    given = backbone_inputs(model, RIGHT)
    field, x = velocity_field(model, given), noise()
    for k in range(steps):
        x = x + field(x, 1.0 + k * (-1.0 / steps)) * (-1.0 / steps)
    torch.testing.assert_close(sampled(model, given, steps, solver='euler'), x, atol=1e-5 * steps, rtol=0)


def test_number_of_steps_and_solver_come_from_the_configuration() -> None:
    model = toy_model(expert_config={'num_inference_steps': 3, 'solver': 'midpoint'})
    given = backbone_inputs(model, RIGHT)
    assert torch.equal(sampled(model, given, None), sampled(model, given, 3, solver='midpoint'))
    assert not torch.equal(sampled(model, given, None), sampled(model, given, 3, solver='euler'))


def test_noise_comes_from_the_generator_that_is_given() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    chunks = [sampled(model, given, noise=None, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(chunks[0], chunks[1]) and not torch.equal(chunks[0], chunks[2])
    losses = [flow_loss(model, given, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@every_conditioning
@pytest.mark.parametrize('use_state', [True, False])
def test_suffix_rows_are_where_the_layout_says(conditioning: str, use_state: bool) -> None:
    """O25."""
    model = toy_model(expert_config={'time_conditioning': conditioning, 'use_state': use_state})
    expert = model.action_expert
    layout = expert.layout
    assert layout == SuffixLayout(use_state, HORIZON, conditioning == 'token')
    assert layout.length == HORIZON + int(use_state) + int(conditioning == 'token')

    def rows(actions: Tensor, time: float, state: float) -> Tensor:
        token = expert.state_proj(torch.full((1, 4), state))[:, None] if use_state else None
        return expert.suffix(actions, expert.time_features(torch.tensor([time])), token)[0]

    base = torch.zeros(1, HORIZON, ACTION_DIM)
    reference = rows(base, 0.5, 0.0)
    assert len(reference) == layout.length

    def changed(other: Tensor) -> list[int]:
        return (other != reference).any(dim=-1).nonzero().flatten().tolist()

    first = int(use_state)
    for step in range(HORIZON):
        moved = base.clone()
        moved[0, step] = 1.0
        assert changed(rows(moved, 0.5, 0.0)) == [first + step]
    actions = list(range(first, first + HORIZON))
    by_time = {'token': [layout.length - 1], 'concat_mlp': actions, 'adarms': []}[conditioning]
    assert changed(rows(base, 0.6, 0.0)) == by_time
    assert changed(rows(base, 0.5, 1.0)) == ([0] if use_state else [])


@pytest.mark.parametrize('conditioning', ['token', 'concat_mlp'])
@pytest.mark.parametrize('use_state', [True, False])
@torch.no_grad()
def test_each_action_is_read_from_its_own_row(conditioning: str, use_state: bool) -> None:
    """O25: with a backbone that passes its input through, the velocity of step i is a function of action i alone."""
    model = toy_model(expert_config={'time_conditioning': conditioning, 'use_state': use_state})
    expert = model.action_expert
    for layer in expert.backbone.expert_model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    field, x = velocity_field(model, backbone_inputs(model, RIGHT)), noise()
    got, tokens = field(x, 0.5), expert.action_in_proj(x)
    if conditioning == 'concat_mlp':
        tokens = expert.suffix(x, expert.time_features(torch.tensor([0.5])), None)
    torch.testing.assert_close(got, expert.action_out_proj(expert.backbone.expert_norm(tokens)), atol=1e-5, rtol=0)
    for step in range(HORIZON):
        moved = x.clone()
        moved[0, step] += 1.0
        assert (field(moved, 0.5) != got).any(dim=-1).nonzero().tolist() == [[0, step]]


def test_wrong_inputs_are_refused_with_the_numbers() -> None:
    """O26, at the expert's own door."""
    model = toy_model()
    inputs = backbone_inputs(model, [[1] * 6])
    expert, fit = model.action_expert, (inputs['mask'], inputs['positions'])
    state, actions = torch.ones(1, 4), torch.zeros(1, HORIZON, ACTION_DIM)
    for bad, message in (
        (torch.zeros(1, 1, ACTION_DIM), r'\(1, 1, 3\).*\[batch, 5, 3\]'),
        (torch.zeros(1, HORIZON, 2), r'\(1, 5, 2\)'),
        (torch.full_like(actions, float('nan')), 'NaN'),
    ):
        with pytest.raises(ValueError, match=message):
            expert.compute_loss(inputs['prefix'], bad, state, *fit)
    for bad_state, message in ((None, 'state token'), (torch.ones(1, 3), r'\(1, 3\)'), (state * float('inf'), 'infinite')):
        with pytest.raises(ValueError, match=message):
            expert.compute_loss(inputs['prefix'], actions, bad_state, *fit)
        with pytest.raises(ValueError, match=message):
            expert.sample_actions(inputs['prefix'], bad_state, 2, *fit)
    with pytest.raises(ValueError, match=r'batch 1.*batch 2'):
        expert.compute_loss(inputs['prefix'], actions.repeat(2, 1, 1), state.repeat(2, 1), *fit)


def test_draws_that_do_not_fit_are_refused() -> None:
    """O26."""
    model = toy_model()
    given = backbone_inputs(model, FULL)
    for wrong in ({'noise': noise(3)}, {'time': torch.rand(4)}):
        with pytest.raises(ValueError, match=r'noise, time and delay are .*\(2, 5, 3\), \(2,\) and \(2,\)'):
            flow_loss(model, given, **wrong)
    with pytest.raises(ValueError, match=r'action_is_pad is \(2, 4\); it must be \(2, 5\)'):
        flow_loss(model, given, action_is_pad=torch.zeros(2, 4))
    with pytest.raises(ValueError, match='num_steps is 0'):
        sampled(model, given, 0)
    with pytest.raises(ValueError, match=r'\(2, 6, 3\); expected \[batch, 5, 3\]'):
        sampled(model, given, noise=torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match='contain NaN'):
        sampled(model, given, noise=torch.full((2, HORIZON, ACTION_DIM), float('nan')))
    with pytest.raises(ValueError, match='joint attention_mask and position_ids'):
        model.action_expert.sample_actions(given['prefix'], fixed_state(), 2)
    with pytest.raises(ValueError, match='prefix_embs or prefix_past_key_values'):
        model.action_expert.sample_actions(None, fixed_state(), 2, given['mask'], given['positions'])


@every_conditioning
@padded_on_either_side
@pytest.mark.parametrize('precision', ['weights', 'autocast'])
@torch.no_grad()
def test_half_precision_velocity_points_the_same_way(precision: str, pads: list[list[int]], conditioning: str) -> None:
    """O38: bfloat16 weights, and float32 weights under autocast."""
    model = toy_model(expert_config={'time_conditioning': conditioning})
    given, x, time = backbone_inputs(model, pads), noise(), torch.tensor([0.2, 0.8])
    exact = velocity_field(model, given)(x, time)
    if precision == 'weights':
        half = velocity_field(model.bfloat16(), {**given, 'prefix': given['prefix'].bfloat16()})(x, time)
    else:
        with torch.autocast('cpu', torch.bfloat16):
            half = velocity_field(model, given)(x, time)
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    assert not torch.equal(half, exact)
    assert torch.nn.functional.cosine_similarity(half.flatten(), exact.flatten(), dim=0) > 0.99


@every_conditioning
def test_half_precision_loss_and_chunk_are_finite_single_precision(conditioning: str) -> None:
    """O38."""
    model = toy_model(expert_config={'time_conditioning': conditioning})
    given, fixed = backbone_inputs(model, RIGHT), {'noise': noise(), 'time': torch.tensor([0.2, 0.8])}
    exact = flow_loss(model, given, **fixed).detach()
    with torch.autocast('cpu', torch.bfloat16):
        loss = flow_loss(model, given, **fixed)
    loss.backward()
    half = {**given, 'prefix': given['prefix'].bfloat16()}
    for value in (loss, flow_loss(model.bfloat16(), half, **fixed), sampled(model, half)):
        assert value.dtype == torch.float32 and torch.isfinite(value).all()
    assert float(loss.detach()) == pytest.approx(float(exact), rel=0.05)


@torch.no_grad()
def test_regression_is_the_same_network_from_one_fixed_start_in_one_step() -> None:
    model = toy_model(expert_config={'objective': 'regression'})
    given = backbone_inputs(model, RIGHT)
    answer = sampled(model, given, steps=7, solver='midpoint')
    assert torch.equal(answer, sampled(model, given, noise=noise(seed=3))), 'it depends on no noise and on no solver'
    start = torch.randn(answer.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(answer)
    assert torch.allclose(answer, start - velocity_field(model, given)(start, 1.0), atol=1e-6)
    assert (answer[:, 1:] - answer[:, :-1]).abs().max() > 1e-3, 'its actions are not one and the same'
    targets = noise(seed=9)
    loss = flow_loss(model, given, generator=torch.Generator().manual_seed(0), repeats=3)
    assert float(loss) == pytest.approx(float((answer - targets).square().mean()), rel=1e-5)
    with pytest.raises(ValueError, match='continues no known actions'):
        sampled(model, given, action_prefix=targets[:, :1])


@pytest.mark.parametrize(
    ('field', 'value', 'message'), [('use_time_weight', True, 'use_time_weight weighs'), ('rtc_max_delay', 1, 'no action prefix')]
)
def test_regression_refuses_what_only_flow_matching_knows(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActionExpertConfig(objective='regression', time_conditioning='adarms', **{field: value})
