"""Images to prefix tokens: towers and their pixel ranges, feature layers, projector, fusion with geometry, hidden tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import TOKENS_PER_VIEW, noise, policy_inputs, toy_config, toy_model
from transformers.models.clip import CLIPVisionModel
from transformers.models.siglip import SiglipVisionModel

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.vision import unit_rgb

Model = MapAnythingLlava3DForConditionalGeneration
CLIP = {'model_type': 'clip_vision_model', 'num_hidden_layers': 3}
LLAVA = {'vision_config': CLIP, 'vision_feature_layer': -2, 'projector_type': 'mlp2x_gelu'}
SIGLIP_RANGE = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_RANGE = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_RANGE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def in_range(pixels: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """uint8 RGB as a tower wants it, channel by channel."""
    channels = [(pixels[..., c, :, :] / 255 - mean) / std for c, (mean, std) in enumerate(zip(*statistics, strict=True))]
    return torch.stack(channels, dim=-3)


@pytest.mark.parametrize(('change', 'statistics'), [({}, SIGLIP_RANGE), (LLAVA, CLIP_RANGE)], ids=['siglip', 'clip'])
@torch.no_grad()
def test_each_tower_gets_pixels_normalised_once_with_its_own_statistics(change: dict[str, Any], statistics: Any) -> None:
    """O30: from the same uint8 image, one range for the vision tower and ImageNet's for the geometry trunk."""
    model, inputs, seen = toy_model(**change), policy_inputs(), {}

    def record(name: str, value: Tensor) -> None:
        seen[name] = value

    model.vision_tower.register_forward_pre_hook(lambda _, __, given: record('vision', given['pixel_values']), with_kwargs=True)
    model.geometry_encoder.encoder.model.register_forward_pre_hook(lambda _, given: record('geometry', given[0]))
    model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])
    torch.testing.assert_close(seen['vision'], in_range(inputs['pixel_values'], statistics).flatten(0, 1), atol=1e-6, rtol=0)
    expected = in_range(inputs['pixel_values'], IMAGENET_RANGE).flatten(0, 1)
    torch.testing.assert_close(seen['geometry'], expected, atol=1e-6, rtol=0)


def whole_tower(model: Model, tower_class: Any, layers: int) -> Any:
    """The full transformers tower around the layers that the model has, with the others random."""
    config = copy.deepcopy(model.vision_tower.config)
    config.num_hidden_layers = layers
    torch.manual_seed(5)
    tower = tower_class(config).eval()
    report = tower.load_state_dict(model.vision_tower.state_dict(), strict=False)
    assert not report.unexpected_keys
    return tower


@pytest.mark.parametrize('layer', [-1, -2, -3])
@torch.no_grad()
def test_clip_features_are_the_patch_states_of_the_chosen_layer(layer: int) -> None:
    model, inputs = toy_model(use_geometric_branch=False, **{**LLAVA, 'vision_feature_layer': layer}), policy_inputs()
    tower = whole_tower(model, CLIPVisionModel, 3)
    states = tower(in_range(inputs['pixel_values'], CLIP_RANGE).flatten(0, 1), output_hidden_states=True).hidden_states
    patches = states[layer][:, 1:]
    first, second = model.vision_projector[0], model.vision_projector[2]
    expected = F.linear(F.gelu(F.linear(patches, first.weight, first.bias)), second.weight, second.bias)
    got = model.get_image_features(inputs['pixel_values'])
    torch.testing.assert_close(got, expected.reshape(2, 2 * TOKENS_PER_VIEW, 64), atol=1e-5, rtol=0)
    assert got.std() > 0.1
    built = len(model.vision_tower.encoder.layers)
    assert built == 4 + layer, 'layers that nobody reads are not there'


