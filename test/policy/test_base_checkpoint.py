"""Base checkpoints from folders with public names: loaded strictly, or refused with nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_policy_ros.model.modeling import MapAnythingLlava3DForConditionalGeneration
from vla_policy_ros.model.presets import PRESETS
from vla_policy_ros.model.tokenizer import small_tokenizer
from vla_policy_ros.model.weights import writer
from vla_policy_ros.model.weights.sources import WeightsError
from vla_policy_ros.policy import CheckpointError, Policy, new_checkpoint, write_base_checkpoint
from vla_policy_ros.policy.checkpoint import load_checkpoint
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.types import CameraView, Observation

WORDS = 720  # more rows than the small tokenizer has words


@pytest.fixture(scope='module')
def robot() -> Robot:
    return load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')


@pytest.fixture(scope='module')
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset's sizes as a file, with another norm and rotary base than the folder will state, in the newer spelling."""
    tiny = {name: dict(part) for name, part in PRESETS['tiny'].items()}
    rope = {'rope_type': 'default', 'rope_theta': 700.0}
    tiny['text_config'] |= {'vocab_size': WORDS, 'rms_norm_eps': 1e-3, 'rope_parameters': rope}
    file = tmp_path_factory.mktemp('sizes') / 'sizes.json'
    file.write_text(json.dumps(tiny))
    return file


