"""The scripted expert in the physics: it looks, commands the drives for one action period, and looks again.

Enters: a task, an episode, a world. Leaves: the joint targets as they are given. The thread of the world.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.tasks.base import Episode, TaskState
from vla_policy_ros.sim.world import TabletopWorld

_TICK = 0.01
_KEPT = 0.8


class Expert(Protocol):
    """Who says what to do next: a `Task`, or somebody who does it less well."""

    def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
        """As `Task.step`."""


class Unsteady:
    """An expert as a policy is that has learnt from it: a little wrong at every look, in what it sees and in what it does.

    Its joint targets are ``hand`` rad (rms) off what the expert says from where the last target led, by an error that begins
    at zero and drifts from look to look (about half a second at 10 Hz); each object is seen ``eye`` m (standard deviation per
    axis) from where it lies, elsewhere at each look.
    """

    def __init__(self, expert: Expert, rng: np.random.Generator, *, hand: float = 0.0, eye: float = 0.0) -> None:
        self._expert, self._rng, self._hand, self._eye = expert, rng, hand, eye
        self._off = np.zeros(1)

    def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
        self._off = _KEPT * self._off + np.sqrt(1.0 - _KEPT**2) * self._rng.normal(0.0, self._hand, len(state.q))
        seen = state.objects.copy()
        seen[:, :2] += self._rng.normal(0.0, self._eye, (len(seen), 2))
        after = self._expert.step(kinematics, replace(state, objects=seen), episode, period)
        return replace(after, q=after.q + self._off)


def play_expert(
    task: Expert, episode: Episode, world: TabletopWorld, period: float, seconds: float
) -> Iterator[NDArray[np.float64]]:
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
    task: Expert,
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
