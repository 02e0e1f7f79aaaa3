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
from vla_policy_ros.demo.loop import POLL_S, ClosedLoopProcesses, LoopError, uninterrupted
from vla_policy_ros.demo.pace import Pace
from vla_policy_ros.demo.processes import ChildError, ros_environment
from vla_policy_ros.demo.reaches import Reach, Sample, plan_reaches
from vla_policy_ros.robot import Robot, load_robot

if TYPE_CHECKING:
    from vla_policy_ros.ros.demo_observer import DemoObserver

RECORD_TIMEOUT_S = 15.0
STALL_TIMEOUT_S = 20.0
LINE_EVERY_S = 2.0


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
    with uninterrupted():
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
    processes = ClosedLoopProcesses()
    with DemoObserver(robot) as observer:
        try:
            _start(options, processes)
            with console.status('starting simulator and policy node') as spinner:
                processes.wait_until_ready(observer, spinner.update)
            _begin_recording(observer, options.out / results.BAG)
            _work(options, observer, processes, run, console)
        except KeyboardInterrupt:
            run.interrupted = True
        except (ChildError, LoopError) as error:
            run.failure = str(error)
        finally:
            with uninterrupted():
                if run.simulated_s > 0.0:
                    processes.brake(observer)
                run.status = observer.status
                failure = processes.stop()
                run.failure = run.failure or failure
    return run


def _start(options: DemoOptions, processes: ClosedLoopProcesses) -> None:
    out = options.out.absolute()
    simulation = {
        'robot_file': options.robot_file, 'seed': options.seed, 'realtime_factor': float(options.realtime_factor),
        'report_file': out / results.REPORT,
    }  # fmt: skip
    policy = {
        'robot_file': options.robot_file, 'checkpoint': options.checkpoint.absolute(), 'replan_rate': float(options.rate),
        'dry_run': options.dry_run, 'autostart': True, 'use_sim_time': True,
    }  # fmt: skip
    processes.start(out, simulation, policy)


def _begin_recording(observer: DemoObserver, bag: Path) -> None:
    """Record from now on, and go on when images arrive, so that the first motion is not missed. Raises LoopError."""
    observer.record(bag)
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    while observer.unheard():
        if time.monotonic() > deadline:
            raise LoopError(f'the recorder hears nothing on {", ".join(observer.unheard())}: does the simulator publish it?')
        time.sleep(POLL_S)


def _work(options: DemoOptions, observer: DemoObserver, processes: ClosedLoopProcesses, run: Run, console: Console) -> None:
    """Give the instructions one after the other and follow what happens.

    Raises:
        ChildError: a process ended.
        LoopError: simulated time stands still, or the policy node is in FAULT.
    """
    report = observer.report
    assert report is not None
    begin, wall_begin = float(report['simulated_s']), time.monotonic()
    planned = plan_reaches(report['objects'], begin, options.seconds, options.instruction)
    moved_at, now = wall_begin, begin
    pace = Pace(options.realtime_factor, begin)
    with _shown(options, console) as show:
        while now < begin + options.seconds:
            processes.check(observer.status)
            while len(run.reaches) < len(planned) and now >= planned[len(run.reaches)].begin:
                run.reaches.append(planned[len(run.reaches)])
                observer.instruct(run.reaches[-1].instruction)
            time.sleep(POLL_S)
            report, status = observer.report or report, observer.status
            if report['simulated_s'] > now:
                moved_at, now = time.monotonic(), float(report['simulated_s'])
                run.samples.append(Sample.from_report(report))
            elif time.monotonic() - moved_at > STALL_TIMEOUT_S:
                raise LoopError(f'simulated time has stood still for {STALL_TIMEOUT_S:.0f} s; see the log of the simulator')
            factor = pace.slower(now, status.requests_skipped)
            if factor is not None:
                observer.set_realtime_factor(factor)
            run.simulated_s, run.wall_s = now - begin, time.monotonic() - wall_begin
            show(status, report, run)


@contextlib.contextmanager
def _shown(options: DemoOptions, console: Console) -> Iterator[Callable[[Any, dict[str, Any], Run], None]]:
    """A function that shows the present state: a live panel, or now and then a line where nobody looks."""
    if not options.headless and console.is_terminal:
        with Live(console=console, refresh_per_second=1.0 / POLL_S) as live:
            yield lambda status, report, run: live.update(panel.render(status, report, run.simulated_s, options.seconds))
        return
    printed = -LINE_EVERY_S

    def show(status: Any, report: dict[str, Any], run: Run) -> None:
        nonlocal printed
        if run.simulated_s - printed >= LINE_EVERY_S:
            printed = run.simulated_s
            console.print(panel.one_line(status, report, run.simulated_s), markup=False, highlight=False, soft_wrap=True)

    yield show
