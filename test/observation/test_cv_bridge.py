"""Where cv_bridge is installed, our decoder gives the pixels that it gives (for messages without its known limits)."""

from __future__ import annotations

import numpy as np
import pytest

cv_bridge = pytest.importorskip('cv_bridge', reason='cv_bridge comes with ROS 2, not as a usable wheel')

from vla_policy_ros.observation.images import decode_compressed, decode_image  # noqa: E402

RGB = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(('encoding', 'pixels'), [('rgb8', RGB), ('bgr8', RGB[..., ::-1]), ('mono8', RGB[..., 0])])
def test_images_decode_as_cv_bridge_decodes_them(encoding: str, pixels: np.ndarray) -> None:
    bridge = cv_bridge.CvBridge()
    message = bridge.cv2_to_imgmsg(np.ascontiguousarray(pixels), encoding)
    np.testing.assert_array_equal(decode_image(message), bridge.imgmsg_to_cv2(message, 'rgb8'))


def test_compressed_images_decode_as_cv_bridge_decodes_them() -> None:
    bridge = cv_bridge.CvBridge()
    message = bridge.cv2_to_compressed_imgmsg(RGB, 'png')
    np.testing.assert_array_equal(decode_compressed(message), bridge.compressed_imgmsg_to_cv2(message, 'rgb8'))
