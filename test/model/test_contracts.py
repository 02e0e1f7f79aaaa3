"""Small promises of the interface that are easy to break without noticing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import HORIZON, RIGHT, STATE_DIM, backbone_inputs, noise, policy_inputs, toy_config, toy_model
from transformers import LlamaForCausalLM

from vla_policy_ros.model.deep_fusion import LLaVA3DWithActionExpertModel
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration, MapAnythingLlava3DOutput

Model = MapAnythingLlava3DForConditionalGeneration


def words_only(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name != 'state'}


@torch.no_grad()
def test_a_language_cache_remembers_which_cameras_were_absent() -> None:
    model, inputs = toy_model(), words_only(policy_inputs())
    masks = torch.tensor([[True, False], [True, True]])
    word = torch.tensor([[7], [9]])
    whole = {**inputs, 'input_ids': torch.cat((inputs['input_ids'], word), dim=1)}
    expected = model(**whole, image_masks=masks).logits[:, -1]
    first = model(**inputs, image_masks=masks, use_cache=True)
    length = inputs['input_ids'].shape[1]
    then = model(input_ids=word, past_key_values=first.past_key_values, attention_mask=torch.ones(2, length + 1), use_cache=True)
    torch.testing.assert_close(then.logits[:, -1], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f'past_key_values hold {length + 1} tokens'):
        model(input_ids=word, past_key_values=then.past_key_values)


def test_insulating_a_shared_expert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"knowledge_insulation cannot insulate a shared expert.*'separate'"):
        toy_config(expert_config={'mode': 'shared', 'hidden_size': 64, 'knowledge_insulation': True})
    shared = toy_config(expert_config={'mode': 'shared', 'hidden_size': 64, 'intermediate_size': 7})
    assert shared.expert_config.intermediate_size == shared.text_config.intermediate_size


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_of_either_kind_keeps_every_gradient(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = toy_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({'use_reentrant': reentrant})
        given = {'actions': noise(seed=9), 'noise': noise(), 'time': torch.tensor([0.2, 0.7])}
        model(**policy_inputs(), **given).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, plain in gradients[0].items():
        other = gradients[1][name]
        assert (plain is None) == (other is None), name
        if plain is not None:
            torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-4)


def test_flat_names_are_written_through_to_the_expert() -> None:
    config = toy_config()
    config.action_dim = 9
    assert config.action_dim == config.expert_config.action_dim == 9


@torch.no_grad()
@pytest.mark.parametrize(('layers', 'read'), [(1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3])])
def test_a_cache_is_made_up_to_the_last_layer_that_is_read(layers: int, read: list[int]) -> None:
    model = toy_model(expert_config={'num_layers': layers})
    ran: list[str] = []
    for index, layer in enumerate(model.language_model.model.layers):
        for part in ('k_proj', 'q_proj'):
            getattr(layer.self_attn, part).register_forward_hook(lambda *_, name=f'{part}{index}': ran.append(name))
    for form in ('immutable', 'preallocated'):
        ran.clear()
        encoded = model.encode_prefix(policy_inputs(), form)
        assert len(encoded.cache.layers) == read[-1] + 1
        assert ran == [
            name for index in range(read[-1] + 1) for name in ([f'k_proj{index}'] + [f'q_proj{index}'] * (index < read[-1]))
        ]
        assert torch.isfinite(model.denoise(encoded, 2, noise=noise())).all()


@torch.no_grad()
def test_an_unpadded_prefix_is_attended_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from vla_policy_ros.model import deep_fusion

    model, masks = toy_model(), []
    real = deep_fusion.attend
    monkeypatch.setattr(deep_fusion, 'attend', lambda q, s, allowed, i: masks.append(allowed) or real(q, s, allowed, i))
    model.predict_action(policy_inputs())
    assert masks and all(mask is None for mask in masks)
    masks.clear()
    padded = policy_inputs() | {'attention_mask': torch.ones(2, 13)}
    padded['attention_mask'][0, -1] = 0
    model.predict_action(padded)
    assert masks and all(mask is not None for mask in masks)


def test_the_ignored_label_is_the_configured_one() -> None:
    model, inputs = toy_model(ignore_index=-7), words_only(policy_inputs())
    labels = inputs['input_ids'].clone()
    losses = []
    for ignored in (-7, -100):
        losses.append(float(model(**inputs, labels=labels.masked_fill(labels < 0, ignored)).loss.detach()))
    assert losses[0] == losses[1]


def test_the_backbone_has_a_default_expert() -> None:
    backbone = LLaVA3DWithActionExpertModel(LlamaForCausalLM(toy_config().text_config))
    assert backbone.expert_hidden_size == 1024 and not backbone.shared


def test_output_can_be_a_tuple_and_be_made_by_keyword() -> None:
    model, inputs = toy_model(), words_only(policy_inputs())
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(model(**inputs, return_dict=False)[0], logits)
        loss = model(**policy_inputs(), actions=noise(), noise=noise(), time=torch.tensor([0.1, 0.2]), return_dict=False)[0]
    assert loss.shape == ()
    made = MapAnythingLlava3DOutput(loss=loss, past_key_values='cache')
    assert made.past_key_values == 'cache' and made['past_key_values'] == 'cache' and made.logits is None


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'inputs_embeds': torch.zeros(2, 13, 64)}, 'input_ids or inputs_embeds, not both'),
        ({'output_attentions': True}, "attn_implementation to be 'eager'"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_the_language_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_model()(**words_only(policy_inputs()), **change)


def test_times_outside_the_unit_interval_are_refused() -> None:
    model = toy_model()
    given = backbone_inputs(model, RIGHT)
    for time in ([0.5, 1.2], [-0.1, 0.5], [float('nan'), 0.5]):
        with pytest.raises(ValueError, match=r'must lie in \[0, 1\]'):
            model.action_expert.compute_loss(
                given['prefix'], noise(seed=9), torch.ones(2, STATE_DIM), given['mask'], given['positions'], time=torch.tensor(time)
            )


def test_prediction_names_an_input_it_does_not_know_and_one_it_misses() -> None:
    model = toy_model()
    with pytest.raises(ValueError, match="'position_ids' is unknown"):
        model.predict_action(policy_inputs() | {'position_ids': torch.zeros(2, 13)})
    with pytest.raises(ValueError, match='no input_ids'):
        model.predict_action({'state': torch.zeros(2, STATE_DIM)})


@torch.no_grad()
def test_integer_masks_are_masks() -> None:
    model, inputs = toy_model(), policy_inputs()
    masks = torch.tensor([[1, 0], [1, 1]])
    chunks = [
        model.predict_action({**inputs, 'image_masks': mask, 'intrinsic_mask': mask}, noise=noise())
        for mask in (masks, masks.bool())
    ]
    assert torch.equal(*chunks) and chunks[0].shape == (2, HORIZON, 3)


@torch.no_grad()
def test_prediction_hides_nothing_also_in_training_mode() -> None:
    model = toy_model(prefix_image_dropout_prob=0.5, prefix_lang_dropout_prob=0.5).train()
    chunks = [model.predict_action(policy_inputs(), noise=noise()) for _ in range(2)]
    assert torch.equal(*chunks)
