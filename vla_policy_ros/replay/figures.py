"""The figures of a replay's report, as SVG text.

Enters: the report, and the paths it speaks about. Leaves: one `<svg>` element each. No display is needed; the same data give the
same text.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vla_policy_ros.episodes.commands import Commands
from vla_policy_ros.episodes.errors import HOLD, POLICY, REPEAT_LAST
from vla_policy_ros.replay.metrics import Executed
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S

MOST_JOINTS = 8
_WIDTH = 9.0
_COLOURS = {'truth': '#555555', POLICY: '#0b6cb8', HOLD: '#c77c11', REPEAT_LAST: '#7a4fa3', 'second': '#1c8a4d'}
_STATES = {
    'WAITING': '#c9ced6', 'READY': '#a9c8e8', 'RUNNING': '#6db784', 'HOLDING': '#e8b84b', 'STOPPED': '#d9705f', 'FAULT': '#9c2f2f',
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    'font.size': 8.5, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#888888', 'axes.grid': True,
    'grid.color': '#e6e6e6', 'grid.linewidth': 0.6, 'legend.frameon': False, 'svg.hashsalt': 'vla_policy_ros',
    'svg.fonttype': 'none', 'font.family': 'sans-serif', 'figure.constrained_layout.use': True,
}  # fmt: skip


def trajectories(robot: Robot, commands: Commands, path: Executed, begin_ns: int) -> tuple[str, int]:
    """What was commanded and what the policy would have, over time, for the joints that move most; and how many are left out."""
    joints = robot.action.joints
    sampled = commands.sample(path.times_ns)
    truth = np.where((sampled.early | sampled.is_pad)[:, None], np.nan, sampled.positions)
    spread = np.ptp(np.where(np.isfinite(truth), truth, path.positions[:1]), axis=0)
    spread = np.nan_to_num(spread)
    chosen = sorted(np.argsort(-spread, kind='stable')[:MOST_JOINTS].tolist())
    seconds = (path.times_ns - begin_ns) / NS_PER_S
    rows = -(-len(chosen) // 2)
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.45 * rows + 0.4))
        axes = np.atleast_1d(figure.subplots(rows, 2, sharex=True, squeeze=False)).ravel()
        for axis, column in zip(axes, chosen, strict=False):
            axis.plot(seconds, truth[:, column], color=_COLOURS['truth'], linewidth=1.6, label='commanded')
            axis.plot(seconds, path.positions[:, column], color=_COLOURS[POLICY], linewidth=1.1, label='policy')
            axis.set_title(joints[column], loc='left', fontsize=8.5)
        for axis in axes[len(chosen) :]:
            axis.set_visible(False)
        axes[0].legend(loc='best', fontsize=7.5)
        figure.supxlabel('time in the replay, s', fontsize=8.5)
        return _svg(figure), len(joints) - len(chosen)


def error_by_step(report: Mapping[str, Any], period_s: float) -> str:
    """Mean absolute error by action of the horizon: the policy, the baselines, and a second policy."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 2 - 0.1, 2.6))
        axis = figure.subplots()
        errors = report['metrics']['accuracy']['errors']
        curves = {name: (_COLOURS[name], errors[name]['step_mae']) for name in (POLICY, HOLD, REPEAT_LAST)}
        second = report['comparison'] and report['comparison']['metrics']['accuracy']
        if second:
            curves['second policy'] = (_COLOURS['second'], second['errors'][POLICY]['step_mae'])
        for name, (colour, steps) in curves.items():
            values = np.array([np.nan if value is None else value for value in steps])
            axis.plot((np.arange(len(values)) + 1) * period_s, values, color=colour, label=name.replace('_', ' '))
        axis.set_ylim(bottom=0.0)
        axis.set_xlabel('ahead of the observation, s')
        axis.set_ylabel('mean absolute error')
        axis.legend(fontsize=7.5)
        return _svg(figure)


def ages(freshness: Mapping[str, Any]) -> str:
    """How old the inputs were when the policy was asked, and how late its trajectories were."""
    rows = {**freshness['age_ms'], 'image to trajectory': freshness['image_to_trajectory_ms']}
    rows = {name: values for name, values in rows.items() if values}
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 2 - 0.1, 2.6))
        axis = figure.subplots()
        names = list(reversed(rows))
        axis.barh(names, [rows[name]['p95'] for name in names], color='#b9d3ea', label='95 %')
        axis.barh(names, [rows[name]['p50'] for name in names], color=_COLOURS[POLICY], height=0.4, label='median')
        axis.plot([rows[name]['max'] for name in names], names, '|', color='#333333', label='largest')
        axis.set_xlabel('ms')
        axis.legend(loc='lower right', bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=7.5)
        return _svg(figure)


def timeline(health: Mapping[str, Any]) -> str:
    """The state of the policy over time."""
    changes, end = health['changes'], health['duration_s']
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.3))
        axis = figure.subplots()
        shown: set[str] = set()
        for index, change in enumerate(changes):
            until = changes[index + 1]['time_s'] if index + 1 < len(changes) else end
            state = change['state']
            label = None if state in shown else state.lower()
            axis.axvspan(change['time_s'], until, color=_STATES[state], linewidth=0, label=label)
            shown.add(state)
        axis.set_xlim(0.0, max(end, 1e-9))
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.set_xlabel('time in the replay, s')
        axis.legend(loc='lower left', bbox_to_anchor=(0.0, 1.0), ncols=len(_STATES), fontsize=7.5)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    text = io.StringIO()
    figure.savefig(text, format='svg', metadata={'Date': None, 'Creator': None})
    svg = text.getvalue()
    return svg[svg.index('<svg') :]
