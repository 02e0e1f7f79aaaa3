"""Windows of recorded episodes: what the robot saw at a step, and what was commanded from then on.

Action i of a window is the target at the step's stamp plus (i + 1) action periods of the robot file, as `types.ActionChunk` has it.
Targets are looked up by time, not by row, so that a recording at another rate, or with gaps, gives the same actions. Beyond the
last target of the episode that target is repeated and marked as padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.episodes.episode import Episode
from vla_policy_ros.types import Observation

# More steps than any episode has: the number of the episode times this, plus the step, is a scene.
SCENES_PER_EPISODE = 1_000_000


@dataclass(frozen=True)
class Window:
    """A training example of a recording; see `dataset.TrainingExample`.

    Attributes:
        observation: of the step.
        actions: float64 ``[T, A]``, robot units, absolute.
        action_is_pad: bool ``[T]``: beyond the end of the episode.
        scene_id: a number of its own for each step.
    """

    observation: Observation
    actions: NDArray[np.float64]
    action_is_pad: NDArray[np.bool_]
    scene_id: int


@dataclass(frozen=True)
class WindowPlan:
    """Which steps of an episode begin a window, and their actions.

    Attributes:
        steps: N indices of steps.
        actions: float64 ``[N, T, A]``.
        action_is_pad: bool ``[N, T]``.
    """

    steps: tuple[int, ...]
    actions: NDArray[np.float64]
    action_is_pad: NDArray[np.bool_]


def plan_windows(episode: Episode, stride: int = 1) -> WindowPlan:
    """The windows of every ``stride``-th step, without decoding an image.

    A step before the first target, or after the last, begins no window: nothing is known of what should be done there.

    Raises:
        ValueError: ``stride`` is not positive.
    """
    if stride < 1:
        raise ValueError(f'stride must be at least 1, got {stride}')
    action = episode.robot.action
    offsets = (np.arange(action.horizon, dtype=np.int64) + 1) * action.period_ns
    candidates = list(range(0, len(episode.steps), stride))
    times = np.array([episode.steps[index].stamp_ns for index in candidates], dtype=np.int64)[:, None] + offsets
    sampled = episode.commands.sample(times.reshape(-1))
    shape = times.shape
    known = ~(sampled.early.reshape(shape)[:, 0] | sampled.is_pad.reshape(shape)[:, 0])
    return WindowPlan(
        tuple(index for index, usable in zip(candidates, known, strict=True) if usable),
        sampled.positions.reshape(*shape, len(action.joints))[known],
        sampled.is_pad.reshape(shape)[known],
    )


def windows(episode: Episode, number: int = 0, stride: int = 1) -> Iterator[Window]:
    """The windows of an episode, images decoded one step at a time; ``number`` tells its scenes from those of other episodes."""
    plan = plan_windows(episode, stride)
    observations = episode.observations(plan.steps)
    for step, observation, actions, is_pad in zip(plan.steps, observations, plan.actions, plan.action_is_pad, strict=True):
        yield Window(observation, actions, is_pad, number * SCENES_PER_EPISODE + step)
