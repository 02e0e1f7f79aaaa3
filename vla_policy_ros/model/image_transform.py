"""One geometric transform per camera that brings an image to the model's size and carries the intrinsics along.

Pixel convention: the centre of the top left pixel is (0, 0), as in OpenCV and camera_info. A resize by s maps a pixel coordinate u
to ``(u + 0.5) * s - 0.5``, which is what the resampling does to the content; the same map is applied to the intrinsics, so that a
point of the scene projects to the same place of the picture before and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

RESIZE_MODES = ('stretch', 'letterbox', 'crop')
LETTERBOX_LEVEL = 0


@dataclass(frozen=True)
class ImageTransform:
    """Cut, resample, pad, in this order; all sizes in whole pixels.

    Attributes:
        source: width and height that the transform applies to.
        cut: left, top, width and height of the part that is used.
        scaled: width and height of that part after resampling.
        pad: left and top margin inside the target.
        target: width and height of the result.
    """

    source: tuple[int, int]
    cut: tuple[int, int, int, int]
    scaled: tuple[int, int]
    pad: tuple[int, int]
    target: tuple[int, int]

    @classmethod
    def fit(cls, source: tuple[int, int], target: tuple[int, int], mode: str) -> ImageTransform:
        """The transform from ``source`` to ``target`` (width, height).

        ``stretch`` uses the whole image and ignores its aspect; ``letterbox`` keeps the aspect and pads with black; ``crop``
        keeps the aspect and cuts the longer side, centred.

        Raises:
            ValueError: a size is not positive or the mode is unknown.
        """
        if min(*source, *target) < 1:
            raise ValueError(f'image sizes must be positive, got {source} to {target}')
        width, height = source
        whole = (0, 0, width, height)
        if mode == 'stretch':
            return cls(source, whole, target, (0, 0), target)
        if mode == 'letterbox':
            scale = min(target[0] / width, target[1] / height)
            scaled = (max(1, round(width * scale)), max(1, round(height * scale)))
            return cls(source, whole, scaled, ((target[0] - scaled[0]) // 2, (target[1] - scaled[1]) // 2), target)
        if mode == 'crop':
            scale = max(target[0] / width, target[1] / height)
            used = (min(width, max(1, round(target[0] / scale))), min(height, max(1, round(target[1] / scale))))
            cut = ((width - used[0]) // 2, (height - used[1]) // 2, *used)
            return cls(source, cut, target, (0, 0), target)
        raise ValueError(f'resize mode {mode!r} is unknown; use one of {", ".join(RESIZE_MODES)}')

    @property
    def matrix(self) -> NDArray[np.float64]:
        """float64 ``[3, 3]`` that maps homogeneous source pixels to target pixels."""
        left, top, width, height = self.cut
        sx, sy = self.scaled[0] / width, self.scaled[1] / height
        return np.array(
            [
                [sx, 0.0, (0.5 - left) * sx - 0.5 + self.pad[0]],
                [0.0, sy, (0.5 - top) * sy - 0.5 + self.pad[1]],
                [0.0, 0.0, 1.0],
            ]
        )

    def intrinsics(self, K: NDArray[np.float64]) -> NDArray[np.float64]:
        """Intrinsics ``[3, 3]`` of the target for those of the source."""
        return self.matrix @ np.asarray(K, dtype=np.float64)

    def image(self, rgb: NDArray[np.uint8]) -> Tensor:
        """uint8 ``[3, H, W]`` of the target for uint8 ``[h, w, 3]``; antialiased bilinear, no copy through float.

        Raises:
            ValueError: the image is not uint8 RGB of the transform's source size.
        """
        width, height = self.source
        if rgb.dtype != np.uint8 or rgb.shape != (height, width, 3):
            raise ValueError(f'image is {rgb.dtype} {rgb.shape}; expected uint8 ({height}, {width}, 3)')
        left, top, used_width, used_height = self.cut
        part = np.require(rgb[top : top + used_height, left : left + used_width], requirements=('C', 'W'))
        pixels = torch.from_numpy(part).permute(2, 0, 1)[None]
        if (used_width, used_height) != self.scaled:
            pixels = F.interpolate(
                pixels, size=(self.scaled[1], self.scaled[0]), mode='bilinear', antialias=True, align_corners=False
            )
        if self.scaled == self.target:
            return pixels[0].contiguous()
        canvas = torch.full((3, self.target[1], self.target[0]), LETTERBOX_LEVEL, dtype=torch.uint8)
        x, y = self.pad
        canvas[:, y : y + self.scaled[1], x : x + self.scaled[0]] = pixels[0]
        return canvas
