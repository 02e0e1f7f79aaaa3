"""Which weights are trained, in which precision, and with which learning rate.

Enters: an objective and a training configuration. Leaves: the same objective with adapters, frozen weights and an optimiser for the
rest. Works on the meta device too, where the dry run counts. The thread that trains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.training.config import Lora, Optimisation, TrainingConfig
from vla_policy_ros.training.objective import Objective
from vla_policy_ros.training.scenes import derived_seed

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
ADAPTER = 'default'

# First match counts.
_GROUPS = (
    ('heads.', 'heads'),
    ('model.vision_tower.', 'vision'),
    ('model.vision_projector.', 'connectors'),
    ('model.fusion.', 'connectors'),
    ('model.geometry_encoder.', 'geometry'),
    ('model.language_model.model.embed_tokens.', 'embeddings'),
    ('model.language_model.lm_head.', 'embeddings'),
    ('model.spatial_embed_tokens.', 'embeddings'),
    ('model.language_model.', 'language'),
    ('model.language_model_with_expert.', 'expert'),
    ('model.action_expert.', 'expert'),
)


def group_of(name: str) -> str:
    """The group of a parameter of an `Objective`, as the training file names it."""
    return next(group for prefix, group in _GROUPS if name.startswith(prefix))


def unread(model: MapAnythingLlava3DForConditionalGeneration) -> tuple[str, ...]:
    """Prefixes of parameters that no action depends on: they can have no gradient."""
    config, backbone = model.config, model.language_model_with_expert
    found = ['language_model.lm_head.', 'language_model.model.norm.']
    if backbone is not None and not backbone.shared:
        # The prefix pass ends at the keys and values of the last layer that a suffix reads.
        last = f'language_model.model.layers.{backbone.last_read_layer}.'
        found += [f'{last}{part}' for part in ('self_attn.q_proj.', 'self_attn.o_proj.', 'mlp.', 'post_attention_layernorm.')]
        found += [f'language_model.model.layers.{index}.' for index in range(backbone.last_read_layer + 1, backbone.num_layers)]
    if config.vision_config.model_type == 'clip_vision_model' or config.vision_feature_layer != -1:
        found.append('vision_tower.post_layernorm.')
    if not config.use_rays:
        found.append('geometry_encoder.ray_dirs_encoder.')
    return tuple(found)


def choose_trainable(objective: Objective, config: TrainingConfig) -> None:
    """Add adapters, and let exactly those weights have gradients that are to be trained and can be; others get `frozen_dtype`.

    Raises:
        ValueError: nothing would be trained.
    """
    if config.lora is not None:
        _add_adapters(objective.model, config.lora, config.seed)
    frozen = {group for group, kept in config.freeze.model_dump().items() if kept}
    silent = tuple(f'model.{prefix}' for prefix in unread(objective.model))
    for name, parameter in objective.named_parameters():
        adapter = '.lora_' in name
        kept = group_of(name) in frozen or (config.lora is not None and group_of(name) == 'language' and not adapter)
        parameter.requires_grad_(not kept and not name.startswith(silent))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif parameter.dim() > 1:  # vectors weigh nothing, and norms want them exact
            parameter.data = parameter.data.to(DTYPES[config.frozen_dtype])
    if not any(parameter.requires_grad for parameter in objective.model.parameters()):
        raise ValueError('freeze leaves nothing to train; keep at least one group, such as the expert, free')


def _add_adapters(model: MapAnythingLlava3DForConditionalGeneration, lora: Lora, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    silent = unread(model)
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith('language_model.model.layers.')
        and isinstance(module, nn.Linear)
        and name.rpartition('.')[2] in lora.targets
        and not f'{name}.'.startswith(silent)
    ]
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, 'lora'))
        inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


def trained(objective: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all that is trained."""
    return {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}


def optimizer_groups(parameters: dict[str, nn.Parameter], options: Optimisation) -> list[dict[str, object]]:
    """Parameter groups for an optimizer: matrices with weight decay and vectors without, by learning rate (``peak``)."""
    members: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        peak = options.learning_rates.get(group_of(name), options.learning_rate)  # type: ignore[call-overload]
        decay = options.weight_decay if parameter.dim() > 1 else 0.0
        members.setdefault((peak, decay), []).append(parameter)
    return [{'params': params, 'peak': peak, 'lr': peak, 'weight_decay': decay} for (peak, decay), params in members.items()]


def plain_weights(
    model: MapAnythingLlava3DForConditionalGeneration, full: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model without adapters: each is merged into its layer, in float32, and cast at the end.

    Args:
        model: gives scales of adapters.
        full: state dict of the model, every tensor whole.
        dtype: of the floating-point results.
    """
    for name, value in full.items():
        if '.lora_' in name:
            continue
        plain = name.replace('.base_layer.', '.')
        if plain != name and name.endswith('.weight'):
            layer = name.removesuffix('.base_layer.weight')
            down, up = (full[f'{layer}.{part}.{ADAPTER}.weight'].float() for part in ('lora_A', 'lora_B'))
            value = value.float() + (up @ down) * model.get_submodule(layer).scaling[ADAPTER]
        yield plain, value.to(dtype) if value.is_floating_point() else value
