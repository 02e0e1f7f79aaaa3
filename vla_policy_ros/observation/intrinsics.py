"""CameraInfo messages to the intrinsics that hold for the pixels of the published image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class IntrinsicsError(ValueError):
    """A CameraInfo that does not describe its image; the message names the offending value."""


def intrinsics_of(message: Any, width: int, height: int) -> NDArray[np.float64]:
    """K as float64 ``[3, 3]`` in pixels of a ``width`` x ``height`` image, from a sensor_msgs/CameraInfo.

    K of the message speaks about the full sensor image; a region of interest and binning, as ``CameraInfo.msg`` and
    ``image_geometry`` define them, are applied so that the result speaks about the published pixels.

    Raises:
        IntrinsicsError: K is all zeros (an uncalibrated camera), not finite, without focal length, or for another image size.
    """
    values = getattr(message, 'k', None)
    K = np.array(message.K if values is None else values, dtype=np.float64).reshape(3, 3)
    if not K.any():
        raise IntrinsicsError('camera_info K is all zeros: the camera is not calibrated; calibrate it or give K in the robot file')
    if not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0 or K[2, 2] != 1:
        raise IntrinsicsError(f'camera_info K is not a camera matrix: {K.ravel().tolist()}')
    binning = np.array([max(1, int(message.binning_x)), max(1, int(message.binning_y))])
    roi = message.roi
    size = np.array([int(roi.width) or int(message.width), int(roi.height) or int(message.height)])
    expected = size // binning
    if tuple(expected) != (width, height):
        raise IntrinsicsError(
            f'image is {width}x{height} but camera_info describes {expected[0]}x{expected[1]} pixels; '
            'publish the camera_info of this image'
        )
    K[0, 2] -= int(roi.x_offset)
    K[1, 2] -= int(roi.y_offset)
    K[0] /= binning[0]
    K[1] /= binning[1]
    return K
