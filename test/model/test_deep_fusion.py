"""The two-stream backbone: prefix, cached suffix and joint passes agree with each other, with a slow definition and transformers.

Tolerances of one float32 forward are absolute, at outputs of standard deviation 1. Where the same kernels run, equality is exact.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import (
    FULL,
    RIGHT,
    VOCAB,
    backbone_inputs,
    fixed_state,
    flow_loss,
    joint_pass,
    mild,
    noise,
    padded_on_either_side,
    policy_inputs,
    sampled,
    single_stream,
    toy_model,
    velocity_field,
)

from vla_policy_ros.model.attention import additive_mask, block_attention_mask, boolean_mask
from vla_policy_ros.model.deep_fusion import LayerCache, PrefixCache

SHARED = {'expert_config': {'mode': 'shared', 'hidden_size': 64}}
MISTRAL = {'text_config': {'model_type': 'mistral', 'sliding_window': None, 'head_dim': 16}}
VARIANTS: dict[str, dict[str, Any]] = {
    'separate': {},
    'shared': SHARED,
    'mistral': MISTRAL,
    'mistral_shared': {**MISTRAL, **SHARED},
    'causal_prefix': {'prefix_attention': 'causal'},
    'fewer_layers': {'expert_config': {'num_layers': 2}},
    'late': {'expert_config': {'fusion_depth': 'late'}},
    'late_shared': {'expert_config': {**SHARED['expert_config'], 'fusion_depth': 'late'}},
    'late_fewer_layers': {'expert_config': {'num_layers': 2, 'fusion_depth': 'late'}},
    'no_grouped_heads': {'text_config': {'num_key_value_heads': 4}},
}
every_variant = pytest.mark.parametrize('variant', VARIANTS)


@padded_on_either_side
@every_variant
@torch.no_grad()
def test_cached_suffix_equals_one_joint_pass_over_both_streams(variant: str, pads: list[list[int]]) -> None:
    """O1: exactly, and both equal the slow single-stream definition."""
    model = toy_model(**VARIANTS[variant])
    given = backbone_inputs(model, pads)
    backbone = model.language_model_with_expert
    _, cache = backbone(given['mask'], given['positions'], None, (given['prefix'], None), use_cache=True)
    (_, suffix), returned = backbone(given['mask'], given['positions'], cache, (None, given['suffix']))
    joint_prefix, joint_suffix = joint_pass(model, given)
    slow_prefix, slow_suffix = single_stream(model, given)
    assert returned is None
    assert suffix.std() > 0.5
    assert torch.equal(suffix, joint_suffix)
    torch.testing.assert_close(suffix, slow_suffix, atol=2e-5, rtol=0)
    valid = given['pad']
    torch.testing.assert_close(joint_prefix[valid], slow_prefix[valid], atol=2e-5, rtol=0)


@pytest.mark.parametrize(('fusion_depth', 'read'), [('deep', {0, 1, 2, 3}), ('late', {3})])
@torch.no_grad()
def test_a_suffix_reads_the_layers_that_its_fusion_names_and_no_others(fusion_depth: str, read: set[int]) -> None:
    model = toy_model(expert_config={'fusion_depth': fusion_depth})
    given = backbone_inputs(model, RIGHT)
    backbone = model.language_model_with_expert
    cache = backbone.prefix_pass(given['prefix'], given['mask'], given['positions'], cache_only=True).cache

    def suffix(spoilt: int | None) -> Tensor:
        layers = [
            LayerCache(-key, value) if index == spoilt else LayerCache(key, value)
            for index, (key, value) in enumerate(cache.layers)
        ]
        changed = PrefixCache(tuple(layers), cache.length)
        return backbone(given['mask'], given['positions'], changed, (None, given['suffix']))[0][1]

    assert {index for index in range(4) if not torch.equal(suffix(index), suffix(None))} == read


@torch.no_grad()
def test_late_fusion_samples_the_same_from_a_cache_with_room_and_without() -> None:
    model = mild(toy_model(expert_config={'fusion_depth': 'late'}))
    inputs = policy_inputs()
    fixed, roomy = (model.denoise(model.encode_prefix(inputs, form), noise=noise()) for form in ('immutable', 'preallocated'))
    torch.testing.assert_close(fixed, roomy, atol=2e-5, rtol=0)
    deep = mild(toy_model()).predict_action(inputs, noise=noise())
    assert (fixed - deep).abs().max() > 0.01


@padded_on_either_side
@torch.no_grad()
def test_cached_suffix_equals_the_joint_pass_in_bfloat16(pads: list[list[int]]) -> None:
    """O1 in half precision: the same kernels, hence exactly."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    exact = joint_pass(model, given)[1]
    model = model.bfloat16()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    half['mask'] = boolean_mask(given['mask'])
    backbone = model.language_model_with_expert
    cache = backbone.prefix_pass(half['prefix'], half['mask'], half['positions'], cache_only=True).cache
    (_, suffix), _ = backbone(half['mask'], half['positions'], cache, (None, half['suffix']))
    assert suffix.dtype == torch.bfloat16 and torch.isfinite(suffix).all()
    assert torch.equal(suffix, joint_pass(model, half)[1])
    assert torch.nn.functional.cosine_similarity(suffix.float().flatten(), exact.flatten(), dim=0) > 0.99


