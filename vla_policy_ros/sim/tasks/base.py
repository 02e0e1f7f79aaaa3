"""What a task is: how an episode is drawn, what the expert does in it, and how its end is judged.

Experts are memoryless and kinematic: from joint positions and the places of the objects follows the next target, and a task
says how it carries the objects along. A chunk of such steps needs no physics, and any state is a valid start, so that training
examples can be drawn without playing episodes.

Enters: seeds and conditions. Leaves: episodes, expert steps, outcomes. Pure, but for the `ArmKinematics` that is handed in.
Units rad, m; world frame as in `mjcf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.instructions import HELD_OUT_TEMPLATES, NAMINGS
from vla_policy_ros.sim.mjcf import FINGER_OPEN
from vla_policy_ros.sim.scene import JITTER, Scene, Variation
from vla_policy_ros.sim.world import TabletopWorld

FINGER_SPEED = 0.12
"""m/s; each finger on its own."""
PHRASINGS = ('trained', 'held_out')


@dataclass(frozen=True)
class Conditions:
    """Under what an episode is drawn.

    Attributes:
        scene: how scenes vary.
        phrasing: ``trained`` sentences, or ``held_out`` ones that training never shows.
        naming: how the object is named, see `instructions.instruction_for`.
    """

    scene: Variation = field(default_factory=lambda: Variation(surroundings=True))
    phrasing: str = 'trained'
    naming: str = 'any'

    def __post_init__(self) -> None:
        if self.phrasing not in PHRASINGS:
            raise ValueError(f'phrasing is {self.phrasing!r}; it must be one of {", ".join(PHRASINGS)}')
        if self.naming not in NAMINGS:
            raise ValueError(f'naming is {self.naming!r}; it must be one of {", ".join(NAMINGS)}')

    def templates(self, trained: Sequence[str], held_out: Sequence[str] = HELD_OUT_TEMPLATES) -> Sequence[str]:
        """The sentences to draw from."""
        return trained if self.phrasing == 'trained' else held_out


TRAINING = Conditions(scene=JITTER)
"""What training examples are drawn under."""


@dataclass(frozen=True)
class Episode:
    """One thing to do.

    Attributes:
        task: name of the task.
        scene: where.
        instruction: the sentence.
        targets: slots of the objects that the sentence means; several where any of them will do.
    """

    task: str
    scene: Scene
    instruction: str
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """How an episode ended: ``error`` is the remaining distance, m; ``failure`` is empty on success, else its class.

    Classes: ``wrong_object`` (nearer to the goal of another object, and not on the way), ``missed`` (close, but not close enough),
    ``timed_out`` (nowhere near anything).
    """

    success: bool
    error: float
    failure: str


@dataclass(frozen=True)
class TaskState:
    """Joint positions ``q [7]`` and centres of the objects ``[slots, 3]``; how far each finger is from the middle (m), and where
    it is told to go, which is further in while it holds something."""

    q: NDArray[np.float64]
    objects: NDArray[np.float64]
    finger: float = FINGER_OPEN
    finger_target: float = FINGER_OPEN

    def finger_towards(self, wanted: float, period: float) -> float:
        """What to tell the fingers, m, so that they get to ``wanted`` at a speed that they can follow; the next ``period`` (s)."""
        step = FINGER_SPEED * period
        return self.finger + min(step, max(-step, wanted - self.finger))

    def moved(self, q: NDArray[np.float64]) -> TaskState:
        """The same objects, the arm elsewhere."""
        return replace(self, q=q)


class Task(Protocol):
    """One kind of episode.

    Attributes:
        name: as in `TASKS`.
        seconds: how long an episode lasts, simulated.
        needs_gripper: whether only a robot with a gripper can do it.
        needs_zone: whether something is to be brought to the zone, which the sentence names.
    """

    @property
    def name(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    @property
    def needs_gripper(self) -> bool: ...

    @property
    def needs_zone(self) -> bool: ...

    def sample(self, seed: int, conditions: Conditions) -> Episode:
        """The episode of a seed. Raises ValueError where the conditions do not fit the task."""

    def training_episodes(self, seed: int) -> list[Episode]:
        """Episodes that share the scene of a seed, some of another task perhaps; the first is the one whose path the training state
        lies on."""

    def step(self, kinematics: ArmKinematics, state: TaskState, episode: Episode, period: float) -> TaskState:
        """The state that the expert reaches one ``period`` (s) later."""

    def measure(self, world: TabletopWorld, episode: Episode) -> Outcome:
        """How the episode ended, from the simulated world as it is now."""
