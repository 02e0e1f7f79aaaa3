"""The scripted expert in the physics: it looks, commands the drives for one action period, and looks again.

Enters: a task, an episode, a world. Leaves: the joint targets as they are given. The thread of the world.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.tasks.base import Episode, Task, TaskState
from vla_policy_ros.sim.world import TabletopWorld

_TICK = 0.01


def play_expert(task: Task, episode: Episode, world: TabletopWorld, period: float, seconds: float) -> Iterator[NDArray[np.float64]]:
    """Targets ``[J]`` for one ``period`` (s) later, each given before the world moves on; at least two of them."""
    kinematics = ArmKinematics()
    world.reset_to(episode.scene)
    commanded = world.joint_state()[0]
    ticks = round(period / _TICK)
    for _ in range(max(2, round(seconds / period))):
        goal = _goal(task, episode, world, kinematics, commanded, period)
        yield goal
        velocity = (goal - commanded) / period
        for tick in range(1, ticks + 1):
            world.set_position_targets(commanded + velocity * tick * _TICK, velocity)
            world.step(_TICK)
        commanded = goal


def _goal(
    task: Task,
    episode: Episode,
    world: TabletopWorld,
    kinematics: ArmKinematics,
    commanded: NDArray[np.float64],
    period: float,
) -> NDArray[np.float64]:
    arm = len(episode.scene.start)
    places = np.stack([world.object_position(slot) for slot in range(len(world.objects))])
    state = TaskState(commanded[:arm], places)
    if len(commanded) > arm:
        state = TaskState(commanded[:arm], places, float(world.joint_state()[0][arm]), float(commanded[arm]))
    after = task.step(kinematics, state, episode, period)
    return np.append(after.q, after.finger_target)[: len(commanded)]