@torch.no_grad()
def test_a_causal_cache_is_far_from_the_joint_pass() -> None:
    """The tolerance above means something: a cache built under the other mask is nowhere near."""
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    backbone = model.language_model_with_expert
    causal = block_attention_mask(given['pad'], torch.ones(7))
    wrong = backbone.prefix_pass(given['prefix'], causal, given['positions']).cache
    (_, suffix), _ = backbone(given['mask'], given['positions'], wrong, (None, given['suffix']))
    assert (suffix - joint_pass(model, given)[1]).abs().max() > 0.1


@padded_on_either_side
@pytest.mark.parametrize('family', [{}, MISTRAL], ids=['llama', 'mistral'])
@torch.no_grad()
def test_shared_mode_equals_one_llama_over_both_streams(family: dict[str, Any], pads: list[list[int]]) -> None:
    """O6."""
    model = toy_model(**SHARED, **family)
    given = backbone_inputs(model, pads)
    backbone = model.language_model_with_expert
    hidden = torch.cat((given['prefix'], given['suffix']), dim=1)
    rotary = backbone.base.rotary_emb(hidden, given['positions'])
    additive = additive_mask(boolean_mask(given['mask']), torch.float32)
    for layer in backbone.base.layers:
        hidden = layer(hidden, attention_mask=additive, position_embeddings=rotary)
    torch.testing.assert_close(joint_pass(model, given)[1], backbone.expert_norm(hidden[:, 7:]), atol=1e-5, rtol=0)


@padded_on_either_side
@pytest.mark.parametrize('family', [{}, MISTRAL], ids=['llama', 'mistral'])
@torch.no_grad()
def test_causal_prefix_pass_gives_the_logits_of_transformers(family: dict[str, Any], pads: list[list[int]]) -> None:
    """O4, relative to the spread of the logits."""
    model = toy_model(prefix_attention='causal', **family)
    given = backbone_inputs(model, pads)
    logits = model.language_model.lm_head(model.language_model_with_expert.prefix_pass(given['prefix'], given['pad']).output)
    expected = model.language_model(
        inputs_embeds=given['prefix'], attention_mask=given['pad'].long(), position_ids=given['positions'][:, :7]
    ).logits
    scale = expected[given['pad']].std()
    assert ((logits - expected)[given['pad']] / scale).abs().max() < 1e-5


@padded_on_either_side
@torch.no_grad()
def test_bidirectional_prefix_pass_equals_transformers_llama_under_the_same_mask(pads: list[list[int]]) -> None:
    """O5."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    allowed = block_attention_mask(given['pad'], torch.zeros(7))
    output = model.language_model_with_expert.prefix_pass(given['prefix'], given['pad']).output
    expected = model.language_model.model(
        inputs_embeds=given['prefix'],
        attention_mask=additive_mask(allowed, torch.float32),
        position_ids=given['positions'][:, :7],
    ).last_hidden_state
    torch.testing.assert_close(output[given['pad']], expected[given['pad']], atol=1e-5, rtol=0)


@padded_on_either_side
@torch.no_grad()
def test_prefix_does_not_depend_on_the_suffix(pads: list[list[int]]) -> None:
    """O7."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    other = {**given, 'suffix': torch.randn_like(given['suffix'])}
    alone = model.language_model_with_expert.prefix_pass(given['prefix'], given['pad']).output
    first = joint_pass(model, given)[0]
    assert torch.equal(first, joint_pass(model, other)[0]) and torch.equal(first, alone)
    longer = toy_model(expert_config={'action_horizon': 9})
    assert torch.equal(first, joint_pass(longer, {**backbone_inputs(longer, pads), 'prefix': given['prefix']})[0])


