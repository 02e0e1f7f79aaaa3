"""JointState messages to the state vector, by joint name, never by message order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.robot import State


class JointStateError(ValueError):
    """A JointState that cannot fill the state vector; the message names the joint and the field."""


def state_vector(message: Any, state: State) -> NDArray[np.float64]:
    """State ``[S]`` in the order of ``state.names`` from a sensor_msgs/JointState in any order and with any further joints.

    Raises:
        JointStateError: a joint is missing or listed twice, an array does not match the names, or a value is not finite.
    """
    names = list(message.name)
    index = {name: i for i, name in enumerate(names)}
    if len(index) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise JointStateError(f'joint {twice!r} is listed twice in the joint state')
    missing = [joint for joint in state.joints if joint not in index]
    if missing:
        raise JointStateError(f'joint {missing[0]!r} is missing from the joint state, which has {_list(names)}')
    order = [index[joint] for joint in state.joints]
    blocks = []
    for field in state.fields:
        values = np.asarray(getattr(message, field), dtype=np.float64)
        if values.size != len(names):
            raise JointStateError(f'joint state has {len(names)} names but {values.size} {field} values')
        block = values[order]
        bad = np.flatnonzero(~np.isfinite(block))
        if bad.size:
            raise JointStateError(f'{field} of joint {state.joints[bad[0]]!r} is {block[bad[0]]}')
        blocks.append(block)
    return np.concatenate(blocks)


def _list(names: Sequence[str]) -> str:
    shown = ', '.join(names[:12])
    return f'{shown}, ... ({len(names)} joints)' if len(names) > 12 else shown or 'no joints'
