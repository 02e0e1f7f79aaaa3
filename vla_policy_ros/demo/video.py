"""Videos: all cameras side by side, and below them what the policy was told, what it did and how far it got.

Enters: a bag written by the recorder, or frame by frame what somebody else has seen. Leaves: an H.264 mp4 that browsers play, at
the speed of the clock that the frames were seen by. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader

from vla_policy_ros.observation.images import decode_compressed
from vla_policy_ros.types import NS_PER_S

VIEW_HEIGHT = 480
CAPTION_HEIGHT = 80
_TIME_BASE = 90_000
_BACKGROUND, _BRIGHT, _DIM = (24, 24, 28), (240, 240, 240), (165, 165, 175)
_FONT = cv2.FONT_HERSHEY_SIMPLEX

Caption = Callable[[str, Any, int], tuple[str, str]]
"""Given a topic, its message and the log time in ns, or the first image's topic for a frame: the two caption lines from now on."""


def write_video(bag: Path, path: Path, image_topics: Sequence[str], caption: Caption) -> int:
    """Write the video and return its number of frames; no file is left where the bag has no image of every topic.

    One frame per image of the first topic, with the newest image of each other topic beside it.
    ``image_topics`` are topics of sensor_msgs/CompressedImage.
    """
    views: dict[str, NDArray[np.uint8]] = {}
    writer = VideoWriter(path)
    with AnyReader([bag]) as reader:
        for connection, time_ns, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            if connection.topic in image_topics:
                views[connection.topic] = at_height(decode_compressed(message))
            lines = caption(connection.topic, message, time_ns)
            if connection.topic == image_topics[0] and len(views) == len(image_topics):
                writer.add(captioned([views[topic] for topic in image_topics], lines), time_ns)
    return writer.close()


class VideoWriter:
    """An mp4 that opens with its first frame, whose size it takes: no frame, no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container: Any = None
        self._stream: Any = None
        self._first_ns = 0
        self._last_tick = -1
        self._count = 0

    def add(self, frame: NDArray[np.uint8], time_ns: int) -> None:
        """Append a frame that was seen at ``time_ns``; one that is not later than the frame before is left out."""
        if self._container is None:
            self._open(frame.shape[1], frame.shape[0])
            self._first_ns = time_ns
        tick = (time_ns - self._first_ns) * _TIME_BASE // NS_PER_S
        if tick <= self._last_tick:
            return
        picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
        picture.pts, picture.time_base = tick, Fraction(1, _TIME_BASE)
        self._container.mux(self._stream.encode(picture))
        self._last_tick = tick
        self._count += 1

    def close(self) -> int:
        """Finish the file; the number of its frames."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        return self._count

    def _open(self, width: int, height: int) -> None:
        self._container = av.open(str(self._path), 'w', options={'movflags': 'faststart'})
        # The rate is nominal: every frame carries its own time.
        self._stream = self._container.add_stream('libx264', rate=30, options={'preset': 'veryfast', 'crf': '23'})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, 'yuv420p'
        self._stream.codec_context.time_base = Fraction(1, _TIME_BASE)


def at_height(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image at the common height; widths are even, as the encoder wants them."""
    height, width = image.shape[:2]
    wide = max(2, round(width * VIEW_HEIGHT / height / 2) * 2)
    return image if (width, height) == (wide, VIEW_HEIGHT) else np.asarray(cv2.resize(image, (wide, VIEW_HEIGHT)), dtype=np.uint8)


def captioned(views: Sequence[NDArray[np.uint8]], lines: tuple[str, str]) -> NDArray[np.uint8]:
    """One picture: views ``[VIEW_HEIGHT, W, 3]`` in a row above a strip with two lines of text."""
    row = np.hstack(views)
    strip = np.full((CAPTION_HEIGHT, row.shape[1], 3), _BACKGROUND, dtype=np.uint8)
    for text, y, colour, scale in ((lines[0], 32, _BRIGHT, 0.8), (lines[1], 64, _DIM, 0.62)):
        cv2.putText(strip, text, (16, y), _FONT, scale, colour, 1, cv2.LINE_AA)
    return np.vstack([row, strip])