@pytest.mark.parametrize('layer', [-1, -2])
@torch.no_grad()
def test_siglip_features_are_the_states_of_the_chosen_layer(layer: int) -> None:
    model = toy_model(use_geometric_branch=False, vision_config={'num_hidden_layers': 3}, vision_feature_layer=layer)
    inputs = policy_inputs()
    answer = whole_tower(model, SiglipVisionModel, 3)(
        in_range(inputs['pixel_values'], SIGLIP_RANGE).flatten(0, 1), output_hidden_states=True
    )
    patches = answer.last_hidden_state if layer == -1 else answer.hidden_states[layer]
    expected = F.linear(patches, model.vision_projector.weight, model.vision_projector.bias)
    got = model.get_image_features(inputs['pixel_values'])
    torch.testing.assert_close(got, expected.reshape(2, 2 * TOKENS_PER_VIEW, 64), atol=1e-5, rtol=0)


def test_projector_has_the_layers_of_its_name() -> None:
    linear, llava = (Model(toy_config(projector_type=kind)).vision_projector for kind in ('linear', 'mlp2x_gelu'))
    assert isinstance(linear, nn.Linear) and linear.weight.shape == (64, 32) and linear.bias is not None
    assert [type(layer) for layer in llava] == [nn.Linear, nn.GELU, nn.Linear]
    assert llava[0].weight.shape == (64, 32) and llava[2].weight.shape == (64, 64)


def test_whole_model_with_a_clip_tower_trains_and_predicts() -> None:
    model, inputs = toy_model(**LLAVA), policy_inputs()
    loss = model(**inputs, actions=noise(seed=9), noise=noise(), time=torch.tensor([0.3, 0.8])).loss
    loss.backward()
    for name in ('vision_projector.0.weight', 'vision_projector.2.weight', 'vision_tower.embeddings.patch_embedding.weight'):
        assert (model.get_parameter(name).grad != 0).any(), name
    assert torch.isfinite(model.predict_action(inputs, 2)).all()


# Pixel contract


@torch.no_grad()
def test_uint8_and_unit_floats_are_the_same_image() -> None:
    model, inputs = toy_model(), policy_inputs()
    as_float = {**inputs, 'pixel_values': inputs['pixel_values'].float() / 255}
    assert torch.equal(model.predict_action(inputs, noise=noise()), model.predict_action(as_float, noise=noise()))
    assert unit_rgb(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]
    for wrong, message in (
        (torch.full((3,), 255.0), 'not normalised yet'), (torch.zeros(3, dtype=torch.long), 'int64'),
        (torch.full((3,), float('nan')), 'nan'), (torch.full((3,), -0.1), '-0.1'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            unit_rgb(wrong)


@torch.no_grad()
def test_one_camera_may_come_without_the_axis_of_cameras() -> None:
    """O26: both shapes of images and of K, and the same answer."""
    model, inputs = toy_model(), policy_inputs(views=1)
    expected = model.predict_action(inputs, 2, noise=noise())
    flat = {'pixel_values': inputs['pixel_values'][:, 0], 'intrinsic': inputs['intrinsic'][:, 0]}
    for names in (['pixel_values'], ['intrinsic'], ['pixel_values', 'intrinsic']):
        assert torch.equal(model.predict_action({**inputs, **{name: flat[name] for name in names}}, 2, noise=noise()), expected)
    two = policy_inputs(views=2)
    with pytest.raises(ValueError, match=r'intrinsic is \(2, 3, 3\); expected \[2, 2, 3, 3\]'):
        model.predict_action({**two, 'intrinsic': two['intrinsic'][:, 0]})


# Fusion


def plain_vision(model: Model, inputs: dict[str, Tensor]) -> Tensor:
    """Projected vision tokens ``[B, V, N, D]`` without geometry."""
    pixels = in_range(inputs['pixel_values'], SIGLIP_RANGE).flatten(0, 1)
    return model.vision_projector(model.vision_tower(pixel_values=pixels).last_hidden_state).unflatten(0, (2, -1))


@pytest.mark.parametrize('mode', ['patch_add', 'patch_concat', 'tokens'])
@torch.no_grad()
def test_fusion_starts_as_the_identity(mode: str) -> None:
    """O29: a fresh model sees what its vision tower sees; ``tokens`` only adds."""
    inputs = policy_inputs()
    torch.manual_seed(0)
    model = Model(toy_config(fusion_mode=mode, geometry_tokens_per_view=1)).eval()
    fused = model.get_image_features(inputs['pixel_values'], inputs['intrinsic']).unflatten(1, (2, -1))
    torch.testing.assert_close(fused[:, :, :TOKENS_PER_VIEW], plain_vision(model, inputs), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize('mode', ['patch_add', 'patch_concat', 'global_concat', 'tokens'])
def test_intrinsics_reach_the_image_tokens_in_every_fusion_mode(mode: str) -> None:
    """O29: with rays on they do, with rays off they do not; the same call twice gives the same."""
    inputs = policy_inputs()
    zoomed = inputs['intrinsic'] * torch.tensor([[1.5], [1.5], [1.0]])
    for use_rays in (True, False):
        model = toy_model(fusion_mode=mode, use_rays=use_rays, geometry_tokens_per_view=4)
        first = model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])
        assert torch.equal(first, model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])), 'two calls are equal'
        difference = (first - model.get_image_features(inputs['pixel_values'], zoomed)).abs().max()
        assert (difference > 1e-4) if use_rays else (difference == 0)


