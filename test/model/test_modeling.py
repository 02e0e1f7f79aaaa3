"""The whole model: contracts, injection, masked cameras, saving, and that every input reaches the actions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from toy import HORIZON, STATE_DIM, TOKENS_PER_VIEW, VOCAB, noise, policy_inputs, toy_config, toy_model
from transformers import AutoConfig, AutoModel, LlamaForCausalLM
from transformers.models.siglip import SiglipVisionModel

from vla_policy_ros.model.attention import boolean_mask
from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.geometry import GeometryTrunk
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.vision import unit_rgb, vision_pixels

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
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(model: Model, change: str) -> None:
    inputs = policy_inputs()
    actions = noise(seed=9)
    image = inputs['pixel_values'].float() / 255
    messages = {
        'slots_more': r'\[9, 9\].*8', 'slots_fewer': r'\[7, 7\].*8', 'batch': 'batch 2.*batch 1', 'horizon': r'\(2, 6, 3\)',
        'state': r'\(2, 5\)', 'no_state': 'state', 'nan_state': 'NaN', 'nan_pixels': 'nan', 'signed_pixels': r'\[-1',
        'image_size': r'30', 'intrinsic': r'\(2, 1, 3, 3\)', 'bad_focal': 'focal', 'vocabulary': f'{VOCAB}',
        'no_images': '8 image positions', 'mask': r'\(2, 5\)',
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
    with pytest.raises(ValueError, match=messages[change]):
        model(**inputs, actions=actions)


def test_actions_without_an_expert_are_refused() -> None:
    speaker = toy_model(use_action_expert=False)
    with pytest.raises(ValueError, match='no action expert'):
        speaker(**{k: v for k, v in policy_inputs().items() if k != 'state'}, actions=noise())


def test_pixel_contract_uint8_and_unit_float_are_the_same_image(model: Model) -> None:
    inputs = policy_inputs()
    as_float = {**inputs, 'pixel_values': inputs['pixel_values'].float() / 255}
    assert torch.equal(model.predict_action(inputs, noise=noise()), model.predict_action(as_float, noise=noise()))
    rgb = unit_rgb(torch.tensor([[0, 255]], dtype=torch.uint8))
    assert vision_pixels(rgb.expand(3, 1, 2), 'siglip_vision_model')[0].tolist() == [[-1.0, 1.0]]


@torch.no_grad()
@pytest.mark.parametrize('absent', [0, 1, 2])
def test_an_absent_camera_changes_nothing_and_equals_having_fewer(model: Model, absent: int) -> None:
    inputs = policy_inputs(views=3)
    masks = torch.ones(2, 3, dtype=torch.bool)
    masks[:, absent] = False
    with_mask = {**inputs, 'image_masks': masks}
    answer = model.predict_action(with_mask, noise=noise())
    scrambled = {**with_mask, 'pixel_values': with_mask['pixel_values'].clone()}
    scrambled['pixel_values'][:, absent] = 255 - scrambled['pixel_values'][:, absent]
    assert torch.equal(model.predict_action(scrambled, noise=noise()), answer)
    kept = [view for view in range(3) if view != absent]
    fewer = policy_inputs(views=2)
    fewer['input_ids'] = torch.cat((inputs['input_ids'][:, :9], inputs['input_ids'][:, 13:]), dim=1)
    fewer |= {'pixel_values': inputs['pixel_values'][:, kept], 'intrinsic': inputs['intrinsic'][:, kept], 'state': inputs['state']}
    torch.testing.assert_close(model.predict_action(fewer, noise=noise()), answer, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_fusion_starts_as_the_identity() -> None:
    inputs = policy_inputs()
    for mode in ('patch_add', 'patch_concat'):
        torch.manual_seed(0)
        model = Model(toy_config(fusion_mode=mode)).eval()
        fused = model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])
        pixels = vision_pixels(unit_rgb(inputs['pixel_values']), 'siglip_vision_model').flatten(0, 1)
        plain = model.vision_projector(model.vision_tower(pixel_values=pixels).last_hidden_state).view_as(fused)
        assert torch.equal(fused, plain), mode


@torch.no_grad()
@pytest.mark.parametrize('mode', ['patch_add', 'patch_concat', 'global_concat'])
def test_intrinsics_reach_the_image_tokens_in_every_fusion_mode(mode: str) -> None:
    inputs = policy_inputs()
    zoomed = inputs['intrinsic'] * torch.tensor([[1.5], [1.5], [1.0]])
    for use_rays in (True, False):
        model = toy_model(fusion_mode=mode, use_rays=use_rays)
        first = model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])
        assert torch.equal(first, model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])), 'two calls are equal'
        difference = (first - model.get_image_features(inputs['pixel_values'], zoomed)).abs().max()
        assert (difference > 1e-4) if use_rays else (difference == 0)


@torch.no_grad()
def test_geometry_grid_is_resampled_where_it_differs() -> None:
    model = toy_model(geometry_config={'patch_size': 7, 'pos_embed_grid': 4})
    inputs = policy_inputs()
    assert model.get_image_features(inputs['pixel_values'], inputs['intrinsic']).shape == (2, 8, 64)


def test_language_path_is_causal_llama_with_images(model: Model) -> None:
    inputs = policy_inputs()
    del inputs['state']
    labels = inputs['input_ids'].masked_fill(inputs['input_ids'] < 0, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        embeds = model.embed_prefix(**inputs).embeds
        expected = model.language_model(inputs_embeds=embeds, labels=labels)
        other = model(**{**inputs, 'pixel_values': 255 - inputs['pixel_values']})
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, expected.loss)
    assert (other.logits[:, -1] - output.logits[:, -1]).abs().max() > 1e-2, 'images change the next word'


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


def test_saved_model_answers_the_same_and_holds_every_tensor_once(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob('*') if file.name != 'config.json'] == ['.safetensors']
    with safe_open(str(tmp_path / 'model.safetensors'), framework='pt') as handle:
        assert set(handle.keys()) == set(model.state_dict())
    again, report = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    inputs = policy_inputs()
    assert torch.equal(again.eval().predict_action(inputs, noise=noise()), model.predict_action(inputs, noise=noise()))
    assert isinstance(AutoModel.from_pretrained(tmp_path), Model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MapAnythingLlava3DConfig)
    config.save_pretrained(tmp_path / 'again')
    texts = [json.loads((folder / 'config.json').read_text()) for folder in (tmp_path, tmp_path / 'again')]
    assert texts[0] == texts[1]


def test_every_input_reaches_the_actions_after_overfitting_one_batch() -> None:
    """Targets that differ by one input at a time can only be learnt if image, intrinsics, words and state all get through."""
    base = policy_inputs(batch=1)
    rows = {name: value.repeat(5, *[1] * (value.dim() - 1)) for name, value in base.items()}
    rows['pixel_values'][1, 0] = 255 - rows['pixel_values'][1, 0]
    rows['intrinsic'][2, :, :2] *= 1.6
    rows['input_ids'][3, -2] = (rows['input_ids'][3, -2] + 7) % 90 + 3
    rows['state'][4] = -rows['state'][4]
    targets = torch.randn(5, HORIZON, 3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    model = Model(toy_config(text_config={'initializer_range': 0.1, 'num_hidden_layers': 2}, fusion_init_std=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    steps, recent = 250, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * (1 - step / steps)
        loss = model(**rows, actions=targets, repeats=6, generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
    zero_baseline = 1.0 + float(targets.square().mean())
    assert sum(recent[-20:]) / 20 < 0.1 * zero_baseline
    model.eval()
    chunk = model.predict_action(rows, num_steps=10, noise=noise(5))
    assert (chunk - targets).abs().mean() < 0.25
    same_noise = noise(1).repeat(5, 1, 1)
    answers = model.predict_action(rows, num_steps=10, noise=same_noise)
    for index, what in enumerate(('pixels', 'intrinsics', 'words', 'state'), start=1):
        assert distance(answers[index], answers[0]) > 0.5 * distance(targets[index], targets[0]), what


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())
