"""The two-stream backbone: prefix, cached suffix and joint passes agree with each other and with transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toy import backbone_inputs, noise, toy_model

from vla_policy_ros.model.attention import additive_mask, apply_rotary, block_attention_mask, boolean_mask

RIGHT = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]
LEFT = [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
SHARED = {'mode': 'shared', 'hidden_size': 64}


def single_stream(model: nn.Module, prefix: Tensor, suffix: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Deep fusion written the slow way: one sequence, every layer projects each stream with its own weights, then attends once."""
    backbone = model.language_model_with_expert
    length = prefix.shape[1]
    rotary = backbone.base.rotary_emb(prefix, positions)
    experts = backbone.base.layers if backbone.expert_model is None else backbone.expert_model.layers
    streams = [prefix, suffix]
    for index, base in enumerate(backbone.base.layers):
        if index % backbone.layer_stride:
            continue
        layers = (base, experts[index // backbone.layer_stride])
        projected = []
        for layer, hidden in zip(layers, streams, strict=True):
            normed = layer.input_layernorm(hidden)
            attention = layer.self_attn
            projected.append(
                [
                    linear(normed).unflatten(-1, (-1, backbone.head_dim)).transpose(1, 2)
                    for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
                ]
            )
        query, key, value = (torch.cat([stream[i] for stream in projected], dim=2) for i in range(3))
        query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(-1, -2) / backbone.head_dim**0.5
        weights = torch.softmax(scores.masked_fill(~mask, float('-inf')), dim=-1).nan_to_num(0.0)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        for i, (layer, part) in enumerate(zip(layers, (mixed[:, :length], mixed[:, length:]), strict=True)):
            hidden = streams[i] + layer.self_attn.o_proj(part)
            streams[i] = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return backbone.base.norm(streams[0]), backbone.expert_norm(streams[1])


@pytest.mark.parametrize('pads', [RIGHT, LEFT], ids=['right', 'left'])
@pytest.mark.parametrize('expert', [{}, SHARED], ids=['separate', 'shared'])
def test_cached_suffix_equals_one_joint_pass_over_both_streams(expert: dict, pads: list[list[int]]) -> None:
    model = toy_model(expert_config=expert)
    given = backbone_inputs(model, pads)
    backbone = model.language_model_with_expert
    with torch.no_grad():
        _, cache = backbone(given['mask'], given['positions'], None, (given['prefix'], None), use_cache=True)
        (_, suffix), returned = backbone(given['mask'], given['positions'], cache, (None, given['suffix']))
        (joint_prefix, joint_suffix), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))
        slow_prefix, slow_suffix = single_stream(
            model, given['prefix'], given['suffix'], boolean_mask(given['mask']), given['positions']
        )
    assert returned is None
    assert suffix.std() > 0.5
    assert torch.equal(suffix, joint_suffix)
    torch.testing.assert_close(suffix, slow_suffix, atol=2e-5, rtol=0)
    valid = given['pad']
    torch.testing.assert_close(joint_prefix[valid], slow_prefix[valid], atol=2e-5, rtol=0)


def test_a_causal_cache_is_far_from_the_joint_pass() -> None:
    """The tolerance above means something: a cache built under the other mask is nowhere near."""
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    backbone = model.language_model_with_expert
    causal = block_attention_mask(given['pad'], torch.ones(7))
    with torch.no_grad():
        wrong = backbone.prefix_pass(given['prefix'], causal, given['positions']).cache
        (_, right), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))
        (_, suffix), _ = backbone(given['mask'], given['positions'], wrong, (None, given['suffix']))
    assert (suffix - right).abs().max() > 0.1


