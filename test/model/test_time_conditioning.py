"""How flow time enters the suffix: a token, mixed into each action, or as adaptive norms; and the weight of time in the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy import (
    ACTION_DIM,
    HORIZON,
    RIGHT,
    backbone_inputs,
    every_conditioning,
    fixed_state,
    flow_loss,
    noise,
    padded_on_either_side,
    sampled,
    single_stream,
    toy_config,
    toy_model,
    velocity_field,
)

from vla_policy_ros.model.flow_matching import time_embedding
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

ADARMS = {'time_conditioning': 'adarms'}


def fresh_model(conditioning: str) -> Any:
    """The model as its own initialisation leaves it."""
    torch.manual_seed(0)
    return MapAnythingLlava3DForConditionalGeneration(toy_config(expert_config={'time_conditioning': conditioning}))


@every_conditioning
def test_a_fresh_expert_answers_zero_velocity(conditioning: str) -> None:
    """O21: the first loss is the target's energy, and sampling returns the noise."""
    model, eps, actions = fresh_model(conditioning).eval(), noise(), noise(seed=9)
    given = backbone_inputs(model, RIGHT)
    loss = flow_loss(model, given, noise=eps, time=torch.rand(2)).detach()
    assert float(loss) == pytest.approx(float((eps - actions).square().mean()), abs=1e-6)
    assert torch.equal(sampled(model, given, 10), eps)
    many = flow_loss(model, given, repeats=4000, generator=torch.Generator().manual_seed(0)).detach()
    assert float(many) == pytest.approx(1.0 + float(actions.square().mean()), rel=0.01)


@every_conditioning
@torch.no_grad()
def test_a_fresh_expert_passes_the_suffix_through(conditioning: str) -> None:
    model = fresh_model(conditioning).eval()
    given, expert = backbone_inputs(model, RIGHT), model.action_expert
    condition = expert.prepare(given['prefix'], fixed_state(), given['mask'], given['positions'], None, 2)
    features = expert.time_features(torch.tensor([0.4]))
    suffix = expert.suffix(noise(), features, condition.state_token)
    out = expert.backbone.suffix_pass(suffix, condition.cache, condition.allowed, condition.rotary, features.modulation)
    assert torch.equal(out, expert.backbone.expert_norm(suffix))


def reached(model: Any) -> set[str]:
    names = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and bool((parameter.grad != 0).any()):
            names.add(name)
    return names


@every_conditioning
def test_gradients_work_their_way_in_from_the_zero_head(conditioning: str) -> None:
    """No part is dead at the start: each optimiser step opens the next one, until everything learns."""
    model = fresh_model(conditioning)
    given, fixed = backbone_inputs(model, RIGHT), {'noise': noise(), 'time': torch.tensor([0.3, 0.8])}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for _ in range(3):
        optimizer.zero_grad()
        flow_loss(model, given, **fixed).backward()
        steps.append(reached(model))
        optimizer.step()
    assert steps[0] == {'action_expert.action_out_proj.weight', 'action_expert.action_out_proj.bias'}
    layer = 'language_model_with_expert.expert_model.layers.0.'
    if conditioning == 'adarms':
        table = 'language_model_with_expert.expert_modulation.'
        assert {table + 'layers.0.weight', table + 'final.weight'} <= steps[1]
        gate = model.get_parameter(table + 'layers.0.weight').view(2, 3, 48, 48)[:, 2]
        assert (gate != 0).any(), 'the gates open'
    else:
        assert {layer + 'self_attn.o_proj.weight', layer + 'mlp.down_proj.weight'} <= steps[1]
        assert layer + 'self_attn.q_proj.weight' not in steps[1]
    own = {
        name for name, _ in model.named_parameters() if name.startswith(('language_model_with_expert.', 'action_expert.'))
    }  # fmt: skip
    assert own <= steps[2], own - steps[2]


