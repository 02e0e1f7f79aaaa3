"""How much memory a training takes per device: counted where it can be counted, estimated where it cannot.

Counted, from the real modules on the meta device: weights, gradients, the optimiser's averages, the moving average, and the
copies that a pass works with. Estimated: activations, as the sum over layers of what autograd keeps per token (`layer_bytes`), in
bfloat16

    language or expert layer   20 D + 6 A + 8 K + 8 F     bytes: two norms in float32; queries, keys and values as projected and
                                                          as multiplied; four inner tensors of the gated MLP
    tower layer                16 D + 8 A + 4 F           bytes
    eager attention            6                          bytes per head and key that a query looks at

with D the width, A and K the widths of queries and of keys, F that of the MLP; in float32 4 bytes per element. A layer below which
nothing is trained keeps its keys and values only. With gradient checkpointing each layer keeps its input and its keys and values,
and one layer at a time all of it. `test/training/test_memory.py` compares this with what autograd really keeps.

Enters: a training configuration and the configuration of a network. Leaves: bytes per device. Any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.deep_fusion import head_width
from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.training.config import Freeze, Lora, TrainingConfig
from vla_policy_ros.training.objective import Objective
from vla_policy_ros.training.optimizer import muon_matrices
from vla_policy_ros.training.parallel import layers_in_turn
from vla_policy_ros.training.parameters import choose_trainable, group_of

PROMPT_WORDS = 64
RESERVE_BYTES = 4e9
"""What the device's context, libraries and a fragmented allocator take beside."""


@dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        weights: as they are stored.
        gradients, optimizer, average: of what is trained, float32.
        copies: weights in the precision of the products, gathered from other devices or cast, and buckets of gradients.
        activations: estimate of what the backward pass needs.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    copies: float
    activations: float

    @property
    def total(self) -> float:
        """Everything at once, which is an upper bound: gradients grow while activations go."""
        return sum(getattr(self, field.name) for field in fields(self))

    def fits(self, device_bytes: float) -> bool:
        """Whether a device of this size is enough, `RESERVE_BYTES` left free."""
        return self.total + RESERVE_BYTES <= device_bytes


@dataclass(frozen=True)
class Way:
    """One way to train a network: the configuration, its name, and the objective on the meta device with what is trained chosen."""

    name: str
    config: TrainingConfig
    objective: Objective

    @property
    def trained(self) -> int:
        """Trained weights."""
        return sum(parameter.numel() for parameter in self.objective.parameters() if parameter.requires_grad)


def ways(config: TrainingConfig, network: MapAnythingLlava3DConfig) -> list[Way]:
    """All weights, adapters, the expert alone, and what the file says where that is none of them."""
    frozen = dict.fromkeys(Freeze.model_fields, True)
    variants: dict[str, dict[str, Any]] = {
        'all weights': {'lora': None, 'freeze': Freeze()},
        'LoRA + expert': {
            'lora': config.lora or Lora(),
            'freeze': Freeze(vision=True, geometry=True, embeddings=True),
            'frozen_dtype': config.precision,
        },
        'expert alone': {'lora': None, 'freeze': Freeze(**{**frozen, 'expert': False}), 'frozen_dtype': config.precision},
    }
    configs = {name: config.model_copy(update=changes) for name, changes in variants.items()}
    known = [(made.lora, made.freeze, made.frozen_dtype) for made in configs.values()]
    if (config.lora, config.freeze, config.frozen_dtype) not in known:
        configs = {'as in the file': config, **configs}
    shared = network.expert_config is not None and network.expert_config.mode == 'shared'
    if shared:  # its layers are the language model's: alone it is a few projections
        del configs['expert alone']
    return [Way(name, made, _on_meta(made, network)) for name, made in configs.items()]


