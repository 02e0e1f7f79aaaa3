"""What a run shows and writes while it trains."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vla_policy_ros.training.progress import LOG_FILE, TENSORBOARD_FOLDER, ProgressLog

ROW = {'flow': 0.25, 'loss_per_dim': [0.5, 1.0], 'cosine': [0.1, None], 'baselines': {'zero_velocity': 2.0}}


def shown(folder: Path, *, terminal: bool, active: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    with ProgressLog(folder, 4, 10, tensorboard=True, active=active, console=console) as log:
        for step in (5, 6):
            log.step(step)
            log.row('train', step, ROW)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_a_bar_with_the_remaining_time(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    assert 'training' in text and '6/10' in text and 'ETA' in text
    assert 'flow 0.25' in text, 'rows stand above the bar'


def test_a_file_gets_plain_lines(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    assert lines[0] == 'train  step 5  flow 0.25  loss_per_dim [0.5 1]  cosine [0.1 -]' and len(lines) == 2


def test_rows_are_json_and_curves(tmp_path: Path) -> None:
    shown(tmp_path, terminal=False)
    shown(tmp_path, terminal=False)  # a second call adds to what is there
    rows = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert len(rows) == 4 and rows[1] == {'event': 'train', 'step': 6, **ROW}
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert set(events.Tags()['scalars']) == {'train/flow', 'train/loss_per_dim/0', 'train/loss_per_dim/1', 'train/cosine/0'}
    assert [(event.step, event.value) for event in events.Scalars('train/flow')] == [(5, 0.25), (6, 0.25)], 'not drawn twice'


def test_other_processes_are_silent(tmp_path: Path) -> None:
    assert shown(tmp_path, terminal=True, active=False) == '' and not list(tmp_path.iterdir())