@padded_on_either_side
@torch.no_grad()
def test_content_of_padding_changes_nothing(pads: list[list[int]]) -> None:
    """O8."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    other = {**given, 'prefix': torch.where(given['pad'][..., None], given['prefix'], 50 * torch.randn_like(given['prefix']))}
    (prefix, suffix), (prefix2, suffix2) = joint_pass(model, given), joint_pass(model, other)
    assert torch.equal(suffix, suffix2)
    assert torch.equal(prefix, prefix2), 'padded rows are zero, valid rows untouched'
    assert torch.isfinite(prefix).all()
    done = model.language_model_with_expert.prefix_pass(other['prefix'], given['pad'])
    assert all(torch.isfinite(layer.key).all() and torch.isfinite(layer.value).all() for layer in done.cache.layers)


@torch.no_grad()
def test_left_and_right_padding_and_no_padding_agree() -> None:
    """O9."""
    model = toy_model()
    backbone, layout = model.language_model_with_expert, model.action_expert.layout
    words, suffix = torch.randn(1, 4, 64), torch.randn(1, layout.length, 48)
    results = []
    for before, after in ((0, 0), (3, 0), (0, 3), (2, 5)):
        prefix = torch.cat((torch.randn(1, before, 64), words, torch.randn(1, after, 64)), dim=1)
        pad = torch.tensor([[False] * before + [True] * 4 + [False] * after])
        mask, positions, _ = model._build_joint_attention_inputs(prefix, layout.length, pad)
        results.append(backbone(mask, positions, None, (prefix, suffix))[0][1])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)


@padded_on_either_side
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(pads: list[list[int]]) -> None:
    """O10."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    together = joint_pass(model, given)[1]
    for row in range(2):
        alone = joint_pass(model, {name: value[row : row + 1] for name, value in given.items()})[1]
        torch.testing.assert_close(alone, together[row : row + 1], atol=2e-5, rtol=0)