@torch.no_grad()
@pytest.mark.parametrize('count', [1, 4])
def test_geometry_tokens_follow_the_patches_of_their_camera(count: int) -> None:
    """``tokens``: S = V (N + K); the patches stay as they are, and each token is W LN of a mean of geometry patches."""
    per_view = TOKENS_PER_VIEW + count
    model, inputs = toy_model(fusion_mode='tokens', geometry_tokens_per_view=count), policy_inputs(tokens=TOKENS_PER_VIEW + count)
    assert model.config.image_seq_length == per_view and model.config.vision_seq_length == TOKENS_PER_VIEW
    features = model.get_image_features(inputs['pixel_values'], inputs['intrinsic'])
    assert features.shape == (2, 2 * per_view, 64)
    by_view = features.unflatten(1, (2, per_view))
    torch.testing.assert_close(by_view[:, :, :TOKENS_PER_VIEW], plain_vision(model, inputs), atol=1e-5, rtol=0)
    geometry = model.geometry_encoder(unit_rgb(inputs['pixel_values']), inputs['intrinsic'], None, None).patches
    pooled = geometry if count == 4 else geometry.mean(dim=2, keepdim=True)
    norm, project = model.fusion.geometry_norm, model.fusion.geometry_projector
    expected = project(F.layer_norm(pooled, pooled.shape[-1:], norm.weight, norm.bias, norm.eps))
    torch.testing.assert_close(by_view[:, :, TOKENS_PER_VIEW:], expected, atol=1e-5, rtol=0)

    answer = model.predict_action(inputs, 2, noise=noise())
    zoomed = {**inputs, 'intrinsic': inputs['intrinsic'] * torch.tensor([[1.5], [1.5], [1.0]])}
    assert (model.predict_action(zoomed, 2, noise=noise()) - answer).abs().max() > 1e-4, 'K reaches the actions'
    with pytest.raises(ValueError, match=rf'\[8, 8\] image positions per sample; the images make {2 * per_view} tokens'):
        model.predict_action(policy_inputs())


@torch.no_grad()
@pytest.mark.parametrize('mode', ['patch_add', 'patch_concat', 'global_concat', 'tokens'])
@pytest.mark.parametrize('absent', [0, 2])
def test_all_tokens_of_an_absent_camera_are_hidden_in_every_fusion_mode(absent: int, mode: str) -> None:
    """O28: its pixels and intrinsics change nothing, and neither do geometry tokens of its own."""
    per_view = TOKENS_PER_VIEW + (4 if mode == 'tokens' else 0)
    model, inputs = toy_model(fusion_mode=mode, geometry_tokens_per_view=4), policy_inputs(views=3, tokens=per_view)
    masks = torch.ones(2, 3, dtype=torch.bool)
    masks[:, absent] = False
    given = {**inputs, 'image_masks': masks}
    prefix = model.embed_prefix(**{name: value for name, value in given.items() if name != 'state'})
    hidden = prefix.image_token_mask & ~prefix.pad
    assert hidden[:, 1 + absent * per_view : 1 + (absent + 1) * per_view].all() and int(hidden.sum()) == 2 * per_view
    scrambled = {name: value.clone() for name, value in given.items()}
    scrambled['pixel_values'][:, absent] = 255 - scrambled['pixel_values'][:, absent]
    scrambled['intrinsic'][:, absent] *= 2
    answer = model.predict_action(given, 2, noise=noise())
    assert torch.equal(model.predict_action(scrambled, 2, noise=noise()), answer)
    assert not torch.equal(model.predict_action(inputs, 2, noise=noise()), answer)


