"""A controller, its clock and an arm, for the tests of the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vla_policy_ros.control.jtc import Command, JointTrajectoryController
from vla_policy_ros.control.jtc_rules import ControllerParameters
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint

MS = 1_000_000
PERIOD = 10 * MS
T0 = 100_000 * MS
PARAMETERS = ControllerParameters(('a',))


def point(time_ms: float, position: float, v: float | None = None, a: float | None = None) -> TrajectoryPoint:
    velocity = np.zeros(0) if v is None else np.array([v])
    acceleration = np.zeros(0) if a is None else np.array([a])
    return TrajectoryPoint(round(time_ms * MS), np.array([position]), velocity, acceleration)


def message(*points: TrajectoryPoint, stamp_ns: int = 0) -> TrajectoryMessage:
    return TrajectoryMessage(('a',), list(points), stamp_ns)


class Cell:
    """A controller, its clock, and an arm that goes where it is told, ``lag`` rad behind."""

    def __init__(self, start: float = 0.0, lag: float = 0.0, **parameters: object) -> None:
        self.now = T0
        self.lag = lag
        self.controller = JointTrajectoryController(replace(PARAMETERS, **parameters), [start])  # type: ignore[arg-type]
        self.position = start
        self.commands: list[Command] = []

    def send(self, sent: TrajectoryMessage) -> None:
        assert self.controller.receive(sent, self.now).accepted

    def cycle(self, count: int = 1, velocity: float | None = None) -> Command:
        for _ in range(count):
            measured_velocity = None if velocity is None else [velocity]
            command = self.controller.update(self.now, [self.position - self.lag], measured_velocity)
            self.commands.append(command)
            self.position = float(command.positions[0])
            self.now += PERIOD
        return command

    def positions(self) -> np.ndarray:
        return np.array([command.positions[0] for command in self.commands])


def run_until(cell: Cell, done: Callable[[], bool], limit: int = 500) -> int:
    for count in range(1, limit + 1):
        cell.cycle()
        if done():
            return count
    raise AssertionError('it never happened')
