"""Messages with the attributes of sensor_msgs, for tests of code that reads them by attribute only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def stamp(ns: int) -> SimpleNamespace:
    return SimpleNamespace(sec=ns // 10**9, nanosec=ns % 10**9)


def image(pixels: np.ndarray, encoding: str = 'rgb8', stamp_ns: int = 10**9, padding: int = 0, big_endian: bool = False) -> Any:
    """A sensor_msgs/Image of ``pixels``, each row followed by ``padding`` bytes of rubbish."""
    if pixels.dtype.itemsize == 2:
        pixels = pixels.astype('>u2' if big_endian else '<u2')
    rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(pixels.shape[0], -1)
    padded = np.concatenate([rows, np.full((len(rows), padding), 0xAB, np.uint8)], axis=1)
    return SimpleNamespace(
        header=SimpleNamespace(stamp=stamp(stamp_ns)),
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=int(big_endian),
        step=padded.shape[1],
        data=padded.tobytes(),
    )


def compressed(data: bytes, format: str = 'jpeg', stamp_ns: int = 10**9) -> Any:
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp(stamp_ns)), format=format, data=data)


def camera_info(width: int = 64, height: int = 48, K: list[float] | None = None, stamp_ns: int = 10**9, **changes: Any) -> Any:
    message = SimpleNamespace(
        header=SimpleNamespace(stamp=stamp(stamp_ns)),
        width=width,
        height=height,
        k=K if K is not None else [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0],
        binning_x=0,
        binning_y=0,
        roi=SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0),
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def joint_state(names: list[str], positions: list[float], stamp_ns: int = 10**9, velocities: list[float] | None = None) -> Any:
    return SimpleNamespace(
        header=SimpleNamespace(stamp=stamp(stamp_ns)), name=names, position=positions, velocity=velocities or [], effort=[]
    )
