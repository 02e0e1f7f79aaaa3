"""Writing a video leaves the process as it was."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_policy_ros.episodes.video import ENCODERS, VideoError, VideoWriter, choose_codec, frames


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='threads are listed in /proc')
@pytest.mark.parametrize('codec', ENCODERS)
def test_no_thread_becomes_real_time(tmp_path: Path, codec: str) -> None:
    """SVT-AV1 sees to that where root runs it, and what the process starts afterwards, a browser, would take the machine over."""
    try:
        choose_codec(codec)
    except VideoError as error:
        pytest.skip(str(error))
    writer, policies = VideoWriter(tmp_path / 'v.mp4', codec, 10, 64, 48), []
    for shade in range(3):
        policies.append({os.sched_getscheduler(int(thread)) for thread in os.listdir('/proc/self/task')})
        writer.add(np.full((48, 64, 3), 80 * shade, dtype=np.uint8))
    writer.close()
    assert not {os.SCHED_FIFO, os.SCHED_RR} & set.union(*policies, {os.sched_getscheduler(0)}), policies
    assert len(list(frames(tmp_path / 'v.mp4', 10, [0, 1, 2]))) == 3
