"""A bag through the policy loop of the live node, on the clock of the bag: what the node would have done, and when.

The runtime, its gates, its planner and the observation code are the node's. Messages arrive in the order and at the times at which
they were received; ticks and looks come at the node's periods; an answer comes as late as one likes. Nothing is sent anywhere, and
as in the node's dry run every plan starts from the measured state. Only the newest message of each input is in memory.

Enters: a `BagEpisode`, a policy, settings. Leaves: a `Run`. One thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.control.workspace import Workspace
from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.replay.latency import Latency
from vla_policy_ros.runtime import ChunkReport, Counters, Infer, PolicyRuntime, Settings, State
from vla_policy_ros.types import NS_PER_S, ActionChunk, JointTrajectory, KnownActions, Observation

# As in the node: see ros/policy_node.py and its parameter `transport_delay`.
_WATCH_NS = NS_PER_S // 50
_TRANSPORT_MS = 60.0
# A recorder that heard nothing for longer has not recorded one episode, or a time in the bag is damaged.
_LONGEST_SILENCE_NS = 600 * NS_PER_S


Look = Callable[[str, Any, bool], None]
"""Sees every message of a camera that is replayed: its name, the message, and whether it is an image (else its CameraInfo)."""


class Observer(Protocol):
    """Who sees every observation that the policy is asked about, while its pixels exist."""

    def __call__(self, observation: Observation, chunk: ActionChunk) -> None: ...


@dataclass(frozen=True)
class ReplaySettings:
    """How a bag is replayed. Times in s on the clock of the bag.

    Attributes:
        replan_rate: Hz, as the node's parameter.
        latency: from the question to the answer.
        start_offset: seconds of the bag that are skipped.
        duration: seconds that are replayed; None is to the end.
        seed: of drawn latencies.
    """

    replan_rate: float = 5.0
    latency: Latency = field(default_factory=lambda: Latency((0.0,), '0 ms'))
    start_offset: float = 0.0
    duration: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.01 <= self.replan_rate <= 1000.0:
            raise ValueError(f'replan rate is {self.replan_rate} Hz; it must lie in 0.01..1000')
        if not 0.0 <= self.start_offset < float('inf'):
            raise ValueError(f'start offset is {self.start_offset} s; it must not be negative')
        if self.duration is not None and not self.duration > 0.0:
            raise ValueError(f'duration is {self.duration} s; it must be positive')


@dataclass(frozen=True)
class ReplayedChunk:
    """One question and its answer.

    Attributes:
        chunk: the answer.
        asked_ns, ready_ns: when, on the clock of the bag.
        state: float64 ``[S]`` that it answers.
        input_stamps: stamp of every message used, by input name.
        outcome: ``planned``, or the name of the planner's `Rejection`.
        reason: in words, where it was rejected.
        clamped: joints whose actions lay outside the position limits.
        cut: why the trajectory ends before the chunk, or ''.
        points_expired: actions that lay before the motion began; ``seam_jump``: from the measured state to the chunk's path.
        trajectory: what the node would have sent; None where it was rejected.
        stages_ms: wall milliseconds of each stage, on this machine.
    """

    chunk: ActionChunk
    asked_ns: int
    ready_ns: int
    state: NDArray[np.float64]
    input_stamps: Mapping[str, int]
    outcome: str
    reason: str
    clamped: tuple[str, ...]
    cut: str
    points_expired: int
    seam_jump: float
    trajectory: JointTrajectory | None
    stages_ms: Mapping[str, float]


@dataclass(frozen=True)
class StateChange:
    """The state of the policy from ``time_ns`` on, and why."""

    time_ns: int
    state: State
    reason: str


@dataclass
class Run:
    """What happened in one replay.

    Attributes:
        begin_ns, end_ns: from the first message that was replayed to the last.
        chunks: in order of arrival.
        states: changes of state, the first at ``begin_ns``.
        dropped: answers that came when nobody wanted them any more: a new instruction, failed inputs.
        counters: of the runtime.
        warnings: sentence to count, of what the node would have logged.
    """

    begin_ns: int = 0
    end_ns: int = 0
    chunks: list[ReplayedChunk] = field(default_factory=list)
    states: list[StateChange] = field(default_factory=list)
    dropped: int = 0
    counters: Counters = field(default_factory=Counters)
    warnings: dict[str, int] = field(default_factory=dict)


def replay(
    episode: BagEpisode, infer: Infer, settings: ReplaySettings, observer: Observer | None = None, look: Look | None = None
) -> Run:
    """Replay a bag. ``observer`` sees each observation with its answer, and ``look`` every picture.

    Raises:
        ValueError: nothing of the bag lies in the span that was asked for, or the policy does not fit the robot file.
        EpisodeError: the instruction was refused, or the bag's time goes back or leaps ahead.
        DamagedBag: the bag has been damaged since it was scanned.
    """
    return _Loop(episode, infer, settings, observer, look).run()


class _Loop:
    """The virtual clock, and what the runtime needs around it: executor, listener and inputs."""

    def __init__(
        self, episode: BagEpisode, infer: Infer, settings: ReplaySettings, observer: Observer | None, look: Look | None
    ) -> None:
        self._episode, self._infer, self._settings, self._observer, self._look = episode, infer, settings, observer, look
        robot = episode.recorded_robot
        slowest = min(controller.update_rate for controller in robot.controllers.values())
        planner = TrajectoryPlanner(
            JointLimits.from_robot(robot), Emission.for_controller(slowest, 'start', _TRANSPORT_MS), Workspace.from_robot(robot)
        )
        wanted = Settings(replan_rate=settings.replan_rate, dry_run=True, max_inference_time=float('inf'))
        self._runtime = PolicyRuntime(robot, self._answer, planner, self, self, self._wake, wanted)
        self._rng = np.random.default_rng(settings.seed)
        self._due: list[tuple[int, int, Callable[[int], None]]] = []
        self._count = 0
        self._now_ns = 0
        self._busy = False
        self._asked: tuple[int, NDArray[np.float64]] = (0, np.zeros(0))
        self._answered = 0
        self.made = Run()

    def run(self) -> Run:
        with self._episode.open_bag() as bag:
            # Seconds of silence are no leap of the clock: the node's timers go on meanwhile.
            for fed in self._episode.replay(bag).feed(self):
                if self._end_ns is not None and fed.now_ns > self._end_ns:
                    break
        if not self._begun:
            raise ValueError(f'{self._episode.name} has no message in the span that was asked for')
        self._advance(self._now_ns if self._end_ns is None else max(self._now_ns, self._end_ns))
        self.made.end_ns = self._now_ns
        self.made.counters = self._runtime.counters
        self.made.dropped = self._answered - len(self.made.chunks)
        return self.made

    # ---- the clock -----------------------------------------------------------------------------------------------------------

    _begun = False
    _first_ns: int | None = None
    _end_ns: int | None = None

    def _at(self, due_ns: int, call: Callable[[int], None]) -> None:
        heapq.heappush(self._due, (due_ns, self._count, call))
        self._count += 1

    def _every(self, period_ns: int, first_ns: int, call: Callable[[int], None]) -> None:
        def again(now_ns: int) -> None:
            call(now_ns)
            self._at(now_ns + period_ns, again)

        self._at(first_ns, again)

    def _advance(self, now_ns: int) -> None:
        """Do all that is due until ``now_ns``."""
        while self._due and self._due[0][0] <= now_ns:
            due_ns, _, call = heapq.heappop(self._due)
            self._now_ns = max(self._now_ns, due_ns)
            call(due_ns)
        self._now_ns = max(self._now_ns, now_ns)

    def _begin(self, now_ns: int) -> None:
        self._begun, self._now_ns = True, now_ns
        self.made.begin_ns = now_ns
        self.made.states.append(StateChange(now_ns, State.WAITING, ''))
        self._runtime.activate(now_ns)
        self._every(_WATCH_NS, now_ns + _WATCH_NS // 2, self._runtime.watch)
        period_ns = round(NS_PER_S / self._settings.replan_rate)
        self._every(period_ns, now_ns + period_ns, self._runtime.tick)

    # ---- what is heard: a Sink -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> tuple[NDArray[np.float64], int] | None:
        """The newest state vector and its stamp."""
        return self._runtime.inputs.state

    def put_image(self, camera: str, message: Any, now_ns: int) -> str | None:
        """An image; before the span begins nobody looks at it."""
        if not self._hears(now_ns):
            return None
        if self._look is not None:
            self._look(camera, message, True)
        return self._runtime.inputs.put_image(camera, message, now_ns)

    def put_camera_info(self, camera: str, message: Any, now_ns: int) -> str | None:
        """Intrinsics; heard also before the span begins, for they do not age."""
        self._hears(now_ns)
        if self._look is not None:
            self._look(camera, message, False)
        return self._runtime.inputs.put_camera_info(camera, message, now_ns)

    def put_joint_state(self, message: Any, now_ns: int) -> str | None:
        """A joint state."""
        return self._runtime.inputs.put_joint_state(message, now_ns) if self._hears(now_ns) else None

    def put_instruction(self, text: str, now_ns: int) -> str | None:
        """An instruction; heard also before the span begins, for it holds until the next."""
        if now_ns > 1:  # the operator's own is there before the bag begins
            self._hears(now_ns)
        return self._runtime.inputs.put_instruction(text, now_ns) if not self._begun else self._runtime.instruct(text, now_ns)

    def _hears(self, now_ns: int) -> bool:
        """Let time go on to a message. Whether the span that is replayed has begun, and is not over."""
        if self._first_ns is None:
            self._first_ns = now_ns + round(self._settings.start_offset * NS_PER_S)
            if self._settings.duration is not None:
                self._end_ns = self._first_ns + round(self._settings.duration * NS_PER_S)
        if not self._begun and now_ns >= self._first_ns:
            self._begin(now_ns)
        if self._begun and now_ns < self._now_ns - NS_PER_S:
            raise EpisodeError(
                f'{self._episode.name}: time goes back by {(self._now_ns - now_ns) / NS_PER_S:.1f} s, '
                f'{(self._now_ns - self.made.begin_ns) / NS_PER_S:.1f} s after its begin: replay the parts with --start-offset and '
                '--playback-duration'
            )
        if self._begun and now_ns > self._now_ns + _LONGEST_SILENCE_NS:
            raise EpisodeError(
                f'{self._episode.name}: time leaps ahead by {(now_ns - self._now_ns) / NS_PER_S:.0f} s, '
                f'{(self._now_ns - self.made.begin_ns) / NS_PER_S:.1f} s after its begin: replay the part before with '
                '--playback-duration'
            )
        if self._begun and (self._end_ns is None or now_ns <= self._end_ns):
            self._advance(now_ns)
        return self._begun and (self._end_ns is None or now_ns <= self._end_ns)

    # ---- the policy and the runtime's executor -------------------------------------------------------------------------------

    def _answer(self, observation: Observation, known: KnownActions | None) -> ActionChunk:
        chunk = self._infer(observation, known)
        self._asked = (self._now_ns, observation.state)
        if self._observer is not None:
            self._observer(observation, chunk)
        return chunk

    def submit(self, call: Callable[[], Any], on_done: Callable[[Any], None]) -> bool:
        """The runtime's executor: the answer is made now, and is there after the latency."""
        if self._busy:
            return False
        self._busy = True
        began = perf_counter()
        try:
            outcome = SimpleNamespace(value=call(), error=None)
        except Exception as error:  # as the node's executor does: an exception of the policy is an answer
            outcome = SimpleNamespace(value=None, error=error)

        def finish(_: int) -> None:
            self._busy = False
            self._answered += 1
            on_done(outcome)

        self._at(self._now_ns + self._settings.latency.draw_ns(self._rng, 1e3 * (perf_counter() - began)), finish)
        return True

    def _wake(self) -> None:
        self._runtime.collect(self._now_ns)

    # ---- the runtime's listener ----------------------------------------------------------------------------------------------

    def on_trajectory(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Nothing to do: the chunk's report has it."""

    def on_move(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Never called: nobody asks for a pose."""
        raise AssertionError('a replay has no poses')

    def on_chunk(self, report: ChunkReport) -> None:
        """A chunk came back."""
        plan = report.plan
        asked_ns, state = self._asked
        self.made.chunks.append(
            ReplayedChunk(
                chunk=report.chunk,
                asked_ns=asked_ns,
                ready_ns=self._now_ns,
                state=state,
                input_stamps=dict(report.input_stamps),
                outcome='planned' if plan.rejection is None else plan.rejection.name,
                reason=plan.reason,
                clamped=tuple(plan.clamped_joints),
                cut=plan.cut,
                points_expired=plan.points_expired,
                seam_jump=float(plan.seam_jump),
                trajectory=plan.trajectory,
                stages_ms=dict(report.stages_ms),
            )
        )

    def on_state(self, state: State, reason: str) -> None:
        """The state changed."""
        self.made.states.append(StateChange(self._now_ns, state, reason))

    def on_warning(self, sentence: str) -> None:
        """What the node would have logged."""
        self.made.warnings[sentence] = self.made.warnings.get(sentence, 0) + 1
