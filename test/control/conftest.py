"""A policy, a planner, a transport that delays, and an emulated controller, on one virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.jtc import ControllerParameters, JointTrajectoryController
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, Plan, TrajectoryPlanner
from vla_policy_ros.types import ActionChunk, JointTrajectory

MS = 1_000_000
T0 = 1_000_000 * MS
Array = NDArray[np.float64]


def joint_limits(count: int = 3, position: float = 2.8, velocity: float = 1.5, acceleration: float = 5.0) -> JointLimits:
    ones = np.ones(count)
    names = tuple(f'joint{index}' for index in range(count))
    return JointLimits(names, -position * ones, position * ones, velocity * ones, acceleration * ones)


def chunk(names: tuple[str, ...], stamp_ns: int, actions: Array, dt_ms: int = 100) -> ActionChunk:
    return ActionChunk(stamp_ns, dt_ms * MS, names, np.asarray(actions, dtype=float), stamp_ns - dt_ms * MS, 'test')


def dense(trajectory: JointTrajectory, per_segment: int = 16) -> tuple[Array, Array, Array]:
    """Position, velocity and acceleration of the cubic interpolant, by Bernstein polynomials (not the code under test)."""
    q, v = trajectory.positions, trajectory.velocities
    h = (np.diff(trajectory.times_ns) * 1e-9)[:, None, None]
    p0, p3 = q[:-1, None], q[1:, None]
    p1, p2 = p0 + h * v[:-1, None] / 3, p3 - h * v[1:, None] / 3
    s = np.linspace(0, 1, per_segment + 1)[None, :, None]
    position = p0 * (1 - s) ** 3 + 3 * p1 * s * (1 - s) ** 2 + 3 * p2 * s**2 * (1 - s) + p3 * s**3
    velocity = 3 / h * ((p1 - p0) * (1 - s) ** 2 + 2 * (p2 - p1) * s * (1 - s) + (p3 - p2) * s**2)
    acceleration = 6 / h**2 * ((p2 - 2 * p1 + p0) * (1 - s) + (p3 - 2 * p2 + p1) * s)
    joints = q.shape[1]
    return position.reshape(-1, joints), velocity.reshape(-1, joints), acceleration.reshape(-1, joints)


@dataclass
class Loop:
    """Closed loop. ``path(t)`` is the joint position ``[J]`` the policy wants at ``t`` seconds after the start."""

    limits: JointLimits
    emission: Emission
    path: Callable[[float], Array]
    rng: np.random.Generator
    from_desired: bool = True
    latency_ms: int = 100
    replan_ms: int = 200
    delay_ms: tuple[float, float] = (0.0, 30.0)
    horizon: int = 16
    dt_ms: int = 100
    noise: float = 0.0
    dies_at: float = float('inf')
    plans: list[Plan] = field(default_factory=list)

    def run(self, seconds: float) -> Array:
        """Commands ``[N, J]`` of every controller update, the start position first."""
        rate = 1e9 / self.emission.controller_period_ns
        start = np.clip(self.path(0.0), self.limits.lower, self.limits.upper)
        self.planner = TrajectoryPlanner(self.limits, self.emission)
        self.commanded = CommandedMotion.from_rest(self.limits.names, start, T0)
        parameters = ControllerParameters(self.limits.names, rate, interpolate_from_desired_state=self.from_desired)
        self.controller = JointTrajectoryController(parameters, start)
        self.inflight: list[tuple[int, TrajectoryMessage]] = []
        commands, measured = [start], start
        next_plan = T0 + int(self.rng.integers(0, self.emission.controller_period_ns))
        now = T0
        while now < T0 + seconds * 1e9:
            while next_plan <= now and next_plan < T0 + self.dies_at * 1e9:
                self.replan(next_plan)
                next_plan += self.replan_ms * MS
            for due, message in [item for item in self.inflight if item[0] <= now]:
                assert self.controller.receive(message, now).accepted
                self.inflight.remove((due, message))
            commands.append(self.controller.update(now, measured).positions)
            measured = commands[-2]  # the arm lags its command by one update
            now += self.emission.controller_period_ns
        return np.array(commands)

    def replan(self, now: int) -> None:
        observed = now - self.latency_ms * MS
        stamp = observed + self.dt_ms * MS
        times = [(stamp + index * self.dt_ms * MS - T0) * 1e-9 for index in range(self.horizon)]
        actions = np.array([self.path(time) for time in times])
        actions = actions + self.rng.normal(0.0, self.noise, actions.shape)
        plan = self.planner.plan(chunk(self.limits.names, stamp, actions, self.dt_ms), now, self.commanded)
        self.plans.append(plan)
        if plan.trajectory is not None:
            self.commanded.accept(plan.trajectory)
            message = TrajectoryMessage.from_trajectory(plan.trajectory, self.emission.header_stamp_ns(plan.trajectory))
            self.inflight.append((now + int(self.rng.uniform(*self.delay_ms) * MS), message))


@dataclass(frozen=True)
class Tools:
    """What the tests of this folder share."""

    limits: Callable[..., JointLimits] = joint_limits
    chunk: Callable[..., ActionChunk] = chunk
    dense: Callable[..., tuple[Array, Array, Array]] = dense
    loop: type[Loop] = Loop
    t0: int = T0


@pytest.fixture(scope='session')
def tools() -> Tools:
    return Tools()
