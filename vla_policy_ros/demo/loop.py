"""Simulator and policy node as two processes: started, waited for, watched, stopped in order. Main thread."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_policy_ros.demo.processes import Child

if TYPE_CHECKING:
    from vla_policy_ros.ros.demo_observer import DemoObserver

READY_TIMEOUT_S = 180.0
POLL_S = 0.1


class LoopError(RuntimeError):
    """The closed loop cannot begin or go on; the message says why and what to do."""


class ClosedLoopProcesses:
    """The processes of one closed loop, from `start` to `stop`."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(self, out: Path, simulation: Mapping[str, Any], policy: Mapping[str, Any]) -> None:
        """Start simulator and policy node, in this order, with these ROS parameters; their logs go to the folder ``out``."""
        for name, module, values in (
            ('simulator', 'vla_policy_ros.sim.ros_node', simulation),
            ('policy', 'vla_policy_ros.ros.policy_node', policy),
        ):
            self._children.append(Child(name, module, _ros_arguments(values), out / f'{name}.log'))

    def check(self, status: Any = None) -> None:
        """Raise ChildError if a process has ended, LoopError if the newest ``status`` of the policy node says FAULT."""
        for child in self._children:
            child.check()
        if status is not None and status.state_name == 'FAULT':
            # The node's reason with what it logged before: one fault often follows from another.
            policy = self._children[-1]
            raise LoopError(f'the policy node cannot work: {status.reason}; the last lines of {policy.log}:\n{policy.tail()}')

    def wait_until_ready(self, observer: DemoObserver, tell: Callable[[str], None]) -> None:
        """Return when the simulator reports and the policy node lacks nothing but an instruction; ``tell`` hears what is awaited.

        Raises:
            ChildError: a process ended.
            LoopError: the policy node is in FAULT, or nobody was ready in time.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check(observer.status)
            waiting = _waiting_for(observer)
            if not waiting:
                return
            tell(f'waiting for {waiting}')
            time.sleep(POLL_S)
        late = self._children[0 if observer.report is None else -1]
        raise LoopError(
            f'not ready after {READY_TIMEOUT_S:.0f} s, still waiting for {_waiting_for(observer)}; the last lines of {late.log}:\n'
            f'{late.tail()}'
        )

    def brake(self, observer: DemoObserver) -> None:
        """Ask for a soft stop and wait until the arm rests, as far as both processes still run."""
        if all(child.running for child in self._children) and observer.request_stop():
            observer.wait_until_stopped()

    def stop(self) -> str:
        """End the policy node (which brakes in any case), then the simulator (which reports what it executed). What went wrong,
        as a sentence, or ''."""
        failure = ''
        for child in reversed(self._children):
            failed_before = not child.running
            if not child.stop() and not failed_before and not failure:
                failure = f'the {child.name} process did not end cleanly; the last lines of {child.log}:\n{child.tail()}'
        return failure


def _ros_arguments(values: Mapping[str, Any]) -> list[str]:
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    return ['--ros-args', *(part for name, text in texts.items() for part in ('-p', f'{name}:={text}'))]


def _waiting_for(observer: DemoObserver) -> str:
    status = observer.status
    if observer.report is None:
        return 'the simulator'
    if status is None:
        return 'the policy node'
    if status.lifecycle_state != 'active':
        return f'the policy node, which is {status.lifecycle_state}'
    return '; '.join(health.reason for health in status.inputs if not health.ok and health.name != 'instruction')


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ending in order takes seconds; a second Ctrl-C must not cost the results."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
