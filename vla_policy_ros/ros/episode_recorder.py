"""Records episodes of a live robot: one bag each, with what the robot file names and a note of where it comes from.

An episode begins when every input has been heard, and then by Enter or the service ``~/toggle`` where somebody is there to give it,
else at once; it ends likewise, or after its time. A bag without ``metadata.yaml`` was not finished; what is in it can be read.

Enters: topics, the service, lines of the terminal. Leaves: bags. One node; its executor spins on a thread of its own, the caller's
thread decides when episodes begin and end.
"""

from __future__ import annotations

import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from std_srvs.srv import Trigger

from vla_policy_ros.episodes.episode import PROVENANCE_FILE, next_number, robot_digest, software, write_json
from vla_policy_ros.robot import Robot
from vla_policy_ros.ros.recorder import LATCHED, BagRecorder, robot_topics

_TURN_S = 0.05
_REMIND_S = 5.0


class RecordingError(RuntimeError):
    """Nothing can be recorded; the message says why and what to do."""


@dataclass(frozen=True)
class RecordingOptions:
    """What to record.

    Attributes:
        out: folder of the episodes; new ones are numbered after those that are there.
        robot_file: text of the robot file, for the note.
        episodes: how many; 0 is until interrupted.
        seconds: length of an episode by the wall clock; None is until it is ended.
        pause: between two episodes that begin by themselves, s.
        instruction: published for the whole recording; None records what others publish.
        use_sim_time: take the time of ``/clock``.
        patience: s to wait for the inputs.
    """

    out: Path
    robot_file: str
    episodes: int = 1
    seconds: float | None = None
    pause: float = 0.0
    instruction: str | None = None
    use_sim_time: bool = False
    patience: float = 30.0


@dataclass(frozen=True)
class RecordedEpisode:
    """A finished bag, and how many messages of each topic it holds."""

    path: Path
    counts: dict[str, int]


