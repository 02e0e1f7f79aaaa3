"""Configuration of the policy network: one composite config with vision, geometry, text and expert parts.

Enters: keyword arguments or a ``config.json``. Leaves: a validated `MapAnythingLlava3DConfig`. Any thread.
Field names follow transformers and the papers; a value that cannot work and a name that nobody reads are refused here, with the
field named, so that the network never has to guess.
"""

import math
from typing import Any, ClassVar

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

VISION_TOWERS = ('siglip_vision_model', 'clip_vision_model')
LANGUAGE_MODELS = ('llama', 'mistral')
PROJECTORS = ('linear', 'mlp2x_gelu')
PREFIX_ATTENTION = ('bidirectional', 'causal', 'image_bidirectional_text_causal')
STREAM_ATTENTION = ('auto', 'eager', 'sdpa')
SUFFIX_ATTENTION = ('block', 'state_block', 'causal')
EXPERT_MODES = ('separate', 'shared')
FUSION_DEPTHS = ('deep', 'late')
OBJECTIVES = ('flow_matching', 'regression')
TIME_CONDITIONING = ('token', 'concat_mlp', 'adarms')
TIME_SAMPLING = ('uniform', 'beta')
SOLVERS = ('euler', 'ab2', 'midpoint')
FUSION_MODES = ('patch_add', 'global_concat', 'patch_concat', 'tokens')
GEOMETRY_FFN = ('mlp', 'swiglu')

GEOMETRY_RELEASES: dict[str, dict[str, Any]] = {
    'v1.0': {},
    'v1.1': {
        'encoder_dim': 1536,
        'encoder_heads': 24,
        'ffn': 'swiglu',
        'encoder_final_norm': False,
        'info_dim': 1536,
        'info_heads': 24,
        'info_layers': 16,
        'info_layer_scale': True,
        'use_class_tokens': True,
    },
}
"""What the public MapAnything releases set beside the defaults of `GeometryConfig`."""

# What transformers itself passes to a configuration beside the fields that a class declares.
_LIBRARY_KEYWORDS = {
    'name_or_path', 'torch_dtype', 'attn_implementation', 'experts_implementation', 'output_attentions', 'num_labels', 'model_type',
    'per_layer_config', 'use_return_dict', *GenerationConfig().to_dict(),
}  # fmt: skip

# The published description has one flat configuration; these of its names are fields of our expert.
_FLAT_EXPERT_NAMES = {
    'action_dim': 'action_dim', 'action_horizon': 'action_horizon', 'state_dim': 'state_dim', 'use_state': 'use_state',
    'use_time_weight': 'use_time_weight', 'num_inference_steps': 'num_inference_steps', 'expert_hidden_size': 'hidden_size',
    'expert_num_layers': 'num_layers', 'expert_mlp_ratio': 'mlp_ratio',
}  # fmt: skip


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


def _refuse_unknown(place: str, keywords: dict[str, Any]) -> None:
    """A misspelt field would otherwise become an attribute that nobody reads."""
    unknown = sorted(name for name in keywords if not name.startswith('_') and name not in _LIBRARY_KEYWORDS)
    if unknown:
        raise ValueError(f'{place} has no field {unknown[0]!r}; see the class for the fields that exist')


