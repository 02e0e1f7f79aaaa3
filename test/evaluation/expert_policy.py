"""A policy that knows where everything is: the simulator's expert behind the interface of a policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.tasks import TASKS, Episode, TaskState
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import ActionChunk, KnownActions, Observation


class Expert:
    """Answers with the expert's chunk towards a target slot, or with what ``spoil`` makes of it. Remembers what it was shown."""

    def __init__(self, robot: Robot, episode: Episode, spoil: Callable[[np.ndarray], np.ndarray] = lambda actions: actions) -> None:
        self.seen: list[Observation] = []
        self._robot, self._episode, self._spoil, self._kinematics = robot, episode, spoil, ArmKinematics()
        world = TabletopWorld()
        world.reset_to(episode.scene)
        self._places = np.stack([world.object_position(slot) for slot in range(len(world.objects))])

    def __call__(self, observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        self.seen.append(observation)
        state, rows = TaskState(observation.state, self._places), []
        for _ in range(self._robot.action.horizon):
            state = TASKS['reach'].step(self._kinematics, state, self._episode, self._robot.action.period)
            rows.append(state.q)
        action = self._robot.action
        return ActionChunk(
            observation.stamp_ns + action.period_ns,
            action.period_ns,
            action.joints,
            self._spoil(np.stack(rows)),
            observation.stamp_ns,
            observation.instruction,
        )
