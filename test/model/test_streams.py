"""How the streams run: cache forms, attention kernels, what a step moves, never waiting for the device, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import (
    FULL,
    HORIZON,
    LEFT,
    RIGHT,
    backbone_inputs,
    every_conditioning,
    every_solver,
    fixed_state,
    flow_loss,
    joint_pass,
    mild,
    noise,
    padded_on_either_side,
    policy_inputs,
    sampled,
    toy_model,
)

from vla_policy_ros.model import deep_fusion
from vla_policy_ros.model.attention import attend
from vla_policy_ros.model.deep_fusion import PrefixCache
from vla_policy_ros.model.flow_matching import Conditioning
from vla_policy_ros.model.solvers import evaluation_times

every_implementation = pytest.mark.parametrize('implementation', ['eager', 'sdpa'])


def caches(model: Any, given: dict[str, Tensor]) -> dict[str, PrefixCache]:
    """Both forms of the cache of one prefix; the preallocated one starts full of garbage."""
    backbone, (batch, length) = model.language_model_with_expert, given['prefix'].shape[:2]
    into = backbone.new_cache(batch, length, model.action_expert.layout.length, given['prefix'])
    for layer in into.layers:
        layer.key.fill_(float('nan'))
        layer.value.fill_(float('nan'))
    fit = (given['prefix'], given['mask'], given['positions'])
    return {
        'immutable': backbone.prefix_pass(*fit, cache_only=True).cache,
        'preallocated': backbone.prefix_pass(*fit, cache_only=True, into=into).cache,
    }


@padded_on_either_side
@every_implementation
@every_conditioning
@torch.no_grad()
def test_both_cache_forms_give_one_chunk(conditioning: str, implementation: str, pads: list[list[int]]) -> None:
    """O2 and O3: the prefix slots hold bit for bit over all steps, and a second chunk equals the first."""
    model = toy_model(expert_config={'time_conditioning': conditioning}, stream_attention=implementation)
    given = backbone_inputs(model, pads)
    held = caches(model, given)
    length, room = given['prefix'].shape[1], model.action_expert.layout.length
    for old, new in zip(held['immutable'].layers, held['preallocated'].layers, strict=True):
        for plain, roomy in zip(old, new, strict=True):
            assert roomy.shape[2] == length + room
            assert torch.equal(roomy[:, :, :length], plain)
    addresses = [part.data_ptr() for layer in held['preallocated'].layers for part in layer]
    first, second = (sampled(model, given, 4, held['preallocated']) for _ in range(2))
    assert torch.equal(first, second) and torch.isfinite(first).all()
    for old, new in zip(held['immutable'].layers, held['preallocated'].layers, strict=True):
        assert all(torch.equal(roomy[:, :, :length], plain) for plain, roomy in zip(old, new, strict=True))
    assert addresses == [part.data_ptr() for layer in held['preallocated'].layers for part in layer]
    model = mild(model)
    chunks = [sampled(model, given, 4, cache) for cache in held.values()]
    torch.testing.assert_close(chunks[0], chunks[1], atol=1e-5, rtol=0)


@padded_on_either_side
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@torch.no_grad()
def test_fused_attention_equals_eager_attention(kv_heads: int, pads: list[list[int]]) -> None:
    """O1 across kernels."""
    outputs = []
    for implementation in ('eager', 'sdpa'):
        model = toy_model(text_config={'num_key_value_heads': kv_heads}, stream_attention=implementation)
        given = backbone_inputs(model, pads)
        given['prefix'] = torch.where(given['pad'][..., None], given['prefix'], 50.0)
        outputs.append(joint_pass(model, given))
    for eager, fused in zip(*outputs, strict=True):
        assert torch.isfinite(fused).all()
        torch.testing.assert_close(fused, eager, atol=5e-5, rtol=0)


@pytest.mark.parametrize('repeats', [1, 3])
def test_fused_attention_over_segments_equals_eager_attention(repeats: int) -> None:
    """With rows that share a prefix, grouped heads, and gradients."""
    generator = torch.Generator().manual_seed(0)
    query, past, own = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((2 * repeats, 4, 5, 8), (2, 2, 2, 7, 8), (2, 2 * repeats, 2, 5, 8))
    )
    allowed = torch.rand(2, 1, 5, 12, generator=generator) > 0.4
    allowed[..., 0] = True
    results = []
    for implementation in ('eager', 'sdpa'):
        for mask in (allowed, allowed[:1], None):
            out = attend(query, [(past[0], past[1]), (own[0], own[1])], mask, implementation)
            results.append([out, *torch.autograd.grad(out.square().sum(), (query, past, own))])
    for eager, fused in zip(results[:3], results[3:], strict=True):
        for one, other in zip(eager, fused, strict=True):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize('lengths', [(3, 3), (3, 40), (40, 3)])
@torch.no_grad()
def test_auto_is_one_of_the_kernels(lengths: tuple[int, int]) -> None:
    query, key = (torch.randn(1, 2, length, 4, generator=torch.Generator().manual_seed(0)) for length in lengths)
    for segments in ([(key, key)], [(key, key), (query, query)]):
        chosen, *kernels = (attend(query, segments, None, implementation) for implementation in ('auto', 'eager', 'sdpa'))
        assert any(torch.equal(chosen, kernel) for kernel in kernels)
        torch.testing.assert_close(kernels[0], kernels[1], atol=1e-5, rtol=0)


def test_a_preallocated_cache_refuses_what_would_break_it() -> None:
    model = toy_model()
    backbone, given = model.language_model_with_expert, backbone_inputs(model, RIGHT)
    held = caches(model, given)['preallocated']
    fixed = (fixed_state(), given['mask'], given['positions'], held)

    def filled(cache: PrefixCache) -> PrefixCache:
        return backbone.prefix_pass(given['prefix'], given['mask'], given['positions'], cache_only=True, into=cache).cache

    with pytest.raises(ValueError, match='1 of 7, gradients on: use an immutable cache'):
        model.action_expert.compute_loss(None, noise(seed=9), *fixed)
    with torch.no_grad(), pytest.raises(ValueError, match='3 of 7, gradients off'):
        model.action_expert.compute_loss(None, noise(seed=9), *fixed, repeats=3)
    with torch.no_grad(), pytest.raises(ValueError, match='one suffix of 6 tokens'):
        small = backbone.new_cache(2, 7, 6, given['prefix'])
        sampled(model, given, 2, filled(small))
    for wrong in (backbone.new_cache(1, 7, 7, given['prefix']), backbone.new_cache(2, 8, 7, given['prefix'])):
        with pytest.raises(ValueError, match=rf'{wrong.batch} prefixes of {wrong.length} tokens, not 2 of 7'):
            filled(wrong)
    with pytest.raises(ValueError, match='use it with cache_only'):
        backbone.prefix_pass(given['prefix'], given['mask'], given['positions'], into=held)


@pytest.mark.parametrize(('implementation', 'room'), [('eager', 0), ('sdpa', 7)])
def test_prediction_takes_the_cache_form_that_its_kernel_reads_in_place(implementation: str, room: int) -> None:
    model, inputs = toy_model(stream_attention=implementation), policy_inputs()
    assert model.encode_prefix(inputs).cache.room == room
    forms = {form: model.encode_prefix(inputs, form) for form in ('immutable', 'preallocated')}
    assert [form.cache.room for form in forms.values()] == [0, 7]
    mild(model)
    chunks = [model.denoise(form, 4, noise=noise()) for form in forms.values()]
    torch.testing.assert_close(chunks[0], chunks[1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="'growing' is unknown; use one of auto, immutable, preallocated"):
        model.encode_prefix(inputs, 'growing')


class LargeResults(TorchDispatchMode):
    """Collects the operations whose results are new memory of at least ``limit`` elements, or writes into as much."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.seen, self.large = limit, 0, []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in torch.utils._pytree.tree_leaves(args) if isinstance(value, Tensor)}
        writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in operation._schema.arguments)
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.seen += 1
                made_here = writes or value.untyped_storage().data_ptr() not in given
                if made_here and value.numel() >= self.limit:
                    self.large.append(str(operation))
        return result


