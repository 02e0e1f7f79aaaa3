"""The executor: one thread, one request, errors delivered, closing joins."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from vla_policy_ros.policy.executor import Outcome, PolicyExecutor


@pytest.fixture
def executor() -> Iterator[PolicyExecutor]:
    executor = PolicyExecutor(num_threads=None)
    yield executor
    assert executor.close(timeout=10)


def run(executor: PolicyExecutor, fn: object) -> Outcome:
    """Submit and wait for the outcome."""
    done: list[Outcome] = []
    finished = threading.Event()
    assert executor.submit(fn, lambda outcome: (done.append(outcome), finished.set()))  # type: ignore[arg-type]
    assert finished.wait(10)
    return done[0]


def test_value_and_error_are_delivered(executor: PolicyExecutor) -> None:
    assert run(executor, lambda: 41 + 1) == Outcome(value=42)

    def fail() -> None:
        raise ValueError('no such checkpoint')

    outcome = run(executor, fail)
    assert not outcome.ok and isinstance(outcome.error, ValueError) and str(outcome.error) == 'no such checkpoint'
    assert run(executor, lambda: 1).ok, 'the thread survives an error'


def test_everything_runs_on_one_thread_that_is_not_the_callers(executor: PolicyExecutor) -> None:
    seen = {run(executor, threading.get_ident).value for _ in range(3)}
    assert len(seen) == 1 and threading.get_ident() not in seen


def test_a_second_request_is_refused_while_one_is_in_flight(executor: PolicyExecutor) -> None:
    started, release, finished = threading.Event(), threading.Event(), threading.Event()
    ran = []
    assert executor.submit(lambda: (started.set(), release.wait(10)), lambda _: finished.set())
    assert started.wait(10) and executor.busy
    assert not executor.submit(lambda: ran.append(1), lambda _: ran.append(2))
    release.set()
    assert finished.wait(10) and not executor.busy
    assert run(executor, lambda: 'next').value == 'next' and ran == []


def test_the_next_request_may_be_submitted_from_the_callback(executor: PolicyExecutor) -> None:
    answers: list[int] = []
    finished = threading.Event()

    def again(outcome: Outcome) -> None:
        answers.append(outcome.value)
        if outcome.value == 3:
            finished.set()
        else:
            assert executor.submit(lambda: outcome.value + 1, again)

    assert executor.submit(lambda: 0, again)
    assert finished.wait(10) and answers == [0, 1, 2, 3]


def test_an_error_in_the_callback_does_not_end_the_thread(executor: PolicyExecutor, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Outcome) -> None:
        raise RuntimeError('callback is broken')

    assert executor.submit(lambda: 1, broken)
    deadline = time.monotonic() + 10
    while executor.busy and time.monotonic() < deadline:
        time.sleep(0.005)
    assert run(executor, lambda: 'alive').value == 'alive'
    assert 'callback is broken' in caplog.text


def test_close_lets_the_running_request_finish_and_refuses_new_ones() -> None:
    executor = PolicyExecutor(num_threads=None)
    done: list[Outcome] = []
    assert executor.submit(lambda: time.sleep(0.1) or 'finished', done.append)
    assert executor.close(timeout=10)
    assert done == [Outcome(value='finished')]
    assert not executor.submit(lambda: 1, done.append)
    assert executor.close(timeout=1), 'closing twice is fine'


def test_threads_of_torch_are_pinned() -> None:
    import torch

    executor = PolicyExecutor(num_threads=1)
    try:
        assert run(executor, torch.get_num_threads).value == 1
    finally:
        assert executor.close(timeout=30)
    with pytest.raises(ValueError, match='num_threads is 0'):
        PolicyExecutor(num_threads=0)


def test_importing_the_executor_does_not_import_torch() -> None:
    code = 'import sys, vla_policy_ros.policy.executor; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
