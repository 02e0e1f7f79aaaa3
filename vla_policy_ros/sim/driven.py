"""The simulated arm of a robot file, looked at and driven as a robot is, without ROS: no planner, no latency.

Enters: scenes, chunks in the order of ``robot.action.joints``. Leaves: observations of the live node's type. One thread, that of
the world's renderer.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.dataset import check_robot, has_gripper
from vla_policy_ros.sim.scene import Scene
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, ActionChunk, Observation

CONTROLLER_PERIOD = 0.01
# Neighbouring episodes lie this far apart on the clock of their stamps, from which a policy draws its noise.
_APART_NS = 1000 * NS_PER_S
_BLOCK = 1 << 20
# Of a joint's range: a network that predicts the end of it errs to both sides.
_MARGIN = 0.02


class Infer(Protocol):
    """The policy; `Policy.infer` is one."""

    def __call__(self, observation: Observation) -> ActionChunk: ...


class DrivenArm:
    """A simulated arm that follows action chunks. Use it as a context manager, which frees the renderer.

    Attributes:
        world: the simulated world.

    Raises:
        RobotMismatch: the robot file describes something that the simulated arm is not.
    """

    def __init__(self, robot: Robot) -> None:
        check_robot(robot)
        self._robot = robot
        self._limits = JointLimits.from_robot(robot)
        self.world = TabletopWorld(gripper=has_gripper(robot))
        names = list(self.world.joint_names)
        self._columns = [names.index(joint) for joint in robot.action.joints]
        self._state_columns = [names.index(joint) for joint in robot.state.joints]
        self._commanded = self.world.joint_state()[0]

    def __enter__(self) -> DrivenArm:
        return self

    def __exit__(self, *_: object) -> None:
        self.world.close()

    def reset(self, scene: Scene) -> None:
        """Begin in ``scene``, at rest."""
        self.world.reset_to(scene)
        self._commanded = self.world.joint_state()[0]

    @property
    def commanded(self) -> NDArray[np.float64]:
        """Where the drives were last told to be, in the order of ``world.joint_names``."""
        return self._commanded.copy()

    def allowed(self, actions: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
        """Actions ``[T, A]`` within the position limits, and whether they were well outside; the robot stays where they are not
        finite."""
        if not np.isfinite(actions).all():
            held = self.world.joint_state()[0][self._columns]
            return np.broadcast_to(held, actions.shape), True
        kept = np.clip(actions, self._limits.lower, self._limits.upper)
        margin = _MARGIN * (self._limits.upper - self._limits.lower)
        return kept, bool((np.abs(kept - actions) > margin).any())

    def follow(self, action: NDArray[np.float64]) -> None:
        """Drive to the joint positions ``action [A]`` in one action period, no faster than the robot may."""
        goal = self._commanded.copy()
        goal[self._columns] = action
        period = self._robot.action.period
        ticks = round(period / CONTROLLER_PERIOD)
        fastest = np.full(len(goal), np.inf)
        fastest[self._columns] = self._limits.velocity
        velocity = np.clip((goal - self._commanded) / period, -fastest, fastest)
        for tick in range(1, ticks + 1):
            self.world.set_position_targets(self._commanded + velocity * tick * CONTROLLER_PERIOD, velocity)
            self.world.step(CONTROLLER_PERIOD)
        self._commanded = self._commanded + velocity * period

    def observe(self, instruction: str, seed: int) -> Observation:
        """What the node would see now; ``seed`` sets episodes apart on the clock of the stamps."""
        position, velocity = self.world.joint_state()
        fields = {'position': position, 'velocity': velocity}
        state = np.concatenate([fields[name][self._state_columns] for name in self._robot.state.fields])
        stamp = NS_PER_S + self.world.time_ns + seed % _BLOCK * _APART_NS
        views = {name: self.world.render(name) for name in self._robot.camera_names}
        return Observation(stamp, views, state, stamp, instruction)
