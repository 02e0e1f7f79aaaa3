"""Sizes that the source folders state about themselves, taken over into the network's configuration.

Weights mean nothing with another rope base, norm epsilon, activation or head count, and none of these shows in a tensor's shape. So
what a folder's ``config.json`` says about its own network wins over the preset. What it leaves out means the default of its own
family's configuration class, not the preset's value; both are therefore read through that class, in one spelling, before they are
compared. Every difference is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, SiglipVisionConfig

from vla_policy_ros.model.configuration import GEOMETRY_RELEASES, VISION_TOWERS
from vla_policy_ros.model.weights.sources import Source, WeightsError

FAMILIES: dict[str, Any] = {
    'llama': LlamaConfig,
    'mistral': MistralConfig,
    'siglip_vision_model': SiglipVisionConfig,
    'clip_vision_model': CLIPVisionConfig,
}
TEXT_FIELDS = (
    'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim', 'vocab_size',
    'rms_norm_eps', 'rope_parameters', 'max_position_embeddings', 'hidden_act', 'tie_word_embeddings',
)  # fmt: skip
# Other spellings of fields above, which the family's class understands.
TEXT_SPELLINGS = ('rope_theta', 'rope_scaling')
VISION_FIELDS = (
    'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'image_size', 'patch_size', 'layer_norm_eps',
    'hidden_act',
)  # fmt: skip
# Which encoder a release has shows in the width of its class token.
GEOMETRY_WIDTHS = {1024: 'v1.0', 1536: 'v1.1'}


def adopt_sizes(sizes: Mapping[str, Any], sources: Mapping[str, Source]) -> tuple[dict[str, Any], list[str]]:
    """``sizes`` (as `presets` has them) with what the folders state about themselves, and one line per value that changed.

    Raises:
        WeightsError: a folder does not say what network it holds, or holds a family that this model cannot use.
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
    stated = _stated(source, 'text_config')
    family = str(stated.get('model_type', 'llama'))
    known = [name for name in ('mistral', 'llama', 'llava') if name in family]
    if not known:
        raise WeightsError(f'{source.path} holds a {family!r} language model; llama and mistral families can be used')
    model_type = 'mistral' if known[0] == 'mistral' else 'llama'
    found = _completed(model_type, stated, (*TEXT_FIELDS, *TEXT_SPELLINGS), TEXT_FIELDS)
    if model_type == 'mistral':
        found['sliding_window'] = None  # the action expert attends to the whole prefix
    before = adopted.get('text_config') or {}
    spelt = _completed(str(before.get('model_type', 'llama')), before, (*TEXT_FIELDS, *TEXT_SPELLINGS), TEXT_FIELDS)
    kept = {name: value for name, value in before.items() if name not in TEXT_SPELLINGS}
    adopted['text_config'] = _merged({**kept, **spelt}, found, 'text_config', changes)
    expert = adopted.get('expert_config') or {}
    if expert.get('mode') == 'shared':
        same = {name: found[name] for name in ('hidden_size', 'intermediate_size')}
        adopted['expert_config'] = _merged(expert, same, 'expert_config', changes)


def _adopt_vision(adopted: dict[str, Any], source: Source, changes: list[str]) -> None:
    stated = _stated(source, 'vision_config')
    family = str(stated.get('model_type', source.config.get('model_type', '')))
    matching = [name for name in VISION_TOWERS if name.split('_')[0] == family.split('_')[0]]
    if not matching:
        raise WeightsError(f'{source.path} holds a {family!r} model; the vision tower can be SigLIP or CLIP')
    found = _completed(matching[0], stated, VISION_FIELDS, VISION_FIELDS)
    before = adopted['vision_config']
    if before.get('model_type', VISION_TOWERS[0]) != matching[0]:
        # Another family: nothing of the preset's tower applies, and LLaVA reads CLIP one layer before the last.
        before, clip = {}, matching[0] == 'clip_vision_model'
        for name, value in (('vision_feature_layer', -2 if clip else -1), ('projector_type', 'mlp2x_gelu' if clip else 'linear')):
            if adopted.get(name) != value:
                changes.append(f'{name}: {value!r}, as this tower is used')
            adopted[name] = value
    else:
        before = {**before, **_completed(matching[0], before, VISION_FIELDS, VISION_FIELDS)}
    adopted['vision_config'] = _merged(before, {**found, 'model_type': matching[0]}, 'vision_config', changes)


def _adopt_geometry(adopted: dict[str, Any], source: Source, changes: list[str]) -> None:
    token = source.tensors.get('encoder.model.cls_token')
    if token is None or token.shape[-1] not in GEOMETRY_WIDTHS:
        return  # not a public release: its shapes must be those that the sizes give
    release = GEOMETRY_WIDTHS[token.shape[-1]]
    wanted = GEOMETRY_RELEASES[release]
    if (adopted.get('geometry_config') or {}) != wanted:
        changes.append(f'geometry_config: release {release}, as the class token is {token.shape[-1]} wide')
        adopted['geometry_config'] = dict(wanted)


def _stated(source: Source, section: str) -> dict[str, Any]:
    """What a folder says about its network."""
    if not source.config:
        raise WeightsError(
            f'{source.path} has no config.json, and heads, norms and rotary base do not show in the tensors; copy the whole folder'
        )
    return source.config.get(section) or source.config


def _completed(model_type: str, stated: Mapping[str, Any], read: tuple[str, ...], fields: tuple[str, ...]) -> dict[str, Any]:
    """``fields`` of a family's configuration class built from what is stated."""
    given = {name: stated[name] for name in read if stated.get(name) is not None}
    complete = FAMILIES[model_type](**given)
    values = {name: getattr(complete, name, None) for name in fields}
    return {'model_type': model_type, **{name: value for name, value in values.items() if value is not None}}


def _merged(before: Mapping[str, Any], found: Mapping[str, Any], part: str, changes: list[str]) -> dict[str, Any]:
    for name, value in found.items():
        if before.get(name) != value and (value is not None or name in before):
            changes.append(f'{part}.{name}: {value!r} (was {before.get(name)!r})')
    return {**before, **found}
