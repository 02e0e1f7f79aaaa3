"""Ablations of one checkpoint that need no training: solver and steps, false inputs, executed actions, chunking and latency.

Each function returns a `Table`. Every row of a table is measured on the same scenes. Main thread, and worker processes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vla_policy_ros.control.timeline import Chunking
from vla_policy_ros.evaluation.ablations.tables import Table
from vla_policy_ros.evaluation.closed_loop import LoopSettings
from vla_policy_ros.evaluation.evaluate import ClosedLoopPlayer, EvaluationOptions, checkpoint_facts, evaluate
from vla_policy_ros.evaluation.late_loop import LateLoop, LateSettings
from vla_policy_ros.evaluation.probes import Probe
from vla_policy_ros.evaluation.report import EpisodeResult, rate_text, summarise
from vla_policy_ros.evaluation.seeds import scene_seeds
from vla_policy_ros.evaluation.variations import conditions_of
from vla_policy_ros.evaluation.workers import Cell, played
from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim.expert import ArmKinematics
from vla_policy_ros.sim.mjcf import JOINT_NAMES
from vla_policy_ros.sim.tasks import TASKS
from vla_policy_ros.types import ActionChunk, Observation

REFERENCE = ('euler', 100)
SOLVERS = (
    ('euler', 1), ('euler', 2), ('euler', 3), ('euler', 5), ('euler', 10), ('euler', 20), ('ab2', 2), ('ab2', 3), ('ab2', 5),
    ('ab2', 10), ('midpoint', 1), ('midpoint', 2), ('midpoint', 5),
)  # fmt: skip
EXECUTED = (1, 2, 4, 8, 12, 16)
PROBES = {
    'K and sentence true': Probe(),
    'focal length × 1.3': Probe(focal_scale=1.3),
    'focal length × 0.77': Probe(focal_scale=1.0 / 1.3),
    'no K': Probe(hide_k=True),
    'sentence about another object': Probe(wrong_instruction=True),
}
CHUNKING: tuple[Chunking, ...] = ('replace', 'ensemble', 'rtc_guided')
LATENCIES_MS = (0, 100, 200, 400)
_OBSERVED_EPISODES = 10


def solver_table(options: EvaluationOptions) -> Table:
    """Success, and the distance of chunks to the reference from the same noise, for solvers and step counts."""
    observed, reference, facts = _reference(options)
    kinematics = ArmKinematics()
    rows, numbers = [], []
    for solver, steps in SOLVERS:
        setting = replace(options, solver=solver, num_steps=steps)
        with ClosedLoopPlayer(setting) as player:
            chunks = [player.policy.infer(observation) for observation in observed]
        found = _task(evaluate(setting))
        _tell(f'{solver}, {steps} steps', found)
        angle = np.array([_rms(chunk, exact) for chunk, exact in zip(chunks, reference, strict=True)])
        tool = np.array([_tool_gap(kinematics, chunk, exact) for chunk, exact in zip(chunks, reference, strict=True)])
        evaluations = steps * (2 if solver == 'midpoint' else 1)
        milliseconds = min(chunk.stages_ms['denoise'] for chunk in chunks)
        numbers.append(
            {
                'solver': solver, 'steps': steps, 'evaluations': evaluations, 'rms_error_rad': float(angle.mean()),
                'tool_error_m': float(tool.mean()), 'denoise_ms': milliseconds, **found,
            }
        )  # fmt: skip
        rows.append(
            (
                solver, str(steps), str(evaluations), f'{1e3 * angle.mean():.2f}', f'{1e3 * tool.mean():.2f}',
                f'{milliseconds:.1f}', rate_text(found), _cm(found),
            )
        )  # fmt: skip
    notes = (
        f'error: mean over {len(observed)} observations of the rms over a chunk, and of the largest distance between the tool '
        f'positions, to the chunk of {REFERENCE[1]} {REFERENCE[0]} steps from the same noise',
        'time: the shortest of these, on one thread',
    )
    head = ('solver', 'steps', 'evaluations', 'error, mrad', 'error, mm', 'denoising, ms', 'success, %', 'median, cm')
    return Table('solver', head, 1, tuple(rows), tuple(numbers), {**facts, 'notes': [_task_note(options), *notes]})


def inputs_table(options: EvaluationOptions) -> Table:
    """What a false K and a false sentence do."""
    rows, numbers, facts = [], [], {}
    for name, probe in PROBES.items():
        found = evaluate(replace(options, loop=replace(options.loop, probe=probe)))
        facts, of_task = _facts(found), _task(found)
        _tell(name, of_task)
        numbers.append({'told': name, **of_task})
        followed = f'{100 * of_task["followed_rate"]:.1f}' if 'followed_rate' in of_task else '-'
        rows.append((name, rate_text(of_task), _cm(of_task), f'{100 * of_task["wrong_object_rate"]:.1f}', followed))
    head = ('what the policy is told', 'success, %', 'median, cm', 'wrong object, %', 'did what the false sentence said, %')
    return Table('inputs', head, 1, tuple(rows), tuple(numbers), {**facts, 'notes': [_task_note(options)]})


def executed_table(options: EvaluationOptions) -> Table:
    """How many actions of a chunk to carry out before the next look."""
    rows, numbers, facts = [], [], {}
    robot = load_robot(options.robot_file)
    for executed in (count for count in EXECUTED if count <= robot.action.horizon):
        found = evaluate(replace(options, loop=replace(options.loop, executed=executed)))
        facts, of_task = _facts(found), _task(found)
        _tell(f'{executed} actions', of_task)
        numbers.append({'executed': executed, **of_task})
        rows.append((str(executed), f'{executed * robot.action.period:.1f}', rate_text(of_task), _cm(of_task)))
    head = ('actions executed', 'seconds between looks', 'success, %', 'median, cm')
    return Table('executed', head, 0, tuple(rows), tuple(numbers), {**facts, 'notes': [_task_note(options)]})


def latency_table(options: EvaluationOptions) -> Table:
    """Success under injected latency, for ways in which chunks follow each other."""
    rows, numbers, facts = [], [], {}
    task, variation = options.tasks[0], options.variations[0]
    cells = [Cell(task, variation, seed) for seed in scene_seeds(options.seed, options.episodes, options.purpose)]
    for chunking in CHUNKING:
        texts = []
        for latency_ms in LATENCIES_MS:
            settings = LateSettings(latency_ms, chunking, seconds=options.loop.seconds)
            found = summarise(list(played(partial(LatePlayer, options, settings), cells, options.jobs)))
            _tell(f'{chunking}, {latency_ms} ms', found)
            numbers.append({'chunking': chunking, 'latency_ms': latency_ms, **found})
            texts.append(f'{rate_text(found)}, {_cm(found)}')
        rows.append((f'`{chunking}`', *texts))
    with ClosedLoopPlayer(options) as player:
        facts = {'checkpoint': checkpoint_facts(player.policy), 'seeds': _seeds(options)}
    head = ('chunking', *(f'{latency_ms} ms: success, %; median, cm' for latency_ms in LATENCIES_MS))
    note = 'the runtime, planner and emulated controllers of the node on simulated time, a new chunk wanted 5 times per second'
    return Table('latency', head, 1, tuple(rows), tuple(numbers), {**facts, 'notes': [_task_note(options), note]})


INFERENCE = {'solver': solver_table, 'inputs': inputs_table, 'executed': executed_table, 'latency': latency_table}


@dataclass
class LatePlayer:
    """Plays episodes with late answers; the policy knows how chunks follow each other."""

    options: EvaluationOptions
    settings: LateSettings

    def __enter__(self) -> LatePlayer:
        from vla_policy_ros.policy import Policy

        options, robot = self.options, load_robot(self.options.robot_file)
        policy = Policy.load(
            options.checkpoint, robot, num_steps=options.num_steps, solver=options.solver, seed=options.policy_seed,
            chunking=self.settings.chunking,
        )  # fmt: skip
        self._loop = LateLoop(policy.infer, robot, self.settings)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.__exit__(*error)

    def play(self, cell: Cell) -> EpisodeResult:
        """The episode of a cell."""
        return self._loop.run(TASKS[cell.task], cell.seed, conditions_of(cell.variation))


def tell(sentence: str) -> None:
    """Progress, for whoever waits."""
    print(sentence, file=sys.stderr, flush=True)


def _tell(row: str, numbers: dict[str, Any]) -> None:
    """A row when it is measured: a table takes long, and is written when it is whole."""
    tell(f'{row}: {rate_text(numbers)} %, median {_cm(numbers)} cm')


def _reference(options: EvaluationOptions) -> tuple[list[Observation], list[ActionChunk], dict[str, Any]]:
    """Observations of whole episodes, and the reference's chunks for them."""
    solver, steps = REFERENCE
    observed: list[Observation] = []
    chunks: list[ActionChunk] = []
    with ClosedLoopPlayer(replace(options, solver=solver, num_steps=steps)) as player:
        infer = player.policy.infer

        def remembered(observation: Observation) -> ActionChunk:
            observed.append(observation)
            chunks.append(infer(observation))
            return chunks[-1]

        player.loop.infer = remembered
        for cell in options.cells[:_OBSERVED_EPISODES]:
            player.play(cell)
        facts = {'checkpoint': checkpoint_facts(player.policy), 'seeds': _seeds(options)}
    return observed, chunks, facts