@pytest.fixture(scope='module')
def random_network(robot: Robot, sizes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('random') / 'net'
    write_base_checkpoint(robot, folder, sizes_file=sizes, dtype='float32', seed=3)
    return folder


@pytest.fixture(scope='module')
def public(random_network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``llava``, ``siglip`` and ``mapanything`` with public names, shards, extras and configurations."""
    root = tmp_path_factory.mktemp('public')
    ours = load_file(random_network / 'model.safetensors')
    generator = torch.Generator().manual_seed(9)
    shaken = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in ours.items()}
    parts = {
        'llava': {
            **below(shaken, 'language_model.'),
            'model.layers.0.self_attn.rotary_emb.inv_freq': torch.zeros(8),
            'model.mm_projector.0.weight': torch.zeros(4, 4),
            'model.video_tower.video_tower.prompt_encoder.pos_emb3d.weight': torch.zeros(4),
        },
        'siglip': {
            **{f'vision_model.{name}': value for name, value in below(shaken, 'vision_tower.').items()},
            'vision_model.head.probe': torch.zeros(1, 1, 64),
            'text_model.embeddings.token_embedding.weight': torch.zeros(4, 4),
            'logit_scale': torch.zeros(1),
        },
        'mapanything': {
            **below(shaken, 'geometry_encoder.'),
            'dense_head.dpt.weight': torch.zeros(3),
            'pose_head.mlp.weight': torch.zeros(3),
            'depth_encoder.conv_in.weight': torch.zeros(3),
        },
    }
    for folder, tensors in parts.items():
        save_in_shards(tensors, root / folder)
    small_tokenizer().save_pretrained(str(root / 'llava'))
    (root / 'llava' / 'config.json').write_text(
        json.dumps({'model_type': 'llava_llama', 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
                    'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': WORDS, 'rms_norm_eps': 1e-5,
                    'rope_theta': 5000.0})
    )  # fmt: skip
    tiny = {name: value for name, value in PRESETS['tiny']['vision_config'].items() if name != 'vision_use_head'}
    stated = {'model_type': 'siglip', 'vision_config': {'model_type': 'siglip_vision_model', **tiny}}
    (root / 'siglip' / 'config.json').write_text(json.dumps(stated))
    (root / 'llava' / 'README.md').write_text('---\nlicense: other\nlicense_name: llama2-and-more\n---\n# LLaVA\n')
    (root / 'siglip' / 'README.md').write_text('---\nlicense: apache-2.0\n---\n')
    return root


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_in_shards(tensors: dict[str, Tensor], folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    names = list(tensors)
    weight_map = {name: f'model-{index % count + 1:05d}.safetensors' for index, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name].contiguous() for name in names if weight_map[name] == file}, str(folder / file))
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


def folders(public: Path, *parts: str) -> dict[str, Path]:
    places = {'language': 'llava', 'vision': 'siglip', 'geometry': 'mapanything'}
    return {part: public / places[part] for part in parts or places}


def observation(robot: Robot) -> Observation:
    rng = np.random.default_rng(0)
    K = np.array([[300.0, 0, 160], [0, 300.0, 120], [0, 0, 1]])
    views = {name: CameraView(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8), K, 0) for name in robot.cameras}
    return Observation(0, views, np.zeros(len(robot.state.names)), 0, 'reach the red cube')


def raw_chunk(path: Path, robot: Robot) -> Tensor:
    """A chunk of a checkpoint whose action head is opened: the random start answers zero velocity."""
    checkpoint = load_checkpoint(path, robot)
    torch.manual_seed(0)
    torch.nn.init.normal_(checkpoint.model.action_expert.action_out_proj.weight)
    for layer in checkpoint.model.language_model_with_expert.expert_model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.2)
    torch.nn.init.normal_(checkpoint.model.fusion.geometry_projector.weight, std=0.3)
    view = observation(robot)
    inputs = checkpoint.processor(
        [{name: camera.rgb for name, camera in view.cameras.items()}],
        [{name: camera.K for name, camera in view.cameras.items()}],
        view.state[None],
        [view.instruction],
    )
    noise = torch.randn(1, robot.action.horizon, len(robot.action.joints), generator=torch.Generator().manual_seed(1))
    return checkpoint.model.predict_action(inputs, noise=noise)


@pytest.mark.parametrize('parts', [('language',), ('vision',), ('geometry',), ('language', 'vision', 'geometry')])
def test_public_weights_load_under_our_names_and_change_the_answers(
    robot: Robot, sizes: Path, random_network: Path, public: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    out = tmp_path / 'base'
    report = write_base_checkpoint(robot, out, sizes_file=sizes, folders=folders(public, *parts), dtype='float32', seed=3)
    written, before = load_file(out / 'model.safetensors'), load_file(random_network / 'model.safetensors')
    assert set(written) == set(before) == {*report.loaded, *report.random}
    for name, origin in report.loaded.items():
        folder = folders(public)[origin.part]
        place = json.loads((folder / 'model.safetensors.index.json').read_text())['weight_map'][origin.name]
        with safe_open(str(folder / place), framework='pt') as handle:
            assert torch.equal(written[name], handle.get_tensor(origin.name)), name
    assert all(torch.equal(written[name], before[name]) for name in report.random), 'the rest starts the same way'
    assert {name.split('.')[0] for name in report.loaded} == {
        {'language': 'language_model', 'vision': 'vision_tower', 'geometry': 'geometry_encoder'}[part] for part in parts
    }
    assert (raw_chunk(out, robot) - raw_chunk(random_network, robot)).abs().max() > 1e-3


def test_sizes_that_no_shape_shows_come_from_the_folder(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    report = write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders=folders(public, 'language'))
    text = json.loads((tmp_path / 'base' / 'config.json').read_text())['text_config']
    assert text['rope_parameters']['rope_theta'] == 5000.0 and text['rms_norm_eps'] == 1e-5
    assert any(line.startswith('text_config.rms_norm_eps: 1e-05 (was 0.001)') for line in report.sizes)
    assert any(line.startswith('text_config.rope_parameters') and '5000.0' in line and '700.0' in line for line in report.sizes)


def test_what_a_folder_leaves_out_means_its_family_s_default(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    def leave_out(folder: Path) -> None:
        stated = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(
            json.dumps({k: v for k, v in stated.items() if k not in ('rope_theta', 'rms_norm_eps')})
        )

    write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders=damaged(public, tmp_path, 'language', leave_out))
    text = json.loads((tmp_path / 'base' / 'config.json').read_text())['text_config']
    assert (text['rope_parameters']['rope_theta'], text['rms_norm_eps']) == (10000.0, 1e-6)


def test_words_without_rows_and_tied_words(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    def drop_rows(folder: Path) -> None:
        stated = json.loads((folder / 'config.json').read_text()) | {'vocab_size': 600}
        (folder / 'config.json').write_text(json.dumps(stated))

    (tmp_path / 'rows').mkdir()
    with pytest.raises(WeightsError, match=r'the tokenizer has \d+ words, the word embedding 600 rows'):
        write_base_checkpoint(
            robot, tmp_path / 'base', sizes_file=sizes, folders=damaged(public, tmp_path / 'rows', 'language', drop_rows)
        )

    def tie(folder: Path) -> None:
        stated = json.loads((folder / 'config.json').read_text()) | {'tie_word_embeddings': True}
        (folder / 'config.json').write_text(json.dumps(stated))
        for file in folder.glob('*.safetensors'):
            tensors = load_file(file)
            tensors.pop('lm_head.weight', None)
            save_file(tensors, str(file))

    (tmp_path / 'tied').mkdir()
    given = damaged(public, tmp_path / 'tied', 'language', tie)
    report = write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders=given, dtype='float32')
    assert 'language_model.lm_head.weight' not in {*report.loaded, *report.random}
    model = load_checkpoint(tmp_path / 'base', robot).model.language_model
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_siglip_tower_inside_a_language_folder_is_taken(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    def embed(folder: Path) -> None:
        tower = {}
        for file in (public / 'siglip').glob('*.safetensors'):
            tower |= {name: value for name, value in load_file(file).items() if name.startswith('vision_model.e')}
            tower |= {name: value for name, value in load_file(file).items() if name.startswith('vision_model.post')}
        save_file(
            {f'model.vision_tower.vision_tower.{name}': value for name, value in tower.items()}, str(folder / 'eyes.safetensors')
        )
        (folder / 'model.safetensors.index.json').unlink()

    report = write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders=damaged(public, tmp_path, 'language', embed))
    assert any(name.startswith('vision_tower.') for name in report.loaded)
    assert not any(name.startswith('vision_tower.') for name in report.random)


def test_mistral_keeps_its_grouped_heads_and_loses_its_window(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    source = tmp_path / 'mistral'
    source.mkdir()
    for file in (public / 'llava').iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    stated = json.loads((source / 'config.json').read_text()) | {'model_type': 'mistral', 'sliding_window': 4096}
    (source / 'config.json').write_text(json.dumps(stated))
    write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders={'language': source}, dtype='float32')
    model = load_checkpoint(tmp_path / 'base', robot).model
    assert model.config.text_config.model_type == 'mistral' and model.config.text_config.sliding_window is None
    assert type(model.language_model).__name__ == 'MistralForCausalLM'


def test_files_beside_the_indexed_ones_are_not_read(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    def add_consolidated(folder: Path) -> None:
        save_file({'layers.0.attention.wq.weight': torch.zeros(2)}, str(folder / 'consolidated.safetensors'))

    given = damaged(public, tmp_path, 'language', add_consolidated)
    write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders=given)


def test_siglip_replaces_the_clip_tower_of_a_preset(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    clip = json.loads(sizes.read_text())
    clip['vision_config'] = {'model_type': 'clip_vision_model', 'num_hidden_layers': 3, 'image_size': 56, 'patch_size': 14}
    clip |= {'vision_feature_layer': -2, 'projector_type': 'mlp2x_gelu'}
    file = tmp_path / 'clip.json'
    file.write_text(json.dumps(clip))
    report = write_base_checkpoint(robot, tmp_path / 'base', sizes_file=file, folders=folders(public, 'vision'), dtype='float32')
    config = load_checkpoint(tmp_path / 'base', robot).model.config
    assert (config.vision_config.model_type, config.vision_feature_layer, config.projector_type) == (
        'siglip_vision_model',
        -1,
        'linear',
    )
    assert any(line.startswith('projector_type') for line in report.sizes)


def test_card_and_report_account_for_everything(robot: Robot, sizes: Path, public: Path, tmp_path: Path) -> None:
    report = write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders=folders(public))
    card = (tmp_path / 'base' / 'README.md').read_text()
    assert '| language | `llava` |' in card and 'llama2-and-more' in card
    assert '| vision | `siglip` |' in card and '| apache-2.0 |' in card
    assert '`mapanything`' in card and 'not stated in the folder; check' in card and 'CC BY-NC 4.0' in card
    assert 'action_expert, fusion, language_model_with_expert, vision_projector | random start' in card
    assert 'language_model_with_expert.expert_model.layers.*.self_attn.q_proj.weight  (2)' in card
    assert str(public) not in card, 'no paths of this machine'
    text = '\n'.join(report.lines())
    assert 'missing 0;' in text and 'left out of vision: 1 tensors (pooling head' in text
    assert 'left out of geometry: 2 tensors (reconstruction head' in text


def damaged(public: Path, tmp_path: Path, part: str, change: Callable[[Path], None]) -> dict[str, Path]:
    folder = tmp_path / 'damaged'
    folder.mkdir()
    for file in folders(public)[part].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    return {part: folder}


def in_first_shard(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for index in folder.glob('*.index.json'):
            index.unlink()
        file = folder / 'model-00001.safetensors'
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, str(file))

    return apply


def rename(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.startswith(('model.layers', 'encoder.model.blocks')) and 'rotary' not in name)
    prefix, _, rest = name.partition('.')
    tensors[f'{prefix}s.{rest}'] = tensors.pop(name)


def poison(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if 'layers' in name or 'blocks' in name)
    tensors[name].view(-1)[0] = float('inf')


@pytest.mark.parametrize(
    ('part', 'change', 'message'),
    [
        ('language', in_first_shard(rename), r'1 missing: language_model.*1 unexpected: language: models.layers'),
        ('geometry', in_first_shard(rename), r'1 missing: geometry_encoder.*1 unexpected: geometry: encoders.model'),
        ('geometry', in_first_shard(poison), 'has values that are not finite'),
        ('vision', lambda folder: (folder / 'model-00002.safetensors').unlink(), 'lacks model-00002.safetensors, which'),
        (
            'vision',
            lambda folder: (folder / 'model-00001.safetensors').write_bytes(
                (folder / 'model-00001.safetensors').read_bytes()[:-50]
            ),
            'damaged or was copied only in part',
        ),
        ('language', lambda folder: (folder / 'tokenizer.json').unlink(), 'has no tokenizer.json'),
        ('language', lambda folder: (folder / 'config.json').write_text('{'), 'is not JSON'),
        ('language', lambda folder: (folder / 'config.json').unlink(), 'has no config.json, and heads'),
        ('vision', lambda folder: (folder / 'config.json').unlink(), 'has no config.json, and heads'),
        ('language', lambda folder: (folder / 'config.json').write_text('{"model_type": "gpt2"}'), "'gpt2' language model"),
        (
            'language',
            lambda folder: (folder / 'config.json').write_text(
                json.dumps(json.loads((folder / 'config.json').read_text()) | {'num_hidden_layers': 3})
            ),
            r'missing: language_model.model.layers.2',
        ),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_is_refused_and_leaves_nothing(
    robot: Robot, sizes: Path, public: Path, tmp_path: Path, part: str, change: Callable[[Path], None], message: str
) -> None:
    given = damaged(public, tmp_path, part, change)
    with pytest.raises(WeightsError, match=message):
        write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders=given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['damaged']


def test_pickles_are_not_opened(robot: Robot, sizes: Path, tmp_path: Path) -> None:
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')
    with pytest.raises(WeightsError, match=r'no \.safetensors files \(it has pytorch_model.bin, which would have to be unpickled'):
        write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, folders={'language': tmp_path / 'old'})


def test_wrong_arguments_are_refused(robot: Robot, sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').touch()
    (tmp_path / 'half.json').write_text('{"vision_config": {}}')
    for arguments, message in (
        ({'preset': 'tiny', 'sizes_file': sizes}, 'either a preset or a file'),
        ({}, 'either a preset or a file'),
        ({'preset': 'huge'}, "'huge'.*llava3d-7b-expert"),
        ({'sizes_file': tmp_path / 'none.json'}, 'not a JSON file'),
        ({'sizes_file': tmp_path / 'half.json'}, 'no text_config'),
        ({'preset': 'tiny', 'dtype': 'int8'}, "'int8'.*bfloat16"),
        ({'preset': 'tiny', 'folders': {'ears': tmp_path}}, "'ears' is not a part"),
        ({'preset': 'tiny', 'folders': {'vision': tmp_path / 'none'}}, 'is not a folder'),
    ):
        with pytest.raises(ValueError, match=message):
            write_base_checkpoint(robot, tmp_path / 'base', **arguments)
    with pytest.raises(ValueError, match='not an empty folder'):
        write_base_checkpoint(robot, tmp_path / 'full', preset='tiny')
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': 1000})())
    with pytest.raises(ValueError, match='GB free'):
        write_base_checkpoint(robot, tmp_path / 'base', preset='tiny')


def test_weights_are_written_a_shard_at_a_time(
    robot: Robot, sizes: Path, random_network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    save = writer.save_file

    def counting(tensors: dict[str, Tensor], file: str, metadata: dict[str, str]) -> None:
        held.append(sum(value.numel() * value.element_size() for value in tensors.values()))
        save(tensors, file, metadata)

    monkeypatch.setattr(writer, 'save_file', counting)
    seen: list[tuple[int, int]] = []
    out, limit = tmp_path / 'base', 350_000
    write_base_checkpoint(
        robot, out, sizes_file=sizes, dtype='float32', seed=3, shard_bytes=limit, progress=lambda *done: seen.append(done)
    )
    assert len(held) > 3 and max(held) <= limit
    assert [written for written, _ in seen] == list(np.cumsum(held)) and seen[-1][0] == seen[-1][1] == sum(held)
    one, many = (load_checkpoint(path, robot).model.state_dict() for path in (random_network, out))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize('preset', ['tiny', 'tabletop'])
def test_a_new_checkpoint_answers_bit_for_bit_the_same_when_loaded(robot: Robot, tmp_path: Path, preset: str) -> None:
    new_checkpoint(robot, preset, tmp_path / 'one', seed=5)
    first, second = (Policy.load(tmp_path / 'one', robot, seed=0).infer(observation(robot)) for _ in range(2))
    assert first.actions.tobytes() == second.actions.tobytes()
    direct = MapAnythingLlava3DForConditionalGeneration.from_pretrained(tmp_path / 'one').eval()
    copied = MapAnythingLlava3DForConditionalGeneration(direct.config).eval()
    copied.load_state_dict(load_file(tmp_path / 'one' / 'model.safetensors'), strict=True)
    for model in (direct, copied):
        with torch.no_grad():
            torch.manual_seed(0)
            torch.nn.init.normal_(model.action_expert.action_out_proj.weight)
    processor = load_checkpoint(tmp_path / 'one', robot).processor
    view = observation(robot)
    inputs = processor(
        [{name: camera.rgb for name, camera in view.cameras.items()}], [{}], view.state[None], [view.instruction]
    )  # fmt: skip
    noise = torch.randn(1, robot.action.horizon, len(robot.action.joints))
    assert torch.equal(direct.predict_action(inputs, noise=noise), copied.predict_action(inputs, noise=noise))


def test_checkpoint_with_a_lost_shard_is_refused(robot: Robot, sizes: Path, tmp_path: Path) -> None:
    write_base_checkpoint(robot, tmp_path / 'base', sizes_file=sizes, dtype='float32', shard_bytes=350_000)
    sorted((tmp_path / 'base').glob('model-*.safetensors'))[1].unlink()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / 'base', robot)
