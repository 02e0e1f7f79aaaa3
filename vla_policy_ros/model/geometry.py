"""Geometry trunk: the feature path of MapAnything, self-contained, with upstream's parameter names.

Images and camera rays enter, one geometric feature per patch leaves. Per view a DINOv2-style encoder makes patch tokens; where
the intrinsics are known, an encoding of the viewing rays is added; a LayerNorm joins both; a transformer then alternates between
attention over all views and attention inside a view, with one extra token that stands for the metric scale. Nothing in here is
random and nothing depends on the other samples of a batch.

Conventions that the released weights rely on: rays go through integer pixel coordinates (the centre of the top left pixel is
(0, 0)), in the camera frame x right, y down, z forward, with unit length; images are normalised with ImageNet statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vla_policy_ros.model.attention import attend
from vla_policy_ros.model.configuration import GeometryConfig

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
POSITION_SCALE_OFFSET = 0.1


def camera_rays(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Unit viewing directions ``[..., H, W, 3]`` of every pixel for pinhole matrices ``[..., 3, 3]``. Skew is ignored."""
    u = torch.arange(width, dtype=intrinsics.dtype, device=intrinsics.device)
    v = torch.arange(height, dtype=intrinsics.dtype, device=intrinsics.device)
    fx, fy = intrinsics[..., 0, 0, None], intrinsics[..., 1, 1, None]
    cx, cy = intrinsics[..., 0, 2, None], intrinsics[..., 1, 2, None]
    x = ((u - cx) / fx)[..., None, :].expand(*intrinsics.shape[:-2], height, width)
    y = ((v - cy) / fy)[..., :, None].expand(*intrinsics.shape[:-2], height, width)
    return F.normalize(torch.stack((x, y, torch.ones_like(x)), dim=-1), dim=-1)


class GeluMlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGluMlp(nn.Module):
    """SwiGLU with the gate in the first half of ``w12``; the hidden width is 2/3 of the nominal one, rounded up to 8."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection ordered q, k, v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(query, [(key, value)], allowed))


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block, with or without LayerScale on its branches."""

    def __init__(self, width: int, heads: int, config: GeometryConfig, layer_scale: bool) -> None:
        super().__init__()
        mlp = GeluMlp if config.ffn == 'mlp' else SwiGluMlp
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = SelfAttention(width, heads)
        self.ls1: nn.Module = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = mlp(width, int(width * config.mlp_ratio))
        self.ls2: nn.Module = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), allowed))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2-style image encoder: CLS and patch tokens of normalised images ``[B, 3, H, W]`` to ``[B, 1 + N, C]``."""

    def __init__(self, config: GeometryConfig) -> None:
        super().__init__()
        width = config.encoder_dim
        self.grid = config.pos_embed_grid
        self.patch_size = config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.blocks = nn.ModuleList(
            Block(width, config.encoder_heads, config, layer_scale=True) for _ in range(config.encoder_layers)
        )
        self.norm: nn.Module = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.encoder_final_norm else nn.Identity()

    def position_embedding(self, height: int, width: int) -> Tensor:
        """``[1, 1 + h * w, C]`` for a token grid, resampled with the scale factors that the pretrained weights expect."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        scale = tuple((side + POSITION_SCALE_OFFSET) / self.grid for side in (height, width))
        grid = F.interpolate(grid, scale_factor=scale, mode='bicubic', antialias=False)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)
        return torch.cat((self.pos_embed[:, :1], patches), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = (side // self.patch_size for side in images.shape[-2:])
        tokens = self.patch_embed(images)
        tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        tokens = tokens + self.position_embedding(height, width)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class ImageEncoder(nn.Module):
    """Holds the vision transformer under the name that upstream gives it."""

    def __init__(self, config: GeometryConfig) -> None:
        super().__init__()
        self.model = VisionTransformer(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class ResidualConvBlock(nn.Module):
    """Two 3x3 convolutions with a 1x1 shortcut; GELU after the first and after the sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv2(F.gelu(self.conv1(x))) + self.shortcut(x))


class RayEncoder(nn.Module):
    """Camera rays ``[B, 3, H, W]`` to one feature per patch ``[B, N, C]``."""

    def __init__(self, config: GeometryConfig) -> None:
        super().__init__()
        first, second, third = config.ray_dims
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, first, 3, padding=1)
        self.encoder = nn.Sequential(
            ResidualConvBlock(first, second), ResidualConvBlock(second, third), nn.Conv2d(third, config.encoder_dim, 1)
        )
        self.norm_layer = nn.LayerNorm(config.encoder_dim, eps=config.layer_norm_eps)

    def forward(self, rays: Tensor) -> Tensor:
        x = self.encoder(self.conv_in(F.pixel_unshuffle(rays, self.patch_size)))
        return self.norm_layer(x.flatten(2).transpose(1, 2))


class AlternatingAttention(nn.Module):
    """Transformer over the tokens of all views: even blocks attend across views, odd blocks inside a view."""

    view_pos_table: Tensor

    def __init__(self, config: GeometryConfig) -> None:
        super().__init__()
        width = config.info_dim
        self.use_reference_code = config.use_reference_code
        self.proj_embed: nn.Module = nn.Identity() if width == config.encoder_dim else nn.Linear(config.encoder_dim, width)
        self.self_attention_blocks = nn.ModuleList(
            Block(width, config.info_heads, config, config.info_layer_scale) for _ in range(config.info_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.register_buffer('view_pos_table', torch.tensor([0.0, 1.0]).repeat(math.ceil(width / 2))[None, :width])

    def forward(self, tokens: Tensor, scale_token: Tensor, view_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, V, T, C]``, scale token ``[C]`` and present views bool ``[B, V]`` to ``[B, V, T, D]`` and ``[B, D]``.

        The first present view is the reference view; absent views are read by nobody.
        """
        batch, views, length, _ = tokens.shape
        tokens = self.proj_embed(tokens)
        scale = self.proj_embed(scale_token).expand(batch, 1, -1)
        if self.use_reference_code:
            first = view_mask & (torch.cumsum(view_mask.to(torch.long), dim=1) == 1)
            tokens = tokens + first[:, :, None, None].to(tokens.dtype) * self.view_pos_table.to(tokens.dtype)
        width = tokens.shape[-1]
        keys = torch.cat((view_mask.repeat_interleave(length, dim=1), view_mask.new_ones(batch, 1)), dim=1)
        allowed = keys[:, None, None, :]
        for index, block in enumerate(self.self_attention_blocks):
            if index % 2 == 0:
                joint = block(torch.cat((tokens.reshape(batch, views * length, width), scale), dim=1), allowed)
                tokens, scale = joint[:, :-1].view(batch, views, length, width), joint[:, -1:]
            else:
                tokens = block(tokens.reshape(batch * views, length, width)).view(batch, views, length, width)
        return self.norm(tokens), self.norm(scale)[:, 0]


@dataclass(frozen=True)
class GeometryFeatures:
    """What the trunk leaves: patch features ``[B, V, N, D]``, the scale token ``[B, D]``, CLS ``[B, V, D]`` or None."""

    patches: Tensor
    scale: Tensor
    class_tokens: Tensor | None


class GeometryTrunk(nn.Module):
    """Images and, where known, intrinsics of V views to geometric patch features."""

    def __init__(self, config: GeometryConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config)
        self.ray_dirs_encoder = RayEncoder(config)
        self.fusion_norm_layer = nn.LayerNorm(config.encoder_dim, eps=config.layer_norm_eps)
        self.scale_token = nn.Parameter(torch.zeros(config.encoder_dim))
        self.info_sharing = AlternatingAttention(config)

    def forward(
        self,
        images: Tensor,
        intrinsics: Tensor | None = None,
        intrinsic_mask: Tensor | None = None,
        view_mask: Tensor | None = None,
    ) -> GeometryFeatures:
        """Encode ``images`` ``[B, V, 3, H, W]`` in [0, 1].

        Args:
            images: RGB; H and W are multiples of the patch size.
            intrinsics: ``[B, V, 3, 3]`` in pixels of ``images``, or None where no camera is calibrated.
            intrinsic_mask: bool ``[B, V]``, views whose intrinsics are known; None is all. Entries of other views are unused.
            view_mask: bool ``[B, V]``, views that are present; None is all.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        batch, views, _, height, width = images.shape
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f'geometry images are {width}x{height}; both sides must be multiples of the patch size {patch}')
        if view_mask is None:
            view_mask = torch.ones(batch, views, dtype=torch.bool, device=images.device)
        dtype = self.scale_token.dtype
        mean = torch.tensor(IMAGE_MEAN, device=images.device).view(3, 1, 1)
        std = torch.tensor(IMAGE_STD, device=images.device).view(3, 1, 1)
        tokens = self.encoder(((images.float() - mean) / std).flatten(0, 1).to(dtype))
        tokens = tokens.view(batch, views, *tokens.shape[1:])
        patches = self.fuse_rays(tokens[:, :, 1:], self.ray_features(intrinsics, intrinsic_mask, height, width))
        shared = torch.cat((patches, tokens[:, :, :1]), dim=2) if self.config.use_class_tokens else patches
        shared, scale = self.info_sharing(shared, self.scale_token, view_mask)
        count = patches.shape[2]
        return GeometryFeatures(shared[:, :, :count], scale, shared[:, :, count] if self.config.use_class_tokens else None)

    def ray_features(self, intrinsics: Tensor | None, intrinsic_mask: Tensor | None, height: int, width: int) -> Tensor | None:
        """Ray features ``[B, V, N, C]``, exactly zero for views without intrinsics; None where no view has any."""
        if intrinsics is None:
            return None
        if intrinsic_mask is not None:
            stand_in = torch.eye(3, dtype=intrinsics.dtype, device=intrinsics.device)
            intrinsics = torch.where(intrinsic_mask[:, :, None, None], intrinsics, stand_in)
        rays = camera_rays(intrinsics.float(), height, width).flatten(0, 1).permute(0, 3, 1, 2)
        features = self.ray_dirs_encoder(rays.to(self.scale_token.dtype)).unflatten(0, intrinsics.shape[:2])
        if intrinsic_mask is None:
            return features
        return torch.where(intrinsic_mask[:, :, None, None], features, torch.zeros_like(features))

    def fuse_rays(self, patches: Tensor, rays: Tensor | None) -> Tensor:
        """The normalised sum of image and ray features; the norm also runs without rays."""
        total = patches if rays is None else patches + rays
        return self.fusion_norm_layer(total)
