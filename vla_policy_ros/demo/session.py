"""One demo from beginning to end: start both processes, wait, ask for objects in turn, stop in order, have the results written.

Main thread. Ctrl-C at any moment ends the run early; what was seen until then is still written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from vla_policy_ros.demo import panel, results
from vla_policy_ros.demo.pace import Pace
from vla_policy_ros.demo.processes import Child, ChildError, ros_environment
from vla_policy_ros.demo.reaches import Reach, Sample, plan_reaches
from vla_policy_ros.robot import Robot, load_robot

if TYPE_CHECKING:
    from vla_policy_ros.ros.demo_observer import DemoObserver

READY_TIMEOUT_S = 180.0
RECORD_TIMEOUT_S = 15.0
STALL_TIMEOUT_S = 20.0
REFRESH_S = 0.1
LINE_EVERY_S = 2.0


class DemoError(RuntimeError):
    """The demo cannot begin or go on; the message says why and what to do."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of `vla-policy demo`, resolved: paths exist, ``seconds`` is simulated time, ``rate`` is in Hz, and
    ``realtime_factor`` is how many simulated seconds pass in a second, at most."""

    headless: bool
    seconds: float
    json_file: Path | None
    out: Path
    instruction: str | None
    seed: int
    checkpoint: Path
    robot_file: Path
    rate: float
    realtime_factor: float
    dry_run: bool


@dataclass
class Run:
    """What is known after the closed loop. ``failure`` is a sentence, empty if all went well."""

    reaches: list[Reach] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    wall_s: float = 0.0
    simulated_s: float = 0.0
    interrupted: bool = False
    failure: str = ''
    status: Any = None


def run_demo(options: DemoOptions) -> int:
    """Run the demo and print its result: 0 if the loop really ran, 1 if it did not or a process failed.

    Raises:
        RobotFileError: the robot file cannot be used.
    """
    console = Console()
    robot = load_robot(options.robot_file)
    results.prepare_folder(options.out)
    os.environ.update(ros_environment(os.environ))
    # An operator's `kill` ends the demo as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = _closed_loop(options, robot, console)
    with _uninterrupted():
        summary = results.write(options, robot, run, console)
    if run.failure:
        console.print(run.failure, style='red', markup=False, highlight=False, soft_wrap=True)
    elif summary is None:
        console.print('ended before the policy could begin')
    if summary is not None:
        console.print(panel.result(summary, options.out))
    return 0 if summary is not None and summary['chunks'] > 0 and not run.failure else 1


def _closed_loop(options: DemoOptions, robot: Robot, console: Console) -> Run:
    """Run both processes. Failures are noted in the result, so that what was recorded is still written."""
    from vla_policy_ros.ros.demo_observer import DemoObserver

    run = Run()
    children: list[Child] = []
    with DemoObserver(robot) as observer:
        try:
            _start(options, children)
            _wait_until_ready(observer, children, console)
            _begin_recording(observer, options.out / results.BAG)
            _work(options, observer, children, run, console)
        except KeyboardInterrupt:
            run.interrupted = True
        except (ChildError, DemoError) as error:
            run.failure = str(error)
        finally:
            with _uninterrupted():
                _stop(observer, children, run)
    return run


def _start(options: DemoOptions, children: list[Child]) -> None:
    """Start simulator and policy node, in this order."""
    out = options.out.absolute()
    simulation = {
        'robot_file': options.robot_file, 'seed': options.seed, 'realtime_factor': float(options.realtime_factor),
        'report_file': out / results.REPORT,
    }  # fmt: skip
    policy = {
        'robot_file': options.robot_file, 'checkpoint': options.checkpoint.absolute(), 'replan_rate': float(options.rate),
        'dry_run': options.dry_run, 'autostart': True, 'use_sim_time': True,
    }  # fmt: skip
    for name, module, values in (
        ('simulator', 'vla_policy_ros.sim.ros_node', simulation),
        ('policy', 'vla_policy_ros.ros.policy_node', policy),
    ):
        children.append(Child(name, module, _ros_arguments(values), out / f'{name}.log'))


def _stop(observer: DemoObserver, children: list[Child], run: Run) -> None:
    """Soft stop, then the policy node (which brakes in any case), then the simulator (which reports what it executed)."""
    if run.simulated_s > 0.0 and all(child.running for child in children) and observer.request_stop():
        observer.wait_until_stopped()
    run.status = observer.status
    for child in reversed(children):
        failed_before = not child.running
        if not child.stop() and not failed_before and not run.failure:
            run.failure = f'the {child.name} process did not end cleanly; the last lines of {child.log}:\n{child.tail()}'


def _ros_arguments(values: dict[str, Any]) -> list[str]:
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}
    return ['--ros-args', *(part for name, text in texts.items() for part in ('-p', f'{name}:={text}'))]


def _wait_until_ready(observer: DemoObserver, children: list[Child], console: Console) -> None:
    """Return when the simulator reports and the policy node lacks nothing but an instruction.

    Raises:
        ChildError: a process ended.
        DemoError: the policy node is in FAULT, or nobody was ready in time.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    with console.status('starting simulator and policy node') as spinner:
        while time.monotonic() < deadline:
            for child in children:
                child.check()
            status = observer.status
            if status is not None and status.state_name == 'FAULT':
                raise DemoError(_fault(status, children))
            waiting = _waiting_for(observer)
            if not waiting:
                return
            spinner.update(f'waiting for {waiting}')
            time.sleep(REFRESH_S)
    raise DemoError(f'not ready after {READY_TIMEOUT_S:.0f} s, still waiting for {_waiting_for(observer)}; see the logs')


