"""The report of a replay as one JSON document, `SCHEMA` in version `VERSION`.

What follows from the bag, the seed and the checkpoint is under ``metrics``, byte for byte the same each time (unless latencies are
measured); what this machine needed is under ``timing``.

Enters: an episode, runs. Leaves: a dictionary without NaN. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import software
from vla_policy_ros.episodes.quality import judge_episode
from vla_policy_ros.replay import metrics
from vla_policy_ros.replay.offline import ReplaySettings, Run
from vla_policy_ros.replay.pictures import Moment

SCHEMA, VERSION = 'vla_policy_ros/replay', 1


@dataclass(frozen=True)
class Replayed:
    """A policy on a bag.

    Attributes:
        name: of the checkpoint.
        identity: its hashes and how it samples.
        run: what happened.
        wall_s: how long the replay took.
        moments: of the largest errors.
    """

    name: str
    identity: Mapping[str, Any]
    run: Run
    wall_s: float
    moments: list[Moment]


@dataclass(frozen=True)
class Pictures:
    """What was seen in the pictures: per camera how many, how many of them stale, and why its calibration looks made up."""

    seen: Mapping[str, int]
    stale: Mapping[str, int]
    ideal: Mapping[str, str]


def document(
    episode: BagEpisode,
    settings: ReplaySettings,
    first: Replayed,
    pictures: Pictures,
    second: Replayed | None = None,
    reproduction: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report; ``reproduction``: how recorded chunks compare with replayed ones, where that was asked for."""
    return {
        'schema': SCHEMA,
        'version': VERSION,
        'software': software(),
        'bag': _bag(episode, pictures),
        'settings': {
            'replan_rate': settings.replan_rate,
            'latency': settings.latency.source,
            'start_offset': settings.start_offset,
            'duration': settings.duration,
            'seed': settings.seed,
        },
        'ground_truth': episode.commands.source,
        'checkpoint': {'name': first.name, **first.identity},
        'metrics': {**_metrics(episode, settings, first.run), 'reproduction': reproduction},
        'timing': _timing(first),
        'comparison': None if second is None else _comparison(episode, settings, first, second),
    }


def _bag(episode: BagEpisode, pictures: Pictures) -> dict[str, Any]:
    quality = judge_episode(episode, dict(pictures.stale)).to_dict()
    notes = [f'camera {name!r}: its calibration looks made up: {why}' for name, why in sorted(pictures.ideal.items())]
    notes += [
        f'camera {name!r}: {count} of {pictures.seen[name]} frames show nothing new (stale camera, or stillness)'
        for name, count in sorted(pictures.stale.items())
        if count
    ]
    return {'name': episode.name, 'robot': episode.robot.name, 'quality': quality, 'notes': [*episode.notes, *notes]}


def _metrics(episode: BagEpisode, settings: ReplaySettings, run: Run) -> dict[str, Any]:
    robot, commands = episode.robot, episode.commands
    path = metrics.executed(run, robot)
    return {
        'accuracy': metrics.accuracy(metrics.windows_of(run, commands, robot), commands, robot),
        'continuity': metrics.continuity(run, path, commands, robot),
        'demands': metrics.demands(run, robot),
        'freshness': metrics.freshness(run, settings.replan_rate),
        'health': metrics.health(run),
    }


def _timing(replayed: Replayed) -> dict[str, Any]:
    run, stages = replayed.run, dict[str, list[float]]()
    for chunk in run.chunks:
        for name, value in chunk.stages_ms.items():
            stages.setdefault(name, []).append(value)
    duration = (run.end_ns - run.begin_ns) / 1e9
    return {
        'wall_s': replayed.wall_s,
        'of_real_time': replayed.wall_s / duration if duration > 0 else None,
        'stages_ms': {
            name: {'p50': float(np.percentile(values, 50)), 'p95': float(np.percentile(values, 95)), 'max': max(values)}
            for name, values in stages.items()
        },
    }


def _comparison(episode: BagEpisode, settings: ReplaySettings, first: Replayed, second: Replayed) -> dict[str, Any]:
    windows = [metrics.windows_of(each.run, episode.commands, episode.robot) for each in (first, second)]
    return {
        'checkpoint': {'name': second.name, **second.identity},
        'metrics': _metrics(episode, settings, second.run),
        'timing': _timing(second),
        'paired': metrics.paired_difference(windows[0], windows[1], seed=settings.seed),
    }
