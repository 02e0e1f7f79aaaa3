"""A closed loop on a virtual clock, without ROS: sensors, a policy that answers late, a sender, transport, controller, arm.

Everything that the benchmarks compare runs in the same `World`: the same robot, path, policy, delays and emulated controller; only
the sender (`senders.py`) and the fault (`fault_cases.py`) differ. True time starts at 0 ns and never jumps; all software reads one
ROS clock, which a fault may make jump. The same seed gives the same run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from fault_cases import MS, Channel, Fault
from numpy.typing import NDArray

from vla_policy_ros.control.jtc import ControllerParameters, JointTrajectoryController
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S, ActionChunk, KnownActions, Observation

Array = NDArray[np.float64]
EPOCH_NS = 1_000 * NS_PER_S
JOINTS = tuple(f'joint{index}' for index in range(1, 8))
CONTROL_NS = 10 * MS
CAMERA, CONTROLLER = 'front', 'arm'

_CAMERA_NS, _STATE_NS = 50 * MS, 20 * MS
_ARM_LAG_S = 0.03
_TRAINED_FADE_ROWS = 15
# (shortest, longest) delay from sender to receiver.
_DELAYS_NS = {
    Channel.IMAGES: (5 * MS, 15 * MS),
    Channel.STATES: (MS, 3 * MS),
    Channel.COMMANDS: (MS, 30 * MS),
}


def robot() -> Robot:
    """Seven joints and one uncalibrated camera; chunks of 50 actions at 30 Hz, as public policies answer."""
    limit = {'position': (-2.8, 2.8), 'velocity': 1.5, 'acceleration': 5.0, 'jerk': 100.0, 'following_error': 0.4}
    return Robot.model_validate(
        {
            'name': 'seven',
            'cameras': {CAMERA: {'topic': '/image'}},
            'state': {'topic': '/joint_states', 'joints': JOINTS},
            'action': {'joints': JOINTS, 'period': 1.0 / 30.0, 'horizon': 50},
            'limits': {joint: limit for joint in JOINTS},
            'controllers': {
                CONTROLLER: {
                    'topic': '/arm/joint_trajectory',
                    'state_topic': '/arm/controller_state',
                    'joints': JOINTS,
                    'update_rate': NS_PER_S / CONTROL_NS,
                }
            },
        }
    )


class ReferencePath:
    """What the policy wants: two sines per joint, at rest at time 0, at about half of the velocity limit."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        count = len(JOINTS)
        self._centre = rng.uniform(-0.5, 0.5, count)
        self._amplitude = np.stack([rng.uniform(0.2, 0.28, count), rng.uniform(0.04, 0.08, count)])
        self._omega = np.stack([rng.uniform(1.4, 2.2, count), rng.uniform(3.0, 4.5, count)])

    def __call__(self, t_ns: int | NDArray[np.int64]) -> Array:
        """Positions ``[..., J]`` at true time ``t_ns``; standing before 0."""
        t = np.maximum(np.asarray(t_ns) * 1e-9, 0.0)[..., None, None]
        positions: Array = self._centre + (self._amplitude * (np.cos(self._omega * t) - 1.0)).sum(axis=-2)
        return positions


