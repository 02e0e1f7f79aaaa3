"""The policy network: vision and MapAnything towers, a Llama backbone, deep fusion with a flow-matching action expert.

    pixels ─ vision_tower ─ vision_projector ─┐
    pixels, K ─ geometry_encoder ─────────────┴ fusion ─ image tokens ┐
    instruction ids ─ language_model.embed_tokens ────────── words ───┴ prefix ─ language_model ─ K, V of every layer
    state, noisy actions, time ─ action_expert ─ suffix ─ language_model_with_expert (reads K, V) ─ velocity ─ action_expert

Enters: token ids, images as RGB uint8 or [0, 1], intrinsics, state, and (in training) actions, all as `processing` makes them.
Leaves: a loss, or a chunk of normalised actions. Whoever calls it owns the thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from vla_policy_ros.model.attention import additive_mask, block_attention_mask, position_ids_from_pad, prefix_block_starts
from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig
from vla_policy_ros.model.deep_fusion import LLaVA3DWithActionExpertModel, PrefixCache
from vla_policy_ros.model.flow_matching import FlowLoss, FlowMatchingActionExpert
from vla_policy_ros.model.fusion import GeometryFusion
from vla_policy_ros.model.geometry import AlternatingAttention, GeometryTrunk, LayerScale, VisionTransformer
from vla_policy_ros.model.initial import starts_as
from vla_policy_ros.model.prefix import PrefixEmbeddings, hide_at_random, inject_images, left_padded
from vla_policy_ros.model.real_time_chunking import RealTimeGuidance
from vla_policy_ros.model.vision import build_projector, build_vision_tower, patch_features, unit_rgb

# transformers 5.24 renamed this argument and this field of its models.
_CACHE = 'cache' if 'cache' in inspect.signature(LlamaForCausalLM.forward).parameters else 'past_key_values'
_LIBRARY_IGNORE_INDEX = -100
CACHES = ('auto', 'immutable', 'preallocated')


@dataclass
class MapAnythingLlava3DOutput(ModelOutput):
    """What `MapAnythingLlava3DForConditionalGeneration.forward` returns.

    Attributes:
        loss: float32 scalar: flow loss with ``actions``, cross entropy with ``labels``.
        logits: language logits ``[B, Lp, vocab]``; None in the action path.
        past_key_values: language cache; None in the action path.
        hidden_states: prefix states where asked for; in the action path the inputs of layers 0 .. L - 1, ``[B, Lp, D]`` each.
        attentions: language attentions; None in the action path.
        image_hidden_states: fused image tokens ``[B, S, D]``, view-major, or None without images.
        flow: the velocities behind ``loss`` in the action path.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    flow: FlowLoss | None = None

    def _replace_old_cache_name(self, key: str) -> str:
        """The field keeps the name of the published contract, which newer transformers would translate."""
        return key


# For the same reason: the plain dataclass constructor, without the translation of its keywords.
_PLAIN_INIT = getattr(MapAnythingLlava3DOutput.__init__, '__wrapped__', MapAnythingLlava3DOutput.__init__)
type.__setattr__(MapAnythingLlava3DOutput, '__init__', _PLAIN_INIT)


@dataclass(frozen=True)
class EncodedPrefix:
    """All that sampling needs of one observation; made once per chunk by `encode_prefix`."""

    cache: PrefixCache
    attention_mask: Tensor
    position_ids: Tensor
    state: Tensor | None


