"""Republishes a bag over DDS at the pace it was recorded: real input for a live node.

Messages leave as the bytes that were recorded, with the QoS that was recorded. Their header stamps are the recording's, so the time
of the bag is published on `/clock` (100 Hz, and before every message) and the nodes under test run with `use_sim_time:=true`; no
message is rewritten.

Controller commands (trajectory_msgs/JointTrajectory) are left out unless a topic is named with `--topics`: a bag that is played
near a robot must not move it by accident.

Enters: a bag, rosbag2 mcap or sqlite3. Leaves: its topics and `/clock`. One thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rclpy
from builtin_interfaces.msg import Time
from rclpy.node import Node
from rclpy.utilities import remove_ros_args
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import Connection, ConnectionExtRosbag2
from rosgraph_msgs.msg import Clock

from vla_policy_ros.ros.bag_qos import from_bag_qos
from vla_policy_ros.ros.message_types import MessageTypeError, message_class
from vla_policy_ros.types import NS_PER_S

CLOCK_PERIOD_NS = NS_PER_S // 100
LEAD_IN_TICKS = 10
COMMAND_TYPES = ('trajectory_msgs/msg/JointTrajectory',)


class PlaybackError(RuntimeError):
    """The bag cannot be played; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Playback:
    """How to play.

    Attributes:
        rate: speed relative to the recording.
        topics: what to play; empty is all but commands.
        clock: whether to publish ``/clock``.
        wait_for: topics that must have a subscriber before the bag begins.
        wait_timeout: wall seconds to wait for them.
        linger: wall seconds to stay after the last message.
    """

    rate: float = 1.0
    topics: tuple[str, ...] = ()
    clock: bool = True
    wait_for: tuple[str, ...] = ()
    wait_timeout: float = 60.0
    linger: float = 1.0


def played_connections(connections: Collection[Connection], topics: Collection[str]) -> list[Connection]:
    """The connections to play. Raises PlaybackError for a topic that the bag does not have."""
    known = {connection.topic for connection in connections}
    unknown = [topic for topic in topics if topic not in known]
    if unknown:
        raise PlaybackError(f'the bag has no topic {unknown[0]!r}; it has {", ".join(sorted(known))}')
    if topics:
        return [connection for connection in connections if connection.topic in topics]
    return [connection for connection in connections if connection.msgtype not in COMMAND_TYPES]


class BagPlayer:
    """Plays one bag on ``node``. Raises PlaybackError or MessageTypeError where it cannot be played."""

    def __init__(self, node: Node, reader: AnyReader, playback: Playback) -> None:
        if not playback.rate > 0.0:
            raise PlaybackError(f'rate must be above 0, got {playback.rate:g}')
        self._node = node
        self._reader = reader
        self._playback = playback
        self._connections = played_connections(reader.connections, playback.topics)
        self._publishers = {connection.id: self._publisher(connection) for connection in self._connections}
        self._clock = node.create_publisher(Clock, '/clock', 10) if playback.clock else None

    def _publisher(self, connection: Connection) -> Any:
        ext = connection.ext
        stored = ext.offered_qos_profiles if isinstance(ext, ConnectionExtRosbag2) else []
        profile = from_bag_qos(stored[0] if stored else None)
        return self._node.create_publisher(message_class(connection.msgtype), connection.topic, profile)

    def play(self) -> int:
        """Play to the end or until ROS is shut down; returns the number of messages published."""
        self._wait_for_subscribers()
        count, last_ns = 0, self._reader.start_time
        for time_ns, message in self._paced():
            self._tick(time_ns)
            if message is not None:
                connection, raw = message
                self._publishers[connection.id].publish(bytes(raw))
                count += 1
            last_ns = time_ns
        self._linger(last_ns)
        return count

    def _paced(self) -> Iterator[tuple[int, tuple[Connection, bytes] | None]]:
        """(bag time, message or None for a bare clock tick), each no sooner than its moment."""
        start_ns, began = self._reader.start_time, time.monotonic()
        tick_ns = start_ns
        for connection, time_ns, raw in self._reader.messages(connections=self._connections):
            while tick_ns < time_ns:
                if not self._sleep_until(began + (tick_ns - start_ns) / NS_PER_S / self._playback.rate):
                    return
                yield tick_ns, None
                tick_ns += CLOCK_PERIOD_NS
            if not self._sleep_until(began + (time_ns - start_ns) / NS_PER_S / self._playback.rate):
                return
            yield time_ns, (connection, raw)

    def _sleep_until(self, moment: float) -> bool:
        """Sleep to a moment of the monotonic clock; False if ROS was shut down meanwhile."""
        delay = moment - time.monotonic()
        if delay > 0.0:
            time.sleep(delay)
        return bool(self._node.context.ok())

    def _tick(self, time_ns: int) -> None:
        if self._clock is not None:
            self._clock.publish(Clock(clock=Time(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)))

    def _wait_for_subscribers(self) -> None:
        """Hold the clock at the beginning of the bag until every topic of ``wait_for`` is listened to."""
        deadline = time.monotonic() + self._playback.wait_timeout
        while self._node.context.ok():
            missing = [topic for topic in self._playback.wait_for if self._node.count_subscribers(topic) == 0]
            if not missing:
                break
            if time.monotonic() > deadline:
                raise PlaybackError(
                    f'nobody subscribed to {", ".join(missing)} within {self._playback.wait_timeout:g} s: '
                    'is the node configured, with a robot file that names this topic, in the same ROS_DOMAIN_ID?'
                )
            self._tick(self._reader.start_time)
            time.sleep(0.05)
        # A node that hears the first message before it hears of the time cannot judge it.
        for _ in range(LEAD_IN_TICKS):
            self._tick(self._reader.start_time)
            time.sleep(0.05)

    def _linger(self, time_ns: int) -> None:
        """Stay for the last messages to arrive; the clock goes on so that nobody waits on it."""
        end = time.monotonic() + self._playback.linger
        while self._node.context.ok() and time.monotonic() < end:
            time.sleep(CLOCK_PERIOD_NS / NS_PER_S)
            time_ns += round(CLOCK_PERIOD_NS * self._playback.rate)
            self._tick(time_ns)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='bag_player', description='Republish a bag over DDS at the pace it was recorded.')
    parser.add_argument('bag', type=Path, help='folder of a rosbag2 bag')
    parser.add_argument('--rate', type=float, default=1.0, help='speed relative to the recording (default 1.0)')
    parser.add_argument('--topics', nargs='+', default=[], help='topics to play (default: all but controller commands)')
    parser.add_argument('--no-clock', dest='clock', action='store_false', help='do not publish /clock')
    parser.add_argument('--wait-for', nargs='+', default=[], help='start when these topics have a subscriber')
    parser.add_argument('--wait-timeout', type=float, default=60.0, help='seconds to wait for subscribers (default 60)')
    return parser.parse_args(arguments)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the executable ``bag_player``: 0 when the bag was played, 2 where it could not be."""
    argv = sys.argv if argv is None else argv
    options = _arguments(remove_ros_args(argv)[1:])
    playback = Playback(options.rate, tuple(options.topics), options.clock, tuple(options.wait_for), options.wait_timeout)
    rclpy.init(args=argv)
    node = rclpy.create_node('bag_player')
    try:
        if not options.bag.exists():
            raise PlaybackError(f'bag {options.bag} does not exist')
        with AnyReader([options.bag]) as reader:
            count = BagPlayer(node, reader, playback).play()
            node.get_logger().info(f'{count} messages of {options.bag} played')
    except (PlaybackError, MessageTypeError, AnyReaderError) as error:
        print(f'bag_player: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