class Policy:
    """Answers an observation with a chunk of the reference path, imperfectly in the ways that matter to a sender.

    - What it sees is the image, which carries the true time at which it was taken: a frozen camera makes it repeat itself.
    - The chunk leaves from the observed joint state, as learned policies do, and returns to the path within about 0.3 s.
    - No two chunks agree: each has its own smooth offset of 3 to 30 mrad.
    - With ``known`` actions (real-time chunking) the answer continues them: ``trained`` repeats the committed rows exactly and
      lets the difference fade out after them, ``guided`` is drawn to all rows of the overlap with falling weight.
    """

    def __init__(self, robot: Robot, path: ReferencePath, seed: int, guided: bool = False) -> None:
        self._action, self._path, self._seed, self._guided = robot.action, path, seed, guided
        self.sequence = 0

    def __call__(self, observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        """The chunk for ``observation``, stamped one action period after it."""
        seen_ns = seen(observation.cameras[CAMERA].rgb)
        ahead = self._action.period_ns * np.arange(1, self._action.horizon + 1, dtype=np.int64)
        state_ns = seen_ns + observation.state_stamp_ns - observation.stamp_ns
        with np.errstate(invalid='ignore'):  # an infinite state is a fault like another
            apart = observation.state - self._path(state_ns)
            actions = self._path(seen_ns + ahead) + np.exp(ahead[:, None] * 1e-9 / -0.3) * apart + self._offset(ahead * 1e-9)
        if known is not None:
            apart = known.actions - actions
            apart[known.overlap :] = apart[known.overlap - 1]
            actions = actions + self._weights(known)[:, None] * apart
        chunk = ActionChunk(
            observation.stamp_ns + self._action.period_ns,
            self._action.period_ns,
            self._action.joints,
            actions,
            observation.stamp_ns,
            observation.instruction,
            self.sequence,
        )
        self.sequence += 1
        return chunk

    def _offset(self, ahead_s: NDArray[np.floating[Any]]) -> Array:
        rng = np.random.default_rng([self._seed, 2, self.sequence])
        size = rng.uniform(0.003, 0.03) * rng.uniform(-1.0, 1.0, (2, len(JOINTS)))
        phase = 2.0 * np.pi * (0.4 * ahead_s[:, None] + rng.uniform(0.0, 1.0, len(JOINTS)))
        offset: Array = (size[0] + size[1] * np.sin(phase)) / 2.0
        return offset

    def _weights(self, known: KnownActions) -> Array:
        """Which part of its distance to the known actions each row of the answer gives up, ``[T]``."""
        row = np.arange(self._action.horizon)
        soft_rows = known.overlap - known.committed if self._guided else _TRAINED_FADE_ROWS if known.committed else 0
        falling = np.clip(1.0 - (row - known.committed + 1) / (soft_rows + 1), 0.0, 1.0)
        if self._guided:  # the soft mask of guided inpainting falls faster than linearly
            falling *= np.expm1(falling) / np.expm1(1.0)
        return np.where(row < known.committed, 1.0, falling)


class Sender(Protocol):
    """What is compared: it hears the sensors and sends messages. ``now_ns`` is the ROS clock's."""

    def start(self, world: World) -> None:
        """The world begins: note it, begin timers."""

    def put_image(self, message: Any, now_ns: int) -> None:
        """An image arrives."""

    def put_state(self, message: Any, now_ns: int) -> None:
        """A joint state arrives."""

    def put_reference(self, positions: Array, stamp_ns: int) -> None:
        """The controller reports its reference ``[J]``."""

    def status(self) -> str:
        """What an operator would see at the end; empty where there is nothing to see."""


@dataclass
class Trace:
    """What happened, one entry per controller update unless said otherwise.

    Attributes:
        times: true ns of the updates.
        commands: positions ``[J]`` written to the arm's drives.
        velocities: ``[J]`` of the interpolated curve, as the controller reports them.
        replaced: indices of the updates that took a new message.
        takeovers: true ns at which a sender says that a new motion takes over, where that is not the arrival of its message.
        sent: messages sent.
        rejections: the controller's reason for each message that it dropped.
        status: the sender's status at the end.
    """

    times: list[int] = field(default_factory=list)
    commands: list[Array] = field(default_factory=list)
    velocities: list[Array] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    takeovers: list[int] = field(default_factory=list)
    sent: int = 0
    rejections: list[str] = field(default_factory=list)
    status: str = ''


class World:
    """One run: true time, the event queue, the delayed channels, controller and arm.

    Args:
        robot: as `robot` makes it.
        policy, sender, fault: the parties.
        latency_ns: from the moment the policy is asked to its answer; up to 10 ms are added at random.
        seed: of the path and of all delays.
    """

    def __init__(
        self, robot: Robot, path: ReferencePath, policy: Policy, sender: Sender, fault: Fault, latency_ns: int, seed: int
    ) -> None:
        self.robot, self.policy, self.fault = robot, policy, fault
        self.true_ns = 0
        self.trace = Trace()
        self._sender, self._latency_ns = sender, latency_ns
        self._rngs = {channel: np.random.default_rng([seed, 3, index]) for index, channel in enumerate(Channel)}
        self._latency_rng = np.random.default_rng([seed, 4])
        self._delivered_ns = dict.fromkeys(Channel, 0)
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self._measured = path(0)
        parameters = ControllerParameters(JOINTS, NS_PER_S / CONTROL_NS, interpolate_from_desired_state=True)
        self.controller = JointTrajectoryController(parameters, self._measured)
        self._arrived = False

    @property
    def now_ns(self) -> int:
        """The ROS clock."""
        return EPOCH_NS + self.true_ns + self.fault.clock_offset_ns(self.true_ns)

    def at(self, true_ns: int, call: Callable[[], None]) -> None:
        """Call once, at ``true_ns``."""
        heapq.heappush(self._events, (true_ns, self._count, call))
        self._count += 1

    def every(self, period_ns: int, phase_ns: int, call: Callable[[], None]) -> None:
        """Call periodically in true time, first at ``phase_ns``."""

        def again() -> None:
            call()
            self.at(self.true_ns + period_ns, again)

        self.at(phase_ns, again)

    def sender_every(self, period_ns: int, phase_ns: int, call: Callable[[int], None]) -> None:
        """A timer of the sender's process: called with the ROS time for as long as the process lives."""
        self.every(period_ns, phase_ns, lambda: call(self.now_ns) if self.fault.sender_lives(self.true_ns) else None)

    def infer(self, call: Callable[[], Any], on_done: Callable[[Any, Exception | None], None]) -> None:
        """Run the policy's ``call`` on its own thread: ``on_done`` gets value and error once its latency has passed, or never."""
        nominal_ns = self._latency_ns + int(self._latency_rng.uniform(0.0, 10.0 * MS))
        latency_ns = self.fault.latency_ns(self.true_ns, nominal_ns)
        if latency_ns is None:
            return

        def finish() -> None:
            if not self.fault.sender_lives(self.true_ns):
                return
            try:
                on_done(call(), None)
            except Exception as error:  # as the executor does: an exception of the policy is an answer
                on_done(None, error)

        self.at(self.true_ns + latency_ns, finish)

    def answer(self, observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        """The policy's answer, as the fault leaves it."""
        chunk = self.policy(observation, known)
        return replace(chunk, actions=self.fault.actions(chunk.actions, self.true_ns))

    def publish(self, message: TrajectoryMessage) -> None:
        """Send a trajectory to the controller."""
        self.trace.sent += 1
        self._send(Channel.COMMANDS, message, self._receive)

    def note_takeover(self, ros_ns: int) -> None:
        """A motion sent now takes over at ``ros_ns``, not when its message arrives."""
        self.trace.takeovers.append(self.true_ns + ros_ns - self.now_ns)

    def run(self, seconds: float) -> Trace:
        """Run from 0 to ``seconds``."""
        self.every(_CAMERA_NS, 2 * MS, self._take_image)
        self.every(_STATE_NS, MS, self._read_joints)
        self.every(CONTROL_NS, 3 * MS, self._update_controller)
        self._sender.start(self)
        end_ns = round(seconds * NS_PER_S)
        while self._events[0][0] <= end_ns:
            self.true_ns, _, call = heapq.heappop(self._events)
            call()
        self.trace.status = self._sender.status()
        return self.trace

    def _send(self, channel: Channel, message: Any, receive: Callable[[Any], None]) -> None:
        rng = self._rngs[channel]
        delay_ns = int(rng.uniform(*_DELAYS_NS[channel]))
        for changed, extra_ns in self.fault.messages(channel, message, self.true_ns, rng):
            # A topic keeps the order of its messages.
            arrival_ns = max(self.true_ns + delay_ns + extra_ns, self._delivered_ns[channel])
            self._delivered_ns[channel] = arrival_ns
            self.at(arrival_ns, partial(receive, changed))

    def _to_sender(self, handle: Callable[[Any, int], None]) -> Callable[[Any], None]:
        return lambda message: handle(message, self.now_ns) if self.fault.sender_lives(self.true_ns) else None

    def _take_image(self) -> None:
        self._send(Channel.IMAGES, image(self.true_ns, self.now_ns), self._to_sender(self._sender.put_image))

    def _read_joints(self) -> None:
        header, positions = SimpleNamespace(stamp=stamp(self.now_ns)), self._measured.tolist()
        message = SimpleNamespace(header=header, name=list(JOINTS), position=positions, velocity=[], effort=[])
        self._send(Channel.STATES, message, self._to_sender(self._sender.put_state))

    def _receive(self, message: TrajectoryMessage) -> None:
        answer = self.controller.receive(message, self.now_ns)
        if answer.accepted:
            self._arrived = True
        else:
            self.trace.rejections.append(answer.reason)

    def _update_controller(self) -> None:
        if self._arrived:
            self.trace.replaced.append(len(self.trace.times))
            self._arrived = False
        with np.errstate(invalid='ignore'):  # a sender may have it command NaN or infinity
            command = self.controller.update(self.now_ns, self._measured, period_ns=CONTROL_NS)
        self.trace.times.append(self.true_ns)
        self.trace.commands.append(command.positions.copy())
        self.trace.velocities.append(command.velocities.copy())
        # A drive ignores what is not a number and holds.
        target = np.where(np.isfinite(command.positions), command.positions, self._measured)
        self._measured = self._measured + (target - self._measured) * -np.expm1(-CONTROL_NS * 1e-9 / _ARM_LAG_S)
        if len(self.trace.times) % 2 == 0 and self.fault.sender_lives(self.true_ns):
            self._sender.put_reference(command.reference_positions.copy(), self.now_ns)


def stamp(ns: int) -> SimpleNamespace:
    """A builtin_interfaces/Time."""
    return SimpleNamespace(sec=ns // NS_PER_S, nanosec=ns % NS_PER_S)


def image(true_ns: int, stamp_ns: int) -> SimpleNamespace:
    """A sensor_msgs/Image of 4x4 pixels that shows when it was taken, see `seen`."""
    pixels = np.zeros(48, np.uint8)
    pixels[:8] = np.array([true_ns], np.int64).view(np.uint8)
    header = SimpleNamespace(stamp=stamp(stamp_ns))
    return SimpleNamespace(header=header, height=4, width=4, encoding='rgb8', is_bigendian=0, step=12, data=pixels.tobytes())


def seen(rgb: NDArray[np.uint8]) -> int:
    """The true time that an image shows."""
    return int(np.ascontiguousarray(rgb).reshape(-1)[:8].view(np.int64)[0])
