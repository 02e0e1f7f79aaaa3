"""`vla-policy dataset` says in a sentence what is wrong and ends with a code; and finds recordings in folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from episode_recordings import IMAGE, ROBOT, ROBOT_TEXT, entries, raw_image, record

from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.episodes.sources import find_episodes, is_bag


def dataset(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / 'robot.yaml').write_text(ROBOT_TEXT)
    command = [sys.executable, '-m', 'vla_policy_ros.cli', 'dataset', '--robot', 'robot.yaml', *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_recording_is_looked_at_and_converted(tmp_path: Path) -> None:
    record(tmp_path / 'bag', entries(5))
    looked = dataset(tmp_path, 'bag', '--json', '-')
    assert looked.returncode == 0 and json.loads(looked.stdout)['episodes'][0]['quality']['steps'] == 5
    made = dataset(tmp_path, 'bag', 'd')
    assert made.returncode == 0 and 'actions: commands on /arm/joint_trajectory' in made.stdout
    again = dataset(tmp_path, 'd', 'back')
    assert again.returncode == 0 and is_bag(tmp_path / 'back' / 'episode_000000')
    assert dataset(tmp_path, 'd', 'copy', '--to', 'lerobot').returncode == 0


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['none'], 'none does not exist'),
        (['robot.yaml'], 'robot.yaml holds no recording'),
        (['bag', 'd', '--to', 'csv'], "'csv' cannot be written; write lerobot or bag"),
        (['bag', 'd', '--codec', 'gif'], "codec 'gif' cannot be encoded here"),
        (['bag', 'd', '--episode', '3'], 'has no bag 3; it has 1, from 0 (bag)'),
        (['bag', 'bag'], 'is there already'),
        (['damaged', 'd'], '--skip-damaged'),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(tmp_path: Path, arguments: list[str], says: str) -> None:
    record(tmp_path / 'bag', entries(3))
    record(
        tmp_path / 'damaged', [(t, at, raw_image(1, at + 100, width=8)) if t == IMAGE else (t, at, m) for t, at, m in entries(3)]
    )
    answer = dataset(tmp_path, *arguments)
    assert answer.returncode == 2 and says in answer.stderr and 'Traceback' not in answer.stderr
    assert not (tmp_path / 'd').exists() and not (tmp_path / 'd.partial').exists()


def test_something_left_out_ends_with_1(tmp_path: Path) -> None:
    record(tmp_path / 'bags' / 'a', entries(3))
    (tmp_path / 'bags' / 'b.mcap').write_text('no bag')
    answer = dataset(tmp_path, 'bags', 'd', '--skip-damaged')
    assert answer.returncode == 1 and 'left out' in answer.stdout and 'does not begin as an MCAP file' in answer.stdout


def test_bags_are_found_one_by_one_or_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / 'bags'
    for name in ('b', 'a'):
        record(folder / name, entries(2))
    assert [source.name for source in find_episodes(folder, ROBOT)] == ['a', 'b']
    assert [source.name for source in find_episodes(folder, ROBOT, only=[1])] == ['b']
    assert [source.name for source in find_episodes(folder / 'a' / 'a.mcap', ROBOT)] == ['a.mcap']
    (folder / 'a' / 'metadata.yaml').unlink()
    assert is_bag(folder / 'a') and not is_bag(folder)
    (folder / 'loose').mkdir()
    for name in ('x', 'y'):
        (folder / 'loose' / f'{name}.mcap').write_bytes((folder / 'a' / 'a.mcap').read_bytes())
    assert [source.name for source in find_episodes(folder / 'loose', ROBOT)] == ['x.mcap', 'y.mcap']
    with pytest.raises(EpisodeError, match='holds no recording'):
        (tmp_path / 'empty').mkdir()
        find_episodes(tmp_path / 'empty', ROBOT)


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    command = "app(['dataset', 'bag', '--robot', 'tabletop'])"
    code = f"import sys; sys.modules['pyarrow'] = None; from vla_policy_ros.cli import app; {command}"
    answer = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 2 and 'pip install -r requirements/training.txt' in answer.stderr
    assert 'Traceback' not in answer.stderr
