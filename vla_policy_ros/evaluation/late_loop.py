"""Episodes through the policy loop of the node, on simulated time, with answers that come as late as one likes.

Between the two other modes: the runtime, the planner and the emulated controllers are those of the node, and so are replanning
while the arm moves and the fate of an answer that is late; topics and processes are left out, and the latency is what is asked for,
not what this machine has. The same settings give the same episode.

Enters: a policy, a task, a scene seed. Leaves: `EpisodeResult`s. One thread, that of the world's renderer.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.control.timeline import Chunking
from vla_policy_ros.evaluation.report import EpisodeResult
from vla_policy_ros.robot import Robot
from vla_policy_ros.runtime import ChunkReport, Infer, PolicyRuntime, Settings, State
from vla_policy_ros.sim.controller import SimulatedRobot
from vla_policy_ros.sim.dataset import check_task
from vla_policy_ros.sim.tasks import Conditions, Task
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, ActionChunk, CameraView, JointTrajectory, KnownActions, Observation

_MS = 1_000_000
# As the node and the simulator have them: camera and joint rates, how often the runtime looks, how late a message arrives.
_CAMERA_NS, _STATE_NS, _REFERENCE_NS, _WATCH_NS, _TRANSPORT_NS = NS_PER_S // 15, 10 * _MS, 20 * _MS, 20 * _MS, 10 * _MS
_TRANSPORT_BOUND_MS = 60.0
_BEGIN_NS = 200 * _MS
# Neighbouring scenes lie this far apart on the clock from which a policy draws its noise.
_APART_NS = 1000 * NS_PER_S
_BLOCK = 1 << 20


@dataclass(frozen=True)
class LateSettings:
    """How episodes run: ``latency_ms`` from the request to the answer, and what the node's parameters of the same names say."""

    latency_ms: int = 0
    chunking: Chunking = 'replace'
    replan_rate: float = 5.0
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.latency_ms <= 10_000:
            raise ValueError(f'latency is {self.latency_ms} ms; it must lie in 0..10000')


class LateLoop:
    """A policy, the node's runtime and a simulated robot. Use it as a context manager, which frees the renderer.

    Args:
        infer: the policy; for real-time chunking one that was loaded with the same ``chunking``.
        robot: the robot file.
        settings: see `LateSettings`.

    Raises:
        RobotMismatch: the robot file describes something that the simulated arm is not.
    """

    def __init__(self, infer: Infer, robot: Robot, settings: LateSettings) -> None:
        self._infer, self._robot, self._settings = infer, robot, settings
        self._arm = SimulatedRobot(robot, seed=0)

    @property
    def world(self) -> TabletopWorld:
        """The world of the arm; all episodes are played in it."""
        return self._arm.world

    def __enter__(self) -> LateLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._arm.world.close()

    def run(self, task: Task, seed: int, conditions: Conditions) -> EpisodeResult:
        """The episode of a scene seed. Raises ValueError where robot or conditions do not fit the task."""
        check_task(task, self._robot)
        episode = task.sample(seed, conditions)
        self._arm.begin_episode(task, episode)
        play = _Play(self._arm, self._robot, self._infer, self._settings, seed)
        play.run(episode.instruction, self._settings.seconds or task.seconds)
        outcome = task.measure(self._arm.world, episode)
        failure = 'limit' if play.outside and not outcome.success else outcome.failure
        return EpisodeResult(seed, episode.instruction, outcome.success, outcome.error, failure)


