"""The whole model: contracts, injection, refusals, absent cameras, saving."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from toy import HORIZON, STATE_DIM, TOKENS_PER_VIEW, VOCAB, mild, noise, policy_inputs, toy_config, toy_model
from transformers import AutoConfig, AutoModel, LlamaForCausalLM
from transformers.models.siglip import SiglipVisionModel

from vla_policy_ros.model.attention import boolean_mask
from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.geometry import GeometryTrunk
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration

Model = MapAnythingLlava3DForConditionalGeneration


@pytest.fixture(scope='module')
def model() -> Model:
    return toy_model()


def test_loss_and_prediction_have_the_promised_forms(model: Model) -> None:
    output = model(**policy_inputs(), actions=noise(seed=9))
    assert output.loss.dtype == torch.float32 and output.loss.shape == ()
    assert output.logits is None and output.past_key_values is None and output.hidden_states is None and output.attentions is None
    assert output.image_hidden_states.shape == (2, 2 * TOKENS_PER_VIEW, 64)
    chunk = model.predict_action(policy_inputs())
    assert chunk.shape == (2, HORIZON, 3) and chunk.dtype == torch.float32 and not chunk.requires_grad


def test_joint_inputs_are_what_the_contract_says(model: Model) -> None:
    """O14 and O15."""
    layout = model.action_expert.layout
    pad = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    prefix = torch.zeros(2, 4, 64)
    mask, positions, prefix_pad = model._build_joint_attention_inputs(
        prefix, layout.length, pad, position_ids=torch.full((2, 4), 77)
    )
    total = 4 + layout.length
    assert mask.shape == (2, 1, total, total) and mask.dtype == prefix.dtype and torch.isfinite(mask).all()
    assert positions.dtype == torch.long and positions[:, 4:].tolist() == [list(range(3, 3 + layout.length))] * 2
    assert prefix_pad.dtype == torch.bool and torch.equal(prefix_pad, pad.bool())
    allowed = boolean_mask(mask)[0, 0]
    assert not allowed[:3, 4:].any(), 'the prefix never sees the suffix'
    assert allowed[4:, :3].all() and not allowed[4:, 3].any(), 'the suffix sees the valid prefix'
    assert allowed[4:, 4:].all(), 'the suffix is one block'
    assert torch.equal(model._build_joint_attention_inputs(prefix, layout.length)[2], torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=f'suffix_len is 99.*{layout.length}'):
        model._build_joint_attention_inputs(prefix, 99)


def test_image_features_fill_their_slots_in_order_and_words_stay(model: Model) -> None:
    """O27."""
    inputs = policy_inputs()
    ids = inputs['input_ids'].clone()
    ids[0, -1] = VOCAB - 1
    features = torch.arange(2 * 8 * 64, dtype=torch.float32).view(2, 8, 64)
    prefix = model.embed_prefix(ids, image_features=features)
    words = model.get_input_embeddings().weight
    for sample in range(2):
        assert torch.equal(prefix.embeds[sample, 1:9], features[sample])
        for slot in (0, *range(9, 13)):
            assert torch.equal(prefix.embeds[sample, slot], words[ids[sample, slot]])
    assert torch.equal(ids[0], torch.cat((ids[0, :1], torch.full((8,), -200), ids[0, 9:]))), 'the caller keeps its ids'


def test_views_are_laid_out_one_after_the_other(model: Model) -> None:
    inputs = policy_inputs()
    both = model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])
    other = inputs['pixel_values'].clone()
    other[:, 1] = 0
    changed = (model.get_image_features(other, inputs['intrinsic']) != both).any(-1)
    assert changed[:, TOKENS_PER_VIEW:].all()
    alone = toy_model(use_geometric_branch=False)
    first = alone.get_image_features(inputs['pixel_values'][:, 0])
    torch.testing.assert_close(alone.get_image_features(inputs['pixel_values'])[:, :TOKENS_PER_VIEW], first, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    'change',
    [
        'slots_more',
        'slots_fewer',
        'batch',
        'horizon',
        'state',
        'no_state',
        'nan_state',
        'nan_pixels',
        'signed_pixels',
        'image_size',
        'intrinsic',
        'bad_focal',
        'vocabulary',
        'no_images',
        'mask',
        'actions_batch',
        'nan_actions',
        'image_masks',
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(model: Model, change: str) -> None:
    """O26."""
    inputs = policy_inputs()
    actions = noise(seed=9)
    image = inputs['pixel_values'].float() / 255
    messages = {
        'slots_more': r'\[9, 9\].*8', 'slots_fewer': r'\[7, 7\].*8', 'batch': 'batch 2.*batch 1', 'horizon': r'\(2, 6, 3\)',
        'state': r'\(2, 5\)', 'no_state': 'state', 'nan_state': 'NaN', 'nan_pixels': 'nan', 'signed_pixels': r'\[-1',
        'image_size': r'30', 'intrinsic': r'\(2, 1, 3, 3\)', 'bad_focal': 'focal', 'vocabulary': f'{VOCAB}',
        'no_images': '8 image positions', 'mask': r'\(2, 5\)',
        'actions_batch': 'actions have batch 3, the prefix has batch 2', 'nan_actions': 'actions contain NaN',
        'image_masks': r'image_masks is \(2, 3\); the images are \[2, 2',
    }  # fmt: skip
    if change == 'slots_more':
        inputs['input_ids'][:, 10] = -200
    elif change == 'slots_fewer':
        inputs['input_ids'][:, 1] = 5
    elif change == 'batch':
        inputs['pixel_values'], inputs['intrinsic'] = inputs['pixel_values'][:1], inputs['intrinsic'][:1]
    elif change == 'horizon':
        actions = torch.zeros(2, HORIZON + 1, 3)
    elif change == 'state':
        inputs['state'] = torch.zeros(2, STATE_DIM + 1)
    elif change == 'no_state':
        del inputs['state']
    elif change == 'nan_state':
        inputs['state'][1, 2] = float('nan')
    elif change == 'nan_pixels':
        image[0, 0, 0, 0, 0] = float('nan')
        inputs['pixel_values'] = image
    elif change == 'signed_pixels':
        inputs['pixel_values'] = image * 2 - 1
    elif change == 'image_size':
        inputs['pixel_values'] = torch.zeros(2, 2, 3, 30, 28, dtype=torch.uint8)
    elif change == 'intrinsic':
        inputs['intrinsic'] = inputs['intrinsic'][:, :1]
    elif change == 'bad_focal':
        inputs['intrinsic'][0, 0, 0, 0] = 0.0
    elif change == 'vocabulary':
        inputs['input_ids'][0, -1] = VOCAB
    elif change == 'no_images':
        del inputs['pixel_values'], inputs['intrinsic']
    elif change == 'mask':
        inputs['attention_mask'] = torch.ones(2, 5)
    elif change == 'actions_batch':
        actions = noise(3)
    elif change == 'nan_actions':
        actions[1, 2, 0] = float('nan')
    elif change == 'image_masks':
        inputs['image_masks'] = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=messages[change]):
        model(**inputs, actions=actions)


def test_actions_without_an_expert_are_refused() -> None:
    speaker = toy_model(use_action_expert=False)
    with pytest.raises(ValueError, match='no action expert'):
        speaker(**{k: v for k, v in policy_inputs().items() if k != 'state'}, actions=noise())


def test_spatial_tokens_replace_their_rows_only() -> None:
    model = toy_model(use_spatial_token=True, spatial_token_num=5, action_token_begin_idx=20)
    ids = torch.tensor([[19, 20, 24, 25]])
    embeds = model.embed_prefix(ids).embeds[0]
    words, spatial = model.get_input_embeddings().weight, model.spatial_embed_tokens.weight
    for row, expected in zip(embeds, (words[19], spatial[0], spatial[4], words[25]), strict=True):
        assert torch.equal(row, expected)


def test_ready_made_parts_are_used_as_they_are() -> None:
    config = toy_config()
    parts = {
        'vision_tower': SiglipVisionModel(config.vision_config), 'language_model': LlamaForCausalLM(config.text_config),
        'mapanything_model': GeometryTrunk(config.geometry_config), 'projector_model': nn.Sequential(nn.Linear(32, 64), nn.GELU()),
    }  # fmt: skip
    model = Model(config, **parts)
    assert model.vision_tower is parts['vision_tower'] and model.language_model is parts['language_model']
    assert model.geometry_encoder is parts['mapanything_model'] and model.vision_projector is parts['projector_model']
    assert model.language_model_with_expert.base is parts['language_model'].model
    assert model.predict_action(policy_inputs()).shape == (2, HORIZON, 3)


@torch.no_grad()
@pytest.mark.parametrize('absent', [0, 1, 2])
def test_an_absent_camera_changes_nothing_and_equals_having_fewer(absent: int) -> None:
    """O28."""
    model, inputs = mild(toy_model()), policy_inputs(views=3)
    masks = torch.ones(2, 3, dtype=torch.bool)
    masks[:, absent] = False
    with_mask = {**inputs, 'image_masks': masks}
    answer = model.predict_action(with_mask, noise=noise())
    scrambled = {**with_mask, 'pixel_values': with_mask['pixel_values'].clone(), 'intrinsic': with_mask['intrinsic'].clone()}
    scrambled['pixel_values'][:, absent] = 255 - scrambled['pixel_values'][:, absent]
    scrambled['intrinsic'][:, absent, :2] *= 2
    assert torch.equal(model.predict_action(scrambled, noise=noise()), answer)
    assert not torch.equal(model.predict_action(inputs, noise=noise()), answer)
    kept = [view for view in range(3) if view != absent]
    fewer = {name: inputs[name][:, kept] for name in ('pixel_values', 'intrinsic')} | {'state': inputs['state']}
    fewer['input_ids'] = torch.cat((inputs['input_ids'][:, :9], inputs['input_ids'][:, 13:]), dim=1)
    torch.testing.assert_close(model.predict_action(fewer, noise=noise()), answer, atol=2e-5, rtol=0)


@torch.no_grad()
def test_cameras_that_differ_by_sample_are_as_if_each_sample_came_alone() -> None:
    """O10 and O28 for the whole model: absent cameras and padding of one sample leave the other as it is."""
    model, inputs = mild(toy_model()), policy_inputs(views=2)
    inputs |= {'image_masks': torch.tensor([[True, False], [True, True]]), 'attention_mask': torch.ones_like(inputs['input_ids'])}
    inputs['attention_mask'][1, -2:] = 0
    together = model.predict_action(inputs, 4, noise=noise())
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        answer = model.predict_action(alone, 4, noise=noise()[row : row + 1])
        torch.testing.assert_close(answer, together[row : row + 1], atol=2e-5, rtol=0)


KINDS: dict[str, dict[str, Any]] = {
    'default': {},
    'adarms': {'expert_config': {'time_conditioning': 'adarms', 'rtc_max_delay': 2, 'num_layers': 2}},
    'shared': {'expert_config': {'mode': 'shared', 'hidden_size': 64, 'time_conditioning': 'concat_mlp'}},
    'llava': {
        'vision_config': {'model_type': 'clip_vision_model', 'num_hidden_layers': 3}, 'vision_feature_layer': -2,
        'projector_type': 'mlp2x_gelu', 'fusion_mode': 'tokens', 'geometry_tokens_per_view': 4,
        'text_config': {'model_type': 'mistral', 'sliding_window': None},
    },
    'plain': {'use_geometric_branch': False, 'use_spatial_token': True, 'spatial_token_num': 5, 'action_token_begin_idx': 20},
}  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_saved_model_answers_the_same_and_holds_every_tensor_once(kind: str, tmp_path: Path) -> None:
    """O34."""
    model = toy_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob('*') if file.name != 'config.json'] == ['.safetensors']
    with safe_open(str(tmp_path / 'model.safetensors'), framework='pt') as handle:
        assert set(handle.keys()) == set(model.state_dict())
    again, report = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    inputs = policy_inputs(tokens=model.config.image_seq_length)
    assert torch.equal(again.eval().predict_action(inputs, noise=noise()), model.predict_action(inputs, noise=noise()))
    assert isinstance(AutoModel.from_pretrained(tmp_path), Model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MapAnythingLlava3DConfig)
    config.save_pretrained(tmp_path / 'again')
    texts = [json.loads((folder / 'config.json').read_text()) for folder in (tmp_path, tmp_path / 'again')]
    assert texts[0] == texts[1]


def test_a_copy_has_its_own_weights(model: Model) -> None:
    """The action path borrows the language model; that of a copy must borrow the copy's."""
    inputs = policy_inputs()
    expected = model.predict_action(inputs, 2, noise=noise())
    other = copy.deepcopy(model)
    assert torch.equal(other.predict_action(inputs, 2, noise=noise()), expected)
    with torch.no_grad():
        other.language_model.model.layers[0].self_attn.k_proj.weight.mul_(2.0)
    assert torch.equal(model.predict_action(inputs, 2, noise=noise()), expected)
    assert not torch.equal(other.predict_action(inputs, 2, noise=noise()), expected)


def test_hidden_states_of_the_action_path_are_the_prefix_before_each_layer(model: Model) -> None:
    inputs = policy_inputs()
    output = model(**inputs, actions=noise(seed=9), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 13, 64)] * 4
    prompt = {name: value for name, value in inputs.items() if name != 'state'}
    torch.testing.assert_close(output.hidden_states[0], model.embed_prefix(**prompt).embeds)