def large_results_of_a_step(implementation: str, form: str, pads: list[list[int]], kv_heads: int = 2) -> LargeResults:
    """What one integration step of a chunk does, for a prefix that is much longer than the suffix."""
    model = toy_model(stream_attention=implementation, text_config={'num_key_value_heads': kv_heads})
    given = backbone_inputs(model, pads)
    with torch.no_grad():
        cache = caches(model, given)[form]
        expert = model.action_expert
        condition = expert.prepare(None, fixed_state(), given['mask'], given['positions'], cache, 2)
        features = expert.time_features(torch.tensor([0.4]))
        with LargeResults(2 * kv_heads * len(pads[0]) * 16) as watched:
            expert.velocity(noise(), features, condition)
    return watched


LONG = [[1] * 400, [1] * 300 + [0] * 100]


@pytest.mark.parametrize('pads', [LONG, [[1] * 400] * 2], ids=['padded', 'full'])
@pytest.mark.parametrize('kv_heads', [2, 4])
@pytest.mark.parametrize(
    'reader', [f'{kernel}-{form}' for kernel in ('eager', 'sdpa', 'auto') for form in ('immutable', 'preallocated')]
)
def test_no_step_copies_the_cache(reader: str, kv_heads: int, pads: list[list[int]]) -> None:
    """Nothing that a step makes or writes is as large as the keys, or values, of one layer for this batch."""
    watched = large_results_of_a_step(*reader.split('-'), pads, kv_heads)
    assert watched.seen > 100
    assert watched.large == []


