"""A policy beside another controller: how far its chunks are from what the robot was then made to do, over the last seconds.

The node feeds it in dry run, while something else drives the robot. A chunk is judged once the times of all of its actions have
passed, by the same errors as a recording (`errors`).

Enters: chunks, and where the robot was to be or was, as time goes on. Leaves: a `ShadowScore`. The caller's thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.episodes.commands import Commands, Targets
from vla_policy_ros.episodes.errors import OpenLoopError
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S, ActionChunk

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ShadowScore:
    """What is known of the chunks of the last seconds.

    Attributes:
        source: what they are compared with.
        window_s: age of the oldest chunk that may count, s.
        chunks: that count; at least one.
        error: of the chunks, robot units.
        hold: of one who would have stayed where the robot was when each question was asked.
        joint: the joint of the largest root mean square error.
    """

    source: str
    window_s: float
    chunks: int
    error: OpenLoopError
    hold: OpenLoopError
    joint: str

    @property
    def worse_than_hold(self) -> bool:
        """Whether standing still would have been nearer to what the robot did."""
        return self.error.rmse > self.hold.rmse

    @property
    def sentence(self) -> str:
        """For the operator."""
        return (
            f'{self.chunks} chunks of the last {self.window_s:g} s against {self.source}: rmse {self.error.rmse:.4f}, '
            f'staying where it was {self.hold.rmse:.4f}'
        )


class Shadow:
    """Collects chunks and what the robot did. See the module docstring.

    Args:
        robot: the robot file.
        window_s: chunks whose last action is older than this are forgotten, s.
    """

    def __init__(self, robot: Robot, window_s: float) -> None:
        self._joints, self._window_s = robot.action.joints, window_s
        chunk_ns = robot.action.period_ns * (robot.action.horizon + 1)
        self._kept_ns = round(window_s * NS_PER_S) + 2 * chunk_ns
        self._path: deque[tuple[int, Array]] = deque()
        self._source = ''
        self._chunks: deque[ActionChunk] = deque()

    def robot_at(self, positions: Array, stamp_ns: int, source: str) -> None:
        """The robot was, or was to be, at ``positions [A]`` at ``stamp_ns``; ``source`` says who says so.

        A jump of the clock back and a change of the source begin anew; what is known already is passed over.
        """
        if self._path and (stamp_ns < self._path[-1][0] - self._kept_ns or source != self._source):
            self.forget()
        if not self._path or stamp_ns > self._path[-1][0]:
            self._path.append((stamp_ns, np.array(positions, dtype=np.float64)))
        self._source = source
        while stamp_ns - self._path[0][0] > self._kept_ns:
            self._path.popleft()

    def answered(self, chunk: ActionChunk) -> None:
        """A chunk of the policy. One with values that are not finite is passed over."""
        if np.isfinite(chunk.actions).all():
            self._chunks.append(chunk)

    def forget(self) -> None:
        """Begin anew."""
        self._path.clear()
        self._chunks.clear()

    def score(self) -> ShadowScore | None:
        """Over all chunks that have passed and are not too old; None where there is none."""
        if len(self._path) < 2:
            return None
        newest = self._path[-1][0]
        while self._chunks and newest - int(self._chunks[0].times_ns[-1]) > self._window_s * NS_PER_S:
            self._chunks.popleft()
        first = self._path[0][0]
        passed = [chunk for chunk in self._chunks if int(chunk.times_ns[-1]) <= newest and chunk.observation_stamp_ns >= first]
        if not passed:
            return None
        stamps, positions = np.array([time for time, _ in self._path], dtype=np.int64), np.stack([at for _, at in self._path])
        commands = Commands(self._joints, (Targets(self._joints, stamps, positions, self._source),))
        truth = np.stack([commands.sample(chunk.times_ns).positions for chunk in passed])
        actions = np.stack([chunk.actions for chunk in passed])
        held = commands.sample(np.array([chunk.observation_stamp_ns for chunk in passed], dtype=np.int64)).positions
        counted = np.ones(truth.shape[:2], dtype=np.bool_)
        error = OpenLoopError.of(actions - truth, counted)
        return ShadowScore(
            self._source,
            self._window_s,
            len(passed),
            error,
            OpenLoopError.of(held[:, None] - truth, counted),
            self._joints[int(error.joint_rmse.argmax())],
        )
