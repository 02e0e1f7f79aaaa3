"""The senders that are compared: ours, and the emission patterns that other bridges use.

The naive ones differ in what they send and in how they count; they share a loop like those of public policy servers: the newest
message of every input, no gates, one request in flight, and where actions are executed one by one, a queue of them. Joint states
are read by name, and a joint that a message lacks keeps its last value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from fault_cases import MS, Fault, all_faults
from harness import CAMERA, CONTROLLER, JOINTS, Array, Policy, ReferencePath, Sender, Trace, World, robot
from measures import Measures, measure, worst

from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.control.timeline import CHUNKING, Chunking
from vla_policy_ros.observation.images import decode_image
from vla_policy_ros.runtime import ChunkReport, PolicyRuntime, Settings, State
from vla_policy_ros.types import NS_PER_S, ActionChunk, CameraView, JointTrajectory, Observation

REPLAN_NS = 200 * MS
_WATCH_NS = 20 * MS
_BEGIN_NS = 200 * MS
_TRANSPORT_MS = 60.0


class Ours:
    """`PolicyRuntime` with the node's defaults, driven as the node drives it."""

    def __init__(self, chunking: Chunking = 'replace') -> None:
        self._settings = Settings(replan_rate=NS_PER_S / REPLAN_NS, chunking=chunking)
        self._busy = False

    def start(self, world: World) -> None:
        """See `Sender`."""
        self._world = world
        self._emission = Emission.for_controller(world.controller.parameters.update_rate, 'start', _TRANSPORT_MS)
        planner = TrajectoryPlanner(JointLimits.from_robot(world.robot), self._emission)
        self._runtime = PolicyRuntime(world.robot, world.answer, planner, self, self, self._wake, self._settings)
        world.at(_BEGIN_NS, self._begin)
        world.sender_every(REPLAN_NS, _BEGIN_NS, self._runtime.tick)
        world.sender_every(_WATCH_NS, 4 * MS, self._runtime.watch)

    def put_image(self, message: Any, now_ns: int) -> None:
        """See `Sender`."""
        self._runtime.inputs.put_image(CAMERA, message, now_ns)

    def put_state(self, message: Any, now_ns: int) -> None:
        """See `Sender`."""
        self._runtime.inputs.put_joint_state(message, now_ns)

    def put_reference(self, positions: Array, stamp_ns: int) -> None:
        """See `Sender`."""
        self._runtime.put_controller_reference(positions, stamp_ns)
        self._runtime.watch_acceptance(CONTROLLER, positions, stamp_ns, self._world.now_ns)

    def status(self) -> str:
        """See `Sender`."""
        lost = self._runtime.counters.trajectories_not_accepted
        noticed = f'{lost} trajectories not accepted' if lost else ''
        return '; '.join(part for part in (self._runtime.state.name, self._runtime.reason, noticed) if part)

    # The runtime's executor.

    def submit(self, call: Callable[[], Any], on_done: Callable[[Any], None]) -> bool:
        """Hand the call to the world's policy."""
        if self._busy:
            return False
        self._busy = True

        def done(value: Any, error: Exception | None) -> None:
            self._busy = False
            on_done(SimpleNamespace(value=value, error=error))

        self._world.infer(call, done)
        return True

    # The runtime's listener.

    def on_trajectory(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Send it as the node does."""
        if actuate:
            self._world.publish(TrajectoryMessage.from_trajectory(trajectory, self._emission.header_stamp_ns(trajectory)))

    def on_chunk(self, report: ChunkReport) -> None:
        """Note where its motion takes over."""
        if report.plan.trajectory is not None:
            self._world.note_takeover(report.plan.seam_ns)

    def on_state(self, state: State, reason: str) -> None:
        """Nothing to do: `status` reads it at the end."""

    def on_warning(self, sentence: str) -> None:
        """Nothing to do: it would be the operator's to read."""

    def _begin(self) -> None:
        self._runtime.instruct('follow the path', self._world.now_ns)
        self._runtime.activate(self._world.now_ns)

    def _wake(self) -> None:
        self._world.at(self._world.true_ns, lambda: self._runtime.collect(self._world.now_ns))


class Naive(ABC):
    """The loop that the naive senders share. Subclasses say what to do with a chunk and when to ask for one."""

    def __init__(self) -> None:
        self._image: Any = None
        self._positions: dict[str, float] = {}
        self._state_ns = 0
        self._in_flight = False

    def start(self, world: World) -> None:
        """See `Sender`."""
        self._world, self._period_ns = world, world.robot.action.period_ns

    def put_image(self, message: Any, now_ns: int) -> None:
        """See `Sender`."""
        self._image = message

    def put_state(self, message: Any, now_ns: int) -> None:
        """See `Sender`."""
        self._positions.update(zip(message.name, message.position, strict=True))
        self._state_ns = _ns(message)

    def put_reference(self, positions: Array, stamp_ns: int) -> None:
        """See `Sender`; nobody listens."""
        del positions, stamp_ns

    def status(self) -> str:
        """See `Sender`; there is none."""
        return ''

    def ask(self, now_ns: int) -> None:
        """Ask for a chunk, unless one is on its way."""
        if self._in_flight or self._image is None or len(self._positions) < len(JOINTS):
            return
        view = CameraView(decode_image(self._image), None, _ns(self._image))
        state = np.array([self._positions[joint] for joint in JOINTS])
        observation = Observation(view.stamp_ns, {CAMERA: view}, state, self._state_ns, 'follow the path')
        self._in_flight = True
        self._world.infer(lambda: self._world.answer(observation), self._answered)

    def _answered(self, chunk: ActionChunk | None, error: Exception | None) -> None:
        self._in_flight = False
        if chunk is None:
            raise RuntimeError('the synthetic policy failed') from error
        self.take(chunk)

    @abstractmethod
    def take(self, chunk: ActionChunk) -> None:
        """An answer arrives."""

    def send(self, points: list[TrajectoryPoint], stamp_ns: int = 0) -> None:
        """Publish a message for all joints."""
        self._world.publish(TrajectoryMessage(JOINTS, points, stamp_ns))


class WholeChunk(Naive):
    """``whole_chunk``: every answer is published as it is: positions only, stamp 0, action i at i dt, nothing trimmed.

    ``first`` counts i from 1 instead, which gives the controller one period to get to the first action.
    """

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self._first = first

    def start(self, world: World) -> None:
        super().start(world)
        world.sender_every(REPLAN_NS, _BEGIN_NS, self.ask)

    def take(self, chunk: ActionChunk) -> None:
        self.send([TrajectoryPoint((index + self._first) * chunk.dt_ns, row) for index, row in enumerate(chunk.actions)])


class SinglePoint(Naive):
    """``single_point_*``: the control loop of a policy library. Half a chunk is executed, one action per period as one point with
    time_from_start 0; then the loop waits for the next answer. ``stamped`` sets header.stamp to now."""

    def __init__(self, stamped: bool) -> None:
        super().__init__()
        self._stamped = stamped
        self._queue: list[Array] = []

    def start(self, world: World) -> None:
        super().start(world)
        world.sender_every(self._period_ns, _BEGIN_NS, self._step)

    def take(self, chunk: ActionChunk) -> None:
        self._queue = list(chunk.actions[: len(chunk.actions) // 2])

    def _step(self, now_ns: int) -> None:
        if self._queue:
            self.send([TrajectoryPoint(0, self._queue.pop(0))], now_ns if self._stamped else 0)
        else:
            self.ask(now_ns)


class StepQueue(Naive):
    """``step_queue``: an asynchronous queue that counts steps. One action per period is popped and sent as one point that is due
    one period later; an answer replaces the queue without as many actions as were popped since it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: list[Array] = []
        self._popped = 0

    def start(self, world: World) -> None:
        super().start(world)
        world.sender_every(self._period_ns, _BEGIN_NS, self._step)
        world.sender_every(REPLAN_NS, _BEGIN_NS, self.ask)

    def ask(self, now_ns: int) -> None:
        if not self._in_flight:
            self._popped = 0
        super().ask(now_ns)

    def take(self, chunk: ActionChunk) -> None:
        self._queue = list(chunk.actions[self._popped :])

    def _step(self, now_ns: int) -> None:
        if self._queue:
            self._popped += 1
            self.send([TrajectoryPoint(self._period_ns, self._queue.pop(0))])


OURS: dict[str, Callable[[], Sender]] = {f'ours, {mode}': partial(Ours, mode) for mode in CHUNKING}
NAIVE: dict[str, Callable[[], Sender]] = {
    'single_point_now': partial(SinglePoint, stamped=True),
    'single_point_zero': partial(SinglePoint, stamped=False),
    'whole_chunk': WholeChunk,
    'whole_chunk_ahead': partial(WholeChunk, first=1),
    'step_queue': StepQueue,
}


def run(name: str, fault: Fault, latency_ms: int, seed: int, seconds: float) -> Trace:
    """One sender through one fault."""
    machine, path = robot(), ReferencePath(seed)
    policy = Policy(machine, path, seed, guided=name.endswith('rtc_guided'))
    sender = (OURS | NAIVE)[name]()
    return World(machine, path, policy, sender, fault, latency_ms * MS, seed).run(seconds)


def worst_of_seeds(name: str, fault_name: str, latency_ms: int, seeds: int, seconds: float) -> Measures:
    """What one sender makes of one fault, at worst."""
    limits = JointLimits.from_robot(robot())
    rows = []
    for seed in range(seeds):
        fault = next(fault for fault in all_faults() if fault.name == fault_name)  # a new one: faults keep state
        rows.append(measure(run(name, fault, latency_ms, seed, seconds), limits, ReferencePath(seed), fault))
    return worst(rows)


def _ns(message: Any) -> int:
    return int(message.header.stamp.sec) * NS_PER_S + int(message.header.stamp.nanosec)