@padded_on_either_side
@torch.no_grad()
def test_order_of_a_bidirectional_prefix_is_only_in_its_positions(pads: list[list[int]]) -> None:
    """O11: embeddings, positions and validity permuted together."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    order = torch.randperm(7)
    columns = torch.cat((order, torch.arange(7, given['mask'].shape[-1])))
    moved = {
        **given,
        'prefix': given['prefix'][:, order],
        'positions': given['positions'][:, columns],
        'mask': given['mask'][:, :, columns][..., columns],
    }
    torch.testing.assert_close(joint_pass(model, given)[1], joint_pass(model, moved)[1], atol=1e-5, rtol=0)
    at_old_positions = {**moved, 'positions': given['positions']}
    assert (joint_pass(model, at_old_positions)[1] - joint_pass(model, given)[1]).abs().max() > 0.1


@padded_on_either_side
@pytest.mark.parametrize('choice', ['block', 'state_block', 'causal'])
def test_suffix_attention_decides_whether_an_action_sees_later_ones(choice: str, pads: list[list[int]]) -> None:
    """O12: exact zeros."""
    model = toy_model(expert_config={'suffix_attention': choice, 'time_conditioning': 'concat_mlp'})
    given = backbone_inputs(model, pads)
    prefix, x = given['prefix'].requires_grad_(), noise().requires_grad_()
    velocity_field(model, given)(x, 0.4)[:, 0].sum().backward()
    assert (x.grad[:, 0] != 0).any()
    assert bool((x.grad[:, -1] != 0).any()) == (choice != 'causal')
    assert (prefix.grad[~given['pad']] == 0).all(), 'padding gets no gradient'
    assert (prefix.grad[given['pad']] != 0).any(dim=-1).all(), 'every valid prefix token reaches the first action'

    suffix = given['suffix'].requires_grad_()
    out = joint_pass(model, given)[1]
    state_row = torch.autograd.grad(out[:, 0].sum(), suffix)[0]
    assert bool((state_row[:, 1:] != 0).any()) == (choice == 'block'), 'only one block lets the state see the actions'


@pytest.mark.parametrize(('shift', 'tolerance'), [(100, 2e-4), (1000, 2e-3)])
@padded_on_either_side
@torch.no_grad()
def test_only_differences_of_positions_matter(pads: list[list[int]], shift: int, tolerance: float) -> None:
    """O13."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    shifted = {**given, 'positions': given['positions'] + shift}
    for got, expected in zip(joint_pass(model, shifted), joint_pass(model, given), strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    late_suffix = given['positions'].clone()
    late_suffix[:, 7:] += shift
    assert (joint_pass(model, {**given, 'positions': late_suffix})[1] - joint_pass(model, given)[1]).abs().max() > 0.1


@padded_on_either_side
@torch.no_grad()
def test_cache_is_only_read(pads: list[list[int]]) -> None:
    """O3: tensors and lengths stay, and a second chunk equals the first."""
    model = toy_model()
    given = backbone_inputs(model, pads)
    cache = model.language_model_with_expert.prefix_pass(given['prefix'], given['mask'], given['positions']).cache
    before = copy.deepcopy(cache)
    chunks = [sampled(model, given, 5, cache) for _ in range(2)]
    assert torch.equal(*chunks)
    for old, new in zip(before.layers, cache.layers, strict=True):
        assert torch.equal(old.key, new.key) and torch.equal(old.value, new.value)


def test_fewer_expert_layers_read_every_second_language_layer() -> None:
    model = toy_model(expert_config={'num_layers': 2})
    backbone = model.language_model_with_expert
    given = backbone_inputs(model, RIGHT)
    cache = backbone.prefix_pass(given['prefix'], given['mask'], given['positions']).cache
    keys = [layer.key for layer in cache.layers]
    (_, out), _ = backbone(given['mask'], given['positions'], cache, (None, given['suffix']))
    read = torch.autograd.grad(out.sum(), keys, allow_unused=True)
    # Keys of layer 1 still feed layer 2 of the prefix, whose keys are read; those of layer 3 feed nothing.
    assert read[0] is not None and read[2] is not None
    assert read[3] is None


def test_knowledge_insulation_keeps_the_loss_and_cuts_the_prefix_gradient() -> None:
    """O32: with insulation no gradient of the flow loss reaches anything in front of the expert."""
    inputs, losses, reached = policy_inputs(), [], []
    for insulated in (False, True):
        model = toy_model(expert_config={'knowledge_insulation': insulated})
        loss = model(**inputs, actions=noise(seed=9), noise=noise(), time=torch.tensor([0.3, 0.8])).loss
        loss.backward()
        losses.append(loss.detach())
        reached.append({name for name, value in model.named_parameters() if value.grad is not None and (value.grad != 0).any()})
    assert torch.equal(*losses)
    own = ('language_model_with_expert.', 'action_expert.')
    assert {name for name in reached[0] if name.startswith(own)} == reached[1]
    assert {name.split('.')[0] for name in reached[0] - reached[1]} == {
        'vision_tower', 'vision_projector', 'geometry_encoder', 'fusion', 'language_model',
    }  # fmt: skip


def dead_language_weights(model: torch.nn.Module) -> set[str]:
    """What a flow loss cannot reach: all behind the last layer's keys and values."""
    last = model.config.text_config.num_hidden_layers - 1
    parts = (
        'self_attn.q_proj', 'self_attn.o_proj', 'post_attention_layernorm', 'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj',
    )  # fmt: skip
    layer = {f'language_model.model.layers.{last}.{part}.weight' for part in parts}
    return layer | {'language_model.model.norm.weight', 'language_model.lm_head.weight'}


@pytest.mark.parametrize('conditioning', ['token', 'concat_mlp', 'adarms'])
def test_flow_gradient_reaches_what_it_should_and_nothing_else(conditioning: str) -> None:
    """O32: all parts, exactly without the weights that no action depends on."""
    model = toy_model(expert_config={'time_conditioning': conditioning})
    inputs = policy_inputs()
    model(**inputs, actions=noise(seed=9), noise=noise(), time=torch.tensor([0.3, 0.8])).loss.backward()
    missed = {name for name, value in model.named_parameters() if value.grad is None or not (value.grad != 0).any()}
    assert {name for name in missed if name.startswith(('language_model', 'action_expert', 'vision', 'fusion'))} == (
        dead_language_weights(model)
    )
    words = model.get_input_embeddings().weight.grad
    used = torch.zeros(VOCAB, dtype=torch.bool)
    used[inputs['input_ids'][inputs['input_ids'] >= 0]] = True
    assert torch.equal((words != 0).any(dim=-1), used), 'only words of the prompt are touched'


def test_frozen_parts_get_no_gradient_and_change_no_other() -> None:
    """O32."""
    inputs, gradients = policy_inputs(), []
    for frozen in ((), ('vision_tower', 'geometry_encoder', 'language_model.')):
        model = toy_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
        model(**inputs, actions=noise(seed=9), noise=noise(), time=torch.tensor([0.3, 0.8])).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    kept = {name for name, value in gradients[1].items() if value is not None}
    assert {name.split('.')[0] for name in kept} == {
        'vision_projector', 'fusion', 'language_model_with_expert', 'action_expert',
    }  # fmt: skip
    for name in kept:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-6, rtol=1e-5)


