"""What one pass through the node costs, stage by stage: CPU and wall milliseconds on one thread.

`python benchmarks/stages.py` prints a table, `--json FILE` (or `-`) gives numbers. Compare stages within one run only: machines are
noisy, and nothing here is ever a test.
"""

from __future__ import annotations

import os

os.environ['OMP_NUM_THREADS'] = '1'

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.observation.images import decode_image
from vla_policy_ros.policy import Policy
from vla_policy_ros.resources import checkpoint_path, robot_path
from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim.dataset import examples
from vla_policy_ros.types import CameraView


def measure(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, CPU ms and wall ms of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def image_message(view: CameraView) -> SimpleNamespace:
    """What a camera driver would publish: rgb8 with row padding."""
    height, width = view.rgb.shape[:2]
    rows = np.pad(view.rgb.reshape(height, width * 3), ((0, 0), (0, 64)))
    return SimpleNamespace(
        height=height, width=width, encoding='rgb8', is_bigendian=0, step=rows.shape[1], data=memoryview(rows.tobytes())
    )


def run(repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU ms, wall ms) of every stage, interleaved, after a warm-up."""
    torch.set_num_threads(1)
    robot = load_robot(robot_path('tabletop'))
    policy = Policy.load(checkpoint_path('tabletop'), robot, seed=0)
    policy.warm_up()
    planner = TrajectoryPlanner(JointLimits.from_robot(robot), Emission.for_controller(100.0, 'start'))
    costs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for example in examples(robot, seed=1, count=repeats):
        observation = example.observation
        messages = [image_message(view) for view in observation.cameras.values()]
        _, cpu, wall = measure(lambda messages=messages: [decode_image(message) for message in messages])
        costs['decode'].append((cpu, wall))
        chunk, cpu, wall = measure(lambda observation=observation: policy.infer(observation))
        costs['infer'].append((cpu, wall))
        now_ns = observation.stamp_ns + round(1e6 * wall)
        commanded = CommandedMotion.from_rest(robot.action.joints, robot.action_positions(observation.state), now_ns)
        _, cpu, wall = measure(lambda chunk=chunk, now=now_ns, motion=commanded: planner.plan(chunk, now, motion))
        costs['plan'].append((cpu, wall))
    return costs


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--repeats', type=int, default=60)
    parser.add_argument('--json', default='', help="file to write, '-' for standard output")
    arguments = parser.parse_args()
    costs = run(arguments.repeats)
    numbers = {
        stage: {
            'cpu_ms_p50': round(float(np.median([cpu for cpu, _ in rows])), 3),
            'wall_ms_p50': round(float(np.median([wall for _, wall in rows])), 3),
            'wall_ms_p90': round(float(np.percentile([wall for _, wall in rows], 90)), 3),
        }
        for stage, rows in costs.items()
    }
    if arguments.json == '-':
        print(json.dumps(numbers, indent=1))
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(numbers, indent=1) + '\n')
    print(f'{"stage":10} {"cpu p50":>9} {"wall p50":>9} {"wall p90":>9}   ms, {arguments.repeats} repeats, 1 thread')
    for stage, row in numbers.items():
        print(f'{stage:10} {row["cpu_ms_p50"]:9.2f} {row["wall_ms_p50"]:9.2f} {row["wall_ms_p90"]:9.2f}')


if __name__ == '__main__':
    sys.exit(main())
