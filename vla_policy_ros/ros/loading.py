"""Loading a policy from the node: on the policy's own thread, the only one that ever touches the model, while this one waits."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vla_policy_ros.policy.executor import PolicyExecutor
from vla_policy_ros.resources import checkpoint_path
from vla_policy_ros.robot import Robot

if TYPE_CHECKING:
    from vla_policy_ros.policy import Policy


def load_policy(
    executor: PolicyExecutor, robot: Robot, values: dict[str, Any], interrupted: threading.Event, tell: Callable[[str], Any]
) -> Policy:
    """The policy that the node parameters ``values`` ask for, loaded and warmed up on ``executor``.

    Raises RuntimeError when ``interrupted`` is set meanwhile, and whatever is wrong with the checkpoint.
    """
    path = checkpoint_path(values['checkpoint'])
    done = threading.Event()
    results: list[Any] = []

    def load() -> Policy:
        from vla_policy_ros.policy import Policy

        policy = Policy.load(
            path,
            robot,
            device=values['device'],
            dtype=values['dtype'],
            num_steps=values['num_inference_steps'] or None,
            solver=values['solver'] or None,
            chunking=values['chunking'],
            seed=None if values['seed'] < 0 else values['seed'],
        )
        warm_up_ms = policy.warm_up()
        tell(f'checkpoint {policy.checkpoint_hash[:12]} loaded, first inference {warm_up_ms:.0f} ms')
        return policy

    def finished(result: Any) -> None:
        results.append(result)
        done.set()

    executor.submit(load, finished)
    while not done.wait(0.1):
        if interrupted.is_set():
            raise RuntimeError('interrupted while loading the checkpoint')
    if results[0].error is not None:
        raise results[0].error
    # A full collection over the model's objects stalls every thread for a quarter second; they live as long as the node.
    gc.collect()
    gc.freeze()
    policy: Policy = results[0].value
    return policy
