"""Configuration of the policy network: one composite config with vision, geometry, text and expert parts.

Enters: keyword arguments or a ``config.json``. Leaves: a validated `MapAnythingLlava3DConfig`. Any thread.
Field names follow transformers and the papers; a value that cannot work is refused here, with the field named, so that the
network never has to guess.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.siglip import SiglipVisionConfig

PREFIX_ATTENTION = ('bidirectional', 'causal', 'image_bidirectional_text_causal')
SUFFIX_ATTENTION = ('block', 'state_block', 'causal')
EXPERT_MODES = ('separate', 'shared')
TIME_CONDITIONING = ('token', 'concat_mlp')
TIME_SAMPLING = ('uniform', 'beta')
FUSION_MODES = ('patch_add', 'global_concat', 'patch_concat')
GEOMETRY_FFN = ('mlp', 'swiglu')


def _one_of(place: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f'{place} is {value!r}; it must be one of {", ".join(allowed)}')


def _positive(place: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f'{place}.{name} is {value!r}; it must be positive')


def _divides(place: str, whole: int, part: int, reason: str) -> None:
    if whole % part:
        raise ValueError(f'{place}: {whole} is not a multiple of {part} ({reason})')


class GeometryConfig(PreTrainedConfig):
    """The MapAnything feature path: image encoder, ray encoder, alternating attention over views.

    The defaults are the sizes of release v1.0 (DINOv2-L encoder, 24 blocks of width 768). Release v1.1 is ``encoder_dim=1536,
    encoder_heads=24, ffn='swiglu', encoder_final_norm=False, info_dim=1536, info_heads=24, info_layers=16, info_layer_scale=True,
    use_class_tokens=True``.

    Attributes:
        patch_size: side of a patch, pixels; the image size must be a multiple of it.
        pos_embed_grid: side of the stored position grid; other grids are interpolated.
        encoder_dim, encoder_heads, encoder_layers, mlp_ratio, ffn: image encoder (``mlp`` is GELU, ``swiglu`` is fused SwiGLU).
        encoder_final_norm: whether the encoder ends in a LayerNorm.
        ray_dims: widths of the ray encoder's input convolution and of its two residual blocks.
        info_dim, info_heads, info_layers, info_layer_scale: multi-view transformer; even blocks see all views, odd ones a view.
        use_class_tokens: feed each view's CLS token to the multi-view transformer.
        use_reference_code: mark the first present view with a fixed code.
    """

    model_type = 'mapanything_llava3d_geometry'

    patch_size: int = 14
    pos_embed_grid: int = 37
    encoder_dim: int = 1024
    encoder_heads: int = 16
    encoder_layers: int = 24
    encoder_final_norm: bool = True
    mlp_ratio: float = 4.0
    ffn: str = 'mlp'
    ray_dims: list[int] | tuple[int, ...] = (588, 768, 1024)
    info_dim: int = 768
    info_heads: int = 12
    info_layers: int = 24
    info_layer_scale: bool = False
    use_class_tokens: bool = False
    use_reference_code: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.ray_dims = list(self.ray_dims)
        if len(self.ray_dims) != 3:
            raise ValueError(f'geometry_config.ray_dims is {self.ray_dims}; it needs three widths')
        _one_of('geometry_config.ffn', self.ffn, GEOMETRY_FFN)
        _divides('geometry_config.encoder_dim', self.encoder_dim, self.encoder_heads, 'encoder_heads')
        _divides('geometry_config.info_dim', self.info_dim, self.info_heads, 'info_heads')


class ActionExpertConfig(PreTrainedConfig):
    """The action expert: its transformer stream, its heads and the flow-matching convention.

    Attributes:
        mode: ``separate`` gives the suffix its own layers of width `hidden_size`; ``shared`` runs it through the language
            model's layers (then `hidden_size` must equal the language model's) and only owns a final norm.
        hidden_size, intermediate_size: width of the suffix stream and of its MLP.
        num_layers: suffix layers; None is one per language layer. Fewer must divide the language model's count: suffix layer j
            then reads language layer j * stride.
        action_dim, action_horizon, state_dim, use_state: A, T, S, and whether a state token leads the suffix.
        time_conditioning: ``token`` appends one time token; ``concat_mlp`` mixes the time into every action token.
        time_sampling: distribution of t in training, ``uniform`` or ``beta`` (alpha, beta, then ``scale * t + offset``).
        suffix_attention: ``block`` (all suffix tokens see each other), ``state_block`` (the state sees only itself), ``causal``.
        num_inference_steps: Euler steps of a chunk.
        knowledge_insulation: stop the flow loss from reaching the prefix.
    """

    model_type = 'mapanything_llava3d_expert'

    mode: str = 'separate'
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int | None = None
    action_dim: int = 7
    action_horizon: int = 10
    state_dim: int | None = None
    use_state: bool = False
    time_conditioning: str = 'token'
    time_min_period: float = 4e-3
    time_max_period: float = 4.0
    time_sampling: str = 'beta'
    time_alpha: float = 1.5
    time_beta: float = 1.0
    time_scale: float = 0.999
    time_offset: float = 0.001
    suffix_attention: str = 'block'
    num_inference_steps: int = 10
    knowledge_insulation: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        place = 'expert_config'
        _one_of(f'{place}.mode', self.mode, EXPERT_MODES)
        _one_of(f'{place}.time_conditioning', self.time_conditioning, TIME_CONDITIONING)
        _one_of(f'{place}.time_sampling', self.time_sampling, TIME_SAMPLING)
        _one_of(f'{place}.suffix_attention', self.suffix_attention, SUFFIX_ATTENTION)
        _positive(place, action_dim=self.action_dim, action_horizon=self.action_horizon, hidden_size=self.hidden_size)
        _positive(place, num_inference_steps=self.num_inference_steps, intermediate_size=self.intermediate_size)
        _divides(f'{place}.hidden_size', self.hidden_size, 2, 'sine and cosine halves of the time embedding')
        if self.use_state and not self.state_dim:
            raise ValueError('expert_config.use_state is set but expert_config.state_dim is missing; give the state width')
        if self.suffix_attention == 'causal' and self.time_conditioning == 'token':
            raise ValueError(
                'expert_config.suffix_attention causal hides the trailing time token from the actions; '
                "use time_conditioning 'concat_mlp' with it"
            )


class MapAnythingLlava3DConfig(PreTrainedConfig):
    """The whole network.

    Attributes:
        vision_config: SigLIP tower (`SiglipVisionConfig`).
        geometry_config: geometry trunk, or None for a model without one.
        text_config: Llama or Mistral backbone.
        expert_config: action expert, or None for a model that only speaks.
        image_token_index: id that marks image positions in ``input_ids``. It is never embedded; a negative id cannot collide
            with a word.
        fusion_mode: how geometry enters the image tokens: ``patch_add`` v + W LN(g), ``patch_concat`` or ``global_concat``.
        fusion_init_std: standard deviation of W at initialisation for ``patch_add``; 0 makes fusion the identity at start.
        use_rays: feed camera rays to the geometry trunk where the intrinsics are known.
        prefix_attention: mask among prefix tokens, the same in training and in the cached pass.
        use_spatial_token, spatial_token_num, action_token_begin_idx: rows that replace a range of ids, off by default.
    """

    model_type = 'mapanything_llava3d'
    attribute_map: ClassVar[dict[str, str]] = {'image_token_id': 'image_token_index'}
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        'vision_config': SubConfigSpec(
            config_class=SiglipVisionConfig,
            init_kwargs={
                'hidden_size': 1152,
                'intermediate_size': 4304,
                'num_hidden_layers': 27,
                'num_attention_heads': 16,
                'patch_size': 14,
                'image_size': 224,
                'vision_use_head': False,
            },
        ),
        'geometry_config': SubConfigSpec(config_class=GeometryConfig, optional=True),
        'text_config': SubConfigSpec(config_class=AutoConfig, model_type='llama'),
        'expert_config': SubConfigSpec(config_class=ActionExpertConfig, optional=True),
    }

    # A dict, a configuration or None on the way in; a configuration (or None where it is optional) afterwards.
    vision_config: Any = None
    geometry_config: Any = None
    text_config: Any = None
    expert_config: Any = None
    ignore_index: int = -100
    image_token_index: int = -200
    fusion_mode: str = 'patch_add'
    fusion_init_std: float = 0.0
    use_rays: bool = True
    prefix_attention: str = 'bidirectional'
    use_spatial_token: bool = False
    spatial_token_num: int = 259
    action_token_begin_idx: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _one_of('fusion_mode', self.fusion_mode, FUSION_MODES)
        _one_of('prefix_attention', self.prefix_attention, PREFIX_ATTENTION)
        if 0 <= self.image_token_index < self.text_config.vocab_size:
            raise ValueError(
                f'image_token_index is {self.image_token_index}, a word of the vocabulary ({self.text_config.vocab_size} ids); '
                'use an id outside it, such as -200'
            )
        if self.geometry_config is not None:
            _divides(
                'vision_config.image_size',
                self.vision_config.image_size,
                self.geometry_config.patch_size,
                'geometry_config.patch_size',
            )
        self._check_expert()
        self._check_spatial_tokens()

    def _check_expert(self) -> None:
        expert, text = self.expert_config, self.text_config
        if expert is None:
            return
        if expert.mode == 'shared' and expert.hidden_size != text.hidden_size:
            raise ValueError(
                f'expert_config.hidden_size is {expert.hidden_size}; a shared expert needs the language width {text.hidden_size}'
            )
        if expert.num_layers is not None:
            _divides('text_config.num_hidden_layers', text.num_hidden_layers, expert.num_layers, 'expert_config.num_layers')

    def _check_spatial_tokens(self) -> None:
        if not self.use_spatial_token:
            return
        begin = self.action_token_begin_idx
        if begin is None:
            raise ValueError('use_spatial_token needs action_token_begin_idx, the first id of the range')
        if begin <= self.image_token_index < begin + self.spatial_token_num:
            raise ValueError(f'spatial tokens {begin}..{begin + self.spatial_token_num - 1} contain the image token')

    @property
    def image_grid(self) -> int:
        """Patches along one side of an image, as the vision tower sees it."""
        return int(self.vision_config.image_size // self.vision_config.patch_size)

    @property
    def image_seq_length(self) -> int:
        """Image tokens of one camera."""
        return self.image_grid**2

    @property
    def hidden_size(self) -> int:
        """Width of the prefix stream."""
        return int(self.text_config.hidden_size)


AutoConfig.register(GeometryConfig.model_type, GeometryConfig)
AutoConfig.register(ActionExpertConfig.model_type, ActionExpertConfig)
AutoConfig.register(MapAnythingLlava3DConfig.model_type, MapAnythingLlava3DConfig)
