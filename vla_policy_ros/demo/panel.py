"""What the operator sees while the demo runs. Pure rendering: messages in, a rich table out. Main thread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_STATE_STYLES = {
    'WAITING': 'yellow',
    'READY': 'cyan',
    'RUNNING': 'bold green',
    'HOLDING': 'bold yellow',
    'STOPPED': 'bold magenta',
    'FAULT': 'bold red',
}


def render(status: Any, report: Mapping[str, Any], elapsed: float, seconds: float) -> RenderableType:
    """The live panel.

    Args:
        status: the newest PolicyStatus.
        report: the simulator's newest report.
        elapsed, seconds: simulated time since the run began, and of the whole run.
    """
    head = Text.assemble(
        (f' {status.state_name} ', _STATE_STYLES.get(status.state_name, '')), ' dry run ' if status.dry_run else '', status.reason
    )
    return Panel(
        Group(head, _task(report), _numbers(status, report['trajectories']), _inputs(status), _progress(elapsed, seconds)),
        title='vla-policy demo',
        subtitle='Ctrl-C ends it and still writes the results',
        padding=(1, 2),
    )


def one_line(status: Any, report: Mapping[str, Any], elapsed: float) -> str:
    """The same for a log."""
    controller, distance = report['trajectories'], report['distance_m']
    way = '' if distance is None else f'  {100 * distance:5.1f} cm to the {report["target"]}'
    return (
        f'{elapsed:5.1f} s  {status.state_name:<8} {status.chunks} chunks at {status.chunk_rate:.1f} Hz  '
        f'accepted {controller["accepted"]} rejected {controller["rejected"]}  '
        f'latency {_ms(status.latency_p50_ms)}{way}  {status.reason}'
    ).rstrip()


def result(summary: Mapping[str, Any], out: Path) -> RenderableType:
    """The summary of a finished run, as an operator reads it."""
    counts, latency = summary['trajectories'], summary['latency_ms']
    table = Table.grid(padding=(0, 3))
    table.add_row('observations', f'{summary["observations"]}', '')
    table.add_row('chunks', f'{summary["chunks"]}', f'{summary["replan_rate_hz"]:.2f} of {summary["replan_rate_wanted_hz"]:.2f} Hz')
    table.add_row(
        'trajectories', f'{counts["published"]} published', f'{counts["accepted"]} accepted, {counts["rejected"]} rejected'
    )
    if latency['p50'] is not None:
        table.add_row('latency', f'{latency["p50"]:.0f} ms p50', f'{latency["p99"]:.0f} ms p99')
    step, limit = summary['max_command_step_rad'], summary['velocity_limit_times_period_rad']
    table.add_row('largest step', f'{step:.4f} rad', f'{limit:.4f} rad allowed')
    table.add_row('time', f'{summary["simulated_s"]:.1f} s simulated', f'{summary["real_time_factor"]:.2f} of real time')
    reaches = Table(
        'instruction', 'distance, cm', 'reached after', 'at the end', box=None, pad_edge=False, padding=(0, 2), header_style='dim'
    )
    for reach in summary['instructions']:
        reaches.add_row(*_reach(reach))
    return Panel(
        Group(table, Text(), reaches), title='vla-policy demo', subtitle=f'video, bag and summary are in {out}', padding=(1, 2)
    )


def _reach(reach: Mapping[str, Any]) -> tuple[str, str, str, Text]:
    if reach['final_distance_m'] is None:
        return reach['instruction'], '-', '-', Text('names no object', style='yellow')
    way = f'{100 * reach["initial_distance_m"]:.1f} to {100 * reach["final_distance_m"]:.1f}'
    after = '-' if reach['reached_after_s'] is None else f'{reach["reached_after_s"]:.1f} s'
    return reach['instruction'], way, after, Text('there', style='green') if reach['success'] else Text('not there', style='yellow')


def _task(report: Mapping[str, Any]) -> RenderableType:
    if report['distance_m'] is None:
        return Text(report['target_reason'], style='dim')
    distance = f'{100 * report["distance_m"]:.1f} cm'
    return Text.assemble(('instruction  ', 'dim'), (report['instruction'], 'bold'), ('   distance  ', 'dim'), distance)


def _numbers(status: Any, controller: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 3))
    taken = f'{controller["accepted"]} accepted, {controller["rejected"]} rejected'
    table.add_row('chunks', f'{status.chunks}', 'rate', f'{status.chunk_rate:.2f} of {status.replan_rate:.2f} Hz')
    table.add_row('published', f'{status.trajectories_published}', 'controller', taken)
    latency = f'{_ms(status.latency_p50_ms)} p50, {_ms(status.latency_p99_ms)} p99'
    table.add_row('refused', f'{status.trajectories_rejected}', 'latency', latency)
    return table


def _inputs(status: Any) -> Table:
    table = Table('input', 'rate', 'age', 'limit', '', box=None, pad_edge=False, padding=(0, 2), header_style='dim')
    for health in status.inputs:
        mark = Text('ok', style='green') if health.ok else Text(health.reason, style='red')
        table.add_row(health.name, f'{health.rate:.1f} Hz', _seconds(health.age), _seconds(health.max_age), mark)
    return table


def _progress(elapsed: float, seconds: float) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=seconds, completed=min(elapsed, seconds), width=40), f'{elapsed:.1f} of {seconds:.0f} s')
    return row


def _ms(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.0f} ms'


def _seconds(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2f} s'
