"""Vision tower: SigLIP or CLIP, its pixel range, and the projection to the language width.

Pixel contract of the whole network: RGB, uint8 or float in [0, 1]. Each tower applies its own normalisation, once: this one here,
the geometry trunk in `geometry`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import CLIPVisionModel
from transformers.models.siglip import SiglipVisionModel

from vla_policy_ros.model.configuration import MapAnythingLlava3DConfig

TOWER_CLASSES: dict[str, Any] = {'siglip_vision_model': SiglipVisionModel, 'clip_vision_model': CLIPVisionModel}
# Channel means and standard deviations of the images that each family was trained on.
PIXEL_STATISTICS = {
    'siglip_vision_model': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    'clip_vision_model': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def unit_rgb(pixel_values: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1].

    Raises:
        ValueError: a float image leaves [0, 1] or is not finite, or the dtype is neither uint8 nor float.
    """
    if pixel_values.dtype == torch.uint8:
        return pixel_values.float() / 255.0
    if not pixel_values.is_floating_point():
        raise ValueError(f'pixel_values are {pixel_values.dtype}; give uint8, or float in [0, 1]')
    low, high = (float(value) for value in torch.aminmax(pixel_values.detach()))
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f'pixel_values span [{low:g}, {high:g}]; give uint8, or float RGB in [0, 1] that is not normalised yet')
    return pixel_values.float()


def vision_pixels(rgb: Tensor, model_type: str) -> Tensor:
    """[0, 1] RGB ``[..., 3, H, W]`` in the range that a tower of this family was trained on."""
    mean, std = (rgb.new_tensor(values)[:, None, None] for values in PIXEL_STATISTICS[model_type])
    return (rgb - mean) / std


def build_vision_tower(config: MapAnythingLlava3DConfig) -> Any:
    """The tower of a configuration, without the layers behind its feature layer."""
    vision = copy.deepcopy(config.vision_config)
    vision.num_hidden_layers += config.vision_feature_layer + 1
    if vision.model_type == 'siglip_vision_model':
        vision.vision_use_head = False  # patch features are used, not the pooled one
    return TOWER_CLASSES[vision.model_type]._from_config(vision)


def build_projector(config: MapAnythingLlava3DConfig) -> nn.Module:
    """Vision width to language width: one linear map, or LLaVA's two with a GELU between them."""
    inputs, outputs = config.vision_config.hidden_size, config.hidden_size
    if config.projector_type == 'linear':
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def patch_features(tower: Any, config: MapAnythingLlava3DConfig, rgb: Tensor, dtype: torch.dtype) -> Tensor:
    """Patch tokens ``[N, patches, C]`` of [0, 1] images ``[N, 3, H, W]``; a CLIP tower's class token is left out.

    SigLIP features have passed its final norm only where the last layer is the feature layer, as in the published uses.
    """
    pixels = vision_pixels(rgb, config.vision_config.model_type).to(dtype)
    if config.vision_config.model_type == 'clip_vision_model':
        return tower(pixel_values=pixels).last_hidden_state[:, 1:]
    if config.vision_feature_layer == -1:
        return tower(pixel_values=pixels).last_hidden_state
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
