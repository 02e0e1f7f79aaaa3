"""``python -m vla_policy_ros.evaluation.ablations``: regenerate the tables of docs/results.md, and the page.

``solver``, ``inputs``, ``executed``, ``latency`` measure one checkpoint; ``train`` trains and compares variants; ``page`` puts the
tables that exist into the page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vla_policy_ros.evaluation.ablations import inference, training
from vla_policy_ros.evaluation.ablations.tables import Table, assembled, table_text
from vla_policy_ros.evaluation.closed_loop import LoopSettings
from vla_policy_ros.evaluation.evaluate import EvaluationOptions
from vla_policy_ros.evaluation.variations import NOMINAL
from vla_policy_ros.resources import checkpoint_path, robot_path
from vla_policy_ros.sim.render_error import RenderError

RESULTS, PAGE = Path('docs/results'), Path('docs/results.md')


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='python -m vla_policy_ros.evaluation.ablations', description=(__doc__ or '').split('\n\n')[1]
    )
    commands = parser.add_subparsers(dest='command', required=True)
    scenes = argparse.ArgumentParser(add_help=False)
    scenes.add_argument('--robot', default='tabletop', help='robot file: a path, or the name of a shipped one')
    scenes.add_argument('--episodes', type=int, default=100, help='per row')
    scenes.add_argument('--seed', type=int, default=0, help='which scenes')
    scenes.add_argument('--choice', action='store_true', help='scenes for comparing recipes, apart from those of reports')
    scenes.add_argument('--variation', default=NOMINAL, help='as of vla-policy evaluate; several of train joined by commas')
    scenes.add_argument('--seconds', type=float, help="simulated length of an episode (default: the task's)")
    scenes.add_argument('--jobs', type=int, default=1, help='processes that share the episodes')
    scenes.add_argument('--results', type=Path, default=RESULTS, help='folder of the tables')
    for name, table in inference.INFERENCE.items():
        one = commands.add_parser(name, parents=[scenes], help=table.__doc__)
        one.add_argument('--checkpoint', default='tabletop', help='folder, or the name of a shipped one')
        one.add_argument('--task', default='reach')
    train = commands.add_parser('train', parents=[scenes], help='train variants for the same steps and compare them')
    train.add_argument('--config', required=True, help='training file: a path, or the name of a shipped one')
    train.add_argument('--budget-steps', type=int, required=True, help='optimiser steps of every cell')
    train.add_argument('--first', help='training file of a first part, whose checkpoint the other one starts from')
    train.add_argument('--first-steps', type=int, default=0, help='optimiser steps of the first part')
    train.add_argument('--seeds', default='0,1,2', help='training seeds, joined by commas')
    train.add_argument('--variants', default=','.join(training.VARIANTS), help='joined by commas')
    train.add_argument('--tasks', default='reach', help='joined by commas')
    train.add_argument('--table', default='training', help='name of the table, and of its file')
    train.add_argument('--runs', type=Path, default=Path('runs/ablations'), help='folder of all trainings')
    train.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='change of the training files, for all cells'
    )
    page = commands.add_parser('page', help='put the tables into the page')
    page.add_argument('--results', type=Path, default=RESULTS, help='folder of the tables')
    page.add_argument('--page', type=Path, default=PAGE, help='the page')
    page.add_argument('--check', action='store_true', help='write nothing; 1 where the page is out of date')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print: 0; 1 where a page is out of date or a training failed; 2 where something cannot be used."""
    given = parse(arguments)
    try:
        if given.command == 'page':
            return _page(given)
        table = _train(given) if given.command == 'train' else _measure(given)
        path = table.write(given.results)
    except (OSError, ValueError, RenderError) as error:
        print(error, file=sys.stderr)
        return 2
    except training.CellError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('interrupted: no table is written; trainings that were finished or saved stay', file=sys.stderr)
        return 1
    print(table_text(table.document()))
    print(f'written to {path}', file=sys.stderr)
    return 0


def _measure(given: argparse.Namespace) -> Table:
    options = _options(given, checkpoint_path(given.checkpoint), (given.task,), (given.variation,))
    return inference.INFERENCE[given.command](inference.defaults(options))


def _train(given: argparse.Namespace) -> Table:
    # The checkpoint of each cell takes the place of this one.
    options = _options(given, given.runs, tuple(given.tasks.split(',')), tuple(given.variation.split(',')))
    seeds = tuple(int(seed) for seed in given.seeds.split(','))
    ablation = training.TrainingAblation(
        given.config, given.runs.absolute(), given.budget_steps, seeds, options, given.first, given.first_steps, tuple(given.set),
        given.table,
    )  # fmt: skip
    return training.run(ablation, given.variants.split(','), given.jobs)


def _options(given: argparse.Namespace, checkpoint: Path, tasks: tuple[str, ...], variations: tuple[str, ...]) -> EvaluationOptions:
    return EvaluationOptions(
        checkpoint=checkpoint,
        robot_file=robot_path(given.robot),
        tasks=tasks,
        variations=variations,
        episodes=given.episodes,
        seed=given.seed,
        purpose='choice' if given.choice else 'test',
        loop=LoopSettings(seconds=given.seconds),
        jobs=given.jobs,
    )


def _page(given: argparse.Namespace) -> int:
    before = given.page.read_text(encoding='utf-8')
    after = assembled(before, given.results)
    if given.check:
        if after != before:
            print(f'{given.page} is out of date: run this without --check', file=sys.stderr)
        return int(after != before)
    given.page.write_text(after, encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
