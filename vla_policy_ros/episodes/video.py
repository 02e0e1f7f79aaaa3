"""Frames of video files, decoded one at a time, and written one at a time, through PyAV.

A frame is found by its time in the file, not by counting, so that a file that begins late or lacks a frame is noticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

# Encoder to its options. Two frames per group of pictures make any frame cheap to reach.
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    'h264': ('libx264', {'crf': '18', 'preset': 'veryfast', 'g': '2', 'bf': '0'}),
    'av1': ('libsvtav1', {'crf': '24', 'preset': '10', 'g': '2'}),
}
CODECS = ('auto', *ENCODERS)


class VideoError(ValueError):
    """A video that cannot be read or written; the message names the file and the frame."""


def frames(path: Path, fps: float, indices: Sequence[int], begin_s: float = 0.0) -> Iterator[NDArray[np.uint8]]:
    """RGB frames uint8 ``[H, W, 3]`` at the times ``begin_s + index / fps`` of a file, for increasing ``indices``.

    Raises:
        VideoError: the file is missing or damaged, or has no frame at one of the times.
    """
    if not len(indices):
        return
    if not path.is_file():
        raise VideoError(f'video {path} is missing; fetch or convert the dataset again')
    found = 0
    try:
        for index, frame in _numbered(path, fps, begin_s, indices[0]):
            if index > indices[found]:
                break
            if index == indices[found]:
                yield np.asarray(frame.to_ndarray(format='rgb24'), dtype=np.uint8)
                found += 1
                if found == len(indices):
                    return
    except (FFmpegError, EOFError) as error:
        raise VideoError(f'video {path} cannot be decoded at frame {indices[found]} ({error}); fetch the dataset again') from error
    raise VideoError(
        f'video {path} has no frame at {begin_s + indices[found] / fps:.3f} s (frame {indices[found]} at {fps:g} Hz): '
        'it is shorter than the table, or of another rate; fetch or convert the dataset again'
    )


def _numbered(path: Path, fps: float, begin_s: float, first: int) -> Iterator[tuple[int, Any]]:
    """(index, frame) from the key frame before ``first`` on."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError(f'{path} holds no video')
        stream = container.streams.video[0]
        stream.thread_type = 'NONE'
        start_s = begin_s + first / fps
        if start_s > 0.0:
            container.seek(round(start_s / stream.time_base), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is not None:
                yield round((float(frame.pts * stream.time_base) - begin_s) * fps), frame


def choose_codec(codec: str) -> str:
    """The codec to write with: ``codec``, or for ``auto`` the first that this PyAV can encode. Raises VideoError."""
    known = [name for name, (encoder, _) in ENCODERS.items() if encoder in av.codecs_available]
    if codec == 'auto' and known:
        return known[0]
    if codec not in known:
        raise VideoError(f'codec {codec!r} cannot be encoded here; use one of {", ".join(["auto", *known])}')
    return codec


class VideoWriter:
    """One mp4 file of RGB frames at a constant rate.

    Args:
        path: the file; its folder must exist.
        codec: one of `ENCODERS`.
        fps, width, height: of all frames.

    Attributes:
        count: frames so far; ``size_bytes``: what they take. The file itself appears when the encoder lets go of the first.
    """

    def __init__(self, path: Path, codec: str, fps: int, width: int, height: int) -> None:
        encoder, options = ENCODERS[codec]
        self.path, self.fps, self.size = path, fps, (width, height)
        # Chroma at half the resolution needs even sides.
        self.pixel_format = 'yuv420p' if width % 2 == 0 and height % 2 == 0 else 'yuv444p'
        self.count = self.size_bytes = 0
        self._container = av.open(str(path), 'w', format='mp4')
        self._stream = self._container.add_stream(encoder, rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self.pixel_format
        self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, fps)
        self._stream.codec_context.thread_count = 1
        _open(self._stream.codec_context)

    def add(self, rgb: NDArray[np.uint8]) -> None:
        """Append a frame. Raises VideoError for one of another size."""
        if (rgb.shape[1], rgb.shape[0]) != self.size:
            raise VideoError(f'{self.path.name} has images of {self.size[0]}x{self.size[1]}, not {rgb.shape[1]}x{rgb.shape[0]}')
        frame = av.VideoFrame.from_ndarray(rgb, format='rgb24')
        frame.pts, frame.time_base = self.count, Fraction(1, self.fps)
        self._mux(frame)
        self.count += 1

    def close(self) -> None:
        """Finish the file."""
        self._mux(None)
        self._container.close()

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self.size_bytes += packet.size
            self._container.mux(packet)

    def abort(self) -> None:
        """Close the file without finishing it."""
        self._container.close()


def _open(codec: Any) -> None:
    """Open an encoder and leave the scheduling of this process as it is.

    SVT-AV1, opened by root, makes the calling thread and its own ones real-time (SCHED_FIFO, the highest priority). That starves
    the rest of the machine, and whatever the caller starts afterwards inherits it; the C library remembers it even where the kernel
    has been told otherwise. So the caller is a thread that ends at once, and the encoder's are reset.
    """
    before = _threads()
    with ThreadPoolExecutor(1) as passing:
        passing.submit(codec.open).result()
    if hasattr(os, 'sched_setscheduler'):
        policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
        for thread in _threads() - before:
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, policy, parameters)


def _threads() -> set[int]:
    """Of this process, as Linux numbers them; elsewhere none."""
    tasks = Path('/proc/self/task')
    return {int(task.name) for task in tasks.iterdir()} if tasks.is_dir() else set()