@padded_on_either_side
@torch.no_grad()
def test_adaptive_norms_equal_their_definition(pads: list[list[int]]) -> None:
    """The velocity re-derived: condition, scale, shift and gate of both norms of each layer, and the adaptive final norm."""
    model = toy_model(expert_config=ADARMS)
    given, expert = backbone_inputs(model, pads), model.action_expert
    x, time = noise(), torch.tensor([0.25, 0.8])
    hidden = F.linear(time_embedding(time, 48), expert.time_mlp_in.weight, expert.time_mlp_in.bias)
    hidden = F.linear(hidden * torch.sigmoid(hidden), expert.time_mlp_out.weight, expert.time_mlp_out.bias)
    condition = hidden * torch.sigmoid(hidden)
    suffix = torch.cat((expert.state_proj(fixed_state())[:, None], expert.action_in_proj(x)), dim=1)
    given = {**given, 'suffix': suffix}
    _, out = single_stream(model, given, condition)
    torch.testing.assert_close(velocity_field(model, given)(x, time), expert.action_out_proj(out[:, 1:]), atol=5e-5, rtol=0)
    (_, public), _ = expert.backbone(given['mask'], given['positions'], None, (given['prefix'], suffix), expert_cond=condition)
    torch.testing.assert_close(public, out, atol=5e-5, rtol=0)
    assert (single_stream(model, given, condition.flip(0))[1] - out).abs().max() > 0.1, 'the condition matters'


@torch.no_grad()
def test_adaptive_norms_need_their_condition() -> None:
    model = toy_model(expert_config=ADARMS)
    given = backbone_inputs(model, RIGHT)
    with pytest.raises(ValueError, match="expert_cond is for time_conditioning 'adarms'"):
        model.language_model_with_expert(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))


