"""The policy loop without ROS: latest observation in, trajectory out, and the state machine between them.

The live node and bag replay both drive this class. The owner feeds messages into ``inputs``, calls ``tick`` at the replan rate,
``watch`` more often, and ``collect`` when woken; everything that leaves goes to the `Listener`. All methods belong to one thread
(the one that receives messages); only inference runs elsewhere, on the executor handed in, one request in flight, newest wins.

Time is passed in with every call. A clock that jumps back drops everything that was learned on the old time line.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.acceptance import AcceptanceWatch
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.moves import Moves
from vla_policy_ros.control.planner import LimitExceeded, Plan, TrajectoryPlanner
from vla_policy_ros.control.timeline import Chunking, Timeline
from vla_policy_ros.observation import ObservationAssembler, ObservationError, Snapshot
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S, ActionChunk, JointTrajectory, KnownActions, Observation

_LATENCY_WINDOW = 100
_SAME_POSITION = 0.05


class State(IntEnum):
    """What the policy is doing; the values are those of PolicyStatus.msg."""

    WAITING = 0
    READY = 1
    RUNNING = 2
    HOLDING = 3
    STOPPED = 4
    FAULT = 5


@dataclass(frozen=True)
class Settings:
    """How to run today. Times in s.

    Attributes:
        replan_rate: Hz at which a new chunk is wanted.
        dry_run: plan and report, but never actuate; every plan then starts from the measured state.
        max_inference_time: an inference that takes longer is reported as a stall.
        chunking: how chunks follow each other, see `Timeline`; fixed while the runtime lives.
        max_not_accepted: the robot is stopped when a controller does not accept this many trajectories in a row; 0 is never.
        stop_policy: what a soft stop and a deactivation do to the motion: ``brake`` and hold, or go to the pose ``park``.
    """

    replan_rate: float = 5.0
    dry_run: bool = False
    max_inference_time: float = 2.0
    chunking: Chunking = 'replace'
    max_not_accepted: int = 3
    stop_policy: Literal['brake', 'park'] = 'brake'


@dataclass(frozen=True)
class ChunkReport:
    """One chunk and all that became of it; what ActionChunk.msg shows."""

    chunk: ActionChunk
    plan: Plan
    actuated: bool
    input_stamps: Mapping[str, int]
    stages_ms: Mapping[str, float]
    latency_ms: float


@dataclass
class Counters:
    """Totals since configuration; what PolicyStatus.msg shows."""

    observations: int = 0
    chunks: int = 0
    trajectories_published: int = 0
    trajectories_rejected: int = 0
    trajectories_not_accepted: int = 0
    requests_skipped: int = 0


class Listener(Protocol):
    """Where the runtime's results go."""

    def on_trajectory(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """A trajectory to show, and to send to the controllers if ``actuate``."""

    def on_move(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """The same, for a move to a pose: nothing follows it soon."""

    def on_chunk(self, report: ChunkReport) -> None:
        """A chunk came back and was planned or rejected."""

    def on_state(self, state: State, reason: str) -> None:
        """The state or its reason changed."""

    def on_warning(self, sentence: str) -> None:
        """Something that the operator should know and that changes no state."""


class Executor(Protocol):
    """Runs one call at a time on the policy's thread."""

    def submit(self, call: Callable[[], Any], on_done: Callable[[Any], None]) -> bool:
        """Start ``call``; ``on_done`` gets a result with ``value`` and ``error`` on the worker thread. False if busy."""


class Infer(Protocol):
    """The policy: one observation, and what is decided already, to one chunk; on the executor's thread."""

    def __call__(self, observation: Observation, known: KnownActions | None) -> ActionChunk: ...


@dataclass
class _Request:
    epoch: int
    snapshot: Snapshot
    started_ns: int
    decode_ms: float = 0.0
    result: Any = None


class PolicyRuntime:
    """The loop. See the module docstring for who calls what.

    Args:
        robot: the robot file.
        infer: the policy; called on the executor's thread only.
        planner: chunk to trajectory.
        executor: runs ``infer``.
        listener: gets trajectories, chunk reports and changes of state.
        wake: called on the executor's thread when a result waits; it must cause ``collect`` to be called on the owner's thread.
        settings: see `Settings`; ``settings`` may be replaced at any time.
    """

    def __init__(
        self,
        robot: Robot,
        infer: Infer,
        planner: TrajectoryPlanner,
        executor: Executor,
        listener: Listener,
        wake: Callable[[], None],
        settings: Settings,
    ) -> None:
        self.robot = robot
        self.inputs = ObservationAssembler(robot)
        self.settings = settings
        self.counters = Counters()
        self.state = State.WAITING
        self.reason = ''
        self.active = False
        self._infer = infer
        self._executor = executor
        self._listener = listener
        self._wake = wake
        self.timeline = Timeline(planner, settings.chunking)
        self._moves = Moves(planner)
        self._move_until_ns = 0
        self._parking = self._astray = False
        self._latencies: deque[float] = deque(maxlen=_LATENCY_WINDOW)
        self._epoch = 0
        self._in_flight: _Request | None = None
        self._replan_wanted = False
        self._has_run = False
        self._inputs_failed = False
        self._plan_problem = ''
        self._stop_reason = ''
        self._fault_reason = ''
        self._controller_reference: tuple[NDArray[np.float64], int] | None = None
        self._acceptance = {
            name: AcceptanceWatch(name, controller.joints, planner.limits, planner.emission)
            for name, controller in robot.controllers.items()
            if controller.state_topic is not None
        }

    # ---- commands of the operator ------------------------------------------------------------------------------------------

    def activate(self, now_ns: int) -> None:
        """Begin to plan. Motion starts from where the controller holds the robot now."""
        now_ns = self._advance(now_ns)
        self.active, self._has_run, self._plan_problem = True, False, ''
        self.timeline.forget_motion_at_rest()
        self._forget_acceptance()
        self._new_epoch()
        self._update_state(now_ns)

    def deactivate(self, now_ns: int, *, only_brake: bool = False) -> None:
        """Brake, or park if that is the stop policy and not ``only_brake``, then be silent."""
        now_ns = self._advance(now_ns)
        if only_brake or not (self._parking and self._is_moving(now_ns)):
            self._end_motion(now_ns, only_brake)
        self.active, self._has_run, self._plan_problem = False, False, ''
        self._new_epoch()
        self._update_state(now_ns)

    def stop(self, now_ns: int, reason: str) -> None:
        """Soft stop: brake, or park if that is the stop policy, then be silent until ``reset``. A move, too, ends in a brake."""
        now_ns = self._advance(now_ns)
        self._end_motion(now_ns, only_brake=False)
        self._stop_reason = reason
        self._new_epoch()
        self._update_state(now_ns)

    def move(self, pose: str, now_ns: int) -> str:
        """Soft stop and go to ``pose`` of the robot file. Returns why that is not possible, or ''; then all goes on as before.

        Raises KeyError for a pose that the robot file does not have.
        """
        now_ns = self._advance(now_ns)
        problem = self._go_to(pose, now_ns)
        if not problem:
            self._stop_reason = f'sent to {pose}; call ~/reset to go on'
            self._new_epoch()
            self._update_state(now_ns)
        return problem

    def reset(self, now_ns: int) -> str:
        """Leave a soft stop; the motion starts anew from where the controller holds the robot. Returns why it is refused, or ''."""
        now_ns = self._advance(now_ns)
        if self._is_moving(now_ns):
            return f'the robot is {self._stop_reason.split(";")[0]} and not there yet: wait, or call ~/stop first'
        self._stop_reason = ''
        self._plan_problem = ''
        self.timeline.forget_motion_at_rest()
        self._forget_acceptance()
        self._update_state(now_ns)
        return ''

    def fault(self, now_ns: int, reason: str) -> None:
        """Brake and stay in FAULT: the policy cannot work any more."""
        now_ns = self._advance(now_ns)
        self._brake(now_ns)
        self._fault_reason = reason
        self._new_epoch()
        self._update_state(now_ns)

    def instruct(self, text: str, now_ns: int) -> str | None:
        """Set the instruction; a chunk in flight for the old one is dropped. Returns why it is refused, or None."""
        now_ns = self._advance(now_ns)
        before = self.inputs.instruction
        refusal = self.inputs.put_instruction(text, now_ns)
        if self.inputs.instruction != before:
            self._new_epoch()
            self._replan_wanted = self.active
        self.watch(now_ns)
        return refusal

    def put_controller_reference(self, positions: NDArray[np.float64], stamp_ns: int) -> None:
        """Positions ``[A]`` that the controllers commanded at ``stamp_ns``; a motion starts from them rather than from the measured
        ones."""
        self._controller_reference = (positions, stamp_ns)
        if self.active and not self.settings.dry_run:
            self.timeline.reconcile(positions, stamp_ns)

    def watch_acceptance(self, name: str, positions: NDArray[np.float64], stamp_ns: int, now_ns: int) -> None:
        """Controller ``name``, which has a state topic, commanded ``positions [J]`` of its joints at ``stamp_ns``. Warn where it
        does not follow a trajectory; stop where it follows none."""
        now_ns = self._advance(now_ns)
        watch = self._acceptance[name]
        sentence = watch.observe(positions, stamp_ns, now_ns)
        if sentence is None:
            return
        self.counters.trajectories_not_accepted += 1
        if not 0 < self.settings.max_not_accepted <= watch.in_a_row or self._stop_reason or not self.active:
            self._listener.on_warning(sentence)
            return
        # Without a brake: where the controller has let go of the motion, that would start from where the robot is not.
        self._stop_reason = f'{watch.in_a_row} trajectories in a row were not accepted: {sentence}; then call ~/reset'
        self._astray = True
        self._new_epoch()
        self._update_state(now_ns)

    # ---- the loop ----------------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """Ask for a new chunk from the newest observation. Call it at the replan rate."""
        now_ns = self._advance(now_ns)
        self.watch(now_ns)
        if self._may_plan():
            self._request(now_ns)

    def watch(self, now_ns: int) -> None:
        """Judge the inputs, the clock, the inference and the robot; brake where one fails. Call it often: it is cheap."""
        now_ns = self._advance(now_ns)
        if self.active and not self._fault_reason:
            if not self._stop_reason:
                self._watch_inference(now_ns)
            if not self._stop_reason or self._is_moving(now_ns):
                self._watch_following(now_ns)
        self._update_state(now_ns)
        if self._replan_wanted and self._may_plan() and self._in_flight is None:
            self._request(now_ns)

    def collect(self, now_ns: int) -> None:
        """Take the result of the inference in flight, if it is there, plan it and hand it on."""
        now_ns = self._advance(now_ns)
        request = self._in_flight
        if request is None or request.result is None:
            return
        self._in_flight = None
        self._update_state(now_ns)  # an input that has failed since the request makes its answer void
        if request.epoch == self._epoch and self.active:
            self._digest(request, now_ns)
        elif request.result.error is not None and not isinstance(request.result.error, ObservationError):
            self.fault(now_ns, f'inference failed: {request.result.error}')
        self.watch(now_ns)

    # ---- numbers for the status --------------------------------------------------------------------------------------------

    @property
    def inference_in_flight(self) -> bool:
        """True while the policy works on an observation."""
        return self._in_flight is not None

    def inference_age(self, now_ns: int) -> float:
        """Seconds that the inference in flight has taken, 0 if there is none."""
        return 0.0 if self._in_flight is None else (now_ns - self._in_flight.started_ns) / NS_PER_S

    def chunk_rate(self, now_ns: int) -> float:
        """Chunks per second achieved of late."""
        return self.timeline.chunk_rate(now_ns, self.settings.replan_rate)

    def latency_percentile(self, percent: float) -> float:
        """Latency from image stamp to published trajectory, ms, over the last chunks; NaN before the first."""
        return float(np.percentile(np.array(self._latencies), percent)) if self._latencies else float('nan')

    def commanded_until(self, now_ns: int) -> float:
        """Seconds until the last trajectory has come to rest, 0 if it has."""
        return self.timeline.moving_for(now_ns)

    # ---- inside ------------------------------------------------------------------------------------------------------------

    def _may_plan(self) -> bool:
        return self.state is State.RUNNING or (self.state is State.HOLDING and not self._inputs_failed)

    def _request(self, now_ns: int) -> None:
        if self._in_flight is not None:
            self.counters.requests_skipped += 1
            self._replan_wanted = True
            return
        request = _Request(self._epoch, self.inputs.snapshot(), now_ns)
        action = self.robot.action
        known = self.timeline.known_actions(request.snapshot.stamp_ns, action.period_ns, action.horizon)

        def work() -> ActionChunk:
            began = perf_counter()
            observation = request.snapshot.decode()
            request.decode_ms = 1e3 * (perf_counter() - began)
            return self._infer(observation, known)

        def done(result: Any) -> None:
            request.result = result
            self._wake()

        self._replan_wanted = False
        self._in_flight = request
        if self._executor.submit(work, done):
            self.counters.observations += 1
        else:
            self._in_flight = None
            self.fault(now_ns, 'the policy executor takes no more requests: configure the node again')

    def _digest(self, request: _Request, now_ns: int) -> None:
        error = request.result.error
        if isinstance(error, ObservationError):
            self._brake(now_ns)
            self._plan_problem = str(error)
            return
        if error is not None:
            self.fault(now_ns, f'inference failed: {type(error).__name__}: {error}')
            return
        chunk: ActionChunk = request.result.value
        began = perf_counter()
        commanded = self._commanded(now_ns)
        try:
            plan = self.timeline.plan(chunk, commanded)
        except ValueError as mismatch:  # the chunk does not fit the robot at all, which no later chunk will mend
            self.fault(now_ns, f'the policy does not fit the robot file: {mismatch}')
            return
        stages = {'decode': request.decode_ms, **chunk.stages_ms, 'plan': 1e3 * (perf_counter() - began)}
        self.counters.chunks += 1
        if plan.trajectory is not None:
            self._publish(plan, commanded)
            self.timeline.taken(chunk, plan)
            if plan.cut:
                self._listener.on_warning(f'chunk {chunk.sequence} is cut short: {plan.cut}')
            self._plan_problem = ''
            self._has_run = True
        else:
            self.timeline.refused()
            self.counters.trajectories_rejected += 1
            self._plan_problem = f'chunk {chunk.sequence} was refused: {plan.reason}'
        latency_ms = (now_ns - chunk.observation_stamp_ns) / 1e6
        self._latencies.append(latency_ms)
        actuated = plan.trajectory is not None and not self.settings.dry_run
        self._listener.on_chunk(ChunkReport(chunk, plan, actuated, request.snapshot.input_stamps, stages, latency_ms))

    def _publish(self, plan: Plan, commanded: CommandedMotion, *, move: bool = False) -> None:
        assert plan.trajectory is not None
        actuate = not self.settings.dry_run
        if actuate:
            self.timeline.accept(plan)
            self.counters.trajectories_published += 1
            for watch in self._acceptance.values():
                watch.published(plan.trajectory, plan.seam_ns)
        self._move_until_ns = commanded.until_ns if move else 0
        tell = self._listener.on_move if move else self._listener.on_trajectory
        tell(plan.trajectory, actuate=actuate)

    def _commanded(self, now_ns: int) -> CommandedMotion:
        """The commanded motion. After a silence it begins anew where the controllers hold the robot, else where it was measured:
        others may have moved it meanwhile."""
        commanded = self.timeline.commanded
        if commanded is None or self.settings.dry_run or self.timeline.starved():
            commanded = self.timeline.begin(self._anchor(now_ns))
            self._astray = False
        return commanded

    def robot_at(self) -> tuple[NDArray[np.float64], int, str] | None:
        """Positions ``[A]`` of the action joints, their stamp and who says so: the controllers, or else the measured state."""
        if self._controller_reference is not None:
            return *self._controller_reference, 'the reference of the controllers'
        state = self.inputs.state
        return None if state is None else (self.robot.action_positions(state[0]), state[1], 'the measured positions')

    def _anchor(self, now_ns: int) -> NDArray[np.float64]:
        state = self.inputs.state
        if state is None:
            raise RuntimeError('a motion cannot start without a measured joint state')
        if self._controller_reference is not None and not self.settings.dry_run:
            positions, stamp_ns = self._controller_reference
            if now_ns - stamp_ns <= round(self.robot.timing.max_state_age * NS_PER_S):
                return positions
        return self.robot.action_positions(state[0])

    def _end_motion(self, now_ns: int, only_brake: bool) -> None:
        """Stop as the stop policy says. A robot that is stopped already stays: it was parked, or something is wrong."""
        parks = self.settings.stop_policy == 'park' and self.active and not self.settings.dry_run
        if parks and not (only_brake or self._stop_reason or self._fault_reason):
            problem = self._go_to('park', now_ns)
            if not problem:
                return
            self._listener.on_warning(f'not parked: {problem}; the robot brakes where it is')
        self._brake(now_ns, though_inactive=only_brake)

    def _go_to(self, pose: str, now_ns: int) -> str:
        """Publish the move to ``pose``; why it cannot be, or ''."""
        goal, state = self.robot.poses[pose], self.inputs.state
        if not self.active:
            return 'the node is not active: activate it first'
        if not self.timeline.settled:
            return 'the clock jumped: wait until the last trajectory has come to rest'
        if self._astray:
            self.timeline.forget_motion_at_rest()
            if self.timeline.commanded is not None:
                return 'the robot does not follow the last trajectory, which has not come to its end: try again in a moment'
        age = float('inf') if state is None else (now_ns - state[1]) / NS_PER_S
        if self.timeline.starved() and age > self.robot.timing.max_state_age:
            return f'it is not known where the robot is: its joint state is {age:.1f} s old; check topic {self.robot.state.topic}'
        commanded = self._commanded(now_ns)
        plan = self._moves.move_to(goal, now_ns, commanded)
        if plan.trajectory is None or plan.cut:
            return plan.reason or plan.cut
        self._publish(plan, commanded, move=True)
        self._parking = pose == 'park'
        return 'dry run: the move is previewed and not sent' if self.settings.dry_run else ''

    def _is_moving(self, now_ns: int) -> bool:
        """Whether a move to a pose is under way."""
        return now_ns < self._move_until_ns

    def _brake(self, now_ns: int, *, though_inactive: bool = False) -> None:
        commanded = self.timeline.commanded
        if commanded is None or self.settings.dry_run or not (self.active or though_inactive):
            return
        try:
            stop = self.timeline.brake()
        except LimitExceeded as problem:
            self._listener.on_warning(f'{problem}; the last trajectory comes to rest by itself')
            return
        if stop is not None:
            self._publish(stop, commanded)

    def _watch_inference(self, now_ns: int) -> None:
        age = self.inference_age(now_ns)
        if age > self.settings.max_inference_time:
            limit = self.settings.max_inference_time
            self._plan_problem = f'inference has taken {age:.1f} s (limit {limit:g} s): is the device overloaded?'

    def _watch_following(self, now_ns: int) -> None:
        """Stop when the robot is not where it was commanded to be: it was stopped, blocked, or another node commands it."""
        commanded, state = self.timeline.commanded, self.inputs.state
        if commanded is None or state is None or self.settings.dry_run or state[1] < commanded.since_ns:
            return
        measured = self.robot.action_positions(state[0])
        expected, _ = commanded.sample(state[1])
        for joint, difference in zip(self.robot.action.joints, np.abs(expected - measured), strict=True):
            limit = self.robot.limits[joint].following_error
            if limit is not None and difference > limit:
                # Where the controller has let go of the motion, a braking trajectory would start from where the robot is not.
                if self._controller_follows(commanded, now_ns):
                    self._brake(now_ns)
                self._stop_reason = (
                    f'joint {joint!r} is {difference:.3f} from where it was commanded (limit {limit:g}): '
                    'is the controller active and the robot free? then call ~/reset'
                )
                self._astray, self._move_until_ns = True, 0
                self._new_epoch()
                return

    def _controller_follows(self, commanded: CommandedMotion, now_ns: int) -> bool:
        """Whether the controllers' reference, if it is known, is still what we commanded."""
        if self._controller_reference is None:
            return False
        positions, stamp_ns = self._controller_reference
        fresh = now_ns - stamp_ns <= round(self.robot.timing.max_state_age * NS_PER_S)
        return fresh and bool(np.abs(commanded.sample(stamp_ns)[0] - positions).max() < _SAME_POSITION)

    def _advance(self, now_ns: int) -> int:
        """The runtime's time: stands still over a small step back of the clock, starts anew after a jump back or a leap ahead.

        Nothing is sent then: the robot may stand elsewhere on the new time line.
        """
        if self.timeline.advance(now_ns):
            self.inputs.clear()
            if self._in_flight is not None:
                self._in_flight.started_ns = now_ns
            self._controller_reference = None
            self._move_until_ns = 0
            self._forget_acceptance()
            self._has_run = False
            self._new_epoch()
        return self.timeline.now_ns

    def _forget_acceptance(self) -> None:
        for watch in self._acceptance.values():
            watch.clear()

    def _new_epoch(self) -> None:
        """Results of requests made before now will be dropped."""
        self._epoch += 1
        self._replan_wanted = False
        self.timeline.forget_chunks()

    def _update_state(self, now_ns: int) -> None:
        problems = self.inputs.problems(now_ns)
        if problems and not self._inputs_failed and not self._stop_reason:
            self._brake(now_ns)
            self._new_epoch()  # a chunk in flight must not end the braking
        self._inputs_failed = bool(problems)
        state, reason = self._judge(problems)
        if (state, reason) != (self.state, self.reason):
            changed = state is not self.state or _kind(reason) != _kind(self.reason)
            self.state, self.reason = state, reason
            if changed:
                self._listener.on_state(state, reason)

    def _judge(self, problems: list[str]) -> tuple[State, str]:
        if self._fault_reason:
            return State.FAULT, self._fault_reason
        if self._stop_reason:
            return State.STOPPED, self._stop_reason
        if not self.active:
            return (State.WAITING, '; '.join(problems)) if problems else (State.READY, 'inputs complete, not active')
        if problems:
            return (State.HOLDING if self._has_run else State.WAITING), '; '.join(problems)
        if not self.timeline.settled:
            return State.WAITING, 'the clock jumped: waiting until the last trajectory has come to rest'
        if self._plan_problem:
            return State.HOLDING, self._plan_problem
        return State.RUNNING, ''


def _kind(reason: str) -> tuple[str, ...]:
    """What a reason is about, without its values: a growing age or another refused number is not a new reason."""
    return tuple(without_numbers(part.split(':')[0]) for part in reason.split('; '))


def without_numbers(sentence: str) -> str:
    """``sentence`` without its numbers, but with those in names such as ``panda_joint1``."""
    return re.sub(r'(?<!\w)[-+]?\d[\d.e+-]*', '', sentence)
