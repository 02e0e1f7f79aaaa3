"""Episodes of the simulator with its scripted expert, recorded as those of a robot are: topics, types and stamps of the robot file.

The expert's target is commanded once per action period and followed by the drives; the cameras look as often. Scenes are training's
own (`evaluation.seeds`), so that no recording contains a scene that an evaluation uses. The same seed gives the same recording.

Enters: a robot file that fits the simulated arm, a task, seeds. Leaves: `Episode`s. One thread, that of the renderer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.episodes.bag_writer import write_bag
from vla_policy_ros.episodes.commands import Commands, targets_of_rows
from vla_policy_ros.episodes.episode import (
    PROVENANCE_FILE,
    Episode,
    EpisodeError,
    InputTimes,
    Provenance,
    Step,
    next_number,
    write_json,
)
from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.dataset import SCENE_SEED_BASE, SCENES_PER_SEED, check_robot, check_task, has_gripper
from vla_policy_ros.sim.tasks import TASKS, TRAINING, Outcome
from vla_policy_ros.sim.tasks.play import play_expert
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, CameraView, Observation

BEGIN_NS = NS_PER_S  # zero would say that there is no stamp


class SimulatedEpisode(Episode):
    """The expert at one scene.

    Args:
        robot: the robot file.
        task: name of a task.
        seed, number: which episode; numbers of one seed are different scenes.
        seconds: simulated length; None is the task's own.

    Attributes:
        outcome: how it ended.

    Raises:
        EpisodeError: the task or its number is unknown.
        RobotMismatch: the robot file does not fit the simulated arm.
    """

    def __init__(self, robot: Robot, task: str, seed: int, number: int, seconds: float | None = None) -> None:
        check_robot(robot)
        if task not in TASKS:
            raise EpisodeError(f'task {task!r} is unknown; choose among {", ".join(TASKS)}')
        if not 0 <= number < SCENES_PER_SEED or seed < 0:
            raise EpisodeError(f'episode {number} of seed {seed}: numbers are 0 to {SCENES_PER_SEED - 1}, seeds not negative')
        self.robot, self.name = robot, f'{task} {seed}/{number}'
        self._task = TASKS[task]
        check_task(self._task, robot)
        self._drawn = self._task.sample(SCENE_SEED_BASE + seed * SCENES_PER_SEED + number, TRAINING)
        self._seconds = seconds or self._task.seconds
        self._world = TabletopWorld(gripper=has_gripper(robot))
        names = list(self._world.joint_names)
        self._state_columns = [names.index(joint) for joint in robot.state.joints]
        columns = [names.index(joint) for joint in robot.action.joints]
        period_ns = robot.action.period_ns
        steps, rows = [], []
        for time_ns, goal in self._play():
            steps.append(self._step(time_ns))
            rows.append((time_ns + period_ns, goal[columns]))
        self.outcome: Outcome = self._task.measure(self._world, self._drawn)
        self.steps = tuple(steps)
        self.commands = Commands(robot.action.joints, (targets_of_rows(robot.action.joints, rows, 'scripted expert'),))
        times = np.array([step.stamp_ns for step in steps], dtype=np.int64)
        self.inputs = tuple(InputTimes(name, times) for name in (*(f'camera:{c}' for c in robot.camera_names), 'state'))
        ended = {'success': self.outcome.success, 'error_m': self.outcome.error, 'failure': self.outcome.failure}
        drawn = {'task': task, 'seed': seed, 'number': number, 'instruction': self._drawn.instruction, **ended}
        self.provenance = Provenance.of(self.name, 'simulator, scripted expert', robot, drawn)
        self.skipped, self.notes, self.uncalibrated = Counter(), [], ()

    def close(self) -> None:
        """Free the renderer."""
        self._world.close()

    def observations(self, indices: Sequence[int] | None = None) -> Iterator[Observation]:
        """See `Episode.observations`: the episode is played again, as it was, and looked at."""
        wanted = self.checked(indices)
        chosen = wanted if isinstance(wanted, range) else frozenset(wanted)
        for index, (time_ns, _) in enumerate(self._play()):
            if index in chosen:
                step = self.steps[index]
                views = {name: self._look(name, time_ns) for name in self.robot.camera_names}
                yield Observation(step.stamp_ns, MappingProxyType(views), step.state, step.state_stamp_ns, step.instruction)

    def _play(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """(time, expert's target ``[J]`` for one action period later) before each period; the world is as it is at that time."""
        for goal in play_expert(self._task, self._drawn, self._world, self.robot.action.period, self._seconds):
            yield BEGIN_NS + self._world.time_ns, goal

    def _step(self, time_ns: int) -> Step:
        position, velocity = self._world.joint_state()
        fields = {'position': position, 'velocity': velocity}
        state: NDArray[np.float64] = np.concatenate([fields[field][self._state_columns] for field in self.robot.state.fields])
        stamps = MappingProxyType(dict.fromkeys(self.robot.camera_names, time_ns))
        return Step(time_ns, stamps, state, time_ns, self._drawn.instruction)

    def _look(self, camera: str, time_ns: int) -> CameraView:
        view = self._world.render(camera)
        return CameraView(view.rgb, view.K, time_ns)


def record_simulated(
    robot: Robot, out: Path, task: str, seed: int, episodes: int, seconds: float | None, tell: Callable[[str], None]
) -> list[Path]:
    """Record episodes of the simulator into bags in ``out``; ``tell`` hears how each ended. Returns the bags.

    Raises:
        EpisodeError, RobotMismatch: see `SimulatedEpisode`.
        OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(episodes):
        episode = SimulatedEpisode(robot, task, seed, number, seconds)
        try:
            path = out / f'episode_{next_number(out):06d}'
            write_bag(episode, path)
            write_json(path / PROVENANCE_FILE, episode.provenance.to_dict())
        finally:
            episode.close()
        made.append(path)
        ended = 'done' if episode.outcome.success else episode.outcome.failure
        tell(f'{path}: {len(episode.steps)} steps, {episode.instructions[0]!r}, {ended} ({100 * episode.outcome.error:.1f} cm)')
    return made