@torch.no_grad()
def test_geometry_grid_is_resampled_where_it_differs() -> None:
    model = toy_model(geometry_config={'patch_size': 7, 'pos_embed_grid': 4})
    inputs = policy_inputs()
    assert model.get_image_features(inputs['pixel_values'], inputs['intrinsic']).shape == (2, 8, 64)


# Tokens that training hides


def dropping_inputs() -> dict[str, Tensor]:
    """Inputs whose last three words are the instruction."""
    inputs = policy_inputs(batch=16)
    instruction = torch.zeros_like(inputs['input_ids'], dtype=torch.bool)
    instruction[:, -3:] = True
    return {**{name: value for name, value in inputs.items() if name != 'state'}, 'instruction_token_mask': instruction}


def hidden_tokens(model: Model, inputs: dict[str, Tensor], seed: int = 0, hide: bool = True) -> tuple[Tensor, Tensor]:
    prefix = model.embed_prefix(**inputs, hide=hide, generator=torch.Generator().manual_seed(seed))
    return ~prefix.pad, prefix.embeds


@torch.no_grad()
@pytest.mark.parametrize('what', ['lang', 'image'])
def test_training_hides_a_random_share_of_the_words_or_of_the_image(what: str) -> None:
    model, inputs = toy_model(**{f'prefix_{what}_dropout_prob': 0.4}), dropping_inputs()
    seen, full = hidden_tokens(model, inputs, hide=False)
    assert not seen.any()
    hidden, embeds = hidden_tokens(model, inputs)
    may_hide = inputs['instruction_token_mask'] if what == 'lang' else inputs['input_ids'] == -200
    assert not (hidden & ~may_hide).any(), 'nothing else'
    assert float(hidden[may_hide].float().mean()) == pytest.approx(0.4, abs=0.15)
    assert (hidden != hidden[0]).any(), 'each sample has a draw of its own'
    assert torch.equal(embeds, full), 'hidden by the mask: the embeddings stay'
    assert torch.equal(hidden_tokens(model, inputs)[0], hidden)
    assert not torch.equal(hidden_tokens(model, inputs, seed=1)[0], hidden)
    padded = {**inputs, 'attention_mask': torch.ones_like(inputs['input_ids'])}
    padded['attention_mask'][:, -1] = 0
    assert hidden_tokens(model, padded)[0][:, -1].all(), 'padding stays padding'


@torch.no_grad()
def test_a_hidden_word_is_as_if_it_were_not_there() -> None:
    """The loss of a sample whose instruction is hidden equals that of the prompt without it."""
    model, inputs = toy_model(prefix_lang_dropout_prob=0.999).train(), policy_inputs()
    instruction = torch.zeros_like(inputs['input_ids'], dtype=torch.bool)
    instruction[:, -3:] = True
    fixed = {'actions': noise(seed=9), 'noise': noise(), 'time': torch.tensor([0.3, 0.8])}
    generator = torch.Generator().manual_seed(0)
    loss = model(**inputs, instruction_token_mask=instruction, generator=generator, **fixed).loss
    short = {**inputs, 'input_ids': inputs['input_ids'][:, :-3]}
    torch.testing.assert_close(loss, model.eval()(**short, **fixed).loss, atol=2e-5, rtol=1e-5)


def test_hiding_words_needs_to_know_the_instruction() -> None:
    model = toy_model(prefix_lang_dropout_prob=0.4).train()
    with pytest.raises(ValueError, match='prefix_lang_dropout_prob needs instruction_token_mask'):
        model(**policy_inputs(), actions=noise())
