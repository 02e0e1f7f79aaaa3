"""Writing a video leaves the process as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla_policy_ros.episodes.video import ENCODERS, VideoError, choose_codec, frames

CHILD = """
import ctypes, os, sys, threading
from pathlib import Path
import numpy as np
from vla_policy_ros.episodes.video import VideoWriter

def policies():
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir('/proc/self/task')}

writer, found = VideoWriter(Path(sys.argv[1]), sys.argv[2], 10, 64, 48), set()
for shade in range(3):
    found |= policies()
    writer.add(np.full((48, 64, 3), 80 * shade, dtype=np.uint8))
# What the C library believes, which Fast DDS asks and hands on to its threads.
policy, parameters = ctypes.c_int(), ctypes.create_string_buffer(64)
assert ctypes.CDLL(None).pthread_getschedparam(ctypes.c_ulong(threading.get_ident()), ctypes.byref(policy), parameters) == 0
found.add(policy.value)
writer.close()
print(sorted(found | policies()))
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='threads are listed in /proc')
@pytest.mark.parametrize('codec', ENCODERS)
def test_no_thread_becomes_real_time(tmp_path: Path, codec: str) -> None:
    """SVT-AV1 sees to that where root runs it, and what the process starts afterwards, a browser, would take the machine over."""
    try:
        choose_codec(codec)
    except VideoError as error:
        pytest.skip(str(error))
    video = tmp_path / 'v.mp4'
    done = subprocess.run(
        [sys.executable, '-u', '-c', CHILD, str(video), codec], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split('\n')[-2] == f'[{os.SCHED_OTHER}]', done.stdout
    assert len(list(frames(video, 10, [0, 1, 2]))) == 3
