"""Names and shapes of the public checkpoints at full size, and the random start of what they do not bring; no weights needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import toy_config
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vla_policy_ros.model.configuration import GEOMETRY_RELEASES, MapAnythingLlava3DConfig
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import fitted_config, preset_sizes
from vla_policy_ros.model.weights import random_start
from vla_policy_ros.model.weights.plan import plan
from vla_policy_ros.model.weights.random_start import RandomStart
from vla_policy_ros.model.weights.rules import translate
from vla_policy_ros.model.weights.sources import SourceTensor, WeightsError

MANIFEST = Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'mapanything' / 'mapanything_manifest.json'
needs_manifest = pytest.mark.skipif(not MANIFEST.is_file(), reason='the list of MapAnything tensors is not on this machine')
ROBOT = {'action_dim': 7, 'state_dim': 7, 'horizon': 16, 'vocab_size': 32000, 'bos': 1, 'eos': 2, 'pad': 0}


class Folder:
    """Names and shapes of a checkpoint folder, as `Source` gives them."""

    def __init__(self, shapes: dict[str, Any]) -> None:
        self.tensors = {name: SourceTensor(Path('model.safetensors'), tuple(shape)) for name, shape in shapes.items()}


def on_meta(config: MapAnythingLlava3DConfig) -> MapAnythingLlava3DForConditionalGeneration:
    with torch.device('meta'):
        return MapAnythingLlava3DForConditionalGeneration(config)


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def built_layers(config: MapAnythingLlava3DConfig) -> int:
    return config.vision_config.num_hidden_layers + config.vision_feature_layer + 1


def vicuna_7b() -> dict[str, list[int]]:
    with torch.device('meta'):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        )
    return shapes_of(model)


@needs_manifest
@pytest.mark.parametrize('release', sorted(GEOMETRY_RELEASES))
def test_full_size_public_names_fill_their_parts(release: str) -> None:
    """Vicuna or LLaVA, SigLIP in the hub's old naming, and both MapAnything releases, at their real shapes."""
    with torch.device('meta'):
        siglip = SiglipVisionModel(SiglipVisionConfig(**preset_sizes('llava3d-7b')['vision_config'] | {'vision_use_head': True}))
    config = fitted_config(preset_sizes('llava3d-7b-expert') | {'geometry_config': GEOMETRY_RELEASES[release]}, **ROBOT)
    target = on_meta(config).state_dict()
    tower = 'model.vision_tower.vision_tower.vision_model'
    clip_only = {'model.mm_projector.0.weight': [4096, 1024], f'{tower}.embeddings.class_embedding': [1024]}
    manifest = json.loads(MANIFEST.read_text())
    unused = {f'{prefix}.layer.weight': [1] for prefix in manifest['ignored_prefixes']}
    folders: Any = {
        'language': Folder({**vicuna_7b(), 'model.layers.0.self_attn.rotary_emb.inv_freq': [64], **clip_only}),
        'vision': Folder({f'vision_model.{name}': shape for name, shape in shapes_of(siglip).items()} | {'logit_scale': [1]}),
        'geometry': Folder(manifest[release] | unused),
    }
    report = plan(target, folders, built_layers(config))
    parts = {name.split('.')[0] for name in report.random}
    assert parts == {'vision_projector', 'fusion', 'language_model_with_expert', 'action_expert'}
    reasons = {reason for _, _, reason in report.left_out}
    assert {'computed from the configuration', 'belongs to a CLIP tower, which this network does not have'} <= reasons
    assert {name for part, name, _ in report.left_out if part == 'geometry'} == set(unused)


# Naming of a LLaVA folder: prefix of the decoder, prefix of the tower, the two layers of the projector.
LLAVA_NAMINGS = {
    'llava': ('model.', 'model.vision_tower.vision_tower.vision_model.', ('model.mm_projector.0', 'model.mm_projector.2')),
    'llava-hf 4.x': ('language_model.model.', 'vision_tower.vision_model.',
                     ('multi_modal_projector.linear_1', 'multi_modal_projector.linear_2')),
    'llava-hf 5.x': ('model.language_model.', 'model.vision_tower.',
                     ('model.multi_modal_projector.linear_1', 'model.multi_modal_projector.linear_2')),
}  # fmt: skip


