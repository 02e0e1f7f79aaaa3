"""The geometry trunk against recorded answers of the real MapAnything feature path, and against its own promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from toy import GEOMETRY

from vla_policy_ros.model.configuration import GeometryConfig
from vla_policy_ros.model.geometry import GeometryTrunk, camera_rays

GOLDEN = Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'mapanything'
TOLERANCE = 1e-4
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='recorded MapAnything tensors are not on this machine')


class Golden:
    """One recorded file: its tensors, and our trunk with its weights."""

    def __init__(self, release: str) -> None:
        self.file = safe_open(str(GOLDEN / f'mapanything_golden_{release}.safetensors'), framework='pt')
        recorded = json.loads(self.file.metadata()['config'])
        encoder, info = recorded['encoder'], recorded['info_sharing']
        self.config = GeometryConfig(
            encoder_dim=encoder['embed_dim'],
            encoder_heads=encoder['num_heads'],
            encoder_layers=encoder['layers'],
            encoder_final_norm=encoder['final_norm'],
            ffn='mlp' if encoder['ffn'] == 'mlp' else 'swiglu',
            ray_dims=recorded['ray_dirs_encoder']['intermediate_dims'],
            info_dim=info['dim'],
            info_heads=info['num_heads'],
            info_layers=info['depth'],
            info_layer_scale=info['layerscale'],
            use_class_tokens=recorded['use_register_tokens_from_encoder'],
        )
        self.trunk = GeometryTrunk(self.config).eval()
        names = [name for name in self.file.keys() if name.startswith('weights/')]  # noqa: SIM118
        self.trunk.load_state_dict({name.removeprefix('weights/'): self.file.get_tensor(name) for name in names}, strict=True)

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def inputs(self, case: str) -> tuple[Tensor, Tensor]:
        """Images and intrinsics with the batch in front."""
        return self[f'{case}/input/images'].transpose(0, 1), self[f'{case}/input/intrinsics'].transpose(0, 1)


@pytest.fixture(scope='module', params=['v1_0', 'v1_1'])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) < TOLERANCE


def as_tokens(features: Tensor) -> Tensor:
    """Recorded ``[V, B, C, h, w]`` as ours, ``[B, V, N, C]``."""
    return features.flatten(3).permute(1, 0, 3, 2)


@needs_golden
@pytest.mark.parametrize('case', ['square', 'nonsquare'])
@torch.no_grad()
def test_encoder_and_ray_encoder_answer_as_recorded(golden: Golden, case: str) -> None:
    images, intrinsics = golden.inputs(case)
    normalised = golden[f'{case}/image_normalized'].flatten(0, 1)
    vit = golden.trunk.encoder.model
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in vit.blocks]
    hooks.append(vit.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0])))
    tokens = vit(normalised)
    for hook in hooks:
        hook.remove()
    for got, name in zip(seen, ('encoder_tokens_in', 'encoder_block0_out', 'encoder_block1_out'), strict=True):
        close(got, golden[f'{case}/{name}'])
    views, batch = len(images[0]), len(images)
    ours = tokens.unflatten(0, (views, batch)).transpose(0, 1)
    close(ours[:, :, 1:], as_tokens(golden[f'{case}/encoder_features']))
    close(ours[:, :, 0], golden[f'{case}/encoder_cls'].transpose(0, 1))
    height, width = images.shape[-2:]
    close(camera_rays(intrinsics, height, width).transpose(0, 1), golden[f'{case}/ray_directions'])
    close(golden.trunk.ray_features(intrinsics, None, height, width), as_tokens(golden[f'{case}/ray_features']))


@needs_golden
@pytest.mark.parametrize(
    'case_variant', ['square/rays_on', 'square/rays_off', 'square/rays_view0_only', 'nonsquare/rays_on', 'nonsquare/rays_off']
)
@torch.no_grad()
def test_trunk_answers_as_recorded(golden: Golden, case_variant: str) -> None:
    case, variant = case_variant.split('/')
    images, intrinsics = golden.inputs(case)
    mask = torch.ones(images.shape[:2], dtype=torch.bool)
    if variant == 'rays_view0_only':
        mask[:, 1:] = False
    rays = (None, None) if variant == 'rays_off' else (intrinsics, mask)
    trunk = golden.trunk
    blocks: list[Tensor] = []
    fused: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: blocks.append(out)) for block in trunk.info_sharing.self_attention_blocks
    ]
    hooks.append(trunk.info_sharing.self_attention_blocks[0].register_forward_pre_hook(lambda _, given: blocks.append(given[0])))
    hooks.append(trunk.fusion_norm_layer.register_forward_hook(lambda _, given, out: fused.extend((given[0], out))))
    answer = trunk(images, *rays)
    for hook in hooks:
        hook.remove()
    close(fused[0], as_tokens(golden[f'{case_variant}/fused_prenorm']))
    close(fused[1], as_tokens(golden[f'{case_variant}/fused_features']))
    close(answer.patches, as_tokens(golden[f'{case_variant}/final_features']))
    close(answer.scale, golden[f'{case_variant}/final_scale_token'])
    if golden.config.use_class_tokens:
        close(answer.class_tokens, golden[f'{case_variant}/final_cls_tokens'].transpose(0, 1))
    count = answer.patches.shape[2]
    for index, block in ((0, 1), (1, 2)):
        inside = blocks[block + 1][:, :-1] if block % 2 == 0 else blocks[block + 1]
        features = trunk.info_sharing.norm(inside.reshape(*images.shape[:2], -1, inside.shape[-1]))[:, :, :count]
        close(features, as_tokens(golden[f'{case_variant}/intermediate{index}_features']))
    if variant == 'rays_on':
        for got, name in zip(blocks, ('info_tokens_in', *(f'info_block{i}_out' for i in range(4))), strict=True):
            close(got, golden[f'{case_variant}/{name}'])


@needs_golden
def test_full_size_releases_have_the_published_names_and_shapes() -> None:
    manifest = json.loads((GOLDEN / 'mapanything_manifest.json').read_text())
    releases = {
        'v1.0': GeometryConfig(),
        'v1.1': GeometryConfig(
            encoder_dim=1536,
            encoder_heads=24,
            ffn='swiglu',
            encoder_final_norm=False,
            info_dim=1536,
            info_heads=24,
            info_layers=16,
            info_layer_scale=True,
            use_class_tokens=True,
        ),
    }
    for release, config in releases.items():
        with torch.device('meta'):
            trunk = GeometryTrunk(config)
        ours = {name: list(value.shape) for name, value in trunk.state_dict().items()}
        ignored = tuple(manifest['ignored_prefixes'])
        assert ours == {name: shape for name, shape in manifest[release].items() if not name.startswith(ignored)}


def toy_trunk() -> GeometryTrunk:
    torch.manual_seed(0)
    trunk = GeometryTrunk(GeometryConfig(**GEOMETRY)).eval()
    with torch.no_grad():
        for parameter in trunk.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return trunk


def camera(focal: float = 24.0) -> Tensor:
    return torch.tensor([[focal, 0.0, 13.5], [0.0, focal, 13.5], [0.0, 0.0, 1.0]])


def test_rays_are_unit_vectors_and_the_principal_point_looks_straight_ahead() -> None:
    """O31."""
    K = torch.tensor([[50.0, 0.0, 7.0], [0.0, 60.0, 5.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    rays = camera_rays(K, 12, 16)
    assert rays.shape == (12, 16, 3)
    torch.testing.assert_close(rays[5, 7], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(rays.norm(dim=-1), torch.ones(12, 16, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(rays[0, 0], torch.nn.functional.normalize(torch.tensor([-7 / 50, -5 / 60, 1.0]).double(), dim=0))


@torch.no_grad()
def test_intrinsics_matter_exactly_where_they_are_known() -> None:
    """O29."""
    trunk, images = toy_trunk(), torch.rand(1, 2, 3, 28, 28)
    near, far = camera(20.0).expand(1, 2, 3, 3), camera(40.0).expand(1, 2, 3, 3)
    none, both = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    assert torch.equal(trunk(images, near, both).patches, trunk(images, near).patches)
    assert (trunk(images, near, both).patches - trunk(images, far, both).patches).abs().max() > 1e-3
    assert torch.equal(trunk(images, near, none).patches, trunk(images, far * float('nan'), none).patches)
    torch.testing.assert_close(trunk(images, near, none).patches, trunk(images).patches)


@torch.no_grad()
@pytest.mark.parametrize('absent', [0, 1, 2])
def test_an_absent_view_is_as_if_it_were_not_there(absent: int) -> None:
    """O28."""
    trunk, images = toy_trunk(), torch.rand(1, 3, 3, 28, 28)
    K = torch.stack([camera(20.0 + 5 * index) for index in range(3)])[None]
    present = torch.ones(1, 3, dtype=torch.bool)
    present[0, absent] = False
    kept = [index for index in range(3) if index != absent]
    three, two = trunk(images, K, None, present), trunk(images[:, kept], K[:, kept])
    torch.testing.assert_close(three.patches[:, kept], two.patches, atol=2e-5, rtol=0)
    torch.testing.assert_close(three.scale, two.scale, atol=2e-5, rtol=0)


def test_image_sides_must_be_multiples_of_the_patch() -> None:
    with pytest.raises(ValueError, match='30x28'):
        toy_trunk()(torch.rand(1, 1, 3, 28, 30))
