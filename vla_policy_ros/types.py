"""The three nouns that flow through the package: Observation, ActionChunk, JointTrajectory.

Each is a frozen dataclass that carries the stamp of the moment it speaks about. Time is integer nanoseconds of one clock that
the caller owns (node clock, bag clock or simulated clock); nothing here reads a clock. Angles are rad, lengths m, time s unless a
name ends in ``_ns`` (REP-103). Imports numpy only, so that every room may import this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class CameraView:
    """One decoded camera image and the intrinsics that hold for its pixels.

    Attributes:
        rgb: uint8 ``[H, W, 3]``, RGB order, as the camera delivered it (no resize).
        K: float64 ``[3, 3]`` pinhole matrix in the pixels of ``rgb``, or None where the camera is uncalibrated.
        stamp_ns: acquisition time of the image.
    """

    rgb: NDArray[np.uint8]
    K: NDArray[np.float64] | None
    stamp_ns: int


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one moment.

    Attributes:
        stamp_ns: acquisition time of the newest image used.
        cameras: camera name to view, in the order of the robot file.
        state: float64 ``[S]``, in the order of ``robot.state.names``.
        state_stamp_ns: stamp of the joint state that ``state`` came from.
        instruction: the operator's sentence.
    """

    stamp_ns: int
    cameras: Mapping[str, CameraView]
    state: NDArray[np.float64]
    state_stamp_ns: int
    instruction: str


@dataclass(frozen=True)
class ActionChunk:
    """A horizon of actions in robot units, and where they came from.

    Action ``i`` is the target at time ``stamp_ns + i * dt_ns``; ``stamp_ns`` is the observation's stamp plus one ``dt_ns``.

    Attributes:
        stamp_ns: time of action 0.
        dt_ns: time between two actions.
        joint_names: ``A`` names, the columns of ``actions``.
        actions: float64 ``[T, A]`` absolute joint positions in robot units (rad, m, or the unit the robot file names).
        observation_stamp_ns: stamp of the observation the chunk answers.
        instruction: the instruction it answers.
        sequence: counts the chunks of one policy instance from 0.
        stages_ms: wall milliseconds of each stage (``decode``, ``preprocess``, ``prefix``, ``denoise``, ``postprocess``).
        checkpoint_hash: content hash of the checkpoint's weights and configuration.
        stats_hash: content hash of the normalisation statistics.
    """

    stamp_ns: int
    dt_ns: int
    joint_names: tuple[str, ...]
    actions: NDArray[np.float64]
    observation_stamp_ns: int
    instruction: str
    sequence: int = 0
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    checkpoint_hash: str = ''
    stats_hash: str = ''

    @property
    def times_ns(self) -> NDArray[np.int64]:
        """Time of each action, ``[T]``."""
        return self.stamp_ns + self.dt_ns * np.arange(len(self.actions), dtype=np.int64)


@dataclass(frozen=True)
class KnownActions:
    """What is decided already about a chunk that is asked for: the answer should continue it (real-time chunking).

    Attributes:
        actions: float64 ``[T, A]`` in robot units: row i is commanded for the time of action i of the chunk asked for. Rows from
            ``overlap`` on carry no information.
        committed: rows that will have been executed when the answer takes over; at most ``overlap``.
        overlap: rows that the previous chunk still speaks about; less than T.
    """

    actions: NDArray[np.float64]
    committed: int
    overlap: int


@dataclass(frozen=True)
class JointTrajectory:
    """Knots of a piecewise cubic (Hermite) joint motion, as a joint_trajectory_controller executes positions with velocities.

    Attributes:
        start_ns: the moment that ``times_ns`` counts from, on the caller's clock.
        joint_names: ``J`` names, the columns of the arrays.
        times_ns: int64 ``[N]``, strictly increasing offsets from ``start_ns`` (``time_from_start``).
        positions: float64 ``[N, J]``.
        velocities: float64 ``[N, J]``; the last row is zero.
    """

    start_ns: int
    joint_names: tuple[str, ...]
    times_ns: NDArray[np.int64]
    positions: NDArray[np.float64]
    velocities: NDArray[np.float64]

    def select(self, joint_names: tuple[str, ...]) -> JointTrajectory:
        """The same motion restricted to ``joint_names``, in that order. Raises KeyError for a joint it does not have."""
        missing = [name for name in joint_names if name not in self.joint_names]
        if missing:
            raise KeyError(f'trajectory has no joint {missing[0]!r}; it has {", ".join(self.joint_names)}')
        columns = [self.joint_names.index(name) for name in joint_names]
        return JointTrajectory(
            self.start_ns, joint_names, self.times_ns, self.positions[:, columns], self.velocities[:, columns]
        )
