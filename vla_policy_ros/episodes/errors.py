"""How far chunks are from what was commanded, and two that look at nothing to compare with.

- ``hold`` stays at the measured positions;
- ``repeat_last`` goes on with the action that was commanded last.

Enters: arrays of actions, `Commands`. Leaves: errors in robot units. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.episodes.commands import Commands
from vla_policy_ros.robot import Robot

Array = NDArray[np.float64]
POLICY, HOLD, REPEAT_LAST = 'policy', 'hold', 'repeat_last'


@dataclass(frozen=True)
class OpenLoopError:
    """Errors of one who answers, over the windows of one episode.

    Attributes:
        mae, rmse: mean absolute and root mean square error over everything, robot units.
        joint_mae, joint_rmse: per action joint ``[A]``.
        step_mae, step_rmse: per action of the horizon ``[T]``; NaN where every window ends before.
    """

    mae: float
    rmse: float
    joint_mae: Array
    joint_rmse: Array
    step_mae: Array
    step_rmse: Array

    @classmethod
    def of(cls, error: Array, counted: NDArray[np.bool_]) -> OpenLoopError:
        """From errors ``[N, T, A]`` and which actions ``[N, T]`` count."""
        absolute, squared = np.abs(error), error**2
        counts = counted.sum(axis=0)

        def per_step(values: Array) -> Array:
            total = np.where(counted, values.mean(axis=2), 0.0).sum(axis=0)
            return np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0)

        return cls(
            float(absolute[counted].mean()),
            float(np.sqrt(squared[counted].mean())),
            absolute[counted].mean(axis=0),
            np.sqrt(squared[counted].mean(axis=0)),
            per_step(absolute),
            np.sqrt(per_step(squared)),
        )

    def to_dict(self, joints: Sequence[str]) -> dict[str, Any]:
        """JSON form; steps without a value are None."""
        steps = {
            name: [None if np.isnan(value) else float(value) for value in values]
            for name, values in (('step_mae', self.step_mae), ('step_rmse', self.step_rmse))
        }
        per_joint = {
            'joint_mae': dict(zip(joints, self.joint_mae.tolist(), strict=True)),
            'joint_rmse': dict(zip(joints, self.joint_rmse.tolist(), strict=True)),
        }
        return {'mae': self.mae, 'rmse': self.rmse, **per_joint, **steps}


def baselines(robot: Robot, states: Array, stamps_ns: NDArray[np.int64], commands: Commands, horizon: int) -> dict[str, Array]:
    """Actions ``[N, T, A]`` of the two that look at nothing, for states ``[N, S]`` at ``stamps_ns [N]``."""
    held = np.stack([robot.action_positions(state) for state in states])
    last = commands.sample(stamps_ns).positions
    return {name: np.repeat(rows[:, None], horizon, axis=1) for name, rows in ((HOLD, held), (REPEAT_LAST, last))}
