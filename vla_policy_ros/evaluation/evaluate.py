"""One evaluation: a checkpoint, tasks, variations and a seed become a document of numbers.

The same options give the same document, apart from ``wall_s``, however many processes share the work. Main thread; other processes
load the checkpoint once each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vla_policy_ros.evaluation.closed_loop import ClosedLoop, LoopSettings
from vla_policy_ros.evaluation.report import SCHEMA, VERSION, EpisodeResult, summarise
from vla_policy_ros.evaluation.seeds import scene_seeds
from vla_policy_ros.evaluation.variations import NOMINAL, conditions_of
from vla_policy_ros.evaluation.workers import Cell, played
from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim.tasks import TASKS

if TYPE_CHECKING:
    from vla_policy_ros.policy import Policy

OnResult = Callable[[Cell, EpisodeResult], None]


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate.

    Attributes:
        checkpoint: folder.
        robot_file: robot file.
        tasks: names out of `TASKS`.
        variations: see `variations`; the numbers of the first one stand at the top of a task.
        episodes: per task and variation; the scenes of different variations have the same seeds.
        seed, purpose: which scenes, see `seeds`.
        loop: how episodes run.
        num_steps, solver: of the integration; None is the checkpoint's own.
        policy_seed: of the policy's noise.
        jobs: processes that share the work.
        rows: whether the document lists every episode.
        videos: folder for videos of the first ``max_videos`` failures; None makes none.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    checkpoint: Path
    robot_file: Path
    tasks: tuple[str, ...] = ('reach',)
    variations: tuple[str, ...] = (NOMINAL,)
    episodes: int = 100
    seed: int = 0
    purpose: str = 'test'
    loop: LoopSettings = field(default_factory=LoopSettings)
    num_steps: int | None = None
    solver: str | None = None
    policy_seed: int = 0
    jobs: int = 1
    rows: bool = False
    videos: Path | None = None
    max_videos: int = 5

    def __post_init__(self) -> None:
        for what, names in (('task', self.tasks), ('variation', self.variations)):
            if not names or len(set(names)) < len(names):
                raise ValueError(f'give each {what} once, and at least one; got {", ".join(names) or "none"}')
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f'task {task!r} is unknown; choose among {", ".join(TASKS)}')
        for variation in self.variations:
            conditions_of(variation)
        scene_seeds(self.seed, self.episodes, self.purpose)
        if self.jobs < 1:
            raise ValueError(f'jobs is {self.jobs}; at least one process must do the work')

    @property
    def cells(self) -> list[Cell]:
        """Every episode, in the order of the document."""
        seeds = scene_seeds(self.seed, self.episodes, self.purpose)
        return [Cell(task, variation, seed) for task in self.tasks for variation in self.variations for seed in seeds]


class ClosedLoopPlayer:
    """A loaded policy that plays episodes. Use it as a context manager.

    Raises:
        CheckpointError, RobotFileError, ValueError: checkpoint, robot file or settings cannot be used, or not together.
    """

    def __init__(self, options: EvaluationOptions) -> None:
        # One thread: products of several threads may add up in another order, and the work is shared by processes anyway.
        os.environ.setdefault('OMP_NUM_THREADS', '1')
        from vla_policy_ros.policy import Policy

        robot = load_robot(options.robot_file)
        self.policy: Policy = Policy.load(
            options.checkpoint, robot, num_steps=options.num_steps, solver=options.solver, seed=options.policy_seed
        )
        self.loop = ClosedLoop(self.policy.infer, robot, options.loop)

    def __enter__(self) -> ClosedLoopPlayer:
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.__exit__(*error)

    def play(self, cell: Cell) -> EpisodeResult:
        """The episode of a cell."""
        return self.loop.run(TASKS[cell.task], cell.seed, conditions_of(cell.variation))


def evaluate(options: EvaluationOptions, on_result: OnResult | None = None) -> dict[str, Any]:
    """Play all episodes and return the document. Ctrl-C ends it early with what was finished, as ``interrupted`` says.

    Raises:
        CheckpointError, RobotFileError, RobotMismatch, ValueError: as `ClosedLoopPlayer`, or a variation that does not fit a task.
        RenderError: the simulator cannot draw here.
    """
    began = perf_counter()
    results: list[EpisodeResult] = []
    interrupted = False
    with ClosedLoopPlayer(options) as player:
        try:
            for cell, result in zip(options.cells, _results(options, player), strict=True):
                results.append(result)
                if on_result:
                    on_result(cell, result)
            if options.videos is not None:
                _film_failures(options, player, results)
        except KeyboardInterrupt:
            interrupted = True
    return document(options, results, checkpoint_facts(player.policy), 'in_process', perf_counter() - began, interrupted)


def checkpoint_facts(policy: Policy) -> dict[str, Any]:
    """What identifies a loaded policy in a document."""
    kept = ('parameters', 'num_steps', 'solver', 'dtype', 'device')
    return {'hash': policy.checkpoint_hash, 'stats_hash': policy.stats_hash} | {name: policy.summary[name] for name in kept}


def document(
    options: EvaluationOptions,
    results: list[EpisodeResult],
    checkpoint: dict[str, Any],
    mode: str,
    wall_s: float,
    interrupted: bool = False,
) -> dict[str, Any]:
    """The document of the first episodes of ``options.cells``: as JSON values, with the numbers of every task under ``tasks``."""
    found: dict[str, dict[str, list[EpisodeResult]]] = {}
    for cell, result in zip(options.cells, results, strict=False):
        found.setdefault(cell.task, {}).setdefault(cell.variation, []).append(result)
    seeds = scene_seeds(options.seed, options.episodes, options.purpose)
    return {
        'schema': SCHEMA,
        'version': VERSION,
        'mode': mode,
        'checkpoint': {'name': options.checkpoint.name, **checkpoint},
        'robot': options.robot_file.stem,
        'settings': {
            'executed': options.loop.executed,
            'seconds': {task: options.loop.seconds or TASKS[task].seconds for task in options.tasks},
            'policy_seed': options.policy_seed,
            'probe': options.loop.probe.as_dict(),
        },
        'seeds': {'purpose': options.purpose, 'seed': options.seed, 'first': seeds[0], 'last': seeds[-1]},
        'tasks': {task: _of_task(by_variation, options.rows) for task, by_variation in found.items()},
        'interrupted': interrupted,
        'wall_s': round(wall_s, 3),
    }


def _of_task(by_variation: dict[str, list[EpisodeResult]], rows: bool) -> dict[str, Any]:
    numbers = {
        variation: summarise(results) | ({'rows': [result.as_dict() for result in results]} if rows else {})
        for variation, results in by_variation.items()
    }
    first = next(iter(numbers))
    return {'variation': first, **numbers.pop(first), 'variations': numbers}


def _results(options: EvaluationOptions, player: ClosedLoopPlayer) -> Iterator[EpisodeResult]:
    return played(partial(ClosedLoopPlayer, options), options.cells, options.jobs, player)


def _film_failures(options: EvaluationOptions, player: ClosedLoopPlayer, results: list[EpisodeResult]) -> None:
    """Write the first failures to ``options.videos``; the videos of a former evaluation that have the same names are replaced."""
    from vla_policy_ros.evaluation.video import film

    assert options.videos is not None
    options.videos.mkdir(parents=True, exist_ok=True)
    failures = [(cell, result) for cell, result in zip(options.cells, results, strict=True) if not result.success]
    for cell, result in failures[: options.max_videos]:
        name = f'{cell.task}_{cell.variation}_{cell.seed}_{result.failure}.mp4'
        film(player.loop, TASKS[cell.task], cell.variation, conditions_of(cell.variation), result, options.videos / name)
