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
from functools import partial
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
from vla_policy_ros.types import ActionChunk, CameraView


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
    plan_long_chunks(costs, 3 * repeats)
    return costs


def plan_long_chunks(costs: dict[str, list[tuple[float, float]]], repeats: int) -> None:
    """Chunks of 50 actions at 30 Hz for 7 joints, replanned every 200 ms in motion: executed as they are, followed because they are
    too fast, and followed because jerk is limited. The grid of the knots is 50 Hz, and every extremum between them is checked."""
    names = tuple(f'joint{index}' for index in range(7))
    ones = np.ones(7)
    for stage, amplitude, jerk in (('plan50', 0.3, None), ('plan50 fast', 1.0, None), ('plan50 jerk', 0.3, 60.0 * ones)):
        limits = JointLimits(names, -2.8 * ones, 2.8 * ones, 1.5 * ones, 5.0 * ones, jerk)
        planner = TrajectoryPlanner(limits, Emission.for_controller(100.0, 'start'))
        rng = np.random.default_rng(0)
        now_ns = 10**9
        commanded = CommandedMotion.from_rest(names, np.zeros(7), now_ns)
        for _ in range(repeats):
            now_ns += 200_000_000
            times = (now_ns - 100_000_000 - 10**9) * 1e-9 + np.arange(1, 51)[:, None] / 30.0
            actions = amplitude * (np.sin(1.6 * times + np.arange(7)) - np.sin(np.arange(7))) + rng.normal(0, 0.005, 7)
            stamp_ns = now_ns - 100_000_000
            chunk = ActionChunk(stamp_ns + 33_333_333, 33_333_333, names, actions, stamp_ns, '')
            plan, cpu, wall = measure(partial(planner.plan, chunk, now_ns, commanded))
            if plan.trajectory is None:
                raise RuntimeError(plan.reason)
            commanded.accept(plan.trajectory, plan.raw)
            costs[stage].append((cpu, wall))


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
    print(f'{"stage":12} {"cpu p50":>9} {"wall p50":>9} {"wall p90":>9}   ms, {arguments.repeats} repeats, 1 thread')
    for stage, row in numbers.items():
        print(f'{stage:12} {row["cpu_ms_p50"]:9.2f} {row["wall_ms_p50"]:9.2f} {row["wall_ms_p90"]:9.2f}')


if __name__ == '__main__':
    sys.exit(main())
