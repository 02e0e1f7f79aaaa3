"""`vla-policy replay`: from bags and a checkpoint to reports.

Each bag is one unit of work with a folder of its own, ``OUT/NAME``: ``report.json``, ``report.html`` and, if wanted, the bag
``annotated``. A folder appears when all of it is there. A second call finds finished folders of the same question and goes on with
the others.

Enters: options. Leaves: folders, lines for the operator, an exit code. Main thread; several bags are shared by processes, or by the
machines of a Ray cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from vla_policy_ros.bags.reading import DamagedBag
from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import EpisodeError, robot_digest, write_json
from vla_policy_ros.policy import Policy
from vla_policy_ros.policy.policy import use_threads
from vla_policy_ros.replay import figures, metrics
from vla_policy_ros.replay.annotate import write_annotated
from vla_policy_ros.replay.document import Pictures, Replayed, document
from vla_policy_ros.replay.gate import Gate
from vla_policy_ros.replay.offline import Look, ReplaySettings, replay
from vla_policy_ros.replay.page import page
from vla_policy_ros.replay.pictures import StalePictures, WorstMoments, ideal_calibration
from vla_policy_ros.replay.ray_cluster import on_ray
from vla_policy_ros.replay.reproduce import foreign, recorded_chunks, reproduce
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S, ActionChunk

REPORT, PAGE, ANNOTATED = 'report.json', 'report.html', 'annotated'


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay, and how.

    Attributes:
        bags: folders of rosbag2 bags, or storage files.
        robot: the robot file, read.
        checkpoint, second: folders; the second is compared with the first.
        out: folder of the reports.
        settings: see `ReplaySettings`.
        instruction: instead of what was recorded.
        steps, solver: of the integration; None is the checkpoint's own.
        annotated: whether to write the annotated bag.
        live: a bag with the chunks of a live node that saw the (one) bag: what it was asked is asked again.
        threads: of torch, per process.
        jobs: processes that share the bags.
        ray: share the bags over the machines of a Ray cluster instead, which must see all the files at the same paths.
        gates: what must hold of every report.
    """

    bags: tuple[Path, ...]
    robot: Robot
    checkpoint: Path
    out: Path
    second: Path | None = None
    settings: ReplaySettings = field(default_factory=ReplaySettings)
    instruction: str | None = None
    steps: int | None = None
    solver: str | None = None
    annotated: bool = True
    live: Path | None = None
    threads: int = 1
    jobs: int = 1
    gates: tuple[Gate, ...] = ()
    ray: bool = False

    def folder_of(self, bag: Path) -> Path:
        """Where the report of a bag goes. Storage files named alike lie in different folders."""
        names = [_name_of(other) for other in self.bags]
        return self.out / (_name_of(bag) if names.count(_name_of(bag)) == 1 else f'{bag.absolute().parent.name}_{_name_of(bag)}')

    def question(self, bag: Path) -> str:
        """A hash of all that the report of a bag depends on."""
        parts: list[Any] = [str(bag.absolute()), _content(bag), robot_digest(self.robot), repr(self.settings), self.instruction]
        parts += [self.steps, self.solver, self.annotated, self.live and _content(self.live), _content(self.checkpoint)]
        parts.append(self.second and _content(self.second))
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


Progress = Callable[[int, int], None]
"""How many of how many bags are done."""


def run(options: ReplayOptions, tell: Callable[[str], None], progress: Progress = lambda done, of: None) -> int:
    """Replay all bags. 0; 1 where a gate does not hold; 2 where a bag cannot be replayed. Finished reports stay in any case.

    Raises:
        CheckpointError, ValueError, OSError: a checkpoint cannot be used, or the output folder not be made.
    """
    if options.live is not None and len(options.bags) != 1:
        raise ValueError('--live is of one bag: replay that one alone')
    options.out.mkdir(parents=True, exist_ok=True)
    folders = [options.folder_of(bag) for bag in options.bags]
    if len(set(folders)) < len(folders):
        raise ValueError('two of the bags have the same name in folders of the same name: replay them with different --out')
    for folder in folders:
        _check_replaceable(folder)
    waiting = [bag for bag in options.bags if not _is_done(options, bag)]
    for bag in set(options.bags) - set(waiting):
        tell(f'{bag}: done before, in {options.folder_of(bag)}')
    problems = _replay_all(options, waiting, tell, progress)
    failed = False
    for bag in options.bags:
        if bag in problems:
            continue
        report = json.loads((options.folder_of(bag) / REPORT).read_text(encoding='utf-8'))
        for gate in options.gates:
            if sentence := gate.failure(report):
                failed = True
                tell(f'{bag}: {sentence}')
    return 2 if problems else 1 if failed else 0


def _replay_all(
    options: ReplayOptions, bags: Sequence[Path], tell: Callable[[str], None], progress: Progress
) -> dict[Path, str]:
    """Problems by bag."""
    problems: dict[Path, str] = {}
    progress(0, len(bags))
    for done, (bag, problem) in enumerate(_answers(options, bags), start=1):
        if problem is not None:
            problems[bag] = problem
        tell(f'[{done}/{len(bags)}] ' + (problem or f'{bag}: {options.folder_of(bag)}'))
        progress(done, len(bags))
    return problems


