"""The simulator's arm once more as a URDF, and the interpolant of a trajectory, computed without the code under test."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.mjcf import JOINT_NAMES
from vla_policy_ros.types import JointTrajectory

Array = NDArray[np.float64]
MS = 1_000_000
T0 = 1_000_000 * MS
SPACING = 20 * MS
# Offset and roll of every joint of the arm, in the frame of the joint before it.
ARM = (
    (0.0, 0.0, 0.333, 0.0),
    (0.0, 0.0, 0.0, -1.5707963),
    (0.0, -0.316, 0.0, 1.5707963),
    (0.0825, 0.0, 0.0, 1.5707963),
    (-0.0825, 0.384, 0.0, -1.5707963),
    (0.0, 0.0, 0.0, 1.5707963),
    (0.088, 0.0, 0.0, 1.5707963),
)


def joint(
    name: str, parent: str, child: str, kind: str = 'revolute', xyz: str = '0 0 0', rpy: str = '0 0 0', rest: str = ''
) -> str:
    """One joint and its child link, with the things a real URDF has and kinematics must not stumble over."""
    return f"""
  <link name="{child}"><visual><geometry><mesh filename="package://nowhere/{child}.dae"/></geometry></visual></link>
  <joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>
    <origin xyz="{xyz}" rpy="{rpy}"/><dynamics damping="1"/>{rest}</joint>"""


LIMIT = '<axis xyz="0 0 1"/><limit lower="-3.8" upper="3.8" velocity="2" effort="10"/>'


def arm_urdf() -> str:
    parts = ['<robot name="arm"><link name="world"/>', joint('mount', 'world', 'link0', 'fixed', xyz='0.5 0 0.2', rpy='0 0 1')]
    for number, (x, y, z, roll) in enumerate(ARM, start=1):
        name = f'panda_joint{number}'
        parts.append(joint(name, f'link{number - 1}', f'link{number}', xyz=f'{x} {y} {z}', rpy=f'{roll} 0 0', rest=LIMIT))
    parts.append(joint('flange', 'link7', 'hand', 'fixed', xyz='0 0 0.107', rpy='0 0 -0.78539816'))
    parts.append(joint('tool', 'hand', 'tcp', 'fixed', xyz='0 0 0.1034'))
    finger = '<axis xyz="0 1 0"/><limit lower="0" upper="0.04" velocity="1" effort="1"/>'
    parts.append(joint('finger', 'hand', 'finger_link', 'prismatic', rest=finger))
    return '\n'.join([*parts, '</robot>'])


@cache
def simulator() -> ArmKinematics:
    return ArmKinematics()


def tips(q: Array) -> Array:
    """The tool of the simulated arm: MuJoCo's kinematics, not the code under test."""
    return np.array([simulator().place(row)[0] for row in q])


def trajectory(q: Array, v: Array, spacing_ns: int = SPACING, names: tuple[str, ...] = JOINT_NAMES) -> JointTrajectory:
    return JointTrajectory(T0, names, spacing_ns * np.arange(len(q), dtype=np.int64), q, v)


def dense(motion: JointTrajectory, until_ns: int | None = None) -> Array:
    """Joint positions every 0.5 ms and at every knot, up to a moment."""
    q, v, times = motion.positions, motion.velocities, motion.times_ns
    end = times[-1] if until_ns is None else until_ns - motion.start_ns
    moments = np.union1d(np.arange(times[0], end, MS // 2), np.append(times[times <= end], end))
    segment = np.clip(np.searchsorted(times, moments, side='right') - 1, 0, max(len(times) - 2, 0))
    h = (np.diff(times) * 1e-9)[segment][:, None]
    s = (moments - times[segment])[:, None] * 1e-9 / h
    p0, p3 = q[segment], q[segment + 1]
    p1, p2 = p0 + h * v[segment] / 3, p3 - h * v[segment + 1] / 3
    return p0 * (1 - s) ** 3 + 3 * p1 * s * (1 - s) ** 2 + 3 * p2 * s**2 * (1 - s) + p3 * s**3
