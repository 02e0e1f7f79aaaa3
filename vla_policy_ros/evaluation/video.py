"""Videos of episodes: what the cameras saw, what the policy was told, and how far it was.

Enters: a closed loop and the seed of an episode, which is played again: it goes as it went. Leaves: an mp4. The loop's thread.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.demo.video import VideoWriter, at_height, captioned
from vla_policy_ros.evaluation.closed_loop import ClosedLoop
from vla_policy_ros.evaluation.report import EpisodeResult
from vla_policy_ros.sim.tasks import Conditions, Task
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S

_LAST_FRAME_S = 1.0


def film(loop: ClosedLoop, task: Task, variation: str, conditions: Conditions, result: EpisodeResult, path: Path) -> None:
    """Play the episode of ``result`` again and write it to ``path``; the verdict stands in the last second."""
    writer = VideoWriter(path)
    episode = task.sample(result.seed, conditions)
    views: list[NDArray[np.uint8]] = []
    time_ns = 0
    told = f'"{result.instruction}"'

    def watch(world: TabletopWorld) -> None:
        nonlocal views, time_ns
        views = [at_height(world.render(name).rgb) for name in world.camera_names]
        time_ns = world.time_ns
        error = task.measure(world, episode).error
        lines = (told, f'{time_ns / NS_PER_S:4.1f} s   {100 * error:.1f} cm to go   scene {result.seed}, {variation}')
        writer.add(captioned(views, lines), time_ns)

    try:
        loop.run(task, result.seed, conditions, watch)
        verdict = 'done' if result.success else result.failure.replace('_', ' ')
        last = captioned(views, (told, f'{verdict}, {100 * result.error:.1f} cm   scene {result.seed}, {variation}'))
        for after in (0.2, _LAST_FRAME_S):
            writer.add(last, time_ns + round(after * NS_PER_S))
    finally:
        writer.close()