def test_the_watch_sees_a_copied_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that joins cache and suffix first, as fused kernels want it; the check above would notice."""

    def joining(query: Tensor, segments: Any, allowed: Tensor | None, implementation: str) -> Tensor:
        key, value = (torch.cat(parts, dim=2) for parts in zip(*segments, strict=True))
        return attend(query, [(key, value)], allowed, implementation)

    monkeypatch.setattr(deep_fusion, 'attend', joining)
    assert 'aten.cat.default' in large_results_of_a_step('sdpa', 'immutable', LONG).large


@every_solver
@pytest.mark.parametrize('form', ['immutable', 'preallocated'])
@pytest.mark.parametrize('conditioning', ['token', 'concat_mlp', 'adarms', 'known_actions', 'known_actions_adarms'])
def test_sampling_loop_never_waits_for_the_device(conditioning: str, form: str, solver: str) -> None:
    """On the meta device, where a tensor has no value: asking for one would raise."""
    known = 2 if conditioning.startswith('known') else 0
    time = {'known_actions': 'concat_mlp', 'known_actions_adarms': 'adarms'}.get(conditioning, conditioning)
    model = toy_model(expert_config={'time_conditioning': time, 'rtc_max_delay': known})
    given = backbone_inputs(model, RIGHT)
    expert, backbone = model.action_expert, model.language_model_with_expert
    model.to('meta')
    prefix = given['prefix'].to('meta')
    condition = Conditioning(
        backbone.new_cache(2, 7, expert.layout.length if form == 'preallocated' else 0, prefix),
        torch.ones(2, 1, expert.layout.length, 7 + expert.layout.length, dtype=torch.bool, device='meta'),
        backbone.rotary(prefix, given['positions'][:, -expert.layout.length :].to('meta')),
        torch.empty(2, 1, 48, device='meta'),
    )
    with pytest.raises(RuntimeError, match='meta'):
        bool(condition.allowed.all())
    with torch.no_grad():
        chunk = expert.denoise(
            noise().to('meta'),
            evaluation_times(solver, 3),
            3,
            solver,
            condition,
            noise()[:, :known].to('meta') if known else None,
        )
    assert chunk.device.type == 'meta' and chunk.shape == (2, HORIZON, 3)


@pytest.mark.filterwarnings('ignore:`gradient_checkpointing')
@every_conditioning
def test_checkpointing_recomputes_layers_and_changes_nothing(conditioning: str) -> None:
    """O33."""
    model, inputs = toy_model(expert_config={'time_conditioning': conditioning}).train(), policy_inputs()
    fixed = {'actions': noise(seed=9), 'noise': noise(), 'time': torch.tensor([0.3, 0.8])}
    calls: list[int] = []
    for layers in (model.language_model.model.layers, model.language_model_with_expert.expert_model.layers):
        layers[1].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        calls.clear()
        model.zero_grad()
        loss = model(**inputs, **fixed).loss
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        results.append((loss.detach(), gradients, len(calls)))
    (plain, expected, once), (loss, gradients, twice) = results
    assert (once, twice) == (2, 4), 'both streams are recomputed'
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=0)
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6, msg=name)


@padded_on_either_side
def test_shared_prefix_gradients_are_the_sum_over_its_draws(pads: list[list[int]]) -> None:
    """Repeated draws on one cache give the prefix the gradient of as many separate samples."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    eps, time = torch.randn(6, HORIZON, 3, generator=torch.Generator().manual_seed(4)), torch.linspace(0.1, 0.9, 6)
    prefix = given['prefix'].clone().requires_grad_()
    flow_loss(model, {**given, 'prefix': prefix}, noise=eps, time=time, repeats=3).backward()
    alone = given['prefix'].clone().requires_grad_()
    for draw in range(3):
        rows = torch.tensor([draw, 3 + draw])
        (flow_loss(model, {**given, 'prefix': alone}, noise=eps[rows], time=time[rows]) / 3).backward()
    torch.testing.assert_close(prefix.grad, alone.grad, atol=1e-5, rtol=1e-4)


def test_a_mask_without_restriction_is_dropped() -> None:
    """So that the fused kernel need not read one; the answer stays."""
    model = toy_model()
    conditions = []
    for pads in (FULL, LEFT):
        given = backbone_inputs(model, pads)
        conditions.append(model.action_expert.prepare(given['prefix'], fixed_state(), given['mask'], given['positions'], None, 2))
    assert conditions[0].allowed is None and conditions[1].allowed is not None
