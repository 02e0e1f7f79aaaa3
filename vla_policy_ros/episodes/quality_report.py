"""How a `DatasetReport` is told: tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla_policy_ros.episodes.convert import DatasetReport
from vla_policy_ros.episodes.quality import EpisodeQuality

# Of a report that nobody reads on a terminal.
REPORT_WIDTH = 132


def print_report(report: DatasetReport, console: Console) -> None:
    """Print a report: a line per episode, a line per input, then everything that is worth a sentence."""
    if report.destination is not None:
        details = ', '.join(f'{key} {value}' for key, value in report.details.items())
        console.print(f'[bold]{escape(report.source)}[/] → {report.format} [bold]{escape(report.destination)}[/]  {details}')
    console.print(_episodes(report))
    console.print(_inputs(report))
    for sentence in _sentences(report):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _episodes(report: DatasetReport) -> Table:
    table = Table(title=f'Episodes for robot {report.robot}', title_justify='left')
    for heading in ('episode', 'steps', 's', 'Hz', 'image–state ms', 'cameras ms', 'stale', 'skipped', 'written'):
        table.add_column(heading, justify='left' if heading in ('episode', 'written') else 'right')
    for outcome in report.episodes:
        quality = outcome.quality
        if quality is None:
            table.add_row(escape(outcome.name), *['–'] * 7, '[red]left out[/]')
            continue
        table.add_row(
            escape(outcome.name),
            str(quality.steps),
            f'{quality.duration:.1f}',
            f'{quality.rate:.2f}',
            f'{quality.state_skew_ms[0]:.1f} / {quality.state_skew_ms[1]:.1f}',
            f'{quality.camera_skew_ms:.1f}',
            ', '.join(str(count) for count in quality.stale.values()) or '–',
            str(sum(quality.skipped.values())),
            ', '.join(outcome.written) or ('–' if report.destination is None else '[red]nothing[/]'),
        )
    return table


def _inputs(report: DatasetReport) -> Table:
    table = Table(title='Inputs', title_justify='left')
    for heading in ('episode', 'input', 'messages', 'Hz', 'gaps', 'missing', 'longest s', 'repeated', 'backwards', 'latency ms'):
        table.add_column(heading, justify='left' if heading in ('episode', 'input') else 'right')
    for outcome in report.episodes:
        for row in outcome.quality.inputs if outcome.quality else ():
            latency = '–' if row.latency_ms is None else f'{row.latency_ms[0]:.1f} / {row.latency_ms[1]:.1f}'
            counts = (str(n) for n in (row.gaps, row.missing))
            table.add_row(
                escape(outcome.name), row.name, str(row.messages), f'{row.rate:.2f}', *counts, f'{row.longest_gap:.3f}',
                str(row.repeated), str(row.backwards), latency,
            )  # fmt: skip
    return table


def _sentences(report: DatasetReport) -> list[str]:
    """Sources of actions once, then what is particular to an episode."""
    found = [outcome.quality for outcome in report.episodes if outcome.quality]
    lines = [f'actions: {source}' for source in dict.fromkeys(quality.action_source for quality in found)]
    for outcome in report.episodes:
        if outcome.problem:
            lines.append(f'{outcome.name}: {outcome.problem}')
        if outcome.quality is not None:
            lines += [f'{outcome.name}: {sentence}' for sentence in _particulars(outcome.quality)]
    return lines


def _particulars(quality: EpisodeQuality) -> list[str]:
    lines = list(quality.notes)
    if quality.uncalibrated:
        lines.append(f'no intrinsics for camera {", ".join(quality.uncalibrated)}: the geometry trunk runs without rays')
    for camera, count in quality.stale.items():
        if count:
            share = count / max(1, quality.steps - 1)
            lines.append(f'camera {camera}: {count} images ({share:.0%}) show nothing new: stillness, or a stale camera')
    return lines + [f'{reason} ({count} times)' for reason, count in quality.skipped.items()]
