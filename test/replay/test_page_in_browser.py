"""The page of a replay as a browser shows and prints it; skipped where there is no Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cv2
import pytest
from episode_recordings import ROBOT, ROBOT_TEXT, entries, record
from typer.testing import CliRunner

from vla_policy_ros.cli import app
from vla_policy_ros.policy.checkpoint import new_checkpoint
from vla_policy_ros.replay.command import PAGE

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason='no Chromium here')

WIDTH, HEIGHT = 1200, 2400


def browse(page: Path, folder: Path, *arguments: str) -> str:
    """What the browser prints."""
    assert BROWSER is not None
    quiet = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run']
    profile = [f'--user-data-dir={folder / "profile"}', '--virtual-time-budget=2000']
    done = subprocess.run(
        [BROWSER, *quiet, *profile, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_the_page_is_shown_and_printed(tmp_path: Path) -> None:
    robot = tmp_path / 'toy.yaml'
    robot.write_text(ROBOT_TEXT)
    bag, checkpoint = record(tmp_path / 'bag', entries(15)), new_checkpoint(ROBOT, 'tiny', tmp_path / 'tiny', seed=1)
    fixed = ['--robot', str(robot), '--checkpoint', str(checkpoint), '--out', str(tmp_path / 'out')]
    assert CliRunner().invoke(app, ['replay', str(bag), *fixed]).exit_code == 0
    page = tmp_path / 'out' / 'bag' / PAGE

    text = browse(page, tmp_path, '--dump-dom')
    assert text.count('<svg') == 4 and '</html>' in text

    shot = tmp_path / 'page.png'
    browse(page, tmp_path, f'--screenshot={shot}', f'--window-size={WIDTH},{HEIGHT}', '--hide-scrollbars')
    pixels = cv2.imread(str(shot))
    assert pixels is not None and pixels.shape == (HEIGHT, WIDTH, 3)
    # Something is drawn in every quarter of the page, and most of it is background.
    quarters = [pixels[top : top + HEIGHT // 4] for top in range(0, HEIGHT, HEIGHT // 4)]
    background = pixels[2, 2]
    inked = [float((quarter != background).any(axis=-1).mean()) for quarter in quarters]
    assert all(0.005 < share < 0.95 for share in inked[:3]), inked

    printed = tmp_path / 'page.pdf'
    browse(page, tmp_path, f'--print-to-pdf={printed}', '--no-pdf-header-footer')
    assert printed.read_bytes().startswith(b'%PDF') and printed.stat().st_size > 20_000