def _rms(chunk: ActionChunk, exact: ActionChunk) -> float:
    return float(np.sqrt(np.mean((chunk.actions - exact.actions) ** 2)))


def _tool_gap(kinematics: ArmKinematics, chunk: ActionChunk, exact: ActionChunk) -> float:
    """Largest distance between the tool positions of two chunks, m."""
    order = [chunk.joint_names.index(name) for name in JOINT_NAMES]
    places = [np.stack([kinematics.place(row[order])[0] for row in each.actions]) for each in (chunk, exact)]
    return float(np.linalg.norm(places[0] - places[1], axis=1).max())


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    return {'checkpoint': found['checkpoint'], 'seeds': found['seeds']}


def _seeds(options: EvaluationOptions) -> dict[str, Any]:
    seeds = scene_seeds(options.seed, options.episodes, options.purpose)
    return {'purpose': options.purpose, 'seed': options.seed, 'first': seeds[0], 'last': seeds[-1]}


def _task(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the one task, without the lists of single episodes. Raises KeyboardInterrupt where it was interrupted."""
    if found['interrupted']:
        raise KeyboardInterrupt
    (numbers,) = found['tasks'].values()
    return {name: value for name, value in numbers.items() if name not in ('failed_seeds', 'variations', 'rows')}


def _task_note(options: EvaluationOptions) -> str:
    return f'task `{options.tasks[0]}`, {options.variations[0]}, {options.episodes} episodes a row'


def _cm(numbers: dict[str, Any]) -> str:
    return f'{100 * numbers["median_error_m"]:.1f}'


def defaults(options: EvaluationOptions) -> EvaluationOptions:
    """One task and one variation, played as `vla-policy evaluate` does by default. Raises ValueError for more than one."""
    if len(options.tasks) != 1 or len(options.variations) != 1:
        raise ValueError(f'an ablation compares on one task and variation; got {options.tasks} and {options.variations}')
    return replace(options, loop=LoopSettings(seconds=options.loop.seconds))