class GeometryConfig(PreTrainedConfig):
    """The MapAnything feature path: image encoder, ray encoder, alternating attention over views.

    The defaults are the sizes of release v1.0 (DINOv2-L encoder, 24 blocks of width 768); `GEOMETRY_RELEASES` has both.

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
        _refuse_unknown('geometry_config', kwargs)
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
            model's layers (then `hidden_size` must equal the language model's) and only owns norms.
        hidden_size: width E of the suffix stream.
        intermediate_size, mlp_ratio: width of its MLP; None is ``mlp_ratio * hidden_size``. A shared expert has that of the
            language model.
        num_layers: suffix layers; None is one per language layer. Fewer must divide the language model's count: suffix layer j
            then reads language layer j * stride.
        fusion_depth: ``deep``: each suffix layer reads the language layer that it is paired with; ``late``: all of them read the
            last one.
        action_dim, action_horizon, state_dim, use_state: A, T, S, and whether a state token leads the suffix.
        time_conditioning: ``token`` appends one time token; ``concat_mlp`` mixes the time into every action token (as in pi0);
            ``adarms`` lets it scale, shift and gate every norm of the suffix (as in pi0.5). Only the last two know a time per
            action, which a real-time-chunking prefix needs.
        time_min_period, time_max_period: periods of the sinusoidal time code.
        objective: ``flow_matching``, or ``regression``: the same network answers the mean chunk at once, from one fixed draw at
            t = 1.
            It is there to be compared with, and fails where several chunks are right.
        time_sampling: distribution of t in training, ``uniform`` or ``beta`` (alpha, beta, then ``scale * t + offset``).
        use_time_weight: weigh the loss by (1 - t) / E[1 - t].
        suffix_attention: ``block`` (all suffix tokens see each other), ``state_block`` (the state sees only itself), ``causal``.
        num_inference_steps, solver: integration steps of a chunk, and ``euler``, ``ab2`` or ``midpoint``.
        rtc_max_delay: trained real-time chunking: longest action prefix, in steps, that training shows clean; 0 is none.
        knowledge_insulation: stop the flow loss from reaching the prefix.
    """

    model_type = 'mapanything_llava3d_expert'

    mode: str = 'separate'
    hidden_size: int = 1024
    intermediate_size: int | None = None
    mlp_ratio: float = 4.0
    num_layers: int | None = None
    fusion_depth: str = 'deep'
    action_dim: int = 7
    action_horizon: int = 10
    state_dim: int | None = None
    use_state: bool = False
    time_conditioning: str = 'token'
    time_min_period: float = 4e-3
    time_max_period: float = 4.0
    objective: str = 'flow_matching'
    time_sampling: str = 'beta'
    time_alpha: float = 1.5
    time_beta: float = 1.0
    time_scale: float = 0.999
    time_offset: float = 0.001
    use_time_weight: bool = False
    suffix_attention: str = 'block'
    num_inference_steps: int = 10
    solver: str = 'euler'
    rtc_max_delay: int = 0
    knowledge_insulation: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        place = 'expert_config'
        _refuse_unknown(place, kwargs)
        super().__post_init__(**kwargs)
        _one_of(f'{place}.mode', self.mode, EXPERT_MODES)
        _one_of(f'{place}.fusion_depth', self.fusion_depth, FUSION_DEPTHS)
        _one_of(f'{place}.time_conditioning', self.time_conditioning, TIME_CONDITIONING)
        _one_of(f'{place}.objective', self.objective, OBJECTIVES)
        _one_of(f'{place}.time_sampling', self.time_sampling, TIME_SAMPLING)
        _one_of(f'{place}.suffix_attention', self.suffix_attention, SUFFIX_ATTENTION)
        _one_of(f'{place}.solver', self.solver, SOLVERS)
        _positive(place, action_dim=self.action_dim, action_horizon=self.action_horizon, hidden_size=self.hidden_size)
        _positive(place, num_inference_steps=self.num_inference_steps, mlp_ratio=self.mlp_ratio)
        _positive(place, time_min_period=self.time_min_period, time_max_period=self.time_max_period)
        _positive(place, time_alpha=self.time_alpha, time_beta=self.time_beta, time_scale=self.time_scale)
        if self.intermediate_size is None:
            self.intermediate_size = round(self.mlp_ratio * self.hidden_size)
        _positive(place, intermediate_size=self.intermediate_size)
        _divides(f'{place}.hidden_size', self.hidden_size, 2, 'sine and cosine halves of the time embedding')
        if self.time_offset < 0 or self.time_scale + self.time_offset > 1.0 + 1e-9:
            raise ValueError(
                f'{place}.time_scale {self.time_scale} and {place}.time_offset {self.time_offset} leave [0, 1]; t must stay inside'
            )
        if self.use_state and not self.state_dim:
            raise ValueError('expert_config.use_state is set but expert_config.state_dim is missing; give the state width')
        if self.time_conditioning == 'token':
            self._check_time_token()
        if self.objective == 'regression' and self.use_time_weight:
            raise ValueError(f'{place}.use_time_weight weighs t = 1, where regression is, with 0; set it to False')
        if self.objective == 'regression' and self.rtc_max_delay:
            raise ValueError(f'{place}.rtc_max_delay is {self.rtc_max_delay}; a regression expert continues no action prefix')
        if not 0 <= self.rtc_max_delay < self.action_horizon:
            raise ValueError(
                f'{place}.rtc_max_delay is {self.rtc_max_delay}; it must lie in 0..{self.action_horizon - 1}, '
                'so that at least one action is left to predict'
            )

    def _check_time_token(self) -> None:
        if self.suffix_attention == 'causal':
            raise ValueError(
                'expert_config.suffix_attention causal hides the trailing time token from the actions; '
                "use time_conditioning 'concat_mlp' or 'adarms' with it"
            )
        if self.rtc_max_delay:
            raise ValueError(
                f'expert_config.rtc_max_delay is {self.rtc_max_delay}, but one time token cannot give each action its own time; '
                "use time_conditioning 'concat_mlp' or 'adarms'"
            )