def test_shared_mode_equals_one_llama_over_both_streams() -> None:
    model = toy_model(expert_config=SHARED)
    given = backbone_inputs(model, RIGHT)
    backbone = model.language_model_with_expert
    with torch.no_grad():
        (_, suffix), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))
        hidden = torch.cat((given['prefix'], given['suffix']), dim=1)
        rotary = backbone.base.rotary_emb(hidden, given['positions'])
        additive = additive_mask(boolean_mask(given['mask']), torch.float32)
        for layer in backbone.base.layers:
            hidden = layer(hidden, attention_mask=additive, position_embeddings=rotary)
    torch.testing.assert_close(suffix, backbone.expert_norm(hidden[:, 7:]), atol=2e-5, rtol=0)


@pytest.mark.parametrize('pads', [RIGHT, LEFT], ids=['right', 'left'])
def test_causal_prefix_pass_gives_the_logits_of_transformers_llama(pads: list[list[int]]) -> None:
    model = toy_model(prefix_attention='causal')
    given = backbone_inputs(model, pads)
    with torch.no_grad():
        output = model.language_model_with_expert.prefix_pass(given['prefix'], given['pad']).output
        logits = model.language_model.lm_head(output)
        expected = model.language_model(
            inputs_embeds=given['prefix'], attention_mask=given['pad'].long(), position_ids=given['positions'][:, :7]
        ).logits
    scale = expected[given['pad']].std()
    assert ((logits - expected)[given['pad']] / scale).abs().max() < 1e-5


def test_bidirectional_prefix_pass_equals_transformers_llama_under_the_same_mask() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    allowed = block_attention_mask(given['pad'], torch.zeros(7))
    with torch.no_grad():
        output = model.language_model_with_expert.prefix_pass(given['prefix'], given['pad']).output
        expected = model.language_model.model(
            inputs_embeds=given['prefix'],
            attention_mask=additive_mask(allowed, torch.float32),
            position_ids=given['positions'][:, :7],
        ).last_hidden_state
    torch.testing.assert_close(output[given['pad']], expected[given['pad']], atol=2e-5, rtol=0)


def test_prefix_does_not_depend_on_the_suffix() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    backbone = model.language_model_with_expert
    with torch.no_grad():
        (first, _), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))
        (second, _), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], torch.randn_like(given['suffix'])))
        alone = backbone.prefix_pass(given['prefix'], given['pad']).output
    assert torch.equal(first, second) and torch.equal(first, alone)


def test_content_of_padding_changes_nothing() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    other = torch.where(given['pad'][..., None], given['prefix'], 50 * torch.randn_like(given['prefix']))
    backbone = model.language_model_with_expert
    with torch.no_grad():
        (prefix, suffix), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))
        (prefix2, suffix2), _ = backbone(given['mask'], given['positions'], None, (other, given['suffix']))
    assert torch.equal(suffix, suffix2)
    assert torch.equal(prefix, prefix2), 'padded rows are zero, valid rows untouched'
    assert torch.isfinite(prefix).all()


def test_left_and_right_padding_and_no_padding_agree() -> None:
    model = toy_model()
    backbone, layout = model.language_model_with_expert, model.action_expert.layout
    words, suffix = torch.randn(1, 4, 64), torch.randn(1, layout.length, 48)
    results = []
    for before, after in ((0, 0), (3, 0), (0, 3), (2, 5)):
        prefix = torch.cat((torch.randn(1, before, 64), words, torch.randn(1, after, 64)), dim=1)
        pad = torch.tensor([[False] * before + [True] * 4 + [False] * after])
        mask, positions, _ = model._build_joint_attention_inputs(prefix, layout.length, pad)
        with torch.no_grad():
            results.append(backbone(mask, positions, None, (prefix, suffix))[0][1])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=2e-5, rtol=0)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    backbone = model.language_model_with_expert
    with torch.no_grad():
        (_, together), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))
        one = {name: value[1:] for name, value in given.items()}
        (_, alone), _ = backbone(one['mask'], one['positions'], None, (one['prefix'], one['suffix']))
    torch.testing.assert_close(alone, together[1:], atol=2e-5, rtol=0)


