"""What every test gets: a quiet, private environment, and a DDS domain that no other test on this machine uses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Set before anything imports numpy, torch, mujoco or rclpy, which read these once. `make test` sets them too.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MUJOCO_GL', 'egl')
os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('FASTRTPS_DEFAULT_PROFILES_FILE', str(ROOT / 'config' / 'fastdds.xml'))
os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)

import fcntl  # noqa: E402
import itertools  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402

# Domains whose UDP ports stay below the range that Linux hands out to outgoing connections; 0 is everybody's default.
DOMAINS = range(1, 102)
_TESTS = itertools.count()


@pytest.fixture
def root() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture
def ros_domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A ROS domain id that this test has to itself, also in ``ROS_DOMAIN_ID`` for the processes it starts.

    The claim is a lock on a file: test runs side by side on one machine do not hear one another, and a killed run frees it.
    """
    # A different one each time: what a test leaves behind for a moment must not answer the next.
    offset = (os.getpid() + next(_TESTS)) % len(DOMAINS)
    for domain in [*DOMAINS[offset:], *DOMAINS[:offset]]:
        with open(Path(tempfile.gettempdir()) / f'vla_policy_ros_domain_{domain}.lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            monkeypatch.setenv('ROS_DOMAIN_ID', str(domain))
            yield domain
            return
    raise RuntimeError(f'all ROS domains {DOMAINS.start}..{DOMAINS.stop - 1} are taken by other tests on this machine')


@pytest.fixture(autouse=True)
def _dds_tests_are_private(request: pytest.FixtureRequest) -> None:
    """A test marked ``dds`` that chose no domain gets one of its own: on the default one, others on this machine may answer."""
    if request.node.get_closest_marker('dds') and 'ROS_DOMAIN_ID' not in os.environ:
        request.getfixturevalue('ros_domain')