def _answers(options: ReplayOptions, bags: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """Each bag with its problem, as they are done."""
    if options.ray and bags:
        yield from on_ray(_replay_in_process, options, bags, options.threads)
    elif options.jobs == 1 or len(bags) < 2:
        policies = Policies(options) if bags else None
        for bag in bags:
            assert policies is not None
            yield bag, replay_one(options, bag, policies)
    else:
        with ProcessPoolExecutor(min(options.jobs, len(bags)), get_context('spawn')) as pool:
            running = {pool.submit(_replay_in_process, options, bag): bag for bag in bags}
            for future in as_completed(running):
                yield running[future], future.result()


class Policies:
    """The checkpoints of the options, loaded once: their noise depends on seed and stamp, not on the bags before."""

    def __init__(self, options: ReplayOptions) -> None:
        use_threads(options.threads)
        self.options = options
        self.first = self._load(options.checkpoint)
        self.second = None if options.second is None else self._load(options.second)

    def _load(self, path: Path) -> Policy:
        options = self.options
        policy = Policy.load(path, options.robot, num_steps=options.steps, solver=options.solver, seed=options.settings.seed)
        policy.warm_up()
        return policy


_of_process: Policies | None = None


def _replay_in_process(options: ReplayOptions, bag: Path) -> str | None:
    """In one of several processes, each of which loads the checkpoints once."""
    global _of_process
    if _of_process is None or _of_process.options != options:
        _of_process = Policies(options)
    return replay_one(options, bag, _of_process)


def replay_one(options: ReplayOptions, bag: Path, policies: Policies) -> str | None:
    """Replay a bag and write its folder, all at once. Why it cannot be, or None."""
    folder = options.folder_of(bag)
    part = folder.with_name(folder.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        episode = BagEpisode(bag, options.robot, options.instruction)
        part.mkdir()
        _write(options, episode, policies, part, options.question(bag))
    except DamagedBag as error:
        shutil.rmtree(part, ignore_errors=True)
        return f'{bag} changed while it was read ({error}): replay it when nobody writes to it'
    except (EpisodeError, ValueError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        return str(error) if bag.name in str(error) else f'{bag}: {error}'
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)
    return None


def _write(options: ReplayOptions, episode: BagEpisode, policies: Policies, folder: Path, question: str) -> None:
    pictures, ideal = StalePictures(episode.recorded_robot), dict[str, str]()

    def look(camera: str, message: Any, is_image: bool) -> None:
        if is_image:
            pictures.add(camera, message)
        elif camera not in ideal and (why := ideal_calibration(message)):
            ideal[camera] = why

    first = _replayed(options, episode, policies.first, options.checkpoint, look)
    second = None
    if policies.second is not None and options.second is not None:
        second = _replayed(options, episode, policies.second, options.second, None)
    again = None if options.live is None else _reproduced(episode, policies.first, options.live)
    report = document(episode, options.settings, first, Pictures(pictures.seen, pictures.stale, ideal), second, again)
    if options.annotated:
        write_annotated(first.run, episode, folder / ANNOTATED)
    path = metrics.executed(first.run, episode.robot)
    drawn: dict[str, str] = {'timeline': figures.timeline(report['metrics']['health'])}
    left_out = 0
    if len(path.times_ns) > 1 and report['metrics']['accuracy'] is not None:
        drawn['trajectories'], left_out = figures.trajectories(episode.robot, episode.commands, path, first.run.begin_ns)
        drawn['error_by_step'] = figures.error_by_step(report, episode.robot.action.period_ns / NS_PER_S)
    if first.run.chunks:
        drawn['ages'] = figures.ages(report['metrics']['freshness'])
    (folder / PAGE).write_text(page(report, drawn, first.moments, first.run.begin_ns, left_out), encoding='utf-8')
    # Last, because it says that all is there.
    write_json(folder / REPORT, {**report, 'question': question})


def _reproduced(episode: BagEpisode, policy: Policy, live: Path) -> dict[str, Any]:
    try:
        chunks = recorded_chunks(live)
    except DamagedBag as error:
        raise ValueError(f'{live}, whose chunks are to be compared, is damaged ({error}): record it anew') from error
    made = reproduce(episode, policy.infer, chunks).to_dict()
    return {**made, 'of_another_checkpoint': foreign(chunks, policy.checkpoint_hash, policy.stats_hash)}


def _replayed(
    options: ReplayOptions, episode: BagEpisode, policy: Policy, path: Path, look: Look | None
) -> Replayed:
    commands = episode.commands

    def error_of(chunk: ActionChunk) -> float | None:
        sampled = commands.sample(chunk.times_ns)
        known = ~(sampled.early | sampled.is_pad)
        return float(np.abs(chunk.actions - sampled.positions)[known].mean()) if known.any() else None

    worst = WorstMoments(error_of)
    began = perf_counter()
    made = replay(episode, policy.infer, options.settings, worst, look)
    identity = {
        'hash': policy.checkpoint_hash,
        'stats_hash': policy.stats_hash,
        'num_steps': policy.summary['num_steps'],
        'solver': policy.summary['solver'],
    }
    return Replayed(path.name, identity, made, perf_counter() - began, worst.moments)


def _name_of(bag: Path) -> str:
    return bag.stem if bag.suffix in ('.mcap', '.db3') else bag.name


def _check_replaceable(folder: Path) -> None:
    """Never replace what a replay has not written. Raises ValueError."""
    if folder.exists() and not (folder / REPORT).is_file() and any(folder.iterdir()):
        raise ValueError(f'{folder} is there and holds no {REPORT}: it was not written by a replay; give another --out')


def _is_done(options: ReplayOptions, bag: Path) -> bool:
    file = options.folder_of(bag) / REPORT
    try:
        return bool(json.loads(file.read_text(encoding='utf-8')).get('question') == options.question(bag))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        return False


def _content(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of the files of a folder, or of the one file; empty where it is not there."""
    files = sorted(path.rglob('*')) if path.is_dir() else [path]
    return [(str(file.relative_to(path.parent)), (s := file.stat()).st_size, s.st_mtime_ns) for file in files if file.is_file()]
