"""A small robot and recordings of it, for tests: two joints, one or two cameras, pictures that tell their number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from bag_writing import TYPES, header, joint_state, point, text, trajectory, write_bag

from vla_policy_ros.robot import Robot, parse_robot

COMMAND, STATE_TOPIC, IMAGE, INFO, TEXT = '/arm/joint_trajectory', '/joint_states', '/top', '/top/info', '/instruction'
REFERENCE = '/arm/controller_state'
WIDTH, HEIGHT, FPS = 64, 48, 10
K = (50.0, 0.0, 31.5, 0.0, 50.0, 23.5, 0.0, 0.0, 1.0)
BEGIN = 100.0  # stamps, s; receive times of `bag_writing` are far from them unless both are shifted

ROBOT_TEXT = """
name: toy
cameras:
  top: {topic: /top, camera_info: /top/info}
state: {topic: /joint_states, joints: [a, b]}
action: {joints: [a, b], period: 0.1, horizon: 4}
limits:
  a: {position: [-3, 3], velocity: 2, acceleration: 9}
  b: {position: [-3, 3], velocity: 2, acceleration: 9}
controllers:
  arm: {topic: /arm/joint_trajectory, joints: [a, b], state_topic: /arm/controller_state}
"""
ROBOT: Robot = parse_robot(ROBOT_TEXT)

Entry = tuple[str, float, Any]


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A smooth picture, different for every number below 32: survives JPEG and video."""
    y, x = np.mgrid[0:height, 0:width]
    level = 8 * (number % 32)
    return np.stack([np.full_like(x, level), 255 * x // width, 255 * y // height], axis=-1).astype(np.uint8)


def number_of(rgb: np.ndarray) -> int:
    """The number that a picture tells."""
    return round(float(rgb[..., 0].mean()) / 8)


def raw_image(number: int, at: float, **size: int) -> Any:
    rgb = picture(number, **size)
    height, width = rgb.shape[:2]
    return TYPES.types['sensor_msgs/msg/Image'](
        header=header(at), height=height, width=width, encoding='rgb8', is_bigendian=0, step=3 * width, data=rgb.reshape(-1)
    )


def compressed_image(number: int, at: float) -> Any:
    _, data = cv2.imencode('.png', cv2.cvtColor(picture(number), cv2.COLOR_RGB2BGR))
    return TYPES.types['sensor_msgs/msg/CompressedImage'](header=header(at), format='png', data=data.reshape(-1))


def info(at: float, k: Sequence[float] = K, width: int = WIDTH, height: int = HEIGHT) -> Any:
    roi = TYPES.types['sensor_msgs/msg/RegionOfInterest'](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return TYPES.types['sensor_msgs/msg/CameraInfo'](
        header=header(at), height=height, width=width, distortion_model='plumb_bob', d=np.zeros(5), k=np.array(k),
        r=np.eye(3).reshape(-1), p=np.zeros(12), binning_x=0, binning_y=0, roi=roi,
    )  # fmt: skip


def position(index: float) -> list[float]:
    """Where the joints are at step ``index``."""
    return [0.05 * index, -0.02 * index]


def target(index: float) -> list[float]:
    """What is commanded for the time of step ``index``."""
    return [0.05 * index + 0.01, -0.02 * index + 0.03]


def entries(steps: int = 12, *, start: int = 0, raw: bool = True, command: bool = True, k: Sequence[float] = K) -> list[Entry]:
    """Joint states 1 ms, commands 2 ms and pictures 20 ms after their stamps, at `FPS`; the instruction at the very beginning."""
    found: list[Entry] = [(TEXT, -0.05, text('pick up the cup'))] if start == 0 else []
    for index in range(start, start + steps):
        at = index / FPS
        stamp = BEGIN + at
        found.append((STATE_TOPIC, at + 0.001, joint_state(position(index), at=stamp)))
        if command:
            found.append((COMMAND, at + 0.002, trajectory([point(1 / FPS, target(index + 1))], at=stamp)))
        found.append((INFO, at + 0.019, info(stamp, k)))
        if raw:
            found.append((IMAGE, at + 0.02, raw_image(index, stamp)))
        else:
            found.append((IMAGE + '/compressed', at + 0.02, compressed_image(index, stamp)))
    return found


def record(path: Path, entries: Sequence[Entry], **options: Any) -> Path:
    """A bag of ``entries``, received on the clock of their stamps."""
    return write_bag(path, sorted(entries, key=lambda entry: entry[1]), begin_ns=round(BEGIN * 1e9), **options)
