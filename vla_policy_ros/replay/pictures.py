"""What a replay looks at in the pictures themselves: frames that show nothing new, calibrations that look made up, and small copies
of the moments at which the policy erred most.

Pictures pass one at a time; a small copy of each camera's last one is kept, and a handful of JPEGs.
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.episodes.quality import STALE_LEVELS
from vla_policy_ros.observation.images import ImageError, decode_image
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S, ActionChunk, Observation

_SHRINK = 8
_THUMBNAIL_WIDTH = 200
_MOMENTS = 6
_APART_NS = NS_PER_S


class StalePictures:
    """Counts pictures that show what the one before showed, as messages; as `episodes.quality.StaleCounter` does decoded ones.

    A JPEG is decoded at an eighth of its size, which costs a tenth of decoding it whole.
    """

    def __init__(self, robot: Robot) -> None:
        self._robot = robot
        self._last: dict[str, NDArray[np.float32]] = {}
        self.seen: dict[str, int] = dict.fromkeys(robot.cameras, 0)
        self.stale: dict[str, int] = dict.fromkeys(robot.cameras, 0)

    def add(self, camera: str, message: Any) -> None:
        """Look at the next message of a camera; one that cannot be decoded is left to those who need it."""
        small = self._small(camera, message)
        if small is None:
            return
        before = self._last.get(camera)
        self.seen[camera] += 1
        if before is not None and before.shape == small.shape and np.abs(small - before).mean() < STALE_LEVELS:
            self.stale[camera] += 1
        self._last[camera] = small

    def _small(self, camera: str, message: Any) -> NDArray[np.float32] | None:
        if self._robot.cameras[camera].transport == 'compressed':
            data = np.frombuffer(message.data, dtype=np.uint8)
            grey = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8) if data.size else None
            return None if grey is None else grey.astype(np.float32)
        try:
            rgb = decode_image(message)
        except ImageError:
            return None
        size = (max(1, rgb.shape[1] // _SHRINK), max(1, rgb.shape[0] // _SHRINK))
        return cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA).astype(np.float32)


@dataclass(frozen=True)
class Moment:
    """A moment of a large error, with small JPEGs of what the cameras saw.

    Attributes:
        time_ns: stamp of the observation.
        error: mean absolute error of its chunk.
        pictures: camera name to JPEG, base64.
    """

    time_ns: int
    error: float
    pictures: dict[str, str]


class WorstMoments:
    """Keeps the moments with the largest errors, no two of them within a second.

    Args:
        error_of: the mean absolute error of a chunk, None where nothing is known to compare it with.
    """

    def __init__(self, error_of: Callable[[ActionChunk], float | None]) -> None:
        self._error_of = error_of
        self._kept: list[tuple[float, int, Moment]] = []

    def __call__(self, observation: Observation, chunk: ActionChunk) -> None:
        """An observation and its answer."""
        error = self._error_of(chunk)
        if error is None or not np.isfinite(error):
            return
        near = [entry for entry in self._kept if abs(entry[2].time_ns - observation.stamp_ns) < _APART_NS]
        if any(entry[0] >= error for entry in near) or (not near and self._full and error <= self._kept[0][0]):
            return
        self._kept = [entry for entry in self._kept if entry not in near]
        pictures = {name: _thumbnail(view.rgb) for name, view in observation.cameras.items()}
        heapq.heapify(self._kept)
        heapq.heappush(self._kept, (error, observation.stamp_ns, Moment(observation.stamp_ns, error, pictures)))
        if len(self._kept) > _MOMENTS:
            heapq.heappop(self._kept)

    @property
    def _full(self) -> bool:
        return len(self._kept) >= _MOMENTS

    @property
    def moments(self) -> list[Moment]:
        """In order of time."""
        return sorted((moment for _, _, moment in self._kept), key=lambda moment: moment.time_ns)


def _thumbnail(rgb: NDArray[np.uint8]) -> str:
    height = max(1, round(rgb.shape[0] * _THUMBNAIL_WIDTH / rgb.shape[1]))
    small = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), (_THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data.tobytes()).decode('ascii')


def ideal_calibration(message: Any) -> str | None:
    """Why a sensor_msgs/CameraInfo looks made up rather than measured, or None: no real camera is that regular."""
    fx, _, cx, _, fy, cy = (float(value) for value in list(message.k)[:6])
    centred = any(
        abs(cx - (message.width - shift) / 2) < 1e-6 and abs(cy - (message.height - shift) / 2) < 1e-6 for shift in (0.0, 1.0)
    )
    if fx == fy and centred and not np.any(np.asarray(message.d, dtype=np.float64)):
        return f'fx = fy = {fx:g}, the principal point is exactly in the middle, and there is no distortion'
    return None