def _on_meta(config: TrainingConfig, network: MapAnythingLlava3DConfig) -> Objective:
    with torch.device('meta'):
        model = MapAnythingLlava3DForConditionalGeneration(network)
        losses = config.losses
        objective = Objective(model, losses.weights(), config.optimisation.repeats, config.seed, losses.grounding_layer)
        choose_trainable(objective, config)
    return objective


def memory(way: Way, devices: int, cameras: int, examples_per_scene: int, *, eager: bool = False) -> Memory:
    """What a training takes on each of ``devices``.

    Args:
        way: what is trained, and how.
        devices: processes with a device each.
        cameras: V.
        examples_per_scene: examples that share their pictures.
        eager: whether attention keeps its weights, as it does on a CPU.
    """
    config, objective = way.config, way.objective
    sharded = config.sharding == 'fsdp' and devices > 1
    parts = devices if sharded else 1
    chosen = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    trained = _bytes(chosen.values())
    averages = 2 * trained - _bytes(muon_matrices(chosen, config.optimisation).values())  # Muon keeps one of a matrix, AdamW two
    return Memory(
        weights=_bytes(objective.parameters()) / parts,
        gradients=trained / parts,
        optimizer=averages / parts,
        average=trained / parts if config.optimisation.ema else 0.0,
        copies=_gathered(objective, config) if sharded else _cast(objective, config) + (trained if devices > 1 else 0.0),
        activations=activation_bytes(way, scenes_per_pass(config, devices), cameras, examples_per_scene, eager=eager),
    )


