"""Writes what a demo leaves behind, summary and video, from the bag and the reports. Runs after the processes have ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vla_policy_ros.demo.captions import RunCaptions
from vla_policy_ros.demo.reaches import judge
from vla_policy_ros.demo.summary import read_bag, summarise
from vla_policy_ros.demo.video import write_video
from vla_policy_ros.robot import Robot

if TYPE_CHECKING:
    from vla_policy_ros.demo.session import DemoOptions, Run

BAG, VIDEO, SUMMARY, REPORT = 'bag', 'demo.mp4', 'summary.json', 'simulator.json'
LOGS = ('simulator.log', 'policy.log')


def prepare_folder(out: Path) -> None:
    """Make the output folder and remove the outputs of a former run; whatever else lies there stays."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / BAG / 'metadata.yaml').is_file() or (out / BAG / f'{BAG}.mcap').is_file():
        shutil.rmtree(out / BAG)
    for name in (VIDEO, SUMMARY, REPORT, *LOGS):
        (out / name).unlink(missing_ok=True)


def write(options: DemoOptions, robot: Robot, run: Run, console: Console) -> dict[str, Any] | None:
    """Write video and summary and return the summary; None where the loop never began."""
    report_path = options.out / REPORT
    if run.status is None or run.simulated_s == 0.0 or not report_path.is_file():
        return None
    report = json.loads(report_path.read_text(encoding='utf-8'))
    results = [judge(reach, run.samples) for reach in run.reaches]
    summary = summarise(read_bag(options.out / BAG), run.status, report, results)
    summary |= {
        'robot': robot.name,
        'seconds_wanted': options.seconds,
        'simulated_s': run.simulated_s,
        'wall_s': run.wall_s,
        'real_time_factor': run.simulated_s / run.wall_s,
        'interrupted': run.interrupted,
    }
    with console.status('writing the video'):
        summary['video_frames'] = _write_video(options.out, robot)
    text = json.dumps(summary, indent=2) + '\n'
    for path in (options.out / SUMMARY, *([options.json_file] if options.json_file else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    return summary


def _write_video(out: Path, robot: Robot) -> int:
    from vla_policy_ros.ros.demo_observer import REPORT_TOPIC, STATUS_TOPIC

    # The recorder stores raw images as JPEG under this name.
    topics = [f'{c.topic}/compressed' if c.transport == 'raw' else c.topic for c in robot.cameras.values()]
    return write_video(out / BAG, out / VIDEO, topics, RunCaptions(STATUS_TOPIC, REPORT_TOPIC))
