"""The simulator with its expert is recorded like a robot: the same topics, steps that are what it was, one seed one recording."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.episodes.sim_recording import SimulatedEpisode, record_simulated
from vla_policy_ros.robot import load_robot
from vla_policy_ros.sim.render_error import RenderError

ROBOT = load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'tabletop.yaml')


@pytest.fixture(scope='module')
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('sim')
    try:
        bags = record_simulated(ROBOT, folder, 'reach', 3, 2, None, lambda _: None)
    except RenderError as error:
        pytest.skip(str(error))
    assert [bag.name for bag in bags] == ['episode_000000', 'episode_000001']
    return folder


def test_a_recording_of_the_simulator_is_an_episode(recorded: Path) -> None:
    bag, simulated = BagEpisode(recorded / 'episode_000000', ROBOT), SimulatedEpisode(ROBOT, 'reach', 3, 0)
    assert len(bag.steps) == len(simulated.steps) == 40 and bag.instructions == simulated.instructions
    np.testing.assert_allclose([s.state for s in bag.steps], [s.state for s in simulated.steps])
    times = np.array([step.stamp_ns for step in simulated.steps]) + ROBOT.action.period_ns
    np.testing.assert_allclose(bag.commands.sample(times).positions, simulated.commands.sample(times).positions)
    for mine, its in zip(bag.observations([0, 30]), simulated.observations([0, 30]), strict=True):
        for name, view in its.cameras.items():
            assert np.abs(mine.cameras[name].rgb.astype(int) - view.rgb).mean() < 2.0
            np.testing.assert_allclose(mine.cameras[name].K, view.K)
    simulated.close()


def test_the_expert_does_it_and_the_arm_follows(recorded: Path) -> None:
    said = json.loads((recorded / 'episode_000001' / 'provenance.json').read_text())
    assert said['recorded']['success'] is True and said['recorded']['task'] == 'reach' and said['robot'] == 'tabletop'
    episode = BagEpisode(recorded / 'episode_000001', ROBOT)
    reached = np.array([step.state for step in episode.steps[1:]])
    wanted = episode.commands.sample(np.array([step.stamp_ns for step in episode.steps[1:]])).positions
    assert np.abs(reached - wanted).max() < 0.05
    first, second = (BagEpisode(recorded / name, ROBOT) for name in ('episode_000000', 'episode_000001'))
    assert np.abs(first.steps[-1].state - second.steps[-1].state).max() > 0.05  # another scene


def test_what_cannot_be_simulated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match="task 'dance' is unknown; choose among reach"):
        record_simulated(ROBOT, tmp_path, 'dance', 0, 1, None, lambda _: None)
    with pytest.raises(EpisodeError, match='seeds not negative'):
        SimulatedEpisode(ROBOT, 'reach', -1, 0)
    other = load_robot(Path(__file__).resolve().parents[2] / 'config' / 'robots' / 'g1_bottle.yaml')
    with pytest.raises(ValueError, match='does not fit the simulated arm'):
        SimulatedEpisode(other, 'reach', 0, 0)
