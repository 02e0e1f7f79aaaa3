"""The report of a replay as one HTML file that needs nothing else: no network, no script. It prints as it is.

Enters: the report, its figures and moments. Leaves: text. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vla_policy_ros.episodes.errors import HOLD, POLICY, REPEAT_LAST
from vla_policy_ros.replay.pictures import Moment

_OF_SEAMS = ('mean', 'p95', 'max')
_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; margin: 0 auto; max-width: 960px;
  padding: 24px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 28px 0 8px; }
p, ul { margin: 6px 0; } .quiet { color: #666; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: right; padding: 3px 10px; border-bottom: 1px solid #e5e5e5; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; background: #f6f7f8; }
.best { color: #0a6b35; font-weight: 600; } .bad { color: #a3271b; font-weight: 600; }
.verdict { border-left: 4px solid #0b6cb8; background: #f3f7fb; padding: 8px 14px; margin: 14px 0; }
.verdict.bad { border-color: #a3271b; background: #fcf3f2; color: #222; font-weight: 400; }
.pair { display: flex; gap: 12px; flex-wrap: wrap; } .pair > * { flex: 1 1 400px; } svg { max-width: 100%; height: auto; }
figure { margin: 0; } figcaption { color: #666; font-size: 12px; }
.strip { display: flex; flex-wrap: wrap; gap: 10px; } .strip img { display: block; border-radius: 3px; }
@media print { body { padding: 0; max-width: none; } h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


def page(report: Mapping[str, Any], figures: Mapping[str, str], moments: Sequence[Moment], begin_ns: int, left_out: int) -> str:
    """The file. ``figures``: ``trajectories``, ``error_by_step``, ``ages``, ``timeline``, as SVG, or missing where there is nothing
    to draw; ``left_out``: joints that ``trajectories`` does not show."""
    bag, metrics = report['bag'], report['metrics']
    parts = [
        f'<h1>{escape(report["checkpoint"]["name"])} on {escape(bag["name"])}</h1>',
        f'<p class="quiet">robot {escape(bag["robot"])} · {metrics["health"]["duration_s"]:.1f} s of the bag · '
        f'{metrics["demands"]["chunks"]} chunks · compared with {escape(report["ground_truth"])} · '
        f'latency {escape(report["settings"]["latency"])} · {escape(report["software"])}</p>',
        _verdict(metrics),
        _notes(bag['notes'], metrics['health']['warnings']),
        _reproduction(metrics['reproduction']),
        '<h2>Error against what was commanded</h2>',
        _errors(report),
        '<div class="pair">',
        _figure(figures.get('error_by_step'), 'By action of the horizon'),
        _figure(figures.get('ages'), 'Age of the inputs when the policy was asked, and from image to trajectory'),
        '</div>',
        '<h2>Commanded, and what the policy would have</h2>',
        _figure(
            figures.get('trajectories'),
            f'Each chunk from its takeover until the next one; gaps: starved. {left_out} joints that move less are not shown.'
            if left_out
            else 'Each chunk from its takeover until the next one; gaps: starved.',
        ),
        '<h2>State of the policy</h2>',
        _figure(figures.get('timeline'), ''),
        _changes(metrics['health']['changes']),
        '<h2>Moments of the largest errors</h2>',
        _strip(moments, begin_ns),
        '<h2>Chunks and demands</h2>',
        _demands(metrics),
        '<h2>By joint</h2>',
        _joints(metrics),
        '<h2>What this machine needed</h2>',
        _timing(report['timing']),
    ]
    title = escape(f'{report["checkpoint"]["name"]} on {bag["name"]}')
    body = '\n'.join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f'<body>\n{body}\n</body></html>\n'
    )


def _verdict(metrics: Mapping[str, Any]) -> str:
    accuracy = metrics['accuracy']
    if accuracy is None:
        return '<p class="verdict bad">Nothing was commanded at the times of the chunks: there is nothing to compare them with.</p>'
    errors = {name: accuracy['errors'][name]['mae'] for name in (POLICY, HOLD, REPEAT_LAST)}
    beaten = [name.replace('_', ' ') for name in (HOLD, REPEAT_LAST) if errors[POLICY] < errors[name]]
    lost = [name.replace('_', ' ') for name in (HOLD, REPEAT_LAST) if errors[POLICY] >= errors[name]]
    better = f'better than {" and ".join(beaten)}' if beaten else ''
    worse = f'no better than {" and ".join(lost)}' if lost else ''
    rejected = sum(metrics['demands']['rejected'].values())
    sentence = (
        f'Mean absolute error {errors[POLICY]:.4g}: {"; ".join(part for part in (better, worse) if part)}. '
        f'{rejected} of {metrics["demands"]["chunks"]} chunks refused, {metrics["continuity"]["starved_s"]:.2f} s starved.'
    )
    return f'<p class="verdict{" bad" if lost or rejected else ""}">{escape(sentence)}</p>'


def _notes(notes: Sequence[str], warnings: Mapping[str, int]) -> str:
    lines = [escape(note) for note in notes] + [f'{escape(text)} ({count} times)' for text, count in warnings.items()]
    return f'<h2>What to know about this bag</h2><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul>' if lines else ''


def _reproduction(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ''
    largest = '' if found['largest_difference'] is None else f', and differ from them by at most {found["largest_difference"]:.3g}'
    other = f' {found["of_another_checkpoint"]} were of another checkpoint.' if found['of_another_checkpoint'] else ''
    sentence = f'{found["matched"]} of {found["recorded"]} recorded chunks were asked for again{largest}.{other}'
    return f'<h2>Against the recorded chunks</h2><p>{sentence}</p>'


def _errors(report: Mapping[str, Any]) -> str:
    accuracy = report['metrics']['accuracy']
    if accuracy is None:
        return ''
    rows = {name.replace('_', ' '): accuracy['errors'][name] for name in (POLICY, HOLD, REPEAT_LAST)}
    comparison = report['comparison']
    if comparison and comparison['metrics']['accuracy']:
        rows[f'second policy: {comparison["checkpoint"]["name"]}'] = comparison['metrics']['accuracy']['errors'][POLICY]
    best = min(row['mae'] for row in rows.values())
    body = [
        (name, _cell(row['mae'], row['mae'] == best), f'{row["rmse"]:.4g}', _number(row['normalised_rmse']))
        for name, row in rows.items()
    ]
    text = _table(('', 'mean absolute', 'root mean square', 'RMS / spread of the commands'), body)
    if comparison and comparison['paired']:
        paired = comparison['paired']
        low, high = paired['interval95']
        text += (
            f'<p>Second minus first, on {paired["observations"]} common observations: {paired["mae_difference"]:+.4g} '
            f'(95 % bootstrap {low:+.4g} to {high:+.4g}).</p>'
        )
    cosine = accuracy['motion_cosine']
    return text + (f'<p>Cosine between the motion asked for and the one commanded: {cosine:.3f}.</p>' if cosine is not None else '')


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    reasons = [change for change in changes if change['reason']]
    rows = [(f'{change["time_s"]:.2f} s', escape(change['state']), escape(change['reason'])) for change in reasons[:12]]
    if not rows:
        return ''
    more = f'<p class="quiet">and {len(reasons) - 12} more, in report.json</p>' if len(reasons) > 12 else ''
    table = _table(('time', 'state', 'reason'), rows)
    return f'<details><summary>{len(reasons)} reasons</summary>{table}{more}</details>'


def _strip(moments: Sequence[Moment], begin_ns: int) -> str:
    shown = [
        f'<figure>{"".join(_image(camera, data) for camera, data in moment.pictures.items())}'
        f'<figcaption>{(moment.time_ns - begin_ns) / 1e9:.2f} s: error {moment.error:.4g}</figcaption></figure>'
        for moment in moments
    ]
    return f'<div class="strip">{"".join(shown)}</div>' if shown else '<p class="quiet">none: nothing to compare with</p>'


def _image(camera: str, data: str) -> str:
    return f'<img alt="camera {escape(camera)}" src="data:image/jpeg;base64,{data}">'


def _demands(metrics: Mapping[str, Any]) -> str:
    demands, continuity, freshness = metrics['demands'], metrics['continuity'], metrics['freshness']
    rejected = ', '.join(f'{count} {name}' for name, count in demands['rejected'].items()) or '0'
    rows = [
        ('questions / chunks / dropped answers', f'{demands["questions"]} / {demands["chunks"]} / {demands["dropped_answers"]}'),
        ('ticks skipped because an answer was still awaited', f'{demands["skipped_ticks"]}'),
        ('chunks refused', escape(rejected)),
        ('chunks clamped / cut short', f'{_percent(demands["clip_rate"])} / {_percent(demands["cut_rate"])}'),
        ('answers later than the next question', f'{freshness["deadline_misses"]}'),
        ('jump at the seams: mean / 95 % / largest', ' / '.join(_number(continuity[f'seam_jump_{k}']) for k in _OF_SEAMS)),
        ('jerk of the chunks, RMS', _number(continuity['jerk_rms'])),
        ('starved', f'{continuity["starved_s"]:.2f} s'),
    ]
    if continuity['aligned_error']:
        rows.append(('error of what would have been executed, at its time', f'{continuity["aligned_error"]["mae"]:.4g}'))
    return _table(('', ''), rows)


def _joints(metrics: Mapping[str, Any]) -> str:
    demands, accuracy = metrics['demands'], metrics['accuracy']
    rows = []
    for joint, margin in demands['limit_margin'].items():
        error = accuracy['errors'][POLICY] if accuracy else None
        rows.append(
            (
                escape(joint),
                f'{error["joint_mae"][joint]:.4g}' if error else '–',
                _number(error['joint_normalised_rmse'][joint]) if error else '–',
                _cell(margin, False, margin < 0),
                _cell(demands['speed_ratio'][joint], False, demands['speed_ratio'][joint] > 1),
            )
        )
    return _table(('joint', 'mean absolute error', 'RMS / spread', 'least distance to a position limit', 'speed / limit'), rows)


def _timing(timing: Mapping[str, Any]) -> str:
    rows = [(name, *(f'{values[key]:.1f}' for key in ('p50', 'p95', 'max'))) for name, values in timing['stages_ms'].items()]
    share = '' if timing['of_real_time'] is None else f', {timing["of_real_time"]:.2f} of the time it replays'
    return f'<p>{timing["wall_s"]:.1f} s{share}.</p>' + (_table(('stage, ms', 'median', '95 %', 'largest'), rows) if rows else '')


def _figure(svg: str | None, caption: str) -> str:
    return f'<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>' if svg else ''


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = f'<tr>{"".join(f"<th>{escape(text)}</th>" for text in head)}</tr>' if any(head) else ''
    return f'<table>{top}{"".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)}</table>'


def _cell(value: float, best: bool, bad: bool = False) -> str:
    kind = 'best' if best else 'bad' if bad else ''
    return f'<span class="{kind}">{value:.4g}</span>' if kind else f'{value:.4g}'


def _number(value: float | None) -> str:
    return '–' if value is None else f'{value:.4g}'


def _percent(value: float | None) -> str:
    return '–' if value is None else f'{100 * value:.0f} %'