def test_order_of_a_bidirectional_prefix_is_only_in_its_positions() -> None:
    model = toy_model()
    given = backbone_inputs(model, [[1] * 7])
    order = torch.randperm(7)
    positions = torch.cat((given['positions'][:, :7][:, order], given['positions'][:, 7:]), dim=1)
    backbone = model.language_model_with_expert
    with torch.no_grad():
        (_, suffix), _ = backbone(given['mask'], given['positions'], None, (given['prefix'], given['suffix']))
        (_, shuffled), _ = backbone(given['mask'], positions, None, (given['prefix'][:, order], given['suffix']))
    torch.testing.assert_close(suffix, shuffled, atol=2e-5, rtol=0)


@pytest.mark.parametrize(('choice', 'later_reaches_earlier'), [('block', True), ('causal', False)])
def test_suffix_attention_decides_whether_an_action_sees_later_ones(choice: str, later_reaches_earlier: bool) -> None:
    model = toy_model(expert_config={'suffix_attention': choice, 'time_conditioning': 'concat_mlp'})
    given = backbone_inputs(model, RIGHT)
    suffix, prefix = given['suffix'].requires_grad_(), given['prefix'].requires_grad_()
    (_, out), _ = model.language_model_with_expert(given['mask'], given['positions'], None, (prefix, suffix))
    out[:, 1].sum().backward()
    assert bool((suffix.grad[:, -1] != 0).any()) == later_reaches_earlier
    assert (prefix.grad[~given['pad']] == 0).all(), 'padding gets no gradient'
    assert (prefix.grad[given['pad']] != 0).any()


def test_cache_is_only_read() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    with torch.no_grad():
        cache = model.language_model_with_expert.prefix_pass(given['prefix'], given['mask'], given['positions']).cache
        before = copy.deepcopy(cache)
        chunks = [
            model.action_expert.sample_actions(None, torch.zeros(2, 4), 5, given['mask'], given['positions'], cache, noise=noise())
            for _ in range(2)
        ]
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
    # The last layer's keys could reach the suffix only by being read; layer 1's still do, through the prefix of layer 2.
    assert read[0] is not None and read[2] is not None
    assert read[3] is None


def test_knowledge_insulation_keeps_the_loss_and_cuts_the_prefix_gradient() -> None:
    losses, gradients = [], []
    for insulated in (False, True):
        model = toy_model(expert_config={'knowledge_insulation': insulated})
        given = backbone_inputs(model, RIGHT)
        prefix = given['prefix'].requires_grad_()
        loss = model.action_expert.compute_loss(
            prefix, noise(seed=9), torch.ones(2, 4), given['mask'], given['positions'], noise=noise(), time=torch.tensor([0.3, 0.8])
        )
        gradients.append(torch.autograd.grad(loss, prefix, allow_unused=True)[0])
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert (gradients[0] != 0).any()
    assert gradients[1] is None or (gradients[1] == 0).all()


def test_flow_gradient_reaches_what_it_should_and_nothing_else() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    model.action_expert.compute_loss(
        given['prefix'], noise(seed=9), torch.ones(2, 4), given['mask'], given['positions'], noise=noise(), time=torch.rand(2)
    ).backward()
    last = model.config.text_config.num_hidden_layers - 1
    dead = [
        f'language_model.model.layers.{last}.{part}.weight'
        for part in (
            'self_attn.q_proj',
            'self_attn.o_proj',
            'post_attention_layernorm',
            'mlp.gate_proj',
            'mlp.up_proj',
            'mlp.down_proj',
        )
    ] + ['language_model.model.norm.weight', 'language_model.lm_head.weight', 'language_model.model.embed_tokens.weight']
    for name, parameter in model.named_parameters():
        if name.startswith(('language_model', 'action_expert')):
            reached = parameter.grad is not None and bool((parameter.grad != 0).any())
            assert reached == (name not in dead), name


def test_backbone_weights_have_one_name_each() -> None:
    model = toy_model()
    addresses = [parameter.data_ptr() for parameter in model.state_dict().values()]
    assert len(addresses) == len(set(addresses))