@torch.no_grad()
def test_mixing_equals_the_unsplit_network() -> None:
    """concat_mlp: each action beside the time through two layers, as one matrix product."""
    model = toy_model(expert_config={'time_conditioning': 'concat_mlp'})
    expert, x, time = model.action_expert, noise(), torch.tensor([0.25, 0.8])
    tokens = expert.action_in_proj(x)
    beside = torch.cat((tokens, time_embedding(time, 48)[:, None].expand_as(tokens)), dim=-1)
    expected = expert.time_mlp_out(F.silu(expert.time_mlp_in(beside)))
    torch.testing.assert_close(expert.suffix(x, expert.time_features(time), None), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_time_token_equals_its_definition() -> None:
    model = toy_model()
    expert, time = model.action_expert, torch.tensor([0.25, 0.8])
    expected = expert.time_mlp_out(F.silu(expert.time_mlp_in(time_embedding(time, 48))))
    suffix = expert.suffix(noise(), expert.time_features(time), expert.state_proj(fixed_state())[:, None])
    torch.testing.assert_close(suffix[:, -1], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize('use_state', [True, False])
@pytest.mark.parametrize('conditioning', ['concat_mlp', 'adarms'])
@torch.no_grad()
def test_equal_times_per_token_are_one_time_per_row(conditioning: str, use_state: bool) -> None:
    model = toy_model(expert_config={'time_conditioning': conditioning, 'use_state': use_state})
    given, expert, x = backbone_inputs(model, RIGHT), model.action_expert, noise()
    state = fixed_state() if use_state else None
    condition = expert.prepare(given['prefix'], state, given['mask'], given['positions'], None, 2)
    table = expert.time_features(torch.tensor([0.1, 0.25, 0.8]))
    rows = torch.tensor([2, 1])
    by_row = expert.velocity(x, table.at(rows), condition)
    by_token = expert.velocity(x, table.at(rows[:, None].expand(2, expert.layout.length)), condition)
    torch.testing.assert_close(by_token, by_row, atol=1e-5, rtol=0)
    mixed = rows[:, None].repeat(1, expert.layout.length)
    mixed[:, -1] = 0
    assert (expert.velocity(x, table.at(mixed), condition) - by_row).abs().max() > 1e-3


@every_conditioning
@torch.no_grad()
def test_time_matters_and_a_table_row_is_the_time_on_its_own(conditioning: str) -> None:
    model = toy_model(expert_config={'time_conditioning': conditioning})
    field = velocity_field(model, backbone_inputs(model, RIGHT))
    together = field(noise(), torch.tensor([0.25, 0.8]))
    for row, time in enumerate((0.25, 0.8)):
        torch.testing.assert_close(field(noise(), time)[row], together[row], atol=2e-5, rtol=0)
    assert (field(noise(), 0.25)[1] - together[1]).abs().max() > 1e-2


@every_conditioning
@torch.no_grad()
def test_time_is_embedded_in_single_precision_in_a_half_precision_model(conditioning: str) -> None:
    """O24: 0.700 and 0.701 are one number in bfloat16, and a quarter of the fastest period apart."""
    model = toy_model(expert_config={'time_conditioning': conditioning}).bfloat16()
    features = [model.action_expert.time_features(torch.tensor([time])) for time in (0.700, 0.701)]
    first, second = (one.mixed if one.mixed is not None else one.modulation.layers[0] for one in features)
    assert first.dtype == torch.bfloat16
    assert (first - second).abs().max() > 0.05 * first.abs().max()


@pytest.mark.parametrize('sampling', ['beta', 'uniform'])
def test_time_weight_prefers_small_times_and_keeps_the_scale(monkeypatch: pytest.MonkeyPatch, sampling: str) -> None:
    """The weight (1 - t) / E[1 - t]: of mean one over draws, and not undone within a batch of one."""
    change = {'time_sampling': sampling}
    plain, weighted = (toy_model(expert_config={**change, 'use_time_weight': on}) for on in (False, True))
    given, eps, time = backbone_inputs(plain, RIGHT), noise(), torch.tensor([0.2, 0.9])
    mean = 0.5 if sampling == 'uniform' else 0.999 * 0.6 + 0.001
    fixed = {'noise': eps, 'time': time, 'reduction': 'none'}
    expected = flow_loss(plain, given, **fixed) * ((1 - time) / (1 - mean))[:, None, None]
    torch.testing.assert_close(flow_loss(weighted, given, **fixed), expected)
    one = {'noise': eps[:1], 'time': time[:1]}
    first = {name: value[:1] for name, value in given.items()}
    assert float(flow_loss(weighted, first, **one).detach()) == pytest.approx(
        float(flow_loss(plain, first, **one).detach()) * 0.8 / (1 - mean), rel=1e-4
    )
    # An error of two everywhere: four on average, whatever the weights.
    draws = torch.randn(40_000, HORIZON, ACTION_DIM, generator=torch.Generator().manual_seed(1))
    target = draws - noise(seed=9).repeat_interleave(20_000, dim=0)
    monkeypatch.setattr(weighted.action_expert, 'velocity', lambda *_: target + 2.0)
    loss = flow_loss(weighted, given, noise=draws, repeats=20_000, generator=torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize(('sampling', 'spread', 'expected'), [('uniform', 0.5, math.pi / 4), ('beta', 0.35**0.5, 0.8333)])
def test_best_unconditional_velocity_has_the_known_loss(
    monkeypatch: pytest.MonkeyPatch, sampling: str, spread: float, expected: float
) -> None:
    """O39: for normal actions of standard deviation s."""
    model = toy_model(expert_config={'time_sampling': sampling, 'use_state': False, 'time_scale': 1.0, 'time_offset': 0.0})
    expert, rows = model.action_expert, 100_000
    generator = torch.Generator().manual_seed(0)
    actions = spread * torch.randn(rows, HORIZON, ACTION_DIM, generator=generator)
    time = expert.sample_time(rows, torch.device('cpu'), generator)

    def best(x: Tensor, *_: Any) -> Tensor:
        t = time[:, None, None]
        return (t - (1 - t) * spread**2) / (t**2 + (1 - t) ** 2 * spread**2) * x

    monkeypatch.setattr(expert, 'velocity', best)
    monkeypatch.setattr(expert, 'prepare', lambda *_: None)
    got = expert.compute_loss(None, actions, time=time, generator=generator)
    assert float(got) == pytest.approx(expected, rel=0.01)
