"""Faults: each a small class that acts on messages, on the policy or on the clock, from 3 s on; those that pass end at 4 s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

MS = 1_000_000
ON_NS = 3_000 * MS
OFF_NS = 4_000 * MS

Deliveries = Sequence[tuple[Any, int]]


class Channel(Enum):
    """What messages travel on."""

    IMAGES = 'images'
    STATES = 'joint states'
    COMMANDS = 'commands'


@dataclass
class Fault:
    """No fault; the others change one of its methods. All times are true ns.

    Attributes:
        name: in the tables.
        sentence: what happens.
        lasts: whether it stays until the end; else it has passed at `OFF_NS`.
        deadly: whether nobody is left to plan, so that the arm must be at rest at the end.
    """

    name: str
    sentence: str
    lasts: bool = False
    deadly: bool = False

    def active(self, t_ns: int) -> bool:
        """Whether the fault acts at ``t_ns``."""
        return t_ns >= ON_NS and (self.lasts or t_ns < OFF_NS)

    def messages(self, channel: Channel, message: Any, t_ns: int, rng: np.random.Generator) -> Deliveries:
        """What becomes of a message sent at ``t_ns``: (message, additional delay in ns), none, once or several times."""
        return [(message, 0)]

    def actions(self, actions: NDArray[np.float64], t_ns: int) -> NDArray[np.float64]:
        """What becomes of the policy's actions ``[T, A]``."""
        return actions

    def latency_ns(self, t_ns: int, nominal_ns: int) -> int | None:
        """How long the policy takes if asked at ``t_ns``; None: it never answers."""
        return nominal_ns

    def clock_offset_ns(self, t_ns: int) -> int:
        """How far the ROS clock is ahead of its normal course."""
        return 0

    def sender_lives(self, t_ns: int) -> bool:
        """Whether the sender's process runs."""
        return True


@dataclass
class Dropped(Fault):
    """Messages of one channel are lost, each with probability ``part``."""

    channel: Channel = Channel.IMAGES
    part: float = 1.0

    def messages(self, channel: Channel, message: Any, t_ns: int, rng: np.random.Generator) -> Deliveries:
        lost = channel is self.channel and self.active(t_ns) and rng.random() < self.part
        return [] if lost else [(message, 0)]


@dataclass
class Jittered(Fault):
    """Messages of some channels are up to ``longest_ns`` later than usual."""

    channels: tuple[Channel, ...] = ()
    longest_ns: int = 0

    def messages(self, channel: Channel, message: Any, t_ns: int, rng: np.random.Generator) -> Deliveries:
        late = channel in self.channels and self.active(t_ns)
        return [(message, int(rng.uniform(0.0, self.longest_ns)) if late else 0)]


@dataclass
class Duplicated(Fault):
    """Every message of every channel arrives a second time, up to 40 ms later."""

    def messages(self, channel: Channel, message: Any, t_ns: int, rng: np.random.Generator) -> Deliveries:
        return [(message, 0), (message, int(rng.uniform(0.0, 40.0 * MS)))] if self.active(t_ns) else [(message, 0)]


@dataclass
class Frozen(Fault):
    """The camera repeats its last image, with the stamp it had or with fresh ones."""

    fresh_stamps: bool = False
    last: Any = None

    def messages(self, channel: Channel, message: Any, t_ns: int, rng: np.random.Generator) -> Deliveries:
        if channel is not Channel.IMAGES:
            return [(message, 0)]
        if not self.active(t_ns):
            self.last = message
            return [(message, 0)]
        repeated = copy(self.last)
        if self.fresh_stamps:
            repeated.header = message.header
        return [(repeated, 0)]


@dataclass
class BadState(Fault):
    """The joint states of the whole robot driver are spoilt by ``spoil(names, positions)``, which returns both anew."""

    spoil: Callable[[list[str], list[float]], tuple[list[str], list[float]]] = lambda names, positions: (names, positions)

    def messages(self, channel: Channel, message: Any, t_ns: int, rng: np.random.Generator) -> Deliveries:
        if channel is Channel.STATES and self.active(t_ns):
            message.name, message.position = self.spoil(message.name, message.position)
        return [(message, 0)]


@dataclass
class BadActions(Fault):
    """One action of each chunk has a ``value`` that is not finite."""

    value: float = float('nan')

    def actions(self, actions: NDArray[np.float64], t_ns: int) -> NDArray[np.float64]:
        if self.active(t_ns):
            actions[5, 2] = self.value  # soon: most senders never reach the later ones
        return actions


@dataclass
class ClockJump(Fault):
    """The clock that everything reads jumps, once and for good."""

    by_ns: int = 0

    def clock_offset_ns(self, t_ns: int) -> int:
        return self.by_ns if t_ns >= ON_NS else 0


@dataclass
class SlowOnce(Fault):
    """One answer takes long."""

    slow_ns: int = 0
    happened: bool = False

    def latency_ns(self, t_ns: int, nominal_ns: int) -> int | None:
        if self.happened or t_ns < ON_NS:
            return nominal_ns
        self.happened = True
        return self.slow_ns


@dataclass
class Slow(Fault):
    """All answers take long, or none ever comes (None)."""

    slow_ns: int | None = None

    def latency_ns(self, t_ns: int, nominal_ns: int) -> int | None:
        return self.slow_ns if self.active(t_ns) else nominal_ns


@dataclass
class DeadSender(Fault):
    """The sender's process is killed."""

    def sender_lives(self, t_ns: int) -> bool:
        return not self.active(t_ns)


def all_faults() -> list[Fault]:
    """Fresh ones: a fault may remember what it has seen."""
    inputs, outputs = (Channel.IMAGES, Channel.STATES), (Channel.COMMANDS,)
    return [
        Fault('none', 'nothing'),
        Dropped('dropped images', 'no image for 1 s'),
        Dropped('dropped states', 'no joint state for 1 s', channel=Channel.STATES),
        Dropped('dropped commands', 'half of the messages to the controller are lost', channel=Channel.COMMANDS, part=0.5),
        Jittered('jittered inputs', 'images and joint states up to 150 ms late', channels=inputs, longest_ns=150 * MS),
        Jittered('jittered commands', 'messages to the controller take up to 55 ms', channels=outputs, longest_ns=25 * MS),
        Duplicated('duplicated', 'every message twice, in all channels'),
        Frozen('frozen, old stamps', 'the camera repeats its last message'),
        Frozen('frozen, fresh stamps', 'the camera repeats its last image as if it were new', fresh_stamps=True),
        BadState('NaN state', 'one joint is measured as NaN', spoil=lambda n, p: (n, [*p[:3], float('nan'), *p[4:]])),
        BadActions('NaN action', 'one action of each chunk is NaN'),
        BadActions('inf action', 'one action of each chunk is infinite', value=float('inf')),
        BadState('reordered joints', 'joint states come in another order', spoil=lambda n, p: (n[::-1], p[::-1])),
        BadState('missing joint', 'joint states lack a joint', spoil=lambda n, p: (n[1:], p[1:])),
        ClockJump('clock back', 'the clock jumps back by 1 s', by_ns=-1_000 * MS),
        ClockJump('clock ahead', 'the clock leaps ahead by 2 s', by_ns=2_000 * MS),
        SlowOnce('slow once', 'one answer takes 1 s', slow_ns=1_000 * MS),
        Slow('slow always', 'every answer takes 600 ms from then on', lasts=True, slow_ns=600 * MS),
        Slow('dead model', 'the policy never answers again', lasts=True, deadly=True),
        DeadSender('dead sender', 'the process is killed', lasts=True, deadly=True),
    ]
