"""How much memory a replay takes: a bag of many frames of two cameras, `vla-policy replay` of it, and the peak of that process.

`python benchmarks/replay_memory.py` prints it; `--frames N` per camera. The bag is made in the temporary folder and removed.
"""

from __future__ import annotations

import os

os.environ['OMP_NUM_THREADS'] = '1'

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import Robot, load_robot

STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types
WIDTH, HEIGHT, RATE = 640, 480, 10.0
BEGIN_NS = 1_700_000_000_000_000_000


def main() -> None:
    """Make the bag, replay it, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n\n')[0])
    parser.add_argument('--frames', type=int, default=2000, help='of each camera')
    parser.add_argument('--checkpoint', default='tabletop')
    parser.add_argument('--robot', default='tabletop')
    given = parser.parse_args()
    robot = load_robot(robot_path(given.robot))
    with tempfile.TemporaryDirectory() as folder:
        bag = write_bag(Path(folder) / 'bag', robot, given.frames)
        size = sum(file.stat().st_size for file in bag.iterdir())
        command = [sys.executable, '-m', 'vla_policy_ros.cli', 'replay', str(bag), '--robot', given.robot, '--checkpoint']
        began = time.perf_counter()
        subprocess.run([*command, given.checkpoint, '--out', f'{folder}/out'], check=True)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f'{given.frames} frames of {len(robot.cameras)} cameras, {WIDTH} x {HEIGHT}, {given.frames / RATE:.0f} s, '
        f'{size / 1e6:.0f} MB: replayed in {seconds:.0f} s, peak {peak:.0f} MB'
    )


def write_bag(path: Path, robot: Robot, frames: int) -> Path:
    """JPEG pictures with calibration, and joint states at 50 Hz, which are also what chunks are compared with."""
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        links: dict[str, tuple[object, str]] = {}

        def put(topic: str, kind: str, stamp_ns: int, message: object) -> None:
            if topic not in links:
                links[topic] = (writer.add_connection(topic, kind, typestore=STORE), kind)
            connection, _ = links[topic]
            writer.write(connection, stamp_ns, STORE.serialize_cdr(message, kind))  # type: ignore[arg-type]

        put(robot.instruction.topic, 'std_msgs/msg/String', BEGIN_NS, TYPES['std_msgs/msg/String'](data='reach the red cube'))
        for frame in range(frames):
            stamp_ns = BEGIN_NS + round(1e9 * frame / RATE)
            for name in robot.cameras:
                camera = robot.cameras[name]
                put(camera.topic + '/compressed', 'sensor_msgs/msg/CompressedImage', stamp_ns, _picture(frame, stamp_ns))
                put(str(camera.camera_info), 'sensor_msgs/msg/CameraInfo', stamp_ns, _calibration(stamp_ns))
            for step in range(5):
                at_ns = stamp_ns + step * 20_000_000
                put(robot.state.topic, 'sensor_msgs/msg/JointState', at_ns, _joints(robot, at_ns))
    return path


def _header(stamp_ns: int) -> object:
    stamp = TYPES['builtin_interfaces/msg/Time'](sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return TYPES['std_msgs/msg/Header'](stamp=stamp, frame_id='')


def _picture(frame: int, stamp_ns: int) -> object:
    return TYPES['sensor_msgs/msg/CompressedImage'](header=_header(stamp_ns), format='jpeg', data=_jpeg(frame % 60))


@cache
def _jpeg(frame: int) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [128 + 100 * np.sin(x / 40 + frame / 7), 128 + 100 * np.sin(y / 30 - frame / 9), np.full(x.shape, frame % 256)]
    _, data = cv2.imencode('.jpg', np.stack(waves, axis=-1).astype(np.uint8))
    return data.reshape(-1)


def _calibration(stamp_ns: int) -> object:
    roi = TYPES['sensor_msgs/msg/RegionOfInterest'](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    k = np.array([600.3, 0.0, 321.7, 0.0, 601.1, 238.9, 0.0, 0.0, 1.0])
    return TYPES['sensor_msgs/msg/CameraInfo'](
        header=_header(stamp_ns), height=HEIGHT, width=WIDTH, distortion_model='plumb_bob', d=np.zeros(5), k=k,
        r=np.eye(3).reshape(-1), p=np.zeros(12), binning_x=0, binning_y=0, roi=roi,
    )  # fmt: skip


def _joints(robot: Robot, stamp_ns: int) -> object:
    middle = np.array([np.mean(robot.limits[joint].position) for joint in robot.state.joints])
    moved = middle + 0.2 * np.sin((stamp_ns - BEGIN_NS) / 1e9 + np.arange(len(middle)))
    nothing = np.zeros(0)
    return TYPES['sensor_msgs/msg/JointState'](
        header=_header(stamp_ns), name=list(robot.state.joints), position=moved, velocity=nothing, effort=nothing
    )


if __name__ == '__main__':
    main()
