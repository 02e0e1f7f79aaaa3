"""Episodes in process: the policy looks, answers a chunk, the drives follow the first part of it, and the policy looks again.

The fast mode of evaluation: no ROS, no planner, no latency; a look costs nothing in simulated time. An episode depends on the
weights, the scene's seed and the settings, and on nothing that happened before it, so that episodes may run in any order and
anywhere.

Enters: a policy, a task, a scene seed. Leaves: `EpisodeResult`s. One thread, that of the world's renderer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vla_policy_ros.evaluation.probes import Probe, about_another_object
from vla_policy_ros.evaluation.report import EpisodeResult
from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.dataset import check_task
from vla_policy_ros.sim.driven import DrivenArm, Infer
from vla_policy_ros.sim.tasks import Conditions, Episode, Task
from vla_policy_ros.sim.world import TabletopWorld

Watch = Callable[[TabletopWorld], None]
"""Called before the first action and after each, with the world as it is then."""


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
        if settings.executed > robot.action.horizon:
            raise ValueError(f'executed is {settings.executed}, but a chunk of {robot.name!r} has {robot.action.horizon} actions')
        self.infer, self._robot, self._settings = infer, robot, settings
        self._arm = DrivenArm(robot)

    def __enter__(self) -> ClosedLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._arm.world.close()

    def run(self, task: Task, seed: int, conditions: Conditions, watch: Watch | None = None) -> EpisodeResult:
        """The episode of a scene seed. Raises ValueError where robot, conditions or probe do not fit the task."""
        check_task(task, self._robot)
        episode = task.sample(seed, conditions)
        told = about_another_object(episode, seed) if self._settings.probe.wrong_instruction else episode
        outside = self._play(episode, told.instruction, self._settings.seconds or task.seconds, seed, watch)
        outcome = task.measure(self._arm.world, episode)
        followed = None if told is episode else task.measure(self._arm.world, told).success
        failure = 'limit' if outside and not outcome.success else outcome.failure
        return EpisodeResult(seed, told.instruction, outcome.success, outcome.error, failure, followed)

    def _play(self, episode: Episode, instruction: str, seconds: float, seed: int, watch: Watch | None) -> bool:
        """Whether the last chunk asked for what the robot may not do."""
        arm, outside = self._arm, False
        arm.reset(episode.scene)
        if watch:
            watch(arm.world)
        for done in range(max(1, round(seconds / self._robot.action.period))):
            if done % self._settings.executed == 0:
                chunk = self.infer(self._settings.probe.seen(arm.observe(instruction, seed)))
                actions, outside = arm.allowed(chunk.actions)
            arm.follow(actions[done % self._settings.executed])
            if watch:
                watch(arm.world)
        return outside
