"""One worker thread for everything that touches the model: loading, warming up, inferring.

One request is in flight at a time; a second one is refused, not queued, because an observation that waited would be old. This
module does not import torch until the worker pins its thread count.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a request ended: its value, or the exception that it raised."""

    value: Any = None
    error: BaseException | None = None

    @property
    def ok(self) -> bool:
        """Whether `value` holds a result."""
        return self.error is None


Request = tuple[Callable[[], Any], Callable[[Outcome], None]]


class PolicyExecutor:
    """Runs one callable at a time on its own thread.

    Args:
        num_threads: intra-op threads that torch may use on the worker; None leaves torch alone (and unimported).
        name: thread name, visible in debuggers and in `top -H`.
    """

    def __init__(self, num_threads: int | None = 1, name: str = 'policy') -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f'num_threads is {num_threads}; the model needs at least one thread')
        self._num_threads = num_threads
        self._condition = threading.Condition()
        self._request: Request | None = None
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        with self._condition:
            return self._busy

    def submit(self, fn: Callable[[], Any], on_done: Callable[[Outcome], None]) -> bool:
        """Run ``fn`` on the worker, then ``on_done`` with its outcome, also on the worker.

        The executor counts as free before ``on_done`` is called, so that ``on_done`` may submit the next request.

        Returns:
            False where a request is in flight or the executor is closed; ``fn`` will then not run.
        """
        with self._condition:
            if self._busy or self._closed:
                return False
            self._busy = True
            self._request = (fn, on_done)
            self._condition.notify()
            return True

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, let the running one finish, and join the thread.

        Returns:
            whether the thread has ended within ``timeout`` seconds. Safe to call twice and from the worker itself.
        """
        with self._condition:
            self._closed = True
            self._condition.notify()
        if threading.current_thread() is self._thread:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._condition:
                while self._request is None and not self._closed:
                    self._condition.wait()
                if self._request is None:
                    return
                (fn, on_done), self._request = self._request, None
            outcome = self._run(fn)
            with self._condition:
                self._busy = False
            self._deliver(on_done, outcome)

    @staticmethod
    def _deliver(on_done: Callable[[Outcome], None], outcome: Outcome) -> None:
        try:
            on_done(outcome)
        except Exception:
            # A broken callback must not end the thread: the caller would wait for answers that never come.
            _LOGGER.exception('the callback of a policy request has failed')

    def _run(self, fn: Callable[[], Any]) -> Outcome:
        try:
            self._pin_threads()
            return Outcome(value=fn())
        except Exception as error:
            return Outcome(error=error)

    def _pin_threads(self) -> None:
        """Once, on the worker; here rather than at its start, so that a torch that cannot be imported fails the request."""
        if self._num_threads is not None:
            import torch

            torch.set_num_threads(self._num_threads)
            self._num_threads = None
