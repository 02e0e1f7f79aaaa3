"""The numbers of one run, from what was recorded: the bag, the node's last status and the simulator's report.

Enters: those three. Leaves: a plain dictionary for JSON, whose keys are described in `summarise`. Pure functions, any thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.highlevel import AnyReader

from vla_policy_ros.control.timeline import rate
from vla_policy_ros.demo.reaches import ReachResult
from vla_policy_ros.types import NS_PER_S

CHUNK_TYPE = 'vla_policy_msgs/msg/ActionChunk'
STATUS_TYPE = 'vla_policy_msgs/msg/PolicyStatus'


@dataclass
class Recorded:
    """What the policy node said in a bag: times in ns of its clock, latencies and stage times in ms, and state names."""

    published_ns: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    states: list[tuple[int, str]] = field(default_factory=list)


def read_bag(bag: Path) -> Recorded:
    """Gather the chunks and states of a recorded run."""
    recorded = Recorded()
    with AnyReader([bag]) as reader:
        connections = [c for c in reader.connections if c.msgtype in (CHUNK_TYPE, STATUS_TYPE)]
        for connection, _, raw in reader.messages(connections=connections):
            message: Any = reader.deserialize(raw, connection.msgtype)
            stamp_ns = message.header.stamp.sec * NS_PER_S + message.header.stamp.nanosec
            if connection.msgtype == STATUS_TYPE:
                recorded.states.append((stamp_ns, message.state_name))
                continue
            recorded.published_ns.append(stamp_ns + round(message.latency_ms * 1e6))
            recorded.latency_ms.append(message.latency_ms)
            for name, value in zip(message.stage_names, message.stage_ms, strict=True):
                recorded.stages_ms[name].append(float(value))
    return recorded


def summarise(recorded: Recorded, status: Any, report: Mapping[str, Any], reaches: Sequence[ReachResult]) -> dict[str, Any]:
    """The summary of a run.

    ``trajectories`` counts those that the node published and those that the emulated controller took or refused; ``chunks_refused``
    are the ones that the planner did not let through. ``latency_ms`` is from image stamp to published, on the node's clock.
    ``max_command_step_rad`` is the largest step of a commanded joint position from one controller tick to the next;
    ``max_command_step_ratio`` is the largest such step in parts of that joint's velocity limit times the period, and 1 is allowed;
    ``max_command_acceleration_ratio`` is the same for the change of velocity from tick to tick and the acceleration limit.
    The distances at the top are those of the instruction that ended farthest from its goal; ``success`` is whether all succeeded.

    Args:
        recorded: from `read_bag`.
        status: the last PolicyStatus.
        report: the simulator's report, written when it ended.
        reaches: one result per instruction.
    """
    commands, controller = report['commands'], report['trajectories']
    limits = [joint['velocity_limit'] for joint in commands['joints'].values()]
    worst = max(reaches, key=lambda r: np.inf if r.final_distance_m is None else r.final_distance_m, default=None)
    return {
        'observations': int(status.observations),
        'chunks': int(status.chunks),
        'chunks_refused': int(status.trajectories_rejected),
        'requests_skipped': int(status.requests_skipped),
        'trajectories': {
            'published': int(status.trajectories_published),
            'accepted': int(controller['accepted']),
            'rejected': int(controller['rejected']),
            'rejections': dict(controller['rejections']),
        },
        'replan_rate_hz': rate(recorded.published_ns),
        'replan_rate_wanted_hz': float(status.replan_rate),
        'latency_ms': percentiles(recorded.latency_ms),
        'stages_ms': {name: percentiles(values) for name, values in recorded.stages_ms.items()},
        'max_command_step_rad': float(commands['max_step_rad']),
        'velocity_limit_times_period_rad': min(limits) * float(commands['period_s']),
        'max_command_step_ratio': float(commands['max_step_ratio']),
        'max_command_acceleration_ratio': max(
            joint['max_acceleration'] / joint['acceleration_limit'] for joint in commands['joints'].values()
        ),
        'initial_distance_m': None if worst is None else worst.initial_distance_m,
        'final_distance_m': None if worst is None else worst.final_distance_m,
        'success': bool(reaches) and all(reach.success for reach in reaches),
        'instructions': [reach.as_dict() for reach in reaches],
        'state_seconds': state_seconds(recorded.states),
        'seed': report['seed'],
        'objects': list(report['objects']),
        'images': dict(report['images']),
        'drive_faults': int(report['drive_faults']),
        'dry_run': bool(status.dry_run),
        'checkpoint_hash': status.checkpoint_hash,
        'stats_hash': status.stats_hash,
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p99 and max; None where there are no values."""
    if not values:
        return {'p50': None, 'p99': None, 'max': None}
    p50, p99, largest = np.percentile(values, [50, 99, 100])
    return {'p50': float(p50), 'p99': float(p99), 'max': float(largest)}


def state_seconds(states: Sequence[tuple[int, str]]) -> dict[str, float]:
    """Seconds spent in each state, given the (time in ns, state) of every status. Time before the clock ran does not count."""
    total: dict[str, float] = {}
    running = [(time, state) for time, state in states if time > 0]
    for (begin, state), (end, _) in pairwise(running):
        total[state] = total.get(state, 0.0) + (end - begin) / NS_PER_S
    return total
