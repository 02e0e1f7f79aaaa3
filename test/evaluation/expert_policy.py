"""A policy that knows where everything is: the simulator's expert behind the interface of a policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.dataset import has_gripper
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.tasks import TASKS, Episode, TaskState
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import ActionChunk, KnownActions, Observation


class Expert:
    """Answers with the chunk of the expert of an episode's task, or with what ``spoil`` makes of it.

    Attributes:
        seen: every observation that it was shown.
        world: where it looks for the objects; its own, in which they stay where the episode has put them, until it is replaced.
    """

    def __init__(self, robot: Robot, episode: Episode, spoil: Callable[[np.ndarray], np.ndarray] = lambda actions: actions) -> None:
        self.seen: list[Observation] = []
        self._robot, self._episode, self._spoil, self._kinematics = robot, episode, spoil, ArmKinematics()
        self.world = TabletopWorld(gripper=has_gripper(robot))
        self.world.reset_to(episode.scene)

    def watch(self, world: TabletopWorld) -> None:
        """Look at this world from now on."""
        self.world = world

    def __call__(self, observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        self.seen.append(observation)
        places = np.stack([self.world.object_position(slot) for slot in range(len(self.world.objects))])
        fingers = (observation.state[7], observation.state[7]) if has_gripper(self._robot) else ()
        state, rows = TaskState(observation.state[:7], places, *fingers), []
        for _ in range(self._robot.action.horizon):
            state = TASKS[self._episode.task].step(self._kinematics, state, self._episode, self._robot.action.period)
            rows.append(np.append(state.q, state.finger_target) if fingers else state.q)
        action = self._robot.action
        return ActionChunk(
            observation.stamp_ns + action.period_ns,
            action.period_ns,
            action.joints,
            self._spoil(np.stack(rows)),
            observation.stamp_ns,
            observation.instruction,
        )
