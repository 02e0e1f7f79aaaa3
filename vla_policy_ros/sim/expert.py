"""The scripted expert: a memoryless velocity field that brings the tool above an object from anywhere.

The tool is drawn into a funnel over the goal: far away it travels at a height that clears the other objects, and the height
it aims for shrinks with the remaining horizontal distance, so that it comes down from above. The wish for the tool becomes a
joint step by damped least squares, with the approach axis kept vertical and the rest of the freedom drawn to the home pose.
Because the answer depends on the joint positions only, any state is a valid start and every state of a noisy path has its
right continuation.

Enters: joint positions, a goal point. Leaves: absolute joint targets. Purely kinematic, on a model of the arm alone: the
simulation is not touched. Any one thread per `ArmKinematics`. Units rad, m, s; world frame as in `mjcf`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.engine import mujoco
from vla_policy_ros.sim.mjcf import JOINT_NAMES, tabletop_xml
from vla_policy_ros.sim.scene import HOME

# Below 0.45 of the 1.5 rad/s in the robot file: a planner that blends a chunk into a running motion needs the rest.
MAX_JOINT_SPEED = 0.6
MAX_TOOL_SPEED = 0.35
APPROACH_RATE = 5.0
TRAVEL_CLEARANCE = 0.12
ARRIVAL_RADIUS = 0.012

# Squared damping: little for the translation, which must arrive, more for the rotations, one of which the axis leaves free.
_DAMPING = 0.04**2 * np.diag([0.05] * 3 + [1.0] * 3)
_AXIS_WEIGHT = 0.25
_HOMING_RATE = 1.0
_LIMIT_MARGIN = 0.03


class ArmKinematics:
    """Forward kinematics and Jacobian of the arm, on its own MuJoCo state. One thread.

    Attributes:
        lower, upper: float64 ``[7]`` joint limits, rad.
    """

    def __init__(self) -> None:
        self.model = mujoco.MjModel.from_xml_string(tabletop_xml(arm_only=True))
        self._data = mujoco.MjData(self.model)
        self._tcp = self.model.site('tcp').id
        self._jacobian = np.zeros((6, 7))
        self.lower, self.upper = (bound.copy() for bound in self.model.jnt_range.T)

    def place(self, q: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Tool position ``[3]`` and approach axis ``[3]`` (unit, away from the hand) at joint positions ``q [7]``."""
        self._data.qpos[:] = q
        mujoco.mj_kinematics(self.model, self._data)
        return self._data.site_xpos[self._tcp].copy(), self._data.site_xmat[self._tcp].reshape(3, 3)[:, 2].copy()

    def heading(self) -> NDArray[np.float64]:
        """Horizontal direction ``[2]`` across the line of the fingers, to the side of the wrist camera (the hand's x axis), at the
        positions of the last `place`. Not of unit length where the hand is tilted."""
        return self._data.site_xmat[self._tcp].reshape(3, 3)[:2, 0].copy()

    def jacobian(self) -> NDArray[np.float64]:
        """Jacobian ``[6, 7]`` (translation above rotation) of the tool at the positions of the last `place`."""
        mujoco.mj_comPos(self.model, self._data)
        mujoco.mj_jacSite(self.model, self._data, self._jacobian[:3], self._jacobian[3:], self._tcp)
        return self._jacobian


def expert_chunk(
    kinematics: ArmKinematics, q: NDArray[np.float64], goal: NDArray[np.float64], horizon: int, period: float
) -> NDArray[np.float64]:
    """The expert's next targets, float64 ``[horizon, 7]`` rad; row ``i`` is the target ``(i + 1) * period`` s from now.

    Args:
        kinematics: the arm.
        q: joint positions now, ``[7]`` rad.
        goal: goal point of the tool, ``[3]`` m, as `TabletopWorld.goal_point` gives it.
        horizon: number of targets, at least 1.
        period: time between targets, s; no joint moves faster than MAX_JOINT_SPEED.

    Raises:
        ValueError: a wrong shape, a value that is not finite, or a non-positive horizon or period.
    """
    q, goal = np.asarray(q, dtype=np.float64), np.asarray(goal, dtype=np.float64)
    if q.shape != (len(JOINT_NAMES),) or goal.shape != (3,) or not (np.isfinite(q).all() and np.isfinite(goal).all()):
        raise ValueError(f'expert needs 7 finite joint positions and a finite goal point, got q={q!r}, goal={goal!r}')
    if horizon < 1 or period <= 0.0:
        raise ValueError(f'expert needs horizon >= 1 and period > 0, got {horizon} and {period}')
    chunk = np.empty((horizon, len(JOINT_NAMES)))
    for row in chunk:
        q = row[:] = expert_step(kinematics, q, goal, period)
    return chunk


def expert_step(kinematics: ArmKinematics, q: NDArray[np.float64], goal: NDArray[np.float64], period: float) -> NDArray[np.float64]:
    """Joint positions ``[7]`` one ``period`` after ``q``; see `expert_chunk`."""
    return step_towards(kinematics, q, funnel(kinematics.place(q)[0], goal), period)


def step_towards(
    kinematics: ArmKinematics,
    q: NDArray[np.float64],
    way: NDArray[np.float64],
    period: float,
    max_tool_speed: float = MAX_TOOL_SPEED,
    turn: float = 0.0,
) -> NDArray[np.float64]:
    """Joint positions ``[7]`` one ``period`` after ``q``, for a tool that has ``way [3]`` (m) to go and ``turn`` (rad) to turn.

    The tool covers a share of the way, at most at ``max_tool_speed`` (m/s), while its approach axis turns to the vertical.
    ``turn`` is about the world's z axis.
    """
    _, axis = kinematics.place(q)
    gain = 1.0 - np.exp(-APPROACH_RATE * period)
    travel = way * gain
    travel *= min(1.0, max_tool_speed * period / max(float(np.linalg.norm(travel)), 1e-12))
    # The rotation that makes the approach axis point straight down, axis x (0, 0, -1), and the one about the vertical.
    tilt = gain * np.array([-axis[1], axis[0], turn])

    jacobian = kinematics.jacobian().copy()
    jacobian[3:] *= _AXIS_WEIGHT
    wish = np.concatenate([travel, _AXIS_WEIGHT * tilt])
    homing = _HOMING_RATE * period * (HOME - q)
    step = homing + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPING, wish - jacobian @ homing)
    step *= min(1.0, MAX_JOINT_SPEED * period / max(float(np.abs(step).max()), 1e-12))
    lower, upper = kinematics.lower + _LIMIT_MARGIN, kinematics.upper - _LIMIT_MARGIN
    stepped: NDArray[np.float64] = np.minimum(np.maximum(q + step, lower), upper)
    return stepped


def funnel(
    position: NDArray[np.float64], goal: NDArray[np.float64], radius: float = ARRIVAL_RADIUS, steepness: float = 1.0
) -> NDArray[np.float64]:
    """Way ``[3]`` (m) from the tool at ``position [3]`` to where it should head: ``goal [3]`` within ``radius``, else above it, by
    ``steepness`` m per m of horizontal distance beyond ``radius``, and by `TRAVEL_CLEARANCE` at most."""
    offset = goal - position
    remaining = float(np.hypot(offset[0], offset[1]))
    offset[2] += min(TRAVEL_CLEARANCE, steepness * max(0.0, remaining - radius))
    return offset
