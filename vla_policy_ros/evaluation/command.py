"""What `vla-policy evaluate` does with its options: progress on stderr, a table or JSON on stdout, files where asked for.

Enters: options. Leaves: an exit code. Main thread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vla_policy_ros.evaluation.evaluate import EvaluationOptions, OnResult, evaluate
from vla_policy_ros.evaluation.report import TABLE_HEAD, table_rows

_FILE_WIDTH = 140


def run(options: EvaluationOptions, json_file: str | None, over_ros: bool, out: Path | None = None, pace: bool = False) -> int:
    """Evaluate and report. 0, or 1 where it was interrupted or a process failed: what was finished is reported then, too.

    Args:
        options: what to evaluate.
        json_file: file for the document; ``-`` prints it and nothing else on stdout; None writes none.
        over_ros: through topics, node and controllers rather than in process.
        out: with ``over_ros``, the folder for the logs of the processes; None keeps none.
        pace: with ``over_ros``, let simulated time slow down until the policy keeps its rate.

    Raises:
        OSError, ValueError: something cannot be used; the message says what.
        RenderError, LoopError, ChildError: the simulator cannot draw, or the closed loop of ``over_ros`` failed.
    """
    if json_file not in (None, '-'):
        _check_writable(Path(str(json_file)))
    with _progress(len(options.cells)) as on_result:
        if over_ros:
            from vla_policy_ros.evaluation.ros_closed_loop import evaluate_over_ros

            found = evaluate_over_ros(options, out, on_result, pace=pace)
        else:
            found = evaluate(options, on_result)
    text = json.dumps(found, indent=1, allow_nan=False)
    if json_file == '-':
        print(text)
    else:
        _show(found)
        if json_file is not None:
            Path(json_file).write_text(text + '\n', encoding='utf-8')
    if found.get('failure'):
        print(found['failure'], file=sys.stderr)
    return 1 if found['interrupted'] or found.get('failure') else 0


def _check_writable(path: Path) -> None:
    """Before minutes of work rather than after. Raises OSError."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f'--json {path}: there is no folder {path.parent}; make it first')


@contextmanager
def _progress(total: int) -> Iterator[OnResult]:
    """A bar on stderr, for people only; successes so far beside it."""
    console = Console(stderr=True)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task('episodes', total=total)
        done = [0, 0]

        def on_result(cell: Any, result: Any) -> None:
            done[0] += 1
            done[1] += result.success
            progress.update(bar, advance=1, description=f'{cell.task}, {cell.variation}: {done[1]} of {done[0]} succeeded')

        yield on_result


def _show(found: dict[str, Any]) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=_FILE_WIDTH)
    table = Table(*TABLE_HEAD)
    for row in table_rows(found['tasks']):
        table.add_row(*row)
    console.print(table)
    false = [name for name, value in found['settings']['probe'].items() if value not in (False, 1.0)]
    notes = [
        f'checkpoint {found["checkpoint"].get("hash", "unknown")[:12]}, {found["mode"].replace("_", " ")}',
        f'{found["seeds"]["purpose"]} seed {found["seeds"]["seed"]}',
        *([f'told falsely: {", ".join(false)}'] if false else []),
        *(['interrupted'] if found['interrupted'] else []),
    ]
    console.print('; '.join(notes), markup=False, highlight=False, soft_wrap=True)
    if 'ros' in found:
        console.print(ros_line(found['ros']), markup=False, highlight=False, soft_wrap=True)


def ros_line(ros: dict[str, Any]) -> str:
    """What the closed loop over ROS was like, in a line."""
    latency = 'never' if ros['latency_p50_ms'] is None else f'in {ros["latency_p50_ms"]:.0f} ms'
    return (
        f'{ros["chunk_rate_hz"]:.2f} chunks/s of {ros["replan_rate_hz"]:g} wanted, image to trajectory {latency}, '
        f'trajectories {ros["trajectories"]["accepted"]} accepted and {ros["trajectories"]["rejected"]} rejected, '
        f'{ros["real_time_factor"]:.2f} of real time'
    )