class _Play:
    """One episode: the runtime's executor and listener, and the clock that everything hangs on."""

    def __init__(self, arm: SimulatedRobot, robot: Robot, infer: Infer, settings: LateSettings, seed: int) -> None:
        self._arm, self._robot, self._infer, self._settings = arm, robot, infer, settings
        self._begin_ns = arm.time_ns
        self._noise_shift_ns = seed % _BLOCK * _APART_NS - self._begin_ns
        self._events: list[tuple[int, int, Callable[[], Any]]] = []
        self._count = 0
        self._busy = False
        rate = next(iter(robot.controllers.values())).update_rate
        self._emission = Emission.for_controller(rate, 'start', _TRANSPORT_BOUND_MS)
        planner = TrajectoryPlanner(JointLimits.from_robot(robot), self._emission)
        wanted = Settings(replan_rate=settings.replan_rate, chunking=settings.chunking)
        self._runtime = PolicyRuntime(robot, self._answer, planner, self, self, self._wake, wanted)

    @property
    def outside(self) -> bool:
        """Whether the loop ended in a stop, a fault or a refused chunk: the policy wanted what the robot may not do."""
        return self._runtime.state in (State.STOPPED, State.FAULT) or self._runtime.counters.trajectories_rejected > 0

    def run(self, instruction: str, seconds: float) -> None:
        """Let the policy begin once its inputs are there, and go on for ``seconds`` from then on."""
        runtime = self._runtime
        self._every(_CAMERA_NS, 0, self._see)
        self._every(_STATE_NS, 0, self._feel)
        self._every(_REFERENCE_NS, _STATE_NS, self._refer)
        self._every(_WATCH_NS, _WATCH_NS // 2, lambda: runtime.watch(self._arm.time_ns))
        self._at(_BEGIN_NS - 1, lambda: self._begin(instruction))
        self._every(round(NS_PER_S / self._settings.replan_rate), _BEGIN_NS, lambda: runtime.tick(self._arm.time_ns))
        end_ns = self._begin_ns + _BEGIN_NS + round(seconds * NS_PER_S)
        while self._arm.time_ns < end_ns:
            while self._events and self._events[0][0] <= self._arm.time_ns:
                heapq.heappop(self._events)[2]()
            self._arm.tick()

    def _begin(self, instruction: str) -> None:
        self._runtime.instruct(instruction, self._arm.time_ns)
        self._runtime.activate(self._arm.time_ns)

    def _at(self, after_ns: int, call: Callable[[], Any]) -> None:
        """Once, so long after the episode's begin."""
        heapq.heappush(self._events, (self._begin_ns + after_ns, self._count, call))
        self._count += 1

    def _every(self, period_ns: int, phase_ns: int, call: Callable[[], None]) -> None:
        def again(due_ns: int) -> None:
            call()
            self._at(due_ns + period_ns, lambda: again(due_ns + period_ns))

        self._at(phase_ns, lambda: again(phase_ns))

    # What the runtime hears.

    def _see(self) -> None:
        now_ns = self._arm.time_ns
        for name in self._robot.camera_names:
            view = self._arm.render(name)
            self._runtime.inputs.put_image(name, _image(view), now_ns)
            if self._robot.cameras[name].camera_info:
                self._runtime.inputs.put_camera_info(name, _camera_info(view), now_ns)

    def _feel(self) -> None:
        now_ns, (positions, velocities) = self._arm.time_ns, self._arm.world.joint_state()
        names = list(self._arm.world.joint_names)
        message = SimpleNamespace(
            header=_header(now_ns), name=names, position=positions.tolist(), velocity=velocities.tolist(), effort=[]
        )
        self._runtime.inputs.put_joint_state(message, now_ns)

    def _refer(self) -> None:
        """What the controllers commanded; once they have commanded at all."""
        commands = self._arm.commands
        if len(commands) < len(self._robot.controllers):
            return
        stamp_ns = min(command.stamp_ns for command in commands.values())
        reference = dict(self._references())
        positions = np.array([reference[joint] for joint in self._robot.action.joints])
        self._runtime.put_controller_reference(positions, stamp_ns)
        for name, controller in self._robot.controllers.items():
            if controller.state_topic is not None:
                command = commands[name]
                self._runtime.watch_acceptance(name, command.reference_positions, command.stamp_ns, self._arm.time_ns)

    def _references(self) -> Iterator[tuple[str, float]]:
        for name, command in self._arm.commands.items():
            yield from zip(self._robot.controllers[name].joints, command.reference_positions.tolist(), strict=True)

    # The runtime's policy and executor.

    def _answer(self, observation: Observation, known: KnownActions | None) -> ActionChunk:
        """The policy's chunk; its noise depends on scene and moment, not on how many episodes came before."""
        shift = self._noise_shift_ns
        chunk = self._infer(replace(observation, stamp_ns=observation.stamp_ns + shift), known)
        return replace(chunk, stamp_ns=chunk.stamp_ns - shift, observation_stamp_ns=chunk.observation_stamp_ns - shift)

    def submit(self, call: Callable[[], Any], on_done: Callable[[Any], None]) -> bool:
        """The runtime's executor: the answer is there after the latency."""
        if self._busy:
            return False
        self._busy = True
        try:
            outcome = SimpleNamespace(value=call(), error=None)
        except Exception as error:  # as the node's executor does: an exception of the policy is an answer
            outcome = SimpleNamespace(value=None, error=error)

        def finish() -> None:
            self._busy = False
            on_done(outcome)

        self._at(self._arm.time_ns - self._begin_ns + self._settings.latency_ms * _MS, finish)
        return True

    def _wake(self) -> None:
        self._at(self._arm.time_ns - self._begin_ns, lambda: self._runtime.collect(self._arm.time_ns))

    # The runtime's listener.

    def on_trajectory(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Send it to every controller, which has it after the transport."""
        if not actuate:
            return
        stamp_ns = self._emission.header_stamp_ns(trajectory)
        for name, controller in self._robot.controllers.items():
            message = TrajectoryMessage.from_trajectory(trajectory.select(controller.joints), stamp_ns)
            self._at(self._arm.time_ns - self._begin_ns + _TRANSPORT_NS, partial(self._arm.receive, name, message))

    def on_move(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Never called: nobody asks for a pose."""
        raise AssertionError('an episode has no poses')

    def on_chunk(self, report: ChunkReport) -> None:
        """Nothing to do: only the end of an episode counts."""

    def on_state(self, state: State, reason: str) -> None:
        """Nothing to do, likewise."""

    def on_warning(self, sentence: str) -> None:
        """Nothing to do, likewise."""


def _header(stamp_ns: int) -> SimpleNamespace:
    return SimpleNamespace(stamp=SimpleNamespace(sec=stamp_ns // NS_PER_S, nanosec=stamp_ns % NS_PER_S))


def _image(view: CameraView) -> SimpleNamespace:
    """A sensor_msgs/Image, rgb8, as the runtime reads it."""
    height, width, channels = view.rgb.shape
    return SimpleNamespace(
        header=_header(view.stamp_ns), height=height, width=width, encoding='rgb8', is_bigendian=0, step=width * channels,
        data=view.rgb.data.cast('B'),
    )  # fmt: skip


def _camera_info(view: CameraView) -> SimpleNamespace:
    """A sensor_msgs/CameraInfo without distortion, as the runtime reads it."""
    assert view.K is not None
    nothing = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
    return SimpleNamespace(
        header=_header(view.stamp_ns), height=view.rgb.shape[0], width=view.rgb.shape[1], k=view.K.ravel().tolist(),
        binning_x=0, binning_y=0, roi=nothing,
    )  # fmt: skip