def scenes_per_pass(config: TrainingConfig, devices: int) -> int:
    """Scenes that a device works on at once."""
    return max(1, config.optimisation.scenes_per_step // (devices * config.optimisation.gradient_accumulation))


def _bytes(parameters: Iterable[torch.Tensor]) -> float:
    return float(sum(parameter.numel() * parameter.element_size() for parameter in parameters))


def _element(config: TrainingConfig) -> int:
    return 2 if config.precision == 'bfloat16' else 4


def _gathered(objective: Objective, config: TrainingConfig) -> float:
    """Weights outside the layers, the two largest layers (one runs, one is on its way), and the gradients of these."""
    size = _element(config)
    layers = layers_in_turn(objective.model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outer = [parameter for parameter in objective.parameters() if id(parameter) not in inside]
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    gradients = sum(parameter.numel() for parameter in outer if parameter.requires_grad) + largest
    return float(size * (sum(parameter.numel() for parameter in outer) + 2 * largest + gradients))


def _cast(objective: Objective, config: TrainingConfig) -> float:
    """Autocast keeps a bfloat16 copy of each float32 matrix until its gradient is known."""
    if config.precision == 'float32':
        return 0.0
    return float(sum(2 * p.numel() for p in objective.parameters() if p.dtype == torch.float32 and p.dim() > 1))


def layer_bytes(width: int, queries: int, keys: int, mlp: int, *, bfloat16: bool, gated: bool) -> float:
    """What autograd keeps of a transformer layer per token, without attention weights.

    Args:
        width, queries, keys, mlp: elements of the stream, of all query heads, of all key heads, and of the MLP.
        bfloat16: of the products; norms are float32.
        gated: RMS norms and a gated MLP (language, expert), else LayerNorms and a plain one (towers), whose branches may be scaled.
    """
    if gated:
        if bfloat16:
            return 20.0 * width + 6 * queries + 8 * keys + 8 * mlp
        return 4.0 * (6 * width + 2 * queries + 2 * keys + 4 * mlp)
    if bfloat16:
        return 16.0 * width + 8 * queries + 4 * mlp
    return 4.0 * (6 * width + 4 * queries + 2 * mlp)


@dataclass(frozen=True)
class _Layers:
    """Layers of one kind: their number, tokens of a pass, bytes per token (all, and what checkpointing keeps), and whether any."""

    count: int
    tokens: int
    whole: float
    kept: float
    graph: bool

    def bytes(self, checkpointing: bool) -> float:
        if not self.graph:
            return 0.0
        return self.count * self.tokens * (self.kept if checkpointing else self.whole)

    @property
    def one(self) -> float:
        return self.tokens * self.whole if self.graph else 0.0


def activation_bytes(way: Way, scenes: int, cameras: int, examples_per_scene: int, *, eager: bool = False) -> float:
    """The estimate for one pass over ``scenes`` scenes."""
    config, model = way.config, way.objective.model
    network: Any = model.config
    trained = {group_of(name) for name, parameter in way.objective.named_parameters() if parameter.requires_grad}
    size, wide = _element(config), config.precision == 'bfloat16'
    pictures, examples = scenes * cameras, scenes * examples_per_scene
    kinds = [*_tower_layers(network, pictures, trained, wide, eager)]
    words = PROMPT_WORDS + cameras * network.image_seq_length
    text, expert = network.text_config, network.expert_config
    head = head_width(text)
    queries, keys = head * text.num_attention_heads, head * text.num_key_value_heads
    reached = bool(trained & {'vision', 'geometry', 'connectors', 'embeddings', 'language'})
    attention = 6 * text.num_attention_heads
    whole = layer_bytes(text.hidden_size, queries, keys, text.intermediate_size, bfloat16=wide, gated=True)
    whole += attention * words if eager else 0.0
    prefix_input = (4 if wide else size) * text.hidden_size
    backbone = model.language_model_with_expert
    if backbone is None or expert is None:
        raise ValueError('this network has no action expert; only actions can be trained here')
    kinds.append(_Layers(backbone.last_read_layer, examples * words, whole, prefix_input + 2 * size * keys, reached))
    cache = 0.0 if reached else backbone.expert_num_layers * examples * words * 2 * size * keys
    suffix = way.objective.repeats * model.action_expert.layout.length  # type: ignore[union-attr]
    whole = layer_bytes(expert.hidden_size, queries, keys, expert.intermediate_size, bfloat16=wide, gated=True)
    whole += attention * (words + suffix / way.objective.repeats)  # over two segments: never fused
    kinds.append(_Layers(backbone.expert_num_layers, examples * suffix, whole, (4 if wide else size) * expert.hidden_size, True))
    streams = examples * words * text.hidden_size * (2 * size + 4) if reached else 0.0
    kept = sum(kind.bytes(config.gradient_checkpointing) for kind in kinds)
    again = max(kind.one for kind in kinds) if config.gradient_checkpointing else 0.0
    return kept + again + cache + streams


def _tower_layers(network: Any, pictures: int, trained: set[str], wide: bool, eager: bool) -> list[_Layers]:
    vision, geometry = network.vision_config, network.geometry_config
    kinds = [
        _tower(
            vision.num_hidden_layers + network.vision_feature_layer + 1,
            pictures * network.vision_seq_length,
            vision.hidden_size,
            vision.intermediate_size,
            vision.num_attention_heads * network.vision_seq_length if eager else 0,
            wide,
            'vision' in trained,
        )
    ]
    if geometry is not None:
        patches = (vision.image_size // geometry.patch_size) ** 2
        for count, width, heads in (
            (geometry.encoder_layers, geometry.encoder_dim, geometry.encoder_heads),
            (geometry.info_layers, geometry.info_dim, geometry.info_heads),
        ):
            # A gated MLP keeps four tensors of two thirds of the width where a plain one keeps two.
            mlp = math.ceil(geometry.mlp_ratio * width * (1.0 if geometry.ffn == 'mlp' else 4 / 3))
            keys = heads * patches if eager else 0
            kinds.append(_tower(count, pictures * patches, width, mlp, keys, wide, 'geometry' in trained))
    return kinds


def _tower(count: int, tokens: int, width: int, mlp: int, keys: int, wide: bool, graph: bool) -> _Layers:
    whole = layer_bytes(width, width, width, mlp, bfloat16=wide, gated=False) + 6.0 * keys
    return _Layers(count, tokens, whole, 4.0 * width, graph)
