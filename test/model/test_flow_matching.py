"""Flow matching: closed-form fields, loss identities, time, suffix layout."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import ACTION_DIM, HORIZON, backbone_inputs, noise, toy_model

from vla_policy_ros.model.flow_matching import SuffixLayout, interpolate, time_embedding
from vla_policy_ros.model.solvers import integrate

STEPS = (1, 2, 3, 5, 10, 20, 40)


def start(rows: int = 64) -> Tensor:
    return torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize('steps', STEPS)
def test_constant_field_moves_by_the_constant(steps: int) -> None:
    x = start()
    torch.testing.assert_close(integrate(lambda *_: torch.full_like(x, 0.7), x, steps), x - 0.7, atol=1e-6, rtol=0)


@pytest.mark.parametrize('steps', STEPS)
def test_field_of_one_point_ends_in_that_point_for_any_number_of_steps(steps: int) -> None:
    x, point = start().float(), torch.tensor([0.3, -2.0])
    end = integrate(lambda y, k: (y - point) / (1.0 - k / steps), x, steps)
    torch.testing.assert_close(end, point.expand_as(end), atol=1e-6, rtol=0)


def test_the_opposite_sign_does_not_end_in_the_point() -> None:
    x, point = start(), torch.tensor([0.3, -2.0])
    end = integrate(lambda y, k: -(y - point) / (1.0 - k / 10), x, 10)
    assert (end - point).abs().mean() > 1.0


def test_linear_field_converges_with_first_order() -> None:
    x, rate = start(), 0.7
    errors = []
    for steps in (10, 20, 40):
        end = integrate(lambda y, _: rate * y, x, steps)
        torch.testing.assert_close(end, x * (1 - rate / steps) ** steps, atol=1e-6, rtol=0)
        errors.append(float((end - x * math.exp(-rate)).abs().mean()))
    assert all(1.8 < a / b < 2.2 for a, b in pairwise(errors))


def test_gaussian_field_converges_to_the_exact_map() -> None:
    x, mean, sigma = start(4096), 0.4, 0.5
    errors = []
    for steps in (10, 20, 40, 80):

        def field(y: Tensor, k: int, steps: int = steps) -> Tensor:
            t = 1.0 - k / steps
            gain = (t - (1 - t) * sigma**2) / (t**2 + (1 - t) ** 2 * sigma**2)
            return -mean + gain * (y - (1 - t) * mean)

        errors.append(float((integrate(field, x, steps) - (mean + sigma * x)).abs().max()))
    assert all(1.7 < a / b < 2.2 for a, b in pairwise(errors))


def test_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match='num_steps is 0'):
        integrate(lambda y, _: y, start(), 0)


def test_interpolation_ends_in_actions_and_noise() -> None:
    actions, eps = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    x0, u0 = interpolate(actions, eps, torch.zeros(3))
    x1, u1 = interpolate(actions, eps, torch.ones(3))
    assert torch.equal(x0, actions) and torch.equal(x1, eps)
    assert torch.equal(u0, u1) and torch.equal(u0, eps - actions)


@pytest.mark.parametrize('time', [0.0, 1e-3, 0.37, 0.5, 1.0])
def test_time_embedding_equals_its_formula_in_double_precision(time: float) -> None:
    width = 1024
    got = time_embedding(torch.tensor([time]), width)[0].double().numpy()
    j = np.arange(width // 2)
    period = 4e-3 * 1000.0 ** (j / (width // 2 - 1))
    t = float(torch.tensor(time))
    expected = np.concatenate((np.sin(2 * np.pi * t / period), np.cos(2 * np.pi * t / period)))
    assert period[0] == pytest.approx(4e-3) and period[-1] == pytest.approx(4.0)
    np.testing.assert_allclose(got, expected, atol=5e-4)


def test_beta_times_have_their_distribution() -> None:
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


def loss_of(model: torch.nn.Module, **given: object) -> Tensor:
    inputs = backbone_inputs(model, [[1] * 6, [1, 1, 1, 1, 0, 0]])
    state = torch.ones(2, 4) if model.action_expert.use_state else None
    return model.action_expert.compute_loss(
        inputs['prefix'], given.pop('actions', noise(seed=9)), state, inputs['mask'], inputs['positions'], **given
    )


def test_loss_is_zero_for_the_true_velocity_and_the_target_energy_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, actions, eps = toy_model(), noise(seed=9), noise()
    expert = model.action_expert
    monkeypatch.setattr(expert, 'velocity', lambda *_: eps - actions)
    assert float(loss_of(model, noise=eps)) == pytest.approx(0.0, abs=1e-6)
    monkeypatch.setattr(expert, 'velocity', lambda *_: actions - eps)
    assert float(loss_of(model, noise=eps)) > 1.0, 'the opposite sign is not a solution'
    monkeypatch.setattr(expert, 'velocity', lambda x, *_: torch.zeros_like(x))
    many = loss_of(model, repeats=4000, generator=torch.Generator().manual_seed(0))
    assert float(many) == pytest.approx(1.0 + float(actions.square().mean()), rel=0.01)


def test_a_fresh_expert_answers_zero_velocity() -> None:
    from toy import toy_config

    from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

    model = MapAnythingLlava3DForConditionalGeneration(toy_config()).eval()
    eps, actions = noise(), noise(seed=9)
    loss = loss_of(model, noise=eps, time=torch.rand(2)).detach()
    assert float(loss) == pytest.approx(float((eps - actions).square().mean()), abs=1e-6)
    inputs = backbone_inputs(model, [[1] * 6] * 2)
    chunk = model.action_expert.sample_actions(
        inputs['prefix'], torch.ones(2, 4), 10, inputs['mask'], inputs['positions'], noise=eps
    )
    assert torch.equal(chunk, eps)


def test_padded_steps_do_not_count() -> None:
    model, eps, time = toy_model(), noise(), torch.tensor([0.2, 0.9])
    pad = torch.zeros(2, HORIZON, dtype=torch.bool)
    pad[0, 3:] = True
    per_element = loss_of(model, noise=eps, time=time, reduction='none')
    masked = loss_of(model, noise=eps, time=time, reduction='none', action_is_pad=pad)
    assert per_element.shape == (2, HORIZON, ACTION_DIM)
    assert torch.equal(masked[~pad], per_element[~pad]) and (masked[pad] == 0).all()
    mean = loss_of(model, noise=eps, time=time, action_is_pad=pad)
    torch.testing.assert_close(mean, per_element[~pad].mean())


def test_repeated_draws_share_a_prefix_without_changing_the_loss() -> None:
    model = toy_model()
    eps, time = torch.randn(6, HORIZON, ACTION_DIM), torch.rand(6)
    together = loss_of(model, noise=eps, time=time, repeats=3, reduction='none')
    for draw in range(3):
        rows = torch.tensor([draw, 3 + draw])
        alone = loss_of(model, noise=eps[rows], time=time[rows], reduction='none')
        torch.testing.assert_close(together[rows], alone, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('cached', [True, False])
@pytest.mark.parametrize('conditioning', ['token', 'concat_mlp'])
def test_sampling_with_and_without_a_cache_equals_the_formula(cached: bool, conditioning: str) -> None:
    model = toy_model(expert_config={'time_conditioning': conditioning})
    inputs = backbone_inputs(model, [[1] * 6, [1, 1, 1, 1, 0, 0]])
    expert, state, steps = model.action_expert, torch.ones(2, 4), 4
    with torch.no_grad():
        cache = expert.backbone.prefix_pass(inputs['prefix'], inputs['mask'], inputs['positions']).cache
        got = expert.sample_actions(
            None if cached else inputs['prefix'],
            state,
            steps,
            inputs['mask'],
            inputs['positions'],
            cache if cached else None,
            noise=noise(),
        )
        x = noise()
        for k in range(steps):
            condition = expert.prepare(inputs['prefix'], state, inputs['mask'], inputs['positions'], None, 2)
            time = torch.full((2,), 1.0 - k / steps)
            x = x - expert.velocity(x, expert.time_features(time), condition) / steps
    torch.testing.assert_close(got, x, atol=1e-5 * steps, rtol=0)


@pytest.mark.parametrize('conditioning', ['token', 'concat_mlp'])
@pytest.mark.parametrize('use_state', [True, False])
def test_suffix_rows_are_where_the_layout_says(conditioning: str, use_state: bool) -> None:
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
    by_time = [layout.length - 1] if conditioning == 'token' else list(range(first, first + HORIZON))
    assert changed(rows(base, 0.6, 0.0)) == by_time
    assert changed(rows(base, 0.5, 1.0)) == ([0] if use_state else [])


def test_each_action_is_read_from_its_own_row() -> None:
    """With a backbone that passes its input through, the velocity of step i is the projection of action i."""
    model = toy_model()
    expert = model.action_expert
    backbone = expert.backbone
    with torch.no_grad():
        for layer in backbone.expert_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    inputs = backbone_inputs(model, [[1] * 6])
    x = torch.randn(1, HORIZON, ACTION_DIM)
    condition = expert.prepare(inputs['prefix'], torch.ones(1, 4), inputs['mask'], inputs['positions'], None, 1)
    with torch.no_grad():
        got = expert.velocity(x, expert.time_features(torch.tensor([0.5])), condition)
        expected = expert.action_out_proj(backbone.expert_norm(expert.action_in_proj(x)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_wrong_inputs_are_refused_with_the_numbers() -> None:
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


def test_bfloat16_velocity_points_the_same_way() -> None:
    model = toy_model()
    inputs = backbone_inputs(model, [[1] * 6, [1, 1, 1, 0, 0, 0]])
    velocities = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        expert = model.action_expert
        with torch.no_grad():
            condition = expert.prepare(inputs['prefix'].to(dtype), torch.ones(2, 4), inputs['mask'], inputs['positions'], None, 2)
            velocities.append(expert.velocity(noise(), expert.time_features(torch.tensor([0.2, 0.8])), condition))
    assert all(v.dtype == torch.float32 and torch.isfinite(v).all() for v in velocities)
    assert torch.nn.functional.cosine_similarity(velocities[0].flatten(), velocities[1].flatten(), dim=0) > 0.99
