"""Open-loop error: how far a policy's chunks are from what was commanded, on recorded episodes, beside two that look at nothing.

A policy that does not beat them has learned nothing that is of use. That it does beat them proves no task: the recording goes on as
it went, whatever the policy answers.

Enters: a policy, episodes. Leaves: errors in robot units, per joint and per action of the horizon. Caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from vla_policy_ros.episodes.episode import Episode
from vla_policy_ros.episodes.errors import POLICY, OpenLoopError, baselines
from vla_policy_ros.episodes.sources import EpisodeSource
from vla_policy_ros.robot import Robot
from vla_policy_ros.training.windows import plan_windows
from vla_policy_ros.types import ActionChunk, Observation


class Answers(Protocol):
    """What is measured: anything that answers an observation with a chunk."""

    def infer(self, observation: Observation) -> ActionChunk: ...


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
    chosen = [episode.steps[index] for index in plan.steps]
    states, stamps = np.stack([step.state for step in chosen]), np.array([step.stamp_ns for step in chosen], dtype=np.int64)
    others = baselines(episode.robot, states, stamps, episode.commands, plan.actions.shape[1])
    made = {POLICY: np.stack(answers), **others}
    counted = ~plan.action_is_pad
    return EpisodeErrors(
        episode.name, len(plan.steps), {name: OpenLoopError.of(actions - plan.actions, counted) for name, actions in made.items()}
    )


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
