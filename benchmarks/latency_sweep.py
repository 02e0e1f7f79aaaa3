"""How seams, jerk and tracking depend on the latency of the policy, for our chunking modes and for naive emission patterns.

`python benchmarks/latency_sweep.py` prints a table, `--markdown` that of docs/robustness.md, `--plot PNG` draws it, `--json FILE`
(or `-`) gives numbers. The arm follows a known path in the closed loop of `harness.py`, without faults. The exit status is 1 if one
of our modes breaks a promise up to 400 ms, or if at 200 ms the seam jump of `replace`, `rtc_guided` or `rtc_trained` exceeds a
tenth of the better whole-chunk pattern's.
"""

from __future__ import annotations

import os

os.environ['OMP_NUM_THREADS'] = '1'

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_cases import all_faults
from measures import Measures, broken_promises, plain
from rich.console import Console
from rich.table import Table
from senders import NAIVE, OURS, worst_of_seeds

SCHEMA, VERSION = 'vla_policy_ros/benchmarks/latency_sweep', 1
LATENCIES_MS = tuple(range(0, 601, 50))
SHOWN_MS = (0, 100, 200, 300, 400, 600)
PROMISED_MS, JUDGED_MS = 400, 200
SECONDS = 8.0
WHOLE_CHUNK = ('whole_chunk', 'whole_chunk_ahead')
FIGURES = {
    'seam_jump': ('seam jump', 'rad/s', 1.0),
    'jerk_rms': ('jerk, rms', 'rad/s³', 1.0),
    'tracking_rms': ('tracking error, rms', 'mrad', 1e3),
}

Sweep = dict[tuple[str, int], Measures]


def sweep(senders: Sequence[str], latencies_ms: Sequence[int], seeds: int) -> Sweep:
    """The row of every sender and latency."""
    no_fault = all_faults()[0].name
    return {(name, ms): worst_of_seeds(name, no_fault, ms, seeds, SECONDS) for name in senders for ms in latencies_ms}


def judge(found: Sweep) -> list[str]:
    """Sentences: what our senders promise and break."""
    broken = []
    for (sender, latency_ms), row in found.items():
        if sender in OURS and latency_ms <= PROMISED_MS:
            broken += [f'{sender}, {latency_ms} ms: {sentence}' for sentence in broken_promises(row, deadly=False)]
    whole = [found[sender, JUDGED_MS].seam_jump for sender in WHOLE_CHUNK if (sender, JUDGED_MS) in found]
    for sender in OURS:
        if whole and sender != 'ours, ensemble' and (sender, JUDGED_MS) in found:
            jump = found[sender, JUDGED_MS].seam_jump
            if jump > min(whole) / 10.0:
                broken.append(f'{sender}, {JUDGED_MS} ms: seam jump {jump:.3f} rad/s (allowed: a tenth of {min(whole):.3f})')
    return broken


def table_rows(found: Sweep) -> list[list[str]]:
    """One row per sender and figure, one column per latency that is shown and known."""
    rows = []
    for figure, (name, unit, scale) in FIGURES.items():
        for sender in dict.fromkeys(sender for sender, _ in found):
            values = [getattr(found[sender, latency], figure) for latency in _shown(found)]
            texts = ['-' if value is None else _digits(scale * value) for value in values]
            rows.append([f'{name}, {unit}', sender, *texts])
    return rows


def markdown(found: Sweep) -> str:
    """The table of docs/robustness.md."""
    head = ['', 'sender', *(f'{latency} ms' for latency in _shown(found))]
    lines = [f'| {" | ".join(head)} |', f'|---|---|{"---:|" * (len(head) - 2)}']
    lines += [f'| {row[0]} | `{row[1]}` | {" | ".join(row[2:])} |' for row in table_rows(found)]
    return '\n'.join(lines)


def plot(found: Sweep, path: Path) -> None:
    """Three panels over latency, on logarithmic scales. Senders that never move the arm are left out."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), layout='constrained')
    for panel, (measure_name, (name, unit, scale)) in zip(panels, FIGURES.items(), strict=True):
        for sender in dict.fromkeys(sender for sender, _ in found):
            rows = {latency: row for (other, latency), row in found.items() if other == sender}
            if all(row.step == 0.0 for row in rows.values()):
                continue
            style = '-o' if sender in OURS else '--s'
            panel.plot(list(rows), [scale * getattr(row, measure_name) for row in rows.values()], style, ms=3, lw=1.2, label=sender)
        panel.set(xlabel='latency of the policy, ms', ylabel=unit, title=name, yscale='log')
        panel.grid(which='both', alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={'Software': None})
    pyplot.close(figure)


def show(found: Sweep) -> None:
    """A table for a terminal."""
    table = Table('', 'sender', *(f'{latency} ms' for latency in _shown(found)))
    for row in table_rows(found):
        table.add_row(*row)
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


def document(found: Sweep, seeds: int) -> dict[str, Any]:
    """The sweep as JSON takes it."""
    return {
        'schema': SCHEMA,
        'version': VERSION,
        'setup': {'seeds': seeds, 'seconds': SECONDS},
        'broken_promises': judge(found),
        'rows': [{'sender': sender, 'latency_ms': latency, **plain(row)} for (sender, latency), row in found.items()],
    }


def _shown(found: Sweep) -> list[int]:
    latencies = list(dict.fromkeys(latency for _, latency in found))
    return [latency for latency in latencies if latency in SHOWN_MS] or latencies


def _digits(value: float) -> str:
    return f'{value:.0f}' if value >= 100.0 else f'{value:.3g}'


def main() -> int:
    """Run, print, draw, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3, help='runs per sender and latency, each with another path')
    parser.add_argument('--sender', action='append', choices=[*OURS, *NAIVE], help='only this one (may be repeated)')
    parser.add_argument('--latency', action='append', type=int, help='only this one, ms (may be repeated)')
    parser.add_argument('--json', default='', help="file to write, '-' for standard output")
    parser.add_argument('--markdown', action='store_true', help='print the table of docs/robustness.md')
    parser.add_argument('--plot', default='', help='PNG file to draw')
    arguments = parser.parse_args()
    found = sweep(arguments.sender or [*OURS, *NAIVE], arguments.latency or LATENCIES_MS, arguments.seeds)
    text = json.dumps(document(found, arguments.seeds), indent=1, allow_nan=False)
    if arguments.json == '-':
        print(text)
    elif arguments.markdown:
        print(markdown(found))
    else:
        show(found)
    if arguments.json not in ('', '-'):
        Path(arguments.json).write_text(text + '\n', encoding='utf-8')
    if arguments.plot:
        plot(found, Path(arguments.plot))
    broken = judge(found)
    for sentence in broken:
        print(f'broken promise: {sentence}', file=sys.stderr)
    return 1 if broken else 0


if __name__ == '__main__':
    sys.exit(main())
