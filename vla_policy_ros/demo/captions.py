"""The caption of each video frame: what the policy was told, what it does, how far it is. Pure state, any thread."""

from __future__ import annotations

import json
from typing import Any

from vla_policy_ros.types import NS_PER_S


class RunCaptions:
    """Follows a recorded run message by message. ``status_topic`` and ``report_topic`` are those of the node and the simulator."""

    def __init__(self, status_topic: str, report_topic: str) -> None:
        self._status_topic, self._report_topic = status_topic, report_topic
        self._status: Any = None
        self._report: dict[str, Any] = {}
        self._begin_ns: int | None = None

    def __call__(self, topic: str, message: Any, time_ns: int) -> tuple[str, str]:
        """The two lines from this message on."""
        self._begin_ns = time_ns if self._begin_ns is None else self._begin_ns
        if topic == self._status_topic:
            self._status = message
        elif topic == self._report_topic:
            self._report = json.loads(message.data)
        return self._task(), self._state((time_ns - self._begin_ns) / NS_PER_S)

    def _task(self) -> str:
        if not self._report.get('instruction'):
            return 'no instruction yet'
        text = f'"{self._report["instruction"]}"'
        if self._report['distance_m'] is None:
            return text
        reached = '   reached' if self._report['success'] else ''
        return f'{text}   {100 * self._report["distance_m"]:.1f} cm to go{reached}'

    def _state(self, seconds: float) -> str:
        if self._status is None:
            return f'{seconds:5.1f} s'
        status = self._status
        dry = ' (dry run)' if status.dry_run else ''
        return (
            f'{seconds:5.1f} s   {status.state_name}{dry}   {status.chunks} chunks at {status.chunk_rate:.1f} Hz   '
            f'image to trajectory {status.latency_p50_ms:.0f} ms   {status.reason}'
        ).rstrip()
