"""The processor: geometry of images and intrinsics, prompts, normalisation, saving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vla_policy_ros.model.geometry import camera_rays
from vla_policy_ros.model.image_transform import ImageTransform
from vla_policy_ros.model.processing import VICUNA_SYSTEM, MapAnythingLlava3DProcessor, ProcessorConfig
from vla_policy_ros.model.statistics import Normalizer, Statistics
from vla_policy_ros.model.tokenizer import small_tokenizer

SIZES = ((640, 480), (480, 640), (1280, 720), (224, 224), (333, 517))
K = np.array([[610.0, 0.0, 318.2], [0.0, 605.0, 243.9], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize('mode', ['stretch', 'letterbox', 'crop'])
@pytest.mark.parametrize('source', SIZES)
def test_a_point_projects_to_the_moved_pixel(mode: str, source: tuple[int, int]) -> None:
    transform = ImageTransform.fit(source, (224, 224), mode)
    moved = transform.intrinsics(K)
    for point in np.random.default_rng(0).normal([0, 0, 4], size=(50, 3)):
        u, v, w = K @ point
        x, y, z = moved @ point
        expected = transform.matrix @ [u / w, v / w, 1.0]
        assert abs(x / z - expected[0]) < 1e-6 and abs(y / z - expected[1]) < 1e-6


@pytest.mark.parametrize('mode', ['stretch', 'letterbox', 'crop'])
@pytest.mark.parametrize('source', [(640, 480), (480, 640)])
def test_the_picture_moves_as_the_matrix_says(mode: str, source: tuple[int, int]) -> None:
    """A bright blob lands, in the resampled image, where the matrix maps its centre."""
    width, height = source
    transform = ImageTransform.fit(source, (160, 160), mode)
    for centre in ((width // 2, height // 2), (width // 2 + 70, height // 2 - 60)):
        ys, xs = np.mgrid[0:height, 0:width]
        blob = 255 * np.exp(-((xs - centre[0]) ** 2 + (ys - centre[1]) ** 2) / (2 * 12.0**2))
        picture = transform.image(np.repeat(blob[..., None], 3, axis=2).astype(np.uint8))[0].double().numpy()
        ty, tx = np.mgrid[0:160, 0:160]
        found = np.array([(picture * tx).sum(), (picture * ty).sum()]) / picture.sum()
        np.testing.assert_allclose(found, (transform.matrix @ [*centre, 1.0])[:2], atol=0.06)


def test_resized_intrinsics_give_the_same_ray_at_the_same_place() -> None:
    transform = ImageTransform.fit((640, 480), (160, 120), 'stretch')
    small = camera_rays(torch.from_numpy(transform.intrinsics(K)), 120, 160)
    u, v, _ = np.linalg.inv(transform.matrix) @ [40, 30, 1.0]
    ray = np.linalg.inv(K) @ [u, v, 1.0]
    np.testing.assert_allclose(small[30, 40].numpy(), ray / np.linalg.norm(ray), atol=1e-6)


@pytest.mark.parametrize('size', [128, 224])
def test_resize_is_within_one_level_of_pillow(size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(noise[::40, ::40]).resize((640, 480), Image.Resampling.BICUBIC))
    for picture in (noise, smooth):
        ours = ImageTransform.fit((640, 480), (size, size), 'stretch').image(picture).permute(1, 2, 0).numpy()
        theirs = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_letterbox_pads_black_and_crop_fills() -> None:
    white = np.full((480, 640, 3), 255, dtype=np.uint8)
    boxed = ImageTransform.fit((640, 480), (128, 128), 'letterbox').image(white)
    assert (boxed[:, :16] == 0).all() and (boxed[:, 16:112] == 255).all() and (boxed[:, 112:] == 0).all()
    assert (ImageTransform.fit((640, 480), (128, 128), 'crop').image(white) == 255).all()
    with pytest.raises(ValueError, match='uint8'):
        ImageTransform.fit((640, 480), (128, 128), 'crop').image(white.astype(np.float32))
    with pytest.raises(ValueError, match="'zoom'"):
        ImageTransform.fit((640, 480), (128, 128), 'zoom')


def make_processor(
    *, delta: bool = False, statistics: Statistics | None = None, system: str = '', separator: str = '\n '
) -> MapAnythingLlava3DProcessor:
    config = ProcessorConfig(
        cameras={'scene': 'stretch', 'wrist': 'letterbox'},
        image_size=28,
        image_seq_length=4,
        image_token_index=-200,
        system_prompt=system,
        image_separator=separator,
        state_dim=4,
        action_shape=(5, 3),
        delta_state_index=(0, 2, None) if delta else (None, None, None),
    )
    return MapAnythingLlava3DProcessor(
        small_tokenizer(), config, statistics or Statistics(Normalizer.identity((4,)), Normalizer.identity((5, 3)))
    )


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_batch_has_one_row_per_sample_and_marks_what_is_missing() -> None:
    processor = make_processor()
    batch = processor(
        [{'scene': picture(), 'wrist': picture(1)}, {'scene': picture(2), 'wrist': None}],
        [{'scene': K, 'wrist': None}, {'scene': K}],
        np.zeros((2, 4)),
        ['reach the red cube', 'go'],
    )
    assert batch['pixel_values'].shape == (2, 2, 3, 28, 28) and batch['pixel_values'].dtype == torch.uint8
    assert batch['image_masks'].tolist() == [[True, True], [True, False]]
    assert batch['intrinsic_mask'].tolist() == [[True, False], [True, False]]
    expected = ImageTransform.fit((64, 48), (28, 28), 'stretch').intrinsics(K)
    np.testing.assert_allclose(batch['intrinsic'][0, 0].numpy(), expected, rtol=1e-6)
    assert batch['image_token_mask'].sum(1).tolist() == [8, 8]
    assert torch.equal(batch['image_token_mask'], batch['input_ids'] == -200)
    lengths = batch['attention_mask'].sum(1)
    assert lengths[0] > lengths[1] and (batch['input_ids'][1, int(lengths[1]) :] == processor.tokenizer.pad_token_id).all()


@pytest.mark.parametrize('separator', ['\n', '\n '])
def test_prompt_is_the_vicuna_template_with_images_before_the_question(separator: str) -> None:
    processor = make_processor(system=VICUNA_SYSTEM, separator=separator)
    ids = processor.prompt_batch(['pick the cup'])['input_ids'][0]
    start = int((ids == -200).nonzero()[0])
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(ids[1:start]) == f'{VICUNA_SYSTEM} USER: '
    assert processor.tokenizer.decode(ids[start + 8 :]) == f'{separator}pick the cup ASSISTANT:'


@pytest.mark.parametrize('separator', ['\n', '\n '])
def test_words_of_the_instruction_are_marked_and_the_template_is_not(separator: str) -> None:
    processor = make_processor(system=VICUNA_SYSTEM, separator=separator)
    for instruction in ('pick the cup', '  hebe die Flasche ☃ ', 'USER: ASSISTANT:'):
        batch = processor.prompt_batch([instruction, 'go'])
        row, marked = batch['input_ids'][0], batch['instruction_token_mask'][0]
        assert processor.tokenizer.decode(row[marked]).strip() == instruction.strip()
        assert not (batch['instruction_token_mask'] & (batch['image_token_mask'] | ~batch['attention_mask'].bool())).any()


def test_common_words_are_single_tokens() -> None:
    assert len(small_tokenizer().tokenize(' reach the yellow cylinder')) == 4


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_no_instruction_loses_information(text: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert all(0 <= token < len(tokenizer) for token in ids)
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


TOKENIZER = small_tokenizer()


def test_tokenizer_is_the_same_every_time() -> None:
    assert small_tokenizer().get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize('mode', ['zscore', 'quantile', 'minmax', 'identity'])
@pytest.mark.parametrize('delta', [False, True])
def test_actions_survive_normalising_and_back(mode: str, delta: bool) -> None:
    rng = np.random.default_rng(0)
    state, actions = rng.normal(size=(40, 4)), 3 + 2 * rng.normal(size=(40, 5, 3))
    plain = make_processor(delta=delta)
    statistics = Statistics(Normalizer.fit(mode, state), Normalizer.fit(mode, plain.relative_actions(actions, state)))
    processor = make_processor(delta=delta, statistics=statistics)
    normalised = processor.normalize_actions(actions, state)
    np.testing.assert_allclose(processor.unnormalize_actions(normalised, state), actions, atol=1e-5)
    if mode == 'zscore':
        assert float(normalised.std()) == pytest.approx(1.0, abs=1e-3)
    if mode == 'minmax':
        assert float(normalised.abs().max()) == pytest.approx(1.0, abs=1e-6)


def test_delta_is_relative_to_the_observed_state_where_the_mask_says() -> None:
    processor = make_processor(delta=True)
    state = np.array([[1.0, 2.0, 3.0, 4.0]])
    absolute = processor.unnormalize_actions(torch.zeros(1, 5, 3), state)
    np.testing.assert_array_equal(absolute[0, 0], [1.0, 3.0, 0.0])


def test_a_constant_element_is_shifted_but_not_blown_up() -> None:
    normalizer = Normalizer.fit('zscore', np.array([[1.0, 5.0], [3.0, 5.0]]))
    np.testing.assert_allclose(normalizer.normalize(np.array([2.0, 5.1])), [0.0, 0.1], atol=1e-12)


def test_saved_processor_is_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    statistics = Statistics(
        Normalizer.fit('zscore', rng.normal(size=(9, 4))), Normalizer.fit('quantile', rng.normal(size=(9, 5, 3)))
    )
    processor = make_processor(delta=True, statistics=statistics, system=VICUNA_SYSTEM)
    processor.save_pretrained(tmp_path)
    again = MapAnythingLlava3DProcessor.from_pretrained(tmp_path)
    assert again.config == processor.config
    assert again.statistics.digest == statistics.digest
    given_ = ([{'scene': picture(), 'wrist': picture(1)}], [{'scene': K}], np.ones((1, 4)), ['reach the ☃'])
    first, second = processor(*given_), again(*given_)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_different_statistics_have_different_hashes() -> None:
    one = Statistics(Normalizer.identity((4,)), Normalizer.identity((5, 3)))
    other = Statistics(Normalizer('identity', np.zeros(4), np.ones(4) * 1.0000001), Normalizer.identity((5, 3)))
    assert one.digest != other.digest


def test_what_the_processor_cannot_use_is_refused() -> None:
    processor = make_processor()
    with pytest.raises(ValueError, match="'side' is not one of scene, wrist"):
        processor.prepare_views({'side': picture()}, {})
    with pytest.raises(ValueError, match=r'\(1, 3\)'):
        processor.normalize_state(np.zeros((1, 3)))
    with pytest.raises(ValueError, match='not finite'):
        processor.normalize_state(np.array([[0.0, np.nan, 0.0, 0.0]]))
    with pytest.raises(ValueError, match='action statistics'):
        make_processor(statistics=Statistics(Normalizer.identity((4,)), Normalizer.identity((4, 3))))
    with pytest.raises(ValueError, match=r"'robust'.*zscore"):
        Normalizer.fit('robust', np.zeros((2, 4)))
    for text, message in (
        ('{}', 'statistics'),
        ('{"state": {"mode": "zscore"}, "action": {}}', 'state'),
        ('no json', 'statistics'),
    ):
        with pytest.raises(ValueError, match=message):
            Statistics.from_json(text)