def record_episodes(robot: Robot, options: RecordingOptions, tell: Callable[[str], None]) -> list[RecordedEpisode]:
    """Record until all episodes are there, or Ctrl-C; the present episode is finished then.

    Raises:
        RecordingError: an input was not heard in time.
        OSError: the folder cannot be written.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    recorder = _EpisodeRecorder(robot, options, tell)
    try:
        recorder.wait_for_inputs()
        recorder.run()
    except KeyboardInterrupt:
        tell('interrupted')
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cost the last episode
        recorder.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return recorder.finished


class _EpisodeRecorder:
    def __init__(self, robot: Robot, options: RecordingOptions, tell: Callable[[str], None]) -> None:
        self.finished: list[RecordedEpisode] = []
        self._robot, self._options, self._tell = robot, options, tell
        self._toggled = threading.Event()
        self._provenance: dict[str, Any] = {}
        self._path: Path | None = None
        overrides = [Parameter('use_sim_time', value=options.use_sim_time)]
        self._node = rclpy.create_node('episode_recorder', parameter_overrides=overrides)
        self._node.create_service(Trigger, '~/toggle', self._on_toggle)
        self._bag = BagRecorder(self._node, None, robot_topics(robot))
        self._instructions = self._node.create_publisher(String, robot.instruction.topic, LATCHED)
        if options.instruction is not None:
            self._instructions.publish(String(data=options.instruction))
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name='episode recorder', daemon=True)
        self._thread.start()

    # ---- the caller's thread ----------------------------------------------------------------------------------------------------

    def wait_for_inputs(self) -> None:
        """Wait until cameras, joint states and the instruction have been heard, and time has begun."""
        begin = remind = time.monotonic()
        while missing := self._missing():
            now = time.monotonic()
            if now - begin > self._options.patience:
                raise RecordingError(
                    f'not heard within {self._options.patience:g} s: {", ".join(missing)}; are they published in this '
                    'ROS_DOMAIN_ID, under these names and as the types of the robot file? (an instruction: --instruction TEXT)'
                )
            if now >= remind:
                self._tell(f'waiting for {", ".join(missing)}')
                remind = now + _REMIND_S
            time.sleep(_TURN_S)

    def run(self) -> None:
        """The episodes."""
        by_hand = sys.stdin.isatty()
        while not self._options.episodes or len(self.finished) < self._options.episodes:
            if by_hand:
                self._tell('Enter begins the next episode, Ctrl-C ends the recording')
                self._wait(None)
            elif self.finished:
                self._wait(self._options.pause)
            self._begin()
            self._tell(f'{self._path}: recording' + (', Enter ends it' if by_hand else ''))
            self._wait(self._options.seconds)
            self._end()

    def close(self) -> None:
        """Finish the present episode and leave ROS."""
        self._end()
        self._bag.close()
        self._executor.shutdown(timeout_sec=2.0)
        self._node.destroy_node()
        rclpy.try_shutdown()
        self._thread.join(2.0)

    def _missing(self) -> list[str]:
        heard, robot = self._bag.heard, self._robot
        needed = [camera.topic for camera in robot.cameras.values()]
        needed += [camera.camera_info for camera in robot.cameras.values() if camera.camera_info]
        missing = [topic for topic in (*needed, robot.state.topic, robot.instruction.topic) if not heard[topic]]
        if self._options.use_sim_time and self._node.get_clock().now().nanoseconds == 0:
            missing.append('/clock')
        return missing

    def _wait(self, seconds: float | None) -> None:
        """Until Enter or the service, at most ``seconds``."""
        self._toggled.clear()
        end = None if seconds is None else time.monotonic() + seconds
        while not self._toggled.is_set() and (end is None or time.monotonic() < end):
            left = _TURN_S if end is None else min(_TURN_S, max(0.0, end - time.monotonic()))
            if sys.stdin.isatty():
                if select.select([sys.stdin], [], [], left)[0]:
                    sys.stdin.readline()
                    return
            else:
                time.sleep(left)

    def _begin(self) -> None:
        self._path = self._options.out / f'episode_{next_number(self._options.out):06d}'
        self._bag.begin(self._path)
        robot = self._robot
        self._provenance = {
            'format': 'rosbag2 (mcap), vla-policy record',
            'software': software(),
            'robot': robot.name,
            'robot_digest': robot_digest(robot),
            'robot_file': self._options.robot_file,
            'instruction': self._options.instruction,
            'use_sim_time': self._options.use_sim_time,
            'began_ns': self._node.get_clock().now().nanoseconds,
            'began_host': _host_time(),
            'finished': False,
        }
        self._note()

    def _end(self) -> None:
        if self._path is None:
            return
        path, self._path = self._path, None
        self._provenance |= {'ended_ns': self._node.get_clock().now().nanoseconds, 'ended_host': _host_time()}
        self._bag.end()
        counts = dict(sorted(self._bag.counts.items()))
        self._provenance |= {'finished': True, 'messages': counts}
        self._note(path)
        self.finished.append(RecordedEpisode(path, counts))
        silent = [name for name, c in self._robot.controllers.items() if not counts.get(c.topic)]
        told = ', '.join(f'{count} {topic}' for topic, count in counts.items())
        self._tell(f'{path}: {told or "nothing was heard"}')
        if silent:
            where = 'actions will come from its reference, or else from the joint states'
            self._tell(f'{path}: no command of {", ".join(silent)} was heard: {where}')
        for topic, count in self._bag.refused.items():
            self._tell(f'{path}: {count} images of {topic} could not be stored: is their encoding a colour image?')

    def _note(self, path: Path | None = None) -> None:
        write_json((path or self._path or Path()) / PROVENANCE_FILE, self._provenance)

    # ---- the node's thread ------------------------------------------------------------------------------------------------------

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def _on_toggle(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        recording = self._path is not None
        self._toggled.set()
        response.success, response.message = True, 'the episode ends' if recording else 'an episode begins'
        return response


def _host_time() -> str:
    return datetime.now(timezone.utc).isoformat(timespec='milliseconds')
