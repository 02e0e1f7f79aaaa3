"""What a run shows and writes while it trains: lines of JSON, TensorBoard, and a progress bar.

Enters: rows of measurements. Leaves: ``log.jsonl``, event files, text on the console. Only the main process writes. The thread that
trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_FILE = 'log.jsonl'
TENSORBOARD_FOLDER = 'tensorboard'


class ProgressLog:
    """Context that shows and writes the progress of a run.

    Args:
        folder: of the run.
        first, last: steps of this call.
        tensorboard: also write event files.
        active: whether this process shows and writes anything.
        console: where to show; a terminal gets a bar with the remaining time, anything else plain lines.
    """

    def __init__(
        self, folder: Path, first: int, last: int, *, tensorboard: bool, active: bool = True, console: Console | None = None
    ) -> None:
        self._file, self._active, self._first = folder / LOG_FILE, active, first
        self._console = console or Console()
        self._writer: Any = None
        if active and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted call wrote after the state that is continued would be drawn twice.
            self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first + 1)
        self._bar: Progress | None = None
        if active and self._console.is_terminal:
            self._bar = Progress(
                TextColumn('{task.description}'),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn('ETA'),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task('training', total=last, completed=first)

    def __enter__(self) -> ProgressLog:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int) -> None:
        """Optimiser step ``step`` is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def row(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Write and show one row."""
        if not self._active:
            return
        row = {'event': event, 'step': step, **values}
        with self._file.open('a', encoding='utf-8') as handle:
            handle.write(json.dumps(row) + '\n')
        self._console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
        if self._writer is not None:
            for name, value in values.items():
                numbers = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
                for index, number in numbers:
                    if isinstance(number, (int, float)) and number == number:
                        self._writer.add_scalar(f'{event}/{name}' if index is None else f'{event}/{name}/{index}', number, step)


def _line(row: dict[str, Any]) -> str:
    """A row for people: names and four digits, without what is nested."""
    parts = []
    for name, value in row.items():
        if isinstance(value, float):
            parts.append(f'{name} {value:.4g}')
        elif isinstance(value, list):
            parts.append(f'{name} [{" ".join("-" if number is None else f"{number:.3g}" for number in value)}]')
        elif isinstance(value, (int, str)):
            parts.append(f'{value}' if name == 'event' else f'{name} {value}')
    return '  '.join(parts)