def _waiting_for(observer: DemoObserver) -> str:
    status = observer.status
    if observer.report is None:
        return 'the simulator'
    if status is None:
        return 'the policy node'
    if status.lifecycle_state != 'active':
        return f'the policy node, which is {status.lifecycle_state}'
    return '; '.join(health.reason for health in status.inputs if not health.ok and health.name != 'instruction')


def _fault(status: Any, children: list[Child]) -> str:
    """The node's reason with what it logged before: one fault often follows from another."""
    policy = children[-1]
    return f'the policy node cannot work: {status.reason}; the last lines of {policy.log}:\n{policy.tail()}'


def _begin_recording(observer: DemoObserver, bag: Path) -> None:
    """Record from now on, and go on when images arrive, so that the first motion is not missed. Raises DemoError."""
    observer.record(bag)
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    while observer.unheard():
        if time.monotonic() > deadline:
            raise DemoError(f'the recorder hears nothing on {", ".join(observer.unheard())}: does the simulator publish it?')
        time.sleep(REFRESH_S)


def _work(options: DemoOptions, observer: DemoObserver, children: list[Child], run: Run, console: Console) -> None:
    """Give the instructions one after the other and follow what happens.

    Raises:
        ChildError: a process ended.
        DemoError: simulated time stands still, or the policy node is in FAULT.
    """
    report = observer.report
    assert report is not None
    begin, wall_begin = float(report['simulated_s']), time.monotonic()
    planned = plan_reaches(report['objects'], begin, options.seconds, options.instruction)
    moved_at, now = wall_begin, begin
    pace = Pace(options.realtime_factor, begin)
    with _shown(options, console) as show:
        while now < begin + options.seconds:
            for child in children:
                child.check()
            while len(run.reaches) < len(planned) and now >= planned[len(run.reaches)].begin:
                run.reaches.append(planned[len(run.reaches)])
                observer.instruct(run.reaches[-1].instruction)
            time.sleep(REFRESH_S)
            report, status = observer.report or report, observer.status
            if report['simulated_s'] > now:
                moved_at, now = time.monotonic(), float(report['simulated_s'])
                run.samples.append(Sample.from_report(report))
            elif time.monotonic() - moved_at > STALL_TIMEOUT_S:
                raise DemoError(f'simulated time has stood still for {STALL_TIMEOUT_S:.0f} s; see the log of the simulator')
            factor = pace.slower(now, status.requests_skipped)
            if factor is not None:
                observer.set_realtime_factor(factor)
            run.simulated_s, run.wall_s = now - begin, time.monotonic() - wall_begin
            if status.state_name == 'FAULT':
                raise DemoError(_fault(status, children))
            show(status, report, run)


@contextlib.contextmanager
def _shown(options: DemoOptions, console: Console) -> Iterator[Callable[[Any, dict[str, Any], Run], None]]:
    """A function that shows the present state: a live panel, or now and then a line where nobody looks."""
    if not options.headless and console.is_terminal:
        with Live(console=console, refresh_per_second=1.0 / REFRESH_S) as live:
            yield lambda status, report, run: live.update(panel.render(status, report, run.simulated_s, options.seconds))
        return
    printed = -LINE_EVERY_S

    def show(status: Any, report: dict[str, Any], run: Run) -> None:
        nonlocal printed
        if run.simulated_s - printed >= LINE_EVERY_S:
            printed = run.simulated_s
            console.print(panel.one_line(status, report, run.simulated_s), markup=False, highlight=False, soft_wrap=True)

    yield show


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ending in order takes seconds; a second Ctrl-C must not cost the results."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
