"""Score card: what the arm does when something fails, for our sender and for the emission patterns of other bridges.

`python benchmarks/faults.py` prints tables, `--markdown` those of docs/robustness.md, `--json FILE` (or `-`) gives numbers. Every
sender meets every fault in the same closed loop on a virtual clock. The exit status is 1 if our sender breaks a promise: a rejected
message, a step or a peak beyond the limits, or an arm that still moves after a death.
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
from measures import Measures, broken_promises, plain, worst
from rich.console import Console
from rich.table import Column, Table
from senders import NAIVE, OURS, worst_of_seeds

SCHEMA, VERSION = 'vla_policy_ros/benchmarks/faults', 1
SENDERS = ('ours, replace', *NAIVE)
LATENCY_MS = 100
SECONDS = 8.0

COLUMNS = {
    'sent': 'sent',
    'rejected': 'rejected',
    'non_finite': 'NaN/inf',
    'step': 'step / v dt',
    'velocity': 'velocity',
    'acceleration': 'acceleration',
    'jerk': 'jerk',
    'seam_jump': 'seam, rad/s',
    'tracking_rms': 'tracking, mrad',
    'time_to_rest': 'to rest, s',
    'at_rest': 'rests at end',
}

Card = dict[tuple[str, str], Measures]


def score(senders: Sequence[str], faults: Sequence[str], seeds: int) -> Card:
    """The row of every sender and fault."""
    return {(sender, name): worst_of_seeds(sender, name, LATENCY_MS, seeds, SECONDS) for sender in senders for name in faults}


def judge(card: Card) -> list[str]:
    """Sentences: the promises that our sender breaks."""
    deadly = {fault.name for fault in all_faults() if fault.deadly}
    return [
        f'{sender}, {fault}: {sentence}'
        for (sender, fault), row in card.items()
        if sender not in NAIVE
        for sentence in broken_promises(row, fault in deadly)
    ]


def cells(row: Measures) -> list[str]:
    """One row of a table, in the order of `COLUMNS`."""
    rest = 'never' if row.time_to_rest is None else f'{row.time_to_rest:.2f}'
    tracking = '-' if row.tracking_rms is None else f'{1e3 * row.tracking_rms:.1f}'
    ratios = [f'{value:.2f}' if value < 10.0 else f'{value:.0f}' for value in (row.step, row.velocity, row.acceleration, row.jerk)]
    counts = [str(count) for count in (row.sent, row.rejected, row.non_finite)]
    return [*counts, *ratios, f'{row.seam_jump:.3f}', tracking, rest, 'yes' if row.at_rest else 'no']


def over_all(card: Card, sender: str) -> Measures:
    """The worst of all faults of one sender."""
    return worst([row for (name, _), row in card.items() if name == sender])


def markdown(card: Card) -> str:
    """The tables of docs/robustness.md: the worst over all faults, then one table per sender."""
    head, senders = list(COLUMNS.values()), list(dict.fromkeys(sender for sender, _ in card))
    summary = head[:-2]
    lines = [_row('sender, worst of all faults', summary), _rule(len(summary))]
    lines += [_row(f'`{sender}`', cells(over_all(card, sender))[:-2]) for sender in senders]
    for sender in senders:
        lines += ['', f'### `{sender}`', '', _row('fault', head), _rule(len(head))]
        lines += [_row(fault, cells(row)) for (name, fault), row in card.items() if name == sender]
    return '\n'.join(lines)


def _row(first: str, rest: Sequence[str]) -> str:
    return f'| {" | ".join([first, *rest])} |'


def _rule(count: int) -> str:
    return f'|---|{"---:|" * count}'


def show(card: Card) -> None:
    """Tables for a terminal, one per sender."""
    console = Console(width=150 if not sys.stdout.isatty() else None)
    for sender in dict.fromkeys(sender for sender, _ in card):
        table = Table(Column('fault', no_wrap=True), *COLUMNS.values(), title=sender)
        for (name, fault), row in card.items():
            if name == sender:
                table.add_row(fault, *cells(row))
        console.print(table)


def document(card: Card, seeds: int) -> dict[str, Any]:
    """The card as JSON takes it."""
    return {
        'schema': SCHEMA,
        'version': VERSION,
        'setup': {'seeds': seeds, 'latency_ms': LATENCY_MS, 'seconds': SECONDS},
        'faults': {fault.name: fault.sentence for fault in all_faults()},
        'broken_promises': judge(card),
        'rows': [{'sender': sender, 'fault': fault, **plain(row)} for (sender, fault), row in card.items()],
    }


def main() -> int:
    """Run, print, judge."""
    known = [fault.name for fault in all_faults()]
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3, help='runs per sender and fault, each with another path')
    parser.add_argument('--sender', action='append', choices=[*OURS, *NAIVE], help='only this one (may be repeated)')
    parser.add_argument('--fault', action='append', choices=known, help='only this one (may be repeated)')
    parser.add_argument('--json', default='', help="file to write, '-' for standard output")
    parser.add_argument('--markdown', action='store_true', help='print the tables of docs/robustness.md')
    arguments = parser.parse_args()
    card = score(arguments.sender or SENDERS, arguments.fault or known, arguments.seeds)
    text = json.dumps(document(card, arguments.seeds), indent=1, allow_nan=False)
    if arguments.json == '-':
        print(text)
    elif arguments.markdown:
        print(markdown(card))
    else:
        show(card)
    if arguments.json not in ('', '-'):
        Path(arguments.json).write_text(text + '\n', encoding='utf-8')
    broken = judge(card)
    for sentence in broken:
        print(f'broken promise: {sentence}', file=sys.stderr)
    return 1 if broken else 0


if __name__ == '__main__':
    sys.exit(main())