@pytest.mark.parametrize('naming', sorted(LLAVA_NAMINGS))
def test_llava_brings_its_own_eyes_to_a_clip_network(naming: str) -> None:
    decoder, tower, (first, second) = LLAVA_NAMINGS[naming]
    sizes = {name: value for name, value in preset_sizes('llava3d-7b-expert-clip').items() if name != 'geometry_config'}
    config = fitted_config(sizes | {'use_geometric_branch': False}, **ROBOT)
    with torch.device('meta'):
        clip = shapes_of(CLIPVisionModel(CLIPVisionConfig(**sizes['vision_config'])))
    names = {f'{decoder}{name.removeprefix("model.")}': shape for name, shape in vicuna_7b().items() if name.startswith('model.')}
    names['language_model.lm_head.weight' if naming == 'llava-hf 4.x' else 'lm_head.weight'] = [32000, 4096]
    names |= {f'{tower}{name}': shape for name, shape in clip.items()}
    names |= {f'{first}.weight': [4096, 1024], f'{first}.bias': [4096], f'{second}.weight': [4096, 4096], f'{second}.bias': [4096]}
    folder: Any = Folder(names)
    report = plan(on_meta(config).state_dict(), {'language': folder}, built_layers(config))
    assert {name.split('.')[0] for name in report.random} == {'language_model_with_expert', 'action_expert'}
    assert report.loaded['vision_projector.0.weight'].name == f'{first}.weight'
    behind = [name for _, name, reason in report.left_out if reason == 'behind the feature layer']
    assert behind and all('layers.23.' in name for name in behind)


def toy_folder(part: str, model: torch.nn.Module) -> dict[str, list[int]]:
    ours = {'language': 'language_model.', 'vision': 'vision_tower.', 'geometry': 'geometry_encoder.'}[part]
    return {name.removeprefix(ours): shape for name, shape in shapes_of(model).items() if name.startswith(ours)}


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        ('renamed', r'1 missing: language_model.model.norm.weight; 1 unexpected: language: model.final_norm.weight'),
        ('lacking', r'1 missing: language_model.model.norm.weight\.'),
        ('added', r'1 unexpected: language: model.layers.9.mlp.up_proj.weight \(would be language_model'),
        ('reshaped', r'1 of another shape: language: model.norm.weight is \[63\], the network has \[64\]'),
    ],
)
def test_what_does_not_fit_is_refused_by_name(damage: str, message: str) -> None:
    model = on_meta(toy_config())
    shapes = toy_folder('language', model)
    if damage in ('renamed', 'lacking'):
        norm = shapes.pop('model.norm.weight')
    if damage == 'renamed':
        shapes['model.final_norm.weight'] = norm
    elif damage == 'added':
        shapes['model.layers.9.mlp.up_proj.weight'] = [1]
    elif damage == 'reshaped':
        shapes['model.norm.weight'] = [63]
    folders: Any = {'language': Folder(shapes)}
    with pytest.raises(WeightsError, match=message):
        plan(model.state_dict(), folders, 1)


def test_a_tensor_with_two_sources_is_refused() -> None:
    model = on_meta(toy_config())
    shapes = toy_folder('vision', model)
    folders: Any = {'vision': Folder(shapes | {f'vision_model.{name}': shape for name, shape in shapes.items()})}
    with pytest.raises(WeightsError, match='a second vision_tower'):
        plan(model.state_dict(), folders, 1)


def test_names_nobody_knows_are_not_guessed() -> None:
    for part, name in (('language', 'model.layers.x.mlp.up_proj.weight'), ('geometry', 'encoder.blocks.0'), ('vision', 'layer.1')):
        with pytest.raises(KeyError):
            translate(part, name)


@pytest.mark.parametrize('piece', [2**28, 30_000])
def test_random_start_is_that_of_a_fresh_model(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor by tensor the same spread as transformers' own initialisation, however small the pieces are."""
    monkeypatch.setattr(random_start, 'PIECE', piece)
    for changes in ({'expert_config': {'time_conditioning': 'adarms'}}, {'fusion_mode': 'patch_concat'}):
        config = toy_config(**changes)
        torch.manual_seed(0)
        fresh = MapAnythingLlava3DForConditionalGeneration(config).state_dict()
        start = RandomStart(on_meta(config), seed=0)
        for name, expected in fresh.items():
            got = start.get(name)
            assert got.shape == expected.shape and got.device.type == 'cpu'
            spread, wanted = spread_of(got), spread_of(expected)
            # Five standard deviations of a sample deviation of so many numbers.
            assert wanted == pytest.approx(spread, rel=5 * (2 * got.numel()) ** -0.5 * 2**0.5, abs=1e-5), name


def spread_of(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def test_random_tensors_depend_on_seed_and_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_start, 'PIECE', 30_000)
    config = toy_config()
    names = ['action_expert.state_proj.weight', 'vision_tower.embeddings.patch_embedding.weight', 'geometry_encoder.scale_token']
    forwards = [RandomStart(on_meta(config), 0).get(name) for name in names]
    start = RandomStart(on_meta(toy_config(expert_config={'num_layers': 2})), 0)
    backwards = [start.get(name) for name in reversed(names)]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    other = RandomStart(on_meta(config), 1)
    assert not any(torch.equal(a, other.get(name)) for a, name in zip(forwards, names, strict=True))