class MapAnythingLlava3DConfig(PreTrainedConfig):
    """The whole network.

    Attributes:
        vision_config: SigLIP or CLIP tower (`SiglipVisionConfig`, `CLIPVisionConfig`).
        geometry_config: geometry trunk; None is the default one where `use_geometric_branch` is set.
        text_config: Llama or Mistral backbone.
        expert_config: action expert; None is the default one where `use_action_expert` is set.
        use_geometric_branch, use_action_expert: whether the model has these parts at all.
        vision_model_name_or_path, language_model_name_or_path, mapanything_model_name_or_path: the public checkpoints that
            the sizes belong to. Informative: nothing is downloaded.
        vision_feature_layer: which layer's output are the image features, counted from the end; -1 is the last. LLaVA takes -2
            of CLIP. Layers that nobody reads are not built.
        projector_type: vision width to language width: ``linear``, or ``mlp2x_gelu`` (LLaVA's two layers).
        image_token_index: id that marks image positions in ``input_ids``. It is never embedded; a negative id cannot collide
            with a word.
        fusion_mode: how geometry enters: ``patch_add`` v + W LN(g), ``patch_concat``, ``global_concat``, or ``tokens``, which
            appends `geometry_tokens_per_view` pooled geometry tokens to the image tokens of each view.
        fusion_init_std: standard deviation of W at initialisation for ``patch_add``; 0 makes fusion the identity at start.
        use_rays: feed camera rays to the geometry trunk where the intrinsics are known.
        prefix_attention: mask among prefix tokens, the same in training and in the cached pass.
        stream_attention: softmax attention of both streams: ``eager`` (matrix products), ``sdpa`` (fused), or ``auto``, the faster
            one for device and shape (`attention.attend`).
        use_spatial_token, spatial_token_num, action_token_begin_idx: rows that replace a range of ids, off by default.
        prefix_lang_dropout_prob, prefix_image_dropout_prob: share of instruction words and of image tokens that training hides
            (masks; nothing is zeroed).
    """

    model_type = 'mapanything_llava3d'
    attribute_map: ClassVar[dict[str, str]] = {'image_token_id': 'image_token_index'}
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        'vision_config': SubConfigSpec(
            config_class=AutoConfig,
            model_type='siglip_vision_model',
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

    # A dict, a configuration or None on the way in; a configuration (or None for a part that is switched off) afterwards.
    vision_config: Any = None
    geometry_config: Any = None
    text_config: Any = None
    expert_config: Any = None
    use_geometric_branch: bool = True
    use_action_expert: bool = True
    vision_model_name_or_path: str | None = None
    language_model_name_or_path: str | None = None
    mapanything_model_name_or_path: str | None = None
    vision_feature_layer: int = -1
    projector_type: str = 'linear'
    ignore_index: int = -100
    image_token_index: int = -200
    fusion_mode: str = 'patch_add'
    fusion_init_std: float = 0.0
    geometry_tokens_per_view: int = 16
    use_rays: bool = True
    prefix_attention: str = 'bidirectional'
    stream_attention: str = 'auto'
    use_spatial_token: bool = False
    spatial_token_num: int = 259
    action_token_begin_idx: int | None = None
    prefix_lang_dropout_prob: float = 0.0
    prefix_image_dropout_prob: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        flat = {name: kwargs.pop(name) for name in list(kwargs) if name in _FLAT_EXPERT_NAMES}
        _refuse_unknown('MapAnythingLlava3DConfig', kwargs)
        self.expert_config = self._optional_part('use_action_expert', 'expert_config', flat)
        self.geometry_config = self._optional_part('use_geometric_branch', 'geometry_config', {})
        super().__post_init__(**kwargs)
        _one_of('fusion_mode', self.fusion_mode, FUSION_MODES)
        _one_of('prefix_attention', self.prefix_attention, PREFIX_ATTENTION)
        _one_of('stream_attention', self.stream_attention, STREAM_ATTENTION)
        _one_of('projector_type', self.projector_type, PROJECTORS)
        self._check_vision()
        self._check_text()
        self._check_expert()
        self._check_spatial_tokens()
        for name in ('prefix_lang_dropout_prob', 'prefix_image_dropout_prob'):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f'{name} is {getattr(self, name)}; it must lie in [0, 1)')

    def _optional_part(self, switch: str, name: str, flat: dict[str, Any]) -> Any:
        """The sub-config ``name`` with the flat names merged in, or None where its switch is off."""
        given = getattr(self, name)
        if not getattr(self, switch):
            if given is not None or flat:
                raise ValueError(f'{switch} is False but {next(iter(flat), name)} is given; leave one of them out')
            return None
        if given is None or isinstance(given, dict):
            merged = dict(given or {})
            for flat_name, value in flat.items():
                field = _FLAT_EXPERT_NAMES[flat_name]
                if merged.setdefault(field, value) != value:
                    raise ValueError(f'{flat_name} is {value!r} but {name}.{field} is {merged[field]!r}; give one of them')
            return merged
        if flat:
            raise ValueError(f'{next(iter(flat))} is given beside a ready {name}; set the field there')
        return given

    def _check_vision(self) -> None:
        vision = self.vision_config
        _one_of('vision_config.model_type', vision.model_type, VISION_TOWERS)
        if not -vision.num_hidden_layers <= self.vision_feature_layer <= -1:
            raise ValueError(
                f'vision_feature_layer is {self.vision_feature_layer}; count from the end, -1 is the last of '
                f'{vision.num_hidden_layers} layers'
            )
        if self.geometry_config is None:
            return
        _divides('vision_config.image_size', vision.image_size, self.geometry_config.patch_size, 'geometry_config.patch_size')
        side = math.isqrt(max(0, self.geometry_tokens_per_view))
        if self.fusion_mode == 'tokens' and (side < 1 or side**2 != self.geometry_tokens_per_view):
            raise ValueError(f'geometry_tokens_per_view is {self.geometry_tokens_per_view}; it must be a square such as 16')

    def _check_text(self) -> None:
        text = self.text_config
        _one_of('text_config.model_type', text.model_type, LANGUAGE_MODELS)
        if getattr(text, 'sliding_window', None) is not None:
            raise ValueError(
                f'text_config.sliding_window is {text.sliding_window}; the expert attends to the whole prefix: set it to None'
            )
        if 0 <= self.image_token_index < text.vocab_size:
            raise ValueError(
                f'image_token_index is {self.image_token_index}, a word of the vocabulary ({text.vocab_size} ids); '
                'use an id outside it, such as -200'
            )

    def _check_expert(self) -> None:
        expert, text = self.expert_config, self.text_config
        if expert is None:
            return
        if expert.mode == 'shared' and expert.hidden_size != text.hidden_size:
            raise ValueError(
                f'expert_config.hidden_size is {expert.hidden_size}; a shared expert needs the language width {text.hidden_size}'
            )
        if expert.mode == 'shared':
            expert.intermediate_size = text.intermediate_size
            if expert.knowledge_insulation:
                raise ValueError(
                    'expert_config.knowledge_insulation cannot insulate a shared expert, whose weights are the language model; '
                    "use mode 'separate'"
                )
        if expert.mode == 'shared' and expert.num_layers not in (None, text.num_hidden_layers):
            raise ValueError(
                f'expert_config.num_layers is {expert.num_layers}; a shared expert has those of the language model, '
                f'{text.num_hidden_layers}'
            )
        if expert.num_layers is not None:
            _positive('expert_config', num_layers=expert.num_layers)
            _divides('text_config.num_hidden_layers', text.num_hidden_layers, expert.num_layers, 'expert_config.num_layers')

    def _check_spatial_tokens(self) -> None:
        if not self.use_spatial_token:
            return
        begin = self.action_token_begin_idx
        if begin is None:
            raise ValueError('use_spatial_token needs action_token_begin_idx, the first id of the range')
        if begin <= self.image_token_index < begin + self.spatial_token_num:
            raise ValueError(f'spatial tokens {begin}..{begin + self.spatial_token_num - 1} contain the image token')
        if begin < 0 or begin + self.spatial_token_num > self.text_config.vocab_size:
            raise ValueError(
                f'spatial tokens {begin}..{begin + self.spatial_token_num - 1} leave the vocabulary of '
                f'{self.text_config.vocab_size} ids; choose action_token_begin_idx and spatial_token_num inside it'
            )

    @property
    def image_grid(self) -> int:
        """Patches along one side of an image, as the vision tower sees it."""
        return int(self.vision_config.image_size // self.vision_config.patch_size)

    @property
    def vision_seq_length(self) -> int:
        """Vision patches of one camera, row by row at the start of its image tokens."""
        return self.image_grid**2

    @property
    def image_seq_length(self) -> int:
        """Prefix positions of one camera: its vision patches and, in fusion mode ``tokens``, its geometry tokens."""
        appended = self.geometry_config is not None and self.fusion_mode == 'tokens'
        return self.vision_seq_length + (self.geometry_tokens_per_view if appended else 0)

    @property
    def hidden_size(self) -> int:
        """Width of the prefix stream."""
        return int(self.text_config.hidden_size)

    def __setattr__(self, name: str, value: Any) -> None:
        """The published flat names are written through to the expert."""
        if name in _FLAT_EXPERT_NAMES and self.__dict__.get('expert_config') is not None:
            setattr(self.expert_config, _FLAT_EXPERT_NAMES[name], value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """The published flat names, read from the expert; only called where no such attribute exists."""
        if name in _FLAT_EXPERT_NAMES and self.__dict__.get('expert_config') is not None:
            return getattr(self.expert_config, _FLAT_EXPERT_NAMES[name])
        raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')


AutoConfig.register(GeometryConfig.model_type, GeometryConfig)
AutoConfig.register(ActionExpertConfig.model_type, ActionExpertConfig)
AutoConfig.register(MapAnythingLlava3DConfig.model_type, MapAnythingLlava3DConfig)
