"""The scripted experts in physics, with hands and eyes as a policy has them that learnt from them.

`python benchmarks/experts.py` prints a table (about four minutes), `--json FILE` (or `-`) gives numbers. An expert who fails as
soon as somebody does what it says a little wrong is a bad teacher, however often it succeeds itself.
"""

from __future__ import annotations

import os

os.environ['OMP_NUM_THREADS'] = '1'

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vla_policy_ros.evaluation.report import wilson95
from vla_policy_ros.evaluation.seeds import scene_seeds
from vla_policy_ros.sim.tasks import TASKS, Conditions
from vla_policy_ros.sim.tasks.play import Unsteady, play_expert
from vla_policy_ros.sim.world import TabletopWorld

SCHEMA, VERSION = 'vla_policy_ros/benchmarks/experts', 1
PERIOD = 0.1
UNSTEADINESS = ((0.0, 0.0), (0.01, 0.005), (0.015, 0.01), (0.02, 0.01))
"""Hand, rad, and eye, m, of the rows of each task."""


def measure(name: str, hand: float, eye: float, episodes: int, world: TabletopWorld) -> dict[str, Any]:
    """How many scenes for choices the expert of a task succeeds in, with such a hand and eye."""
    task, ends = TASKS[name], []
    expert = Unsteady(task, np.random.default_rng(0), hand=hand, eye=eye)
    for seed in scene_seeds(0, episodes, 'choice'):
        episode = task.sample(seed, Conditions())
        for _ in play_expert(expert, episode, world, PERIOD, task.seconds):
            pass
        ends.append(task.measure(world, episode))
    successes = sum(end.success for end in ends)
    return {
        'task': name, 'hand_rad': hand, 'eye_m': eye, 'episodes': episodes, 'success_rate': successes / episodes,
        'wilson95': wilson95(successes, episodes), 'median_error_m': float(np.median([end.error for end in ends])),
    }  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table for a terminal."""
    table = Table('task', 'hand, mrad', 'eye, mm', 'success, %', 'median, cm')
    for row in rows:
        low, high = row['wilson95']
        success = f'{100 * row["success_rate"]:.0f} ({100 * low:.0f}–{100 * high:.0f})'
        numbers = (f'{1e3 * row["hand_rad"]:.0f}', f'{1e3 * row["eye_m"]:.0f}', success, f'{100 * row["median_error_m"]:.1f}')
        table.add_row(row['task'], *numbers)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main() -> int:
    """Play, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--task', action='append', choices=TASKS, help='only this one (may be repeated)')
    parser.add_argument('--episodes', type=int, default=60, help='scenes per row')
    parser.add_argument('--gripper', action='store_true', help='the arm with a gripper also for tasks that need none')
    parser.add_argument('--json', default='', help="file to write, '-' for standard output")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.task or TASKS:
        world = TabletopWorld(gripper=arguments.gripper or TASKS[name].needs_gripper)
        rows += [measure(name, hand, eye, arguments.episodes, world) for hand, eye in UNSTEADINESS]
        world.close()
    text = json.dumps({'schema': SCHEMA, 'version': VERSION, 'rows': rows}, indent=1, allow_nan=False)
    if arguments.json == '-':
        print(text)
    else:
        show(rows)
    if arguments.json not in ('', '-'):
        Path(arguments.json).write_text(text + '\n', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
