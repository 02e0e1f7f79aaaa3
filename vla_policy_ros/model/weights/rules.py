"""The table of names: which tensor of a public checkpoint becomes which of ours, and which are left out on purpose.

The first rule whose pattern matches the whole name decides. A name that no rule knows is an error, so that a renamed or misplaced
file is noticed. Sources of the names: LLaVA, LLaVA-3D and Vicuna repositories (liuhaotian, ChaimZhu, lmsys), their transformers
ports (llava-hf, old and new naming), transformers' SigLIP and CLIP (the hub's 4.x names carry ``vision_model.``, 5.x names do not),
and the MapAnything state dict.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LANGUAGE, VISION, PROJECTOR, GEOMETRY = 'language_model', 'vision_tower', 'vision_projector', 'geometry_encoder'
PARTS = ('language', 'vision', 'geometry')
"""Folders that may be given; a language folder may bring a vision tower and a projector of its own."""


@dataclass(frozen=True)
class Rule:
    """``pattern`` (whole name) to ``target`` with its groups, or, without a target, left out for a ``reason``."""

    pattern: str
    target: str | None
    reason: str = ''

    def apply(self, name: str) -> str | None:
        """Our name, '' where the name is left out, None where the rule does not match."""
        match = re.fullmatch(self.pattern, name)
        if match is None:
            return None
        return '' if self.target is None else match.expand(self.target)


_DECODER = r'(embed_tokens\.weight|norm\.weight|layers\.\d+\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm)\..+)'
_TOWER = r'((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..+)'
_LINEAR = {'1': '0', '2': '2'}

RULES: dict[str, tuple[Rule, ...]] = {
    'language': (
        Rule(r'.*\.(?:rotary_emb\.inv_freq|position_ids)', None, 'computed from the configuration'),
        # LLaVA, LLaVA-3D, Vicuna
        Rule(rf'model\.{_DECODER}', rf'{LANGUAGE}.model.\1'),
        Rule(r'lm_head\.weight', rf'{LANGUAGE}.lm_head.weight'),
        Rule(r'model\.mm_projector\.([02])\.(weight|bias)', rf'{PROJECTOR}.\1.\2'),
        Rule(rf'model\.vision_tower\.vision_tower\.(?:vision_model\.)?{_TOWER}', rf'{VISION}.\1'),
        Rule(r'model\.video_tower\..+', None, 'position encoding of the RGB-D video path, which this model does not have'),
        Rule(r'model\.image_newline', None, 'separator of tiled images, which this model does not use'),
        # llava-hf, before and after transformers 4.52
        *(
            rule
            for wrapper, decoder in (('', r'language_model\.model\.'), (r'model\.', r'model\.language_model\.'))
            for rule in (
                Rule(rf'{decoder}{_DECODER}', rf'{LANGUAGE}.model.\1'),
                *(
                    Rule(rf'{wrapper}multi_modal_projector\.linear_{theirs}\.(weight|bias)', rf'{PROJECTOR}.{ours}.\1')
                    for theirs, ours in _LINEAR.items()
                ),
                Rule(rf'{wrapper}vision_tower\.(?:vision_model\.)?{_TOWER}', rf'{VISION}.\1'),
            )
        ),
        Rule(r'language_model\.lm_head\.weight', rf'{LANGUAGE}.lm_head.weight'),
    ),
    'vision': (
        Rule(r'(?:.*\.)?position_ids', None, 'computed from the configuration'),
        Rule(rf'(?:vision_model\.)?{_TOWER}', rf'{VISION}.\1'),
        Rule(r'(?:vision_model\.)?head\..+', None, 'pooling head; patch features are used'),
        Rule(r'text_model\..+|text_projection\..+|visual_projection\..+|logit_scale|logit_bias', None, 'text side of the pair'),
    ),
    'geometry': (
        Rule(r'encoder\.model\.mask_token', None, 'used in pretraining only'),
        Rule(
            r'((?:encoder\.model|ray_dirs_encoder|fusion_norm_layer|info_sharing)\..+|scale_token)',
            rf'{GEOMETRY}.\1',
        ),
        Rule(
            r'(?:cam_rot_encoder|cam_trans_encoder|cam_trans_scale_encoder|depth_encoder|depth_scale_encoder)\..+',
            None,
            'input that this model does not take',
        ),
        Rule(
            r'(?:dpt_feature_head|dpt_regressor_head|dense_head|pose_head|scale_head|[a-z_]*adaptor)\..+',
            None,
            'reconstruction head; features are used',
        ),
    ),
}


def translate(part: str, name: str) -> tuple[str | None, str]:
    """Our name and '' for a tensor of a folder of ``part``, or None and the reason why it is left out.

    Raises:
        KeyError: no rule knows the name.
    """
    for rule in RULES[part]:
        target = rule.apply(name)
        if target is not None:
            return (target, '') if target else (None, rule.reason)
    raise KeyError(name)
