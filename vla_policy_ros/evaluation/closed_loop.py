"""Episodes in process: the policy looks, answers a chunk, the drives follow the first part of it, and the policy looks again.

The fast mode of evaluation: no ROS, no planner, no latency; a look costs nothing in simulated time. An episode depends on the
weights, the scene's seed and the settings, and on nothing that happened before it, so that episodes may run in any order and
anywhere.

Enters: a policy, a task, a scene seed. Leaves: `EpisodeResult`s. One thread, that of the world's renderer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.evaluation.probes import Probe, about_another_object
from vla_policy_ros.evaluation.report import EpisodeResult
from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.dataset import check_robot, check_task, has_gripper
from vla_policy_ros.sim.tasks import Conditions, Episode, Task
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, ActionChunk, Observation

CONTROLLER_PERIOD = 0.01
# Neighbouring episodes lie this far apart on the clock of their stamps, from which a policy draws its noise.
_APART_NS = 1000 * NS_PER_S
_BLOCK = 1 << 20
# Of a joint's range: a network that predicts the end of it errs to both sides.
_MARGIN = 0.02

Watch = Callable[[TabletopWorld], None]
"""Called before the first action and after each, with the world as it is then."""


class Infer(Protocol):
    """The policy; `Policy.infer` is one."""

    def __call__(self, observation: Observation) -> ActionChunk: ...


@dataclass(frozen=True)
class LoopSettings:
    """How episodes run.

    Attributes:
        executed: actions of each chunk that are carried out before the next look.
        seconds: simulated length of an episode; None is the task's own.
        probe: what the policy is told falsely.
    """

    executed: int = 2
    seconds: float | None = None
    probe: Probe = field(default_factory=Probe)

    def __post_init__(self) -> None:
        if self.executed < 1:
            raise ValueError(f'executed is {self.executed}; at least one action of a chunk must be carried out')
        if self.seconds is not None and not 0.1 <= self.seconds <= 600.0:
            raise ValueError(f'seconds is {self.seconds}; an episode lasts 0.1 to 600 s')


class ClosedLoop:
    """A policy and a simulated arm. Use it as a context manager, which frees the renderer.

    Args:
        infer: the policy; as an attribute, it may be replaced between episodes.
        robot: the robot file that it answers for.
        settings: see `LoopSettings`.

    Raises:
        RobotMismatch: the robot file describes something that the simulated arm is not.
        ValueError: more actions are to be executed than a chunk has.
    """

    def __init__(self, infer: Infer, robot: Robot, settings: LoopSettings) -> None:
        check_robot(robot)
        if settings.executed > robot.action.horizon:
            raise ValueError(f'executed is {settings.executed}, but a chunk of {robot.name!r} has {robot.action.horizon} actions')
        self.infer, self._robot, self._settings = infer, robot, settings
        self._limits = JointLimits.from_robot(robot)
        self._world = TabletopWorld(gripper=has_gripper(robot))
        names = list(self._world.joint_names)
        self._columns = [names.index(joint) for joint in robot.action.joints]
        self._state_columns = [names.index(joint) for joint in robot.state.joints]

    def __enter__(self) -> ClosedLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._world.close()

    def run(self, task: Task, seed: int, conditions: Conditions, watch: Watch | None = None) -> EpisodeResult:
        """The episode of a scene seed. Raises ValueError where robot, conditions or probe do not fit the task."""
        check_task(task, self._robot)
        episode = task.sample(seed, conditions)
        told = about_another_object(episode, seed) if self._settings.probe.wrong_instruction else episode
        outside = self._play(episode, told.instruction, self._settings.seconds or task.seconds, seed, watch)
        outcome = task.measure(self._world, episode)
        followed = None if told is episode else task.measure(self._world, told).success
        failure = 'limit' if outside and not outcome.success else outcome.failure
        return EpisodeResult(seed, told.instruction, outcome.success, outcome.error, failure, followed)

    def _play(self, episode: Episode, instruction: str, seconds: float, seed: int, watch: Watch | None) -> bool:
        """Whether the last chunk asked for what the robot may not do."""
        world, period = self._world, self._robot.action.period
        world.reset_to(episode.scene)
        commanded = world.joint_state()[0]
        outside = False
        if watch:
            watch(world)
        for done in range(max(1, round(seconds / period))):
            if done % self._settings.executed == 0:
                chunk = self.infer(self._observe(instruction, seed))
                actions, outside = self._allowed(chunk.actions)
            goal = commanded.copy()
            goal[self._columns] = actions[done % self._settings.executed]
            commanded = self._move(commanded, goal)
            if watch:
                watch(world)
        return outside

    def _allowed(self, actions: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
        """Actions within the position limits, and whether they were well outside; where they are not finite, the robot stays."""
        if not np.isfinite(actions).all():
            held = self._world.joint_state()[0][self._columns]
            return np.broadcast_to(held, actions.shape), True
        kept = np.clip(actions, self._limits.lower, self._limits.upper)
        margin = _MARGIN * (self._limits.upper - self._limits.lower)
        return kept, bool((np.abs(kept - actions) > margin).any())

    def _move(self, start: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.float64]:
        """Drive from ``start`` to ``goal`` in one action period, no faster than the robot may; where the command ends."""
        period = self._robot.action.period
        ticks = round(period / CONTROLLER_PERIOD)
        fastest = np.full(len(start), np.inf)
        fastest[self._columns] = self._limits.velocity
        velocity = np.clip((goal - start) / period, -fastest, fastest)
        for tick in range(1, ticks + 1):
            self._world.set_position_targets(start + velocity * tick * CONTROLLER_PERIOD, velocity)
            self._world.step(CONTROLLER_PERIOD)
        end: NDArray[np.float64] = start + velocity * period
        return end

    def _observe(self, instruction: str, seed: int) -> Observation:
        """What the node would see now."""
        world, robot = self._world, self._robot
        position, velocity = world.joint_state()
        fields = {'position': position, 'velocity': velocity}
        state = np.concatenate([fields[name][self._state_columns] for name in robot.state.fields])
        stamp = NS_PER_S + world.time_ns + seed % _BLOCK * _APART_NS
        views = {name: world.render(name) for name in robot.camera_names}
        return self._settings.probe.seen(Observation(stamp, views, state, stamp, instruction))
