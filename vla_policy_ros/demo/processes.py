"""Child processes with a log each, and the DDS environment that they and we must share.

A child leads its own session, so that Ctrl-C in the terminal reaches only us and we decide the order in which things stop.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vla_policy_ros.resources import share_path

LAST_LINES = 15
_HIGHEST_DOMAIN = 101


class ChildError(RuntimeError):
    """A child process ended by itself; the message has the last lines of its log."""


class Child:
    """A Python module run as a process, its output in a log file.

    Args:
        name: how messages to the operator call it.
        module: module to run, as ``python -m`` takes it.
        arguments: its command line.
        log: file that takes stdout and stderr.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._output = log.open('wb')
        self._process = subprocess.Popen(
            [sys.executable, '-m', module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise ChildError if the process has ended."""
        code = self._process.poll()
        if code is not None:
            how = f'was killed by signal {-code}' if code < 0 else f'ended with exit code {code}'
            raise ChildError(f'the {self.name} {how}; the last lines of {self.log}:\n{self.tail()}')

    def tail(self, lines: int = LAST_LINES) -> str:
        """The last lines of the log."""
        return '\n'.join(self.log.read_text(encoding='utf-8', errors='replace').splitlines()[-lines:])

    def stop(self, patience: float = 8.0) -> bool:
        """Ask the process to end (SIGINT), kill it after ``patience`` seconds. True if it ended by itself and without an error."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        self._output.close()
        return code == 0


def ros_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to ``environ`` so that the demo is alone: what is set already is left as it is."""
    wanted = {
        'FASTRTPS_DEFAULT_PROFILES_FILE': lambda: str(share_path('config/fastdds.xml')),
        'ROS_AUTOMATIC_DISCOVERY_RANGE': lambda: 'LOCALHOST',
        'ROS_DOMAIN_ID': lambda: str(free_domain()),
    }
    return {name: value() for name, value in wanted.items() if not environ.get(name)}


def free_domain() -> int:
    """A ROS domain in which no participant of this machine listens. Raises OSError if there is none."""
    domains = list(range(1, _HIGHEST_DOMAIN + 1))
    random.shuffle(domains)
    for domain in domains:
        if not any(_taken(domain, participant) for participant in range(3)):
            return domain
    raise OSError('no free ROS domain between 1 and 101; set ROS_DOMAIN_ID')


def _taken(domain: int, participant: int) -> bool:
    """Whether some participant holds its unicast discovery port (DDS-RTPS port mapping: 7400 + 250 domain + 10 + 2 participant)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(('', 7400 + 250 * domain + 10 + 2 * participant))
        except OSError:
            return True
    return False
