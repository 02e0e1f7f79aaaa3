"""Sizes that the source folders state about themselves, taken over into the network's configuration.

Weights mean nothing with another rope base, norm epsilon or head count, and neither of them shows in a tensor's shape. So what a
folder's ``config.json`` says about its own network wins over the preset, and every change is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vla_policy_ros.model.configuration import GEOMETRY_RELEASES, VISION_TOWERS
from vla_policy_ros.model.weights.sources import Source, WeightsError

TEXT_FIELDS = (
    'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim', 'vocab_size',
    'rms_norm_eps', 'rope_theta', 'rope_scaling', 'rope_parameters', 'max_position_embeddings', 'hidden_act',
)  # fmt: skip
VISION_FIELDS = (
    'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'image_size', 'patch_size', 'layer_norm_eps',
    'hidden_act',
)  # fmt: skip
# Which encoder a release has shows in the width of its class token.
GEOMETRY_WIDTHS = {1024: 'v1.0', 1536: 'v1.1'}


def adopt_sizes(sizes: Mapping[str, Any], sources: Mapping[str, Source]) -> tuple[dict[str, Any], list[str]]:
    """``sizes`` (as `presets` has them) with what the folders state about themselves, and one line per value that changed.

    Raises:
        WeightsError: a folder holds a family of networks that this model cannot use.
    """
    adopted: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in sizes.items()}
    changes: list[str] = []
    if 'language' in sources:
        _adopt_language(adopted, sources['language'], changes)
    if 'vision' in sources:
        _adopt_vision(adopted, sources['vision'], changes)
    if 'geometry' in sources:
        _adopt_geometry(adopted, sources['geometry'], changes)
    return adopted, changes


def _adopt_language(adopted: dict[str, Any], source: Source, changes: list[str]) -> None:
    stated = source.config.get('text_config') or source.config
    if not stated:
        return
    family = str(stated.get('model_type', 'llama'))
    known = [name for name in ('mistral', 'llama', 'llava') if name in family]
    if not known:
        raise WeightsError(f'{source.path} holds a {family!r} language model; llama and mistral families can be used')
    found = {name: stated[name] for name in TEXT_FIELDS if stated.get(name) is not None}
    found['model_type'] = 'mistral' if known[0] == 'mistral' else 'llama'
    if 'num_key_value_heads' not in found and 'num_attention_heads' in found:
        found['num_key_value_heads'] = found['num_attention_heads']
    if 'head_dim' not in found and {'hidden_size', 'num_attention_heads'} <= found.keys():
        found['head_dim'] = found['hidden_size'] // found['num_attention_heads']
    if found['model_type'] == 'mistral':
        # The action expert attends to the whole prefix.
        found['sliding_window'] = None
    _merge(adopted, 'text_config', found, changes)
    expert = adopted.get('expert_config') or {}
    if expert.get('mode') == 'shared':
        text = adopted['text_config']
        same = {'hidden_size': text['hidden_size'], 'intermediate_size': text['intermediate_size']}
        _merge(adopted, 'expert_config', same, changes)


def _adopt_vision(adopted: dict[str, Any], source: Source, changes: list[str]) -> None:
    stated = source.config.get('vision_config') or source.config
    if not stated:
        return
    family = str(stated.get('model_type', source.config.get('model_type', '')))
    matching = [name for name in VISION_TOWERS if name.split('_')[0] == family.split('_')[0]]
    if not matching:
        raise WeightsError(f'{source.path} holds a {family!r} model; the vision tower can be SigLIP or CLIP')
    found = {name: stated[name] for name in VISION_FIELDS if stated.get(name) is not None}
    if adopted['vision_config'].get('model_type', VISION_TOWERS[0]) != matching[0]:
        # Another family: nothing of the preset's tower applies, and LLaVA reads CLIP one layer before the last.
        adopted['vision_config'] = {}
        clip = matching[0] == 'clip_vision_model'
        for name, value in (('vision_feature_layer', -2 if clip else -1), ('projector_type', 'mlp2x_gelu' if clip else 'linear')):
            if adopted.get(name) != value:
                changes.append(f'{name}: {value!r}, as this tower is used')
            adopted[name] = value
    _merge(adopted, 'vision_config', {**found, 'model_type': matching[0]}, changes)


def _adopt_geometry(adopted: dict[str, Any], source: Source, changes: list[str]) -> None:
    token = source.tensors.get('encoder.model.cls_token')
    release = GEOMETRY_WIDTHS.get(token.shape[-1]) if token is not None else None
    if release is None:
        return
    wanted = GEOMETRY_RELEASES[release]
    present = adopted.get('geometry_config') or {}
    if present != wanted:
        changes.append(f'geometry_config: release {release}, as the class token is {token.shape[-1] if token else 0} wide')
        adopted['geometry_config'] = dict(wanted)


def _merge(adopted: dict[str, Any], part: str, found: Mapping[str, Any], changes: list[str]) -> None:
    before = adopted.get(part) or {}
    for name, value in found.items():
        if before.get(name) != value and (value is not None or name in before):
            changes.append(f'{part}.{name}: {value!r} (was {before.get(name)!r})')
    adopted[part] = {**before, **found}
