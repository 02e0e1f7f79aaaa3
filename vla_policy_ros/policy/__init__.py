"""A checkpoint and a robot file become a function from `Observation` to `ActionChunk`.

Enters: a checkpoint folder, a `Robot`, then observations. Leaves: action chunks in robot units with their provenance. Everything
that touches torch (loading, warming up, inferring) runs on the one thread of a `PolicyExecutor`; importing this package does not
import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_policy_ros.policy.base_checkpoint import write_base_checkpoint
    from vla_policy_ros.policy.checkpoint import FROM_NOTHING, CheckpointError, new_checkpoint
    from vla_policy_ros.policy.executor import Outcome, PolicyExecutor
    from vla_policy_ros.policy.policy import Policy

__all__ = ['FROM_NOTHING', 'CheckpointError', 'Outcome', 'Policy', 'PolicyExecutor', 'new_checkpoint', 'write_base_checkpoint']

_HOMES = {
    'CheckpointError': 'checkpoint',
    'FROM_NOTHING': 'checkpoint',
    'write_base_checkpoint': 'base_checkpoint',
    'new_checkpoint': 'checkpoint',
    'Outcome': 'executor',
    'PolicyExecutor': 'executor',
    'Policy': 'policy',
}


def __getattr__(name: str) -> Any:
    """Import the room's classes on first use, so that only those that need torch load it."""
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)