class MapAnythingLlava3DForConditionalGeneration(PreTrainedModel):
    """Vision, geometry, language and action in one model.

    Every part may be passed in ready made, which is what makes small tests and partial replacements possible.

    Args:
        config: sizes and choices.
        vision_tower: a SigLIP or CLIP vision model, as `vision_config` says.
        language_model: a Llama or Mistral model for causal language modelling.
        mapanything_model: a module with the interface of `GeometryTrunk`.
        projector_model: vision width to language width.
    """

    config_class = MapAnythingLlava3DConfig
    base_model_prefix = ''
    main_input_name = 'input_ids'
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ('LlamaDecoderLayer', 'MistralDecoderLayer', 'SiglipEncoderLayer', 'CLIPEncoderLayer', 'Block')

    def __init__(
        self,
        config: MapAnythingLlava3DConfig,
        vision_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
        mapanything_model: nn.Module | None = None,
        projector_model: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_tower: Any = vision_tower or build_vision_tower(config)
        self.vision_projector = projector_model or build_projector(config)
        self.geometry_encoder: Any = None
        self.fusion: GeometryFusion | None = None
        if config.geometry_config is not None:
            self.geometry_encoder = mapanything_model or GeometryTrunk(config.geometry_config)
            self.fusion = GeometryFusion(config)
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.spatial_embed_tokens = nn.Embedding(config.spatial_token_num, config.hidden_size) if config.use_spatial_token else None
        self.language_model_with_expert: LLaVA3DWithActionExpertModel | None = None
        self.action_expert: FlowMatchingActionExpert | None = None
        if config.expert_config is not None:
            self.language_model_with_expert = LLaVA3DWithActionExpertModel(
                self.language_model, config.expert_config, config.prefix_attention, config.stream_attention
            )
            self.action_expert = FlowMatchingActionExpert(self.language_model_with_expert, config.expert_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Ordinary initialisation of the family, and an action expert that starts as the identity with zero velocity."""
        super()._init_weights(module)
        if isinstance(module, VisionTransformer):
            init.normal_(module.cls_token, std=self.config.geometry_config.initializer_range)
            init.normal_(module.pos_embed, std=self.config.geometry_config.initializer_range)
        elif isinstance(module, GeometryTrunk):
            init.normal_(module.scale_token, std=module.config.initializer_range)
        elif isinstance(module, AlternatingAttention):
            table = torch.tensor([0.0, 1.0]).repeat(module.view_pos_table.shape[1])[: module.view_pos_table.shape[1]]
            init.copy_(module.view_pos_table, table[None])
        elif isinstance(module, LayerScale):
            init.ones_(module.gamma)
        elif isinstance(module, nn.Linear):
            self._init_special_start(module)

    @staticmethod
    def _init_special_start(module: nn.Linear) -> None:
        """Projections that `starts_as` marked: zero, the identity of the first inputs, or a given standard deviation."""
        start = starts_as(module)
        if start is None:
            return
        if start == 'identity':
            rows, columns = module.weight.shape
            init.copy_(module.weight, torch.eye(rows, columns, dtype=module.weight.dtype, device=module.weight.device))
        else:
            init.normal_(module.weight, std=float(start))
        if module.bias is not None:
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with every tensor moved to memory of its own.

        The loader hands out slices of the mapped file. Matrix kernels round differently for such unaligned memory, and the mapping
        would follow a file that is overwritten; with the copy a reloaded model answers bit for bit like the one that was saved.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        """The language model's word embedding."""
        return self.language_model.get_input_embeddings()

    def get_image_features(
        self,
        pixel_values: Tensor,
        intrinsic: Tensor | None = None,
        intrinsic_mask: Tensor | None = None,
        image_masks: Tensor | None = None,
    ) -> Tensor:
        """Fused image tokens ``[B, V * N, D]``, camera by camera, row by row (N: ``config.image_seq_length``).

        Args:
            pixel_values: RGB, uint8 or [0, 1], ``[B, V, 3, H, W]`` or, for one camera, ``[B, 3, H, W]``.
            intrinsic: ``[B, V, 3, 3]`` or ``[B, 3, 3]`` in pixels of ``pixel_values``; None where nothing is calibrated.
            intrinsic_mask: bool ``[B, V]``: cameras whose intrinsics are known; None is all.
            image_masks: bool ``[B, V]``: cameras that are present; None is all.

        Raises:
            ValueError: shapes do not belong together, or pixel values break the contract.
        """
        if pixel_values.dim() == 4:
            pixel_values = pixel_values[:, None]
        side = self.config.vision_config.image_size
        if pixel_values.dim() != 5 or tuple(pixel_values.shape[2:]) != (3, side, side):
            raise ValueError(f'pixel_values are {tuple(pixel_values.shape)}; expected [batch, cameras, 3, {side}, {side}]')
        batch, views = pixel_values.shape[:2]
        intrinsic_mask, image_masks = (None if mask is None else mask.bool() for mask in (intrinsic_mask, image_masks))
        intrinsic = self._check_views(batch, views, intrinsic, intrinsic_mask, image_masks)
        rgb = unit_rgb(pixel_values)
        vision = patch_features(self.vision_tower, self.config, rgb.flatten(0, 1), self.dtype)
        tokens = self.vision_projector(vision).unflatten(0, (batch, views))
        if self.fusion is not None and self.geometry_encoder is not None:
            present = image_masks if image_masks is not None else rgb.new_ones((batch, views), dtype=torch.bool)
            rays = intrinsic if self.config.use_rays else None
            geometry = self.geometry_encoder(rgb, rays, intrinsic_mask, present)
            tokens = self.fusion(tokens, geometry.patches, present)
        return tokens.flatten(1, 2)

    def _check_views(
        self, batch: int, views: int, intrinsic: Tensor | None, intrinsic_mask: Tensor | None, image_masks: Tensor | None
    ) -> Tensor | None:
        for name, mask in (('intrinsic_mask', intrinsic_mask), ('image_masks', image_masks)):
            if mask is not None and tuple(mask.shape) != (batch, views):
                raise ValueError(f'{name} is {tuple(mask.shape)}; the images are [{batch}, {views}, ...]')
        if intrinsic is None:
            return None
        if intrinsic.dim() == 3 and views == 1:
            intrinsic = intrinsic[:, None]
        if tuple(intrinsic.shape) != (batch, views, 3, 3):
            raise ValueError(f'intrinsic is {tuple(intrinsic.shape)}; expected [{batch}, {views}, 3, 3]')
        known = intrinsic if intrinsic_mask is None else intrinsic[intrinsic_mask]
        if not bool(torch.isfinite(known).all()) or not bool((known[..., 0, 0] > 0).all() & (known[..., 1, 1] > 0).all()):
            raise ValueError(
                'intrinsic has non-finite entries or a focal length that is not positive; '
                'clear intrinsic_mask for cameras without calibration'
            )
        return intrinsic

    def embed_prefix(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        intrinsic: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        intrinsic_mask: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_token_mask: Tensor | None = None,
        instruction_token_mask: Tensor | None = None,
        image_token_index: int | None = None,
        image_features: Tensor | None = None,
        hide: bool = False,
        generator: torch.Generator | None = None,
    ) -> PrefixEmbeddings:
        """Words and image tokens as one sequence.

        Args:
            input_ids: ``[B, Lp]``; image positions hold ``image_token_index``, or anything where ``image_token_mask`` marks them.
            pixel_values, intrinsic, intrinsic_mask, image_masks: as in `get_image_features`.
            attention_mask: validity ``[B, Lp]``; None is all valid.
            image_token_mask: bool ``[B, Lp]``; None compares ``input_ids`` with ``image_token_index`` (the configuration's).
            instruction_token_mask: bool ``[B, Lp]``: words of the instruction; training with ``prefix_lang_dropout_prob`` needs it.
            image_features: ``[B, S, D]``, in place of ``pixel_values`` where the caller has encoded the images already.
            hide: hide prefix tokens at random, as ``prefix_lang_dropout_prob`` and ``prefix_image_dropout_prob`` say.
            generator: source of these draws.

        Raises:
            ValueError: the number of image positions of a sample differs from the number of image tokens, batches differ, or an
                id lies outside the vocabulary.
        """
        marker = self.config.image_token_index if image_token_index is None else image_token_index
        is_image = input_ids == marker if image_token_mask is None else image_token_mask.bool()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape or is_image.shape != input_ids.shape:
            raise ValueError(
                f'input_ids are {tuple(input_ids.shape)}, attention_mask {tuple(attention_mask.shape)}, '
                f'image_token_mask {tuple(is_image.shape)}; they must agree'
            )
        words = torch.where(is_image, 0, input_ids)
        vocabulary = self.config.text_config.vocab_size
        if bool(((words < 0) | (words >= vocabulary)).any()):
            raise ValueError(f'input_ids reach {int(words.min())}..{int(words.max())}; the vocabulary has {vocabulary} words')
        if image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values, intrinsic, intrinsic_mask, image_masks)
        pad = attention_mask.bool()
        if hide:
            pad = self._hide(pad, is_image, instruction_token_mask, generator)
        return inject_images(self._embed_words(words), pad, is_image, image_features, image_masks)

    def _hide(self, pad: Tensor, is_image: Tensor, instruction: Tensor | None, generator: torch.Generator | None) -> Tensor:
        config = self.config
        if config.prefix_image_dropout_prob:
            pad = hide_at_random(pad, is_image, config.prefix_image_dropout_prob, generator)
        if config.prefix_lang_dropout_prob:
            if instruction is None:
                raise ValueError('prefix_lang_dropout_prob needs instruction_token_mask, so that the template stays visible')
            pad = hide_at_random(pad, instruction.bool(), config.prefix_lang_dropout_prob, generator)
        return pad

    def _embed_words(self, words: Tensor) -> Tensor:
        embeds = self.get_input_embeddings()(words)
        if self.spatial_embed_tokens is None:
            return embeds
        begin, count = self.config.action_token_begin_idx, self.config.spatial_token_num
        spatial = (words >= begin) & (words < begin + count)
        rows = self.spatial_embed_tokens(torch.where(spatial, words - begin, 0))
        return torch.where(spatial[..., None], rows.to(embeds.dtype), embeds)

    def _build_joint_attention_inputs(
        self,
        prefix_embs: Tensor,
        suffix_len: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask and positions of prefix and suffix together.

        Args:
            prefix_embs: ``[B, Lp, D]``; gives sizes, device and dtype.
            suffix_len: suffix tokens Ls.
            attention_mask: prefix validity ``[B, Lp]``; None is all valid.
            position_ids: ignored: positions always count valid tokens, so that padding cannot shift the suffix.
            image_token_mask: needed for ``prefix_attention='image_bidirectional_text_causal'``.

        Returns:
            additive mask ``[B, 1, L, L]`` in the dtype of ``prefix_embs`` (0 = may look), positions ``[B, L]`` (long), prefix
            validity ``[B, Lp]`` (bool).
        """
        layout = self._expert().layout
        if suffix_len != layout.length:
            raise ValueError(f'suffix_len is {suffix_len}; this expert has {layout.length} suffix tokens')
        batch, length = prefix_embs.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, device=prefix_embs.device)
        prefix_pad = attention_mask.bool()
        pad = torch.cat((prefix_pad, prefix_pad.new_ones(batch, suffix_len)), dim=1)
        prefix_starts = prefix_block_starts(self.config.prefix_attention, prefix_pad, image_token_mask)
        suffix_starts = torch.tensor(layout.block_starts(self.config.expert_config.suffix_attention), device=pad.device)
        starts = torch.cat((prefix_starts, suffix_starts.expand(batch, -1)), dim=1)
        mask = additive_mask(block_attention_mask(pad, starts), prefix_embs.dtype)
        return mask, position_ids_from_pad(pad), prefix_pad

    def _expert(self) -> FlowMatchingActionExpert:
        if self.action_expert is None:
            raise ValueError('this model has no action expert (config.use_action_expert is False); actions need one')
        return self.action_expert

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        intrinsic: Tensor | None = None,
        actions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        image_token_index: int | None = None,
        *,
        state: Tensor | None = None,
        intrinsic_mask: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_token_mask: Tensor | None = None,
        instruction_token_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        action_is_pad: Tensor | None = None,
        delay: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
        repeats: int = 1,
    ) -> MapAnythingLlava3DOutput | tuple[Any, ...]:
        """Flow-matching loss where ``actions`` ``[B, T, A]`` are given, else the language model's causal forward.

        In the action path the language logits are not computed, ``labels`` and ``position_ids`` are ignored, and the arguments from
        ``action_is_pad`` on are those of `FlowMatchingActionExpert.flow_loss`. In the language path positions count valid
        tokens; after ``past_key_values``, ``attention_mask`` covers what they hold as well as ``input_ids``.

        Raises:
            ValueError: shapes, counts or values do not fit; ``actions`` without an action expert.
        """
        past_pad, attention_mask = _split_mask(attention_mask, past_key_values)
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError('give input_ids or inputs_embeds, not both')
        if input_ids is None:
            prefix = _given_embeddings(inputs_embeds, pixel_values, attention_mask)
        else:
            prefix = self.embed_prefix(
                input_ids,
                pixel_values,
                intrinsic,
                attention_mask,
                intrinsic_mask=intrinsic_mask,
                image_masks=image_masks,
                image_token_mask=image_token_mask,
                instruction_token_mask=instruction_token_mask,
                image_token_index=image_token_index,
                image_features=image_features,
                hide=self.training and actions is not None,
                generator=generator,
            )
        if actions is None:
            spoken = self._speak(prefix, past_pad, labels, past_key_values, use_cache, output_attentions, output_hidden_states)
            return spoken if return_dict is not False else spoken.to_tuple()
        expert = self._expert()
        if len(actions) != len(prefix.embeds):
            raise ValueError(f'actions have batch {len(actions)}, the prefix has batch {len(prefix.embeds)}')
        mask, positions, _ = self._build_joint_attention_inputs(
            prefix.embeds, expert.layout.length, prefix.pad, image_token_mask=prefix.image_token_mask
        )
        done = expert.backbone.prefix_pass(prefix.embeds, mask, positions, cache_only=True)
        flow = expert.flow_loss(
            None,
            actions,
            state,
            mask,
            positions,
            done.cache,
            noise=noise,
            time=time,
            generator=generator,
            action_is_pad=action_is_pad,
            delay=delay,
            repeats=repeats,
        )
        hidden = done.hidden_states if output_hidden_states else None
        output = MapAnythingLlava3DOutput(
            loss=flow.mean(), hidden_states=hidden, image_hidden_states=prefix.image_features, flow=flow
        )
        return output if return_dict is not False else output.to_tuple()

    def _speak(
        self,
        prefix: PrefixEmbeddings,
        past_pad: Tensor | None,
        labels: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> MapAnythingLlava3DOutput:
        if output_attentions and self.language_model.config._attn_implementation != 'eager':
            raise ValueError("output_attentions needs the language model's attn_implementation to be 'eager'")
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.ignore_index, _LIBRARY_IGNORE_INDEX)
        pad = prefix.pad if past_pad is None else torch.cat((past_pad, prefix.pad), dim=1)
        spoken = self.language_model(
            inputs_embeds=prefix.embeds,
            attention_mask=pad.long(),
            position_ids=position_ids_from_pad(pad)[:, -prefix.pad.shape[1] :],
            labels=labels,
            use_cache=bool(use_cache),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **{_CACHE: past_key_values},
        )
        cache = getattr(spoken, _CACHE)
        if cache is not None:
            cache.valid_tokens = pad  # with the tokens of absent cameras cleared, which the caller's mask does not know
        return MapAnythingLlava3DOutput(
            loss=spoken.loss,
            logits=spoken.logits,
            past_key_values=cache,
            hidden_states=spoken.hidden_states,
            attentions=spoken.attentions,
            image_hidden_states=prefix.image_features,
        )

    @torch.no_grad()
    def generate(self, model_inputs: Mapping[str, Any], **generation: Any) -> Tensor:
        """Words that the language model continues the prompt with, images included from the first one on; causal.

        Args:
            model_inputs: arguments of `embed_prefix`.
            generation: those of transformers' ``generate``, such as ``max_new_tokens`` or ``do_sample``.

        Returns:
            ids of the new tokens ``[B, new]``, without the prompt.

        Raises:
            ValueError: as `embed_prefix`, or ``use_cache=False`` (without a cache, the library drops the images after one word).
        """
        if not generation.get('use_cache', True):
            raise ValueError('generate always uses a cache; call forward on the whole sequence to do without one')
        prefix = self.embed_prefix(**_prefix_arguments(model_inputs))
        embeds, pad = left_padded(prefix.embeds, prefix.pad)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=pad.long(), **generation)

    @torch.no_grad()
    def encode_prefix(self, model_inputs: Mapping[str, Any], cache: str = 'auto') -> EncodedPrefix:
        """The part of `predict_action` that does not depend on noise: towers, prefix pass, masks and positions.

        Args:
            model_inputs: arguments of `embed_prefix`, and ``state``.
            cache: ``immutable``, or ``preallocated`` with room for the suffix (no guidance then: it needs gradients); ``auto`` is
                the form that the attention implementation reads without copying.
        """
        if cache not in CACHES:
            raise ValueError(f'cache {cache!r} is unknown; use one of {", ".join(CACHES)}')
        expert = self._expert()
        state = model_inputs.get('state')
        prefix = self.embed_prefix(**_prefix_arguments(model_inputs))
        backbone, room = expert.backbone, expert.layout.length
        mask, positions, _ = self._build_joint_attention_inputs(
            prefix.embeds, room, prefix.pad, image_token_mask=prefix.image_token_mask
        )
        if cache == 'auto':
            cache = 'immutable' if backbone.attention_implementation == 'eager' else 'preallocated'
        batch, length = prefix.embeds.shape[:2]
        into = backbone.new_cache(batch, length, room, prefix.embeds) if cache == 'preallocated' else None
        done = backbone.prefix_pass(prefix.embeds, mask, positions, cache_only=True, into=into)
        return EncodedPrefix(done.cache, mask, positions, state)

    @torch.no_grad()
    def denoise(
        self,
        prefix: EncodedPrefix,
        num_steps: int | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        solver: str | None = None,
        action_prefix: Tensor | None = None,
        guidance: RealTimeGuidance | None = None,
    ) -> Tensor:
        """A chunk ``[B, T, A]``, float32 and normalised, from an encoded prefix; arguments of `sample_actions`."""
        return self._expert().sample_actions(
            None,
            prefix.state,
            num_steps,
            prefix.attention_mask,
            prefix.position_ids,
            prefix.cache,
            noise=noise,
            generator=generator,
            solver=solver,
            action_prefix=action_prefix,
            guidance=guidance,
        )

    @torch.no_grad()
    def predict_action(self, model_inputs: Mapping[str, Any], num_steps: int | None = None, **sampling: Any) -> Tensor:
        """A chunk of normalised actions ``[B, T, A]`` (float32) for the inputs of `embed_prefix` and ``state``.

        ``num_steps`` and ``sampling`` are the arguments of `denoise`.

        Raises:
            ValueError: an input is missing, unknown in shape, or the model has no action expert.
        """
        cache = 'immutable' if sampling.get('guidance') is not None else 'auto'
        return self.denoise(self.encode_prefix(model_inputs, cache), num_steps, **sampling)


def _prefix_arguments(model_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `embed_prefix` among model inputs. Raises ValueError for a name that is not an input."""
    unknown = sorted(set(model_inputs) - _PREFIX_INPUTS - {'state'})
    if unknown:
        raise ValueError(f'model input {unknown[0]!r} is unknown; the inputs are {", ".join(sorted(_PREFIX_INPUTS))} and state')
    if 'input_ids' not in model_inputs:
        raise ValueError('model inputs have no input_ids')
    return {name: value for name, value in model_inputs.items() if name in _PREFIX_INPUTS}


_PREFIX_INPUTS = set(inspect.signature(MapAnythingLlava3DForConditionalGeneration.embed_prefix).parameters) - {
    'self',
    'hide',
    'generator',
}


def _given_embeddings(embeds: Tensor | None, pixel_values: Tensor | None, attention_mask: Tensor | None) -> PrefixEmbeddings:
    """A prefix that the caller has embedded."""
    if embeds is None:
        raise ValueError('give input_ids or inputs_embeds')
    if pixel_values is not None:
        raise ValueError('images are placed by input_ids; inputs_embeds alone cannot take pixel_values')
    valid = torch.ones(embeds.shape[:2], device=embeds.device) if attention_mask is None else attention_mask
    return PrefixEmbeddings(embeds, valid.bool(), torch.zeros_like(valid, dtype=torch.bool), None)


def _split_mask(attention_mask: Tensor | None, past_key_values: Any) -> tuple[Tensor | None, Tensor | None]:
    """Validity of what a language cache holds (None without one), and of the new tokens."""
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if not past:
        return None, attention_mask
    if attention_mask is None:
        raise ValueError(f'past_key_values hold {past} tokens; give the attention_mask of those and of the new ones')
    valid = attention_mask[:, :past].bool()
    known = getattr(past_key_values, 'valid_tokens', None)
    if known is not None and known.shape == valid.shape:
        valid = valid & known
    return valid, attention_mask[:, past:]


AutoModel.register(MapAnythingLlava3DConfig, MapAnythingLlava3DForConditionalGeneration)