def test_backbone_weights_have_one_name_each() -> None:
    model = toy_model()
    addresses = [parameter.data_ptr() for parameter in model.state_dict().values()]
    assert len(addresses) == len(set(addresses))


def test_streams_that_do_not_belong_together_are_refused() -> None:
    model = toy_model()
    backbone, given = model.language_model_with_expert, backbone_inputs(model, FULL)
    mask, positions, prefix, suffix = (given[name] for name in ('mask', 'positions', 'prefix', 'suffix'))
    cache = backbone.prefix_pass(prefix, mask, positions).cache
    with pytest.raises(ValueError, match='prefix embeddings, suffix embeddings or both'):
        backbone(mask, positions)
    with pytest.raises(ValueError, match='past_key_values'):
        backbone(mask, positions, None, (None, suffix))
    with pytest.raises(ValueError, match='position_ids'):
        backbone(mask, None, cache, (None, suffix))
    with pytest.raises(ValueError, match='prefix has 7 tokens'):
        backbone.prefix_pass(prefix, mask[:, :, :5, :5], positions)
    with pytest.raises(ValueError, match=r'7 suffix tokens see 14 keys'):
        backbone.suffix_pass(suffix, cache, boolean_mask(mask)[:, :, -7:, 1:], backbone.rotary(suffix, positions[:, -7:]))
    with pytest.raises(ValueError, match="for time_conditioning 'adarms'"):
        backbone(mask, positions, cache, (None, suffix), expert_cond=torch.zeros(2, 48))
    with pytest.raises(ValueError, match='cannot be paired'):
        broken = copy.deepcopy(model.config.expert_config)
        broken.num_layers = 3
        type(backbone)(model.language_model, broken)
    with pytest.raises(ValueError, match=r'batch 2.*batch 3'):
        model.action_expert.sample_actions(None, fixed_state(3), 2, mask, positions, cache, noise=noise(3))


def test_hidden_states_are_the_inputs_of_every_layer() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    seen: list[Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in model.language_model_with_expert.base.layers
    ]
    with torch.no_grad():
        done = model.language_model_with_expert.prefix_pass(given['prefix'], given['pad'])
    for hook in hooks:
        hook.remove()
    assert len(done.hidden_states) == 5 and done.hidden_states[-1] is done.output
    assert all(torch.equal(a, b) for a, b in zip(done.hidden_states, seen, strict=False))


def test_the_toy_loss_depends_on_everything_it_is_given() -> None:
    """The checks above would hold for a network that ignores its inputs; this one does not."""
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    fixed = {'noise': noise(), 'time': torch.tensor([0.3, 0.8])}
    loss = flow_loss(model, given, **fixed).detach()
    for other in ({**given, 'prefix': given['prefix'] * 1.1}, backbone_inputs(model, FULL)):
        assert abs(float(flow_loss(model, other, **fixed).detach() - loss)) > 1e-3
