"""Image messages to RGB arrays, honouring row padding, byte order and bit depth.

The encodings are those of ``sensor_msgs/image_encodings.hpp``. Depth images are refused: the policy looks at colour.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Encoding to (channels in the message, dtype, OpenCV conversion to RGB or None where the pixels are RGB already).
# ROS names a Bayer pattern by its first two pixels, OpenCV by the second row's, so that rggb is OpenCV's BG.
_ENCODINGS: dict[str, tuple[int, str, int | None]] = {
    'rgb8': (3, 'u1', None),
    '8UC3': (3, 'u1', cv2.COLOR_BGR2RGB),
    'bgr8': (3, 'u1', cv2.COLOR_BGR2RGB),
    'rgba8': (4, 'u1', cv2.COLOR_RGBA2RGB),
    'bgra8': (4, 'u1', cv2.COLOR_BGRA2RGB),
    '8UC4': (4, 'u1', cv2.COLOR_BGRA2RGB),
    'mono8': (1, 'u1', cv2.COLOR_GRAY2RGB),
    '8UC1': (1, 'u1', cv2.COLOR_GRAY2RGB),
    'rgb16': (3, 'u2', None),
    'bgr16': (3, 'u2', cv2.COLOR_BGR2RGB),
    'rgba16': (4, 'u2', cv2.COLOR_RGBA2RGB),
    'bgra16': (4, 'u2', cv2.COLOR_BGRA2RGB),
    'mono16': (1, 'u2', cv2.COLOR_GRAY2RGB),
    'bayer_rggb8': (1, 'u1', cv2.COLOR_BayerBG2RGB),
    'bayer_bggr8': (1, 'u1', cv2.COLOR_BayerRG2RGB),
    'bayer_gbrg8': (1, 'u1', cv2.COLOR_BayerGR2RGB),
    'bayer_grbg8': (1, 'u1', cv2.COLOR_BayerGB2RGB),
    'yuv422': (2, 'u1', cv2.COLOR_YUV2RGB_UYVY),
    'uyvy': (2, 'u1', cv2.COLOR_YUV2RGB_UYVY),
    'yuv422_yuy2': (2, 'u1', cv2.COLOR_YUV2RGB_YUYV),
    'yuyv': (2, 'u1', cv2.COLOR_YUV2RGB_YUYV),
}


class ImageError(ValueError):
    """An image message that cannot be used; the message names the offending value."""


def check_image(message: Any) -> None:
    """Check that a sensor_msgs/Image can be decoded, without touching its pixels.

    Raises:
        ImageError: unknown or depth encoding, an empty image, a `step` smaller than a row, or data of the wrong length.
    """
    encoding, height, width, step = message.encoding, int(message.height), int(message.width), int(message.step)
    if encoding not in _ENCODINGS:
        raise ImageError(f'image encoding {encoding!r} is not a colour image that can be read; use one of {", ".join(_ENCODINGS)}')
    if height == 0 or width == 0:
        raise ImageError(f'image is empty ({width}x{height})')
    channels, kind, _ = _ENCODINGS[encoding]
    if channels == 2 and width % 2:
        raise ImageError(f'image has encoding {encoding}, which shares colour between two pixels, but the odd width {width}')
    row = width * channels * np.dtype(kind).itemsize
    if step < row:
        raise ImageError(f'image step is {step} bytes, but a row of {width} {encoding} pixels has {row}')
    if len(message.data) != step * height:
        raise ImageError(f'image data has {len(message.data)} bytes, but step x height is {step} x {height} = {step * height}')


def decode_image(message: Any) -> NDArray[np.uint8]:
    """RGB uint8 ``[H, W, 3]`` of a sensor_msgs/Image. 16-bit images keep their upper byte. Raises ImageError."""
    check_image(message)
    channels, kind, conversion = _ENCODINGS[message.encoding]
    dtype = np.dtype(kind).newbyteorder('>' if message.is_bigendian else '<')
    height, width = int(message.height), int(message.width)
    padded = np.frombuffer(message.data, dtype=np.uint8).reshape(height, int(message.step))
    rows = np.ascontiguousarray(padded[:, : width * channels * dtype.itemsize])
    pixels = rows.view(dtype).reshape(height, width, channels)
    if kind == 'u2':
        pixels = (pixels >> 8).astype(np.uint8)
    if conversion is None:
        return pixels
    return np.asarray(cv2.cvtColor(pixels[..., 0] if channels == 1 else pixels, conversion), dtype=np.uint8)


def decode_compressed(message: Any) -> NDArray[np.uint8]:
    """RGB uint8 ``[H, W, 3]`` of a sensor_msgs/CompressedImage (JPEG, PNG, ...); 16-bit PNGs keep their upper byte.

    Raises:
        ImageError: a compressedDepth message, no data, or data that is not an image.
    """
    if 'compressedDepth' in message.format:
        raise ImageError(f'compressed image format {message.format!r} is a depth image; give the colour topic')
    data = np.frombuffer(message.data, dtype=np.uint8)
    pixels = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if pixels is None:
        raise ImageError(f'compressed image of format {message.format!r} with {data.size} bytes cannot be decoded')
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)
