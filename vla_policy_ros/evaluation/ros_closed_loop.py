"""Episodes through everything that a robot has: topics, the policy node, controllers, the wall clock.

Simulator and policy node are started once. Before each episode the node is stopped, the simulator lays the scene out and puts the
arm where the episode begins, the instruction is published, and the node is let go; what became of it is read from the simulator
when the time of the episode is over. Scenes, starts and sentences are those of the evaluation in process.

Main thread; the observer's executor has one of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vla_policy_ros.demo.loop import ClosedLoopProcesses, LoopError, uninterrupted
from vla_policy_ros.demo.pace import Pace
from vla_policy_ros.demo.processes import ChildError, ros_environment
from vla_policy_ros.evaluation.evaluate import EvaluationOptions, OnResult, document
from vla_policy_ros.evaluation.probes import about_another_object
from vla_policy_ros.evaluation.report import EpisodeResult
from vla_policy_ros.evaluation.variations import conditions_of
from vla_policy_ros.evaluation.workers import Cell
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.sim.controller import START_NS
from vla_policy_ros.sim.dataset import check_task
from vla_policy_ros.sim.requests import episode_request
from vla_policy_ros.sim.tasks import TASKS
from vla_policy_ros.types import NS_PER_S

if TYPE_CHECKING:
    from vla_policy_ros.ros.evaluation_observer import EvaluationObserver

# Simulated time from the new scene to the start: cameras and joint states of the old scene have been replaced by then.
_SETTLE_S = 0.3
_POLL_S = 0.02
_STALL_TIMEOUT_S = 20.0
_PATIENCE_S = 10.0


def evaluate_over_ros(
    options: EvaluationOptions, out: Path | None, on_result: OnResult | None = None, *, pace: bool = False
) -> dict[str, Any]:
    """Play all episodes and return the document, with what the loop was like under ``ros``.

    Ctrl-C ends it early, and so does a process that fails: ``failure`` is then the reason, as a sentence.

    Args:
        options: what to evaluate; some of it is for the evaluation in process only and refused here.
        out: folder for the logs of both processes; None keeps none.
        on_result: hears of every episode.
        pace: let simulated time slow down until the policy keeps its rate, for machines that do other work, too.

    Raises:
        ValueError: an option that cannot be had over ROS, or the robot file cannot be used.
        LoopError, ChildError: a process failed, or does not go on, before any episode was finished.
    """
    _refuse_what_needs_one_process(options)
    robot = load_robot(options.robot_file)
    for name in options.tasks:
        check_task(TASKS[name], robot)
    os.environ.update(ros_environment(os.environ))
    # An operator's `kill` ends it as Ctrl-C does, so that no process is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from vla_policy_ros.ros.evaluation_observer import EvaluationObserver
    except ImportError as error:
        raise ValueError(f'--ros needs ROS 2 ({error}): source its setup file, or leave --ros out') from error
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else out.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        observer = stack.enter_context(EvaluationObserver(robot))
        return _Session(options, robot, observer, folder, Pace(1.0, 0.0) if pace else None).run(on_result)


def _refuse_what_needs_one_process(options: EvaluationOptions) -> None:
    probe = options.loop.probe
    refused = {
        '--wrong-k and --no-k': probe.hide_k or probe.focal_scale != 1.0,
        '--videos': options.videos is not None,
        '--jobs': options.jobs != 1,
    }
    found = [name for name, is_there in refused.items() if is_there]
    if found:
        raise ValueError(f'{", ".join(found)} cannot be had over ROS, where the node and the camera topics are the real ones')


@dataclass
class _Totals:
    """What happened during episodes, and not between them."""

    simulated_s: float = 0.0
    wall_s: float = 0.0
    chunks: int = 0
    chunks_refused: int = 0
    skipped: int = 0
    stops: int = 0


class _Session:
    def __init__(
        self, options: EvaluationOptions, robot: Robot, observer: EvaluationObserver, folder: Path, pace: Pace | None
    ) -> None:
        self._options, self._robot, self._observer, self._folder = options, robot, observer, folder
        self._processes = ClosedLoopProcesses()
        self._totals = _Totals()
        self._pace = pace

    def run(self, on_result: OnResult | None) -> dict[str, Any]:
        began = perf_counter()
        results: list[EpisodeResult] = []
        interrupted, failure = False, ''
        try:
            self._start()
            for cell in self._options.cells:
                results.append(self._play(cell))
                if on_result:
                    on_result(cell, results[-1])
        except KeyboardInterrupt:
            interrupted = True
        except (LoopError, ChildError) as error:
            if not results:
                raise
            interrupted, failure = True, str(error)  # what was finished is worth its time
        finally:
            with uninterrupted():
                self._processes.brake(self._observer)
                unclean = self._processes.stop()
        found = self._document(results, perf_counter() - began, interrupted)
        found['failure'] = failure or unclean
        return found

    def _start(self) -> None:
        options = self._options
        simulation = {'robot_file': options.robot_file}
        policy = {
            'robot_file': options.robot_file, 'checkpoint': options.checkpoint.absolute(), 'autostart': True, 'use_sim_time': True,
            'num_inference_steps': options.num_steps or 0, 'seed': options.policy_seed, 'status_rate': 20.0,
        }  # fmt: skip
        # An empty text cannot be given on a ROS command line; leaving it out means the same.
        self._processes.start(self._folder, simulation, policy | ({'solver': options.solver} if options.solver else {}))
        self._processes.wait_until_ready(self._observer, lambda _: None)

    def _play(self, cell: Cell) -> EpisodeResult:
        observer, task, conditions = self._observer, TASKS[cell.task], conditions_of(cell.variation)
        episode = task.sample(cell.seed, conditions)
        false = self._options.loop.probe.wrong_instruction
        told = about_another_object(episode, cell.seed) if false else episode
        self._stop_node()
        self._ask(episode_request(cell.task, cell.seed, conditions))
        observer.instruct(told.instruction)
        self._wait(lambda: observer.status.instruction == told.instruction, 'the policy node does not take the instruction')
        settled = self._episode['begun_s'] + _SETTLE_S
        self._wait(lambda: self._reported_s >= settled, 'the simulator does not report')
        before, wall_began = observer.status, perf_counter()
        if refusal := observer.resume():
            raise LoopError(f'the policy node does not go on: {refusal}')
        begin, seconds = self._now_s, self._options.loop.seconds or task.seconds
        self._wait(lambda: self._reported_s >= begin + seconds, 'the simulator does not report', seconds)
        judged, after = self._episode, observer.status
        self._count(before, after, self._reported_s - begin, perf_counter() - wall_began)
        outside = after.trajectories_rejected > before.trajectories_rejected or after.state_name == 'STOPPED'
        failure = 'limit' if outside and not judged['success'] else judged['failure']
        return EpisodeResult(cell.seed, told.instruction, judged['success'], judged['error'], failure, None)

    def _stop_node(self) -> None:
        observer = self._observer
        if not observer.request_stop():
            raise LoopError('the policy node does not answer ~/stop')
        observer.wait_until_stopped()
        if observer.status.commanded_until > 0.0:
            raise LoopError(f'the arm has not come to rest after ~/stop: {observer.status.reason}')

    def _ask(self, request: str) -> None:
        """Have the simulator begin an episode and return when it has."""
        before = self._report['episode']
        begun_s = -1.0 if before is None else before['begun_s']
        if refusal := self._observer.ask_for_episode(request):
            raise LoopError(f'the simulator does not begin the episode: {refusal}')
        self._wait(lambda: (self._report['episode'] or {'begun_s': -1.0})['begun_s'] > begun_s, 'the simulator begins no episode')

    @property
    def _report(self) -> dict[str, Any]:
        report = self._observer.report
        assert report is not None
        return report

    @property
    def _episode(self) -> dict[str, Any]:
        episode: dict[str, Any] = self._report['episode']
        return episode

    @property
    def _reported_s(self) -> float:
        """Simulated time of the newest report."""
        return float(self._report['simulated_s'])

    @property
    def _now_s(self) -> float:
        """Simulated time now, by the clock of the reports."""
        return (self._observer.time_ns - START_NS) / NS_PER_S

    def _wait(self, condition: Callable[[], bool], problem: str, seconds: float = 0.0) -> None:
        """Until ``condition``, which is due after ``seconds`` of simulated time.

        Raises:
            LoopError: with ``problem``, long after it was due; or because simulated time stands still.
        """
        begin = last = self._now_s
        moved = time.monotonic()
        while not condition():
            self._processes.check(self._observer.status)
            self._keep_pace()
            time.sleep(_POLL_S)
            now = self._now_s
            if now > last:
                last, moved = now, time.monotonic()
            if now > begin + seconds + _PATIENCE_S:
                raise LoopError(f'{problem}, {_PATIENCE_S:g} s after it should have')
            if time.monotonic() - moved > _STALL_TIMEOUT_S:
                raise LoopError(f'simulated time has stood still for {_STALL_TIMEOUT_S:g} s')

    def _keep_pace(self) -> None:
        factor = None if self._pace is None else self._pace.slower(self._now_s, self._observer.status.requests_skipped)
        if factor is not None:
            self._observer.set_realtime_factor(factor)

    def _count(self, before: Any, after: Any, simulated_s: float, wall_s: float) -> None:
        totals = self._totals
        totals.simulated_s += simulated_s
        totals.wall_s += wall_s
        totals.chunks += after.chunks - before.chunks
        totals.chunks_refused += after.trajectories_rejected - before.trajectories_rejected
        totals.skipped += after.requests_skipped - before.requests_skipped
        totals.stops += after.state_name == 'STOPPED'

    def _document(self, results: list[EpisodeResult], wall_s: float, interrupted: bool) -> dict[str, Any]:
        status, report, totals = self._observer.status, self._observer.report or {}, self._totals
        checkpoint = {'hash': status.checkpoint_hash, 'stats_hash': status.stats_hash} if status else {}
        found = document(self._options, results, checkpoint, 'ros', wall_s, interrupted)
        found['settings']['executed'] = None  # the node replans by its clock
        if totals.simulated_s > 0.0:
            trajectories = report['trajectories']
            found['ros'] = {
                'replan_rate_hz': float(status.replan_rate),
                'chunk_rate_hz': round(totals.chunks / totals.simulated_s, 4),
                'chunks': totals.chunks,
                'chunks_refused': totals.chunks_refused,
                'ticks_skipped': totals.skipped,
                'latency_p50_ms': _finite(status.latency_p50_ms),
                'latency_p99_ms': _finite(status.latency_p99_ms),
                'trajectories': {name: trajectories[name] for name in ('accepted', 'rejected', 'rejections')},
                'max_command_step_ratio': report['commands']['max_step_ratio'],
                'unexpected_stops': totals.stops,
                'simulated_s': round(totals.simulated_s, 3),
                'real_time_factor': round(totals.simulated_s / totals.wall_s, 4),
            }
        return found


def _finite(value: float) -> float | None:
    """As JSON takes it: None before the first chunk."""
    return round(float(value), 2) if math.isfinite(value) else None
