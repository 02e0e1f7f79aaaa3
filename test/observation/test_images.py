"""Every encoding that is promised decodes to the same RGB; what cannot be read is refused with the offending value."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from fake_messages import compressed, image

from vla_policy_ros.observation.images import ImageError, decode_compressed, decode_image

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ALPHA = np.full((6, 8, 1), 255, np.uint8)
GRAY = RGB[..., :1]
WIDE = RGB.astype(np.uint16) * 256 + 77


@pytest.mark.parametrize('padding', [0, 5])
@pytest.mark.parametrize(
    ('encoding', 'pixels', 'expected'),
    [
        ('rgb8', RGB, RGB),
        ('bgr8', RGB[..., ::-1], RGB),
        ('rgba8', np.concatenate([RGB, ALPHA], -1), RGB),
        ('bgra8', np.concatenate([RGB[..., ::-1], ALPHA], -1), RGB),
        ('mono8', GRAY, np.repeat(GRAY, 3, -1)),
        ('rgb16', WIDE, RGB),
        ('bgr16', WIDE[..., ::-1], RGB),
        ('mono16', WIDE[..., :1], np.repeat(GRAY, 3, -1)),
    ],
)
def test_decodes_to_rgb_whatever_the_row_padding(encoding, pixels, expected, padding):
    np.testing.assert_array_equal(decode_image(image(pixels, encoding, padding=padding)), expected)


def test_big_endian_16_bit_equals_little_endian():
    little, big = (decode_image(image(WIDE, 'rgb16', big_endian=flag)) for flag in (False, True))
    np.testing.assert_array_equal(little, big)
    np.testing.assert_array_equal(big, RGB)


@pytest.mark.parametrize(
    ('encoding', 'first_two_rows'),
    [('bayer_rggb8', 'RGGB'), ('bayer_bggr8', 'BGGR'), ('bayer_gbrg8', 'GBRG'), ('bayer_grbg8', 'GRBG')],
)
def test_bayer_patterns_are_named_by_their_first_pixels(encoding, first_two_rows):
    colour = {'R': 200, 'G': 100, 'B': 30}
    tile = np.array([colour[c] for c in first_two_rows], np.uint8).reshape(2, 2)
    rgb = decode_image(image(np.tile(tile, (4, 4))[..., None], encoding))
    np.testing.assert_allclose(rgb[2:-2, 2:-2].reshape(-1, 3).mean(0), [200, 100, 30], atol=2)


def test_yuv422_orders_differ():
    uyvy = np.tile(np.array([90, 120, 200, 120], np.uint8), (4, 4)).reshape(4, 8, 2)
    yuyv = uyvy[..., ::-1]
    np.testing.assert_array_equal(decode_image(image(uyvy, 'yuv422')), decode_image(image(yuyv, 'yuv422_yuy2')))


def test_jpeg_and_16_bit_png_decode():
    smooth = np.full((16, 16, 3), (200, 60, 20), np.uint8)
    jpeg = cv2.imencode('.jpg', smooth[..., ::-1])[1].tobytes()
    np.testing.assert_allclose(decode_compressed(compressed(jpeg)).astype(int), smooth.astype(int), atol=4)
    png = cv2.imencode('.png', WIDE[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode_compressed(compressed(png, 'png')), RGB)


def _broken(**changes):
    message = image(RGB)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ('message', 'names'),
    [
        (_broken(encoding='32FC1'), '32FC1'),
        (_broken(encoding='pink'), 'pink'),
        (_broken(step=10), 'step is 10'),
        (_broken(data=b'123'), '3 bytes'),
        (_broken(height=0), '8x0'),
    ],
)
def test_unreadable_images_are_refused_by_name(message, names):
    with pytest.raises(ImageError, match=names):
        decode_image(message)


@pytest.mark.parametrize(('data', 'format'), [(b'', 'jpeg'), (b'not a picture', 'jpeg'), (b'x', '16UC1; compressedDepth png')])
def test_unreadable_compressed_images_are_refused_by_name(data, format):
    with pytest.raises(ImageError, match='compressed'):
        decode_compressed(compressed(data, format))
