"""Open-loop error: how far a policy's chunks are from what was commanded, on recorded episodes, beside two that look at nothing.

- ``hold`` stays at the measured positions;
- ``repeat_last`` goes on with the action that was commanded last.

A policy that does not beat them has learned nothing that is of use. That it does beat them proves no task: the recording goes on as
it went, whatever the policy answers.

Enters: a policy, episodes. Leaves: errors in robot units, per joint and per action of the horizon. Caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vla_policy_ros.episodes.episode import Episode
from vla_policy_ros.episodes.sources import EpisodeSource
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.windows import plan_windows
from vla_policy_ros.types import ActionChunk, Observation

Array = NDArray[np.float64]
POLICY, HOLD, REPEAT_LAST = 'policy', 'hold', 'repeat_last'


class Answers(Protocol):
    """What is measured: anything that answers an observation with a chunk."""

    def infer(self, observation: Observation) -> ActionChunk: ...


@dataclass(frozen=True)
class OpenLoopError:
    """Errors of one who answers, over the windows of one episode.

    Attributes:
        mae, rmse: mean absolute and root mean square error over everything, robot units.
        joint_mae, joint_rmse: per action joint ``[A]``.
        step_mae, step_rmse: per action of the horizon ``[T]``; NaN where every window ends before.
    """

    mae: float
    rmse: float
    joint_mae: Array
    joint_rmse: Array
    step_mae: Array
    step_rmse: Array

    @classmethod
    def of(cls, error: Array, counted: NDArray[np.bool_]) -> OpenLoopError:
        """From errors ``[N, T, A]`` and which actions ``[N, T]`` count."""
        absolute, squared = np.abs(error), error**2
        counts = counted.sum(axis=0)

        def per_step(values: Array) -> Array:
            total = np.where(counted, values.mean(axis=2), 0.0).sum(axis=0)
            return np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0)

        return cls(
            float(absolute[counted].mean()),
            float(np.sqrt(squared[counted].mean())),
            absolute[counted].mean(axis=0),
            np.sqrt(squared[counted].mean(axis=0)),
            per_step(absolute),
            np.sqrt(per_step(squared)),
        )

    def to_dict(self, joints: Sequence[str]) -> dict[str, Any]:
        """JSON form; steps without a value are None."""
        steps = {
            name: [None if np.isnan(value) else float(value) for value in values]
            for name, values in (('step_mae', self.step_mae), ('step_rmse', self.step_rmse))
        }
        per_joint = {
            'joint_mae': dict(zip(joints, self.joint_mae.tolist(), strict=True)),
            'joint_rmse': dict(zip(joints, self.joint_rmse.tolist(), strict=True)),
        }
        return {'mae': self.mae, 'rmse': self.rmse, **per_joint, **steps}


@dataclass(frozen=True)
class EpisodeErrors:
    """The policy and the baselines on one episode, over ``windows`` windows."""

    name: str
    windows: int
    errors: dict[str, OpenLoopError]


def measure(policy: Answers, episode: Episode, stride: int = 1) -> EpisodeErrors:
    """Errors of every ``stride``-th step of an episode. Raises ValueError where it has no window."""
    plan = plan_windows(episode, stride)
    if not plan.steps:
        raise ValueError(f'{episode.name} has no window: nothing was commanded during its steps')
    answers = [policy.infer(observation).actions for observation in episode.observations(plan.steps)]
    made = {POLICY: np.stack(answers), **baselines(episode, plan.steps, plan.actions.shape[1])}
    counted = ~plan.action_is_pad
    return EpisodeErrors(
        episode.name, len(plan.steps), {name: OpenLoopError.of(actions - plan.actions, counted) for name, actions in made.items()}
    )


def baselines(episode: Episode, steps: Sequence[int], horizon: int) -> dict[str, Array]:
    """Actions ``[N, T, A]`` of the two that look at nothing."""
    chosen = [episode.steps[index] for index in steps]
    held = np.stack([episode.robot.action_positions(step.state) for step in chosen])
    last = episode.commands.sample(np.array([step.stamp_ns for step in chosen], dtype=np.int64)).positions
    return {name: np.repeat(rows[:, None], horizon, axis=1) for name, rows in ((HOLD, held), (REPEAT_LAST, last))}


def measure_all(policy: Answers, sources: Sequence[EpisodeSource], stride: int, tell: Callable[[str], None]) -> list[EpisodeErrors]:
    """`measure` on every episode. Raises EpisodeError for one that cannot be read."""
    found = []
    for source in sources:
        tell(source.name)
        found.append(measure(policy, source.open(), stride))
    return found


def to_dict(results: Sequence[EpisodeErrors], robot: Robot) -> dict[str, Any]:
    """JSON form of all results."""
    rows = [
        {
            'name': result.name,
            'windows': result.windows,
            **{name: error.to_dict(robot.action.joints) for name, error in result.errors.items()},
        }
        for result in results
    ]
    return {'robot': robot.name, 'period': robot.action.period, 'horizon': robot.action.horizon, 'episodes': rows}


def print_errors(results: Sequence[EpisodeErrors], robot: Robot, console: Console) -> None:
    """A line per episode and answer: over everything, and at the first, the middle and the last action."""
    horizon = robot.action.horizon
    shown = sorted({0, horizon // 2, horizon - 1})
    table = Table(title='Open-loop error in robot units (mean absolute)', title_justify='left')
    for heading in (
        'episode',
        'windows',
        'answer',
        'MAE',
        'RMSE',
        *(f'after {(i + 1) * robot.action.period:.2f} s' for i in shown),
    ):
        table.add_column(heading, justify='left' if heading in ('episode', 'answer') else 'right')
    for result in results:
        for name, error in result.errors.items():
            steps = [f'{error.step_mae[index]:.4f}' for index in shown]
            table.add_row(result.name, str(result.windows), name, f'{error.mae:.4f}', f'{error.rmse:.4f}', *steps)
    console.print(table)
