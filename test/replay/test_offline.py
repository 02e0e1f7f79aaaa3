"""A replay asks the policy what the node would ask, when it would; its numbers are the analytic ones of policies that are known."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from bag_writing import joint_state, text
from episode_recordings import (
    BEGIN,
    FPS,
    IMAGE,
    INFO,
    ROBOT_TEXT,
    STATE_TOPIC,
    TEXT,
    entries,
    number_of,
    position,
    raw_image,
    record,
    target,
)

from vla_policy_ros.bags.reading import BagError
from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.replay import metrics
from vla_policy_ros.replay.latency import Latency
from vla_policy_ros.replay.metrics import accuracy, continuity, executed, windows_of
from vla_policy_ros.replay.offline import ReplaySettings, Run, replay
from vla_policy_ros.replay.pictures import StalePictures, WorstMoments, ideal_calibration
from vla_policy_ros.replay.reproduce import LiveChunk, foreign, recorded_chunks, reproduce
from vla_policy_ros.robot import parse_robot
from vla_policy_ros.runtime import State
from vla_policy_ros.types import ActionChunk, KnownActions, Observation

ROBOT = parse_robot(ROBOT_TEXT.replace('horizon: 4', 'horizon: 12'))
PERIOD = ROBOT.action.period_ns


def policy(rows: Callable[[float, int], list[float]]) -> Callable[[Observation, KnownActions | None], ActionChunk]:
    """Answers ``rows(step, ahead)`` for each action: the step of the recording that it is for, and how many periods ahead it is."""

    def infer(observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        now = (observation.stamp_ns / 1e9 - BEGIN) * FPS
        actions = np.array([rows(round(now + ahead, 6), ahead) for ahead in range(1, ROBOT.action.horizon + 1)])
        names = ROBOT.action.joints
        return ActionChunk(observation.stamp_ns + PERIOD, PERIOD, names, actions, observation.stamp_ns, observation.instruction)

    return infer


perfect = policy(lambda step, _: target(step))


def replayed(episode: BagEpisode, infer: Callable[..., ActionChunk], latency: float = 0.0, **settings: float) -> Run:
    return replay(episode, infer, ReplaySettings(replan_rate=5.0, latency=Latency((latency,), 'test'), **settings))


def as_recorded(run: Run) -> list[LiveChunk]:
    """The chunks of a replay as those that a live node published."""
    return [LiveChunk(c.input_stamps, c.chunk.instruction, c.chunk.actions, 'w', 's') for c in run.chunks]


@pytest.fixture
def episode(tmp_path: Path) -> BagEpisode:
    return BagEpisode(record(tmp_path / 'bag', entries(40)), ROBOT)


def test_the_node_would_ask_at_its_rate_about_the_newest_pictures(episode: BagEpisode) -> None:
    seen = []

    def look(observation: Observation, chunk: ActionChunk) -> None:
        seen.append((number_of(observation.cameras['top'].rgb), observation.instruction))

    run = replay(episode, perfect, ReplaySettings(replan_rate=5.0), look)
    assert len(run.chunks) == len(seen) == pytest.approx(5 * 3.9, abs=1)
    assert {instruction for _, instruction in seen} == {'pick up the cup'}
    pictures = [number for number, _ in seen]
    assert set(np.diff(pictures[1:]) % 32) == {2}, 'ten pictures a second, five questions, the first at once'
    asked = np.diff([chunk.asked_ns for chunk in run.chunks[1:]])
    assert (asked == 200_000_000).all()
    assert all(chunk.ready_ns == chunk.asked_ns and chunk.outcome == 'planned' for chunk in run.chunks)
    assert [change.state for change in run.states][-1] is State.RUNNING


def test_no_more_than_one_decoded_picture_of_a_camera_is_alive(episode: BagEpisode) -> None:
    pictures: list[weakref.ref[np.ndarray]] = []
    alive = []

    def infer(observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        pictures.append(weakref.ref(observation.cameras['top'].rgb))
        alive.append(sum(picture() is not None for picture in pictures))
        return perfect(observation, known)

    replayed(episode, infer, latency=120.0)
    assert len(pictures) > 15 and max(alive) == 1


def test_recorded_actions_have_no_error_and_no_seam(episode: BagEpisode) -> None:
    run = replayed(episode, perfect)
    found = accuracy(windows_of(run, episode.commands, ROBOT), episode.commands, ROBOT)
    assert found is not None
    np.testing.assert_allclose(found['errors']['policy']['step_mae'], 0.0, atol=1e-9)
    assert found['motion_cosine'] == pytest.approx(1.0)
    assert found['errors']['hold']['mae'] > 0.01 and found['errors']['repeat_last']['mae'] > 0.01
    joined = continuity(run, executed(run, ROBOT), episode.commands, ROBOT)
    assert joined['seams'] == len(run.chunks) - 1 and joined['seam_jump_max'] < 1e-9
    assert joined['aligned_error']['mae'] < 1e-9


def test_pictures_that_a_recorder_compressed_are_those_of_the_robot(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'bag', entries(20, raw=False)), ROBOT)
    seen, pictures = [], StalePictures(episode.recorded_robot)

    def look(camera: str, message: object, is_image: bool) -> None:
        if is_image:
            pictures.add(camera, message)

    def note(observation: Observation, chunk: ActionChunk) -> None:
        seen.append(number_of(observation.cameras['top'].rgb))

    run = replay(episode, perfect, ReplaySettings(), note, look)
    assert len(run.chunks) > 5 and set(np.diff(seen[1:])) == {2} and pictures.seen == {'top': 20}
    live = as_recorded(run)
    assert reproduce(episode, perfect, live).matched == len(live)


def test_a_shift_and_a_swap_have_their_analytic_errors(episode: BagEpisode) -> None:
    shifted = windows_of(replayed(episode, policy(lambda step, _: target(step + 1))), episode.commands, ROBOT)
    found = accuracy(shifted, episode.commands, ROBOT)['errors']['policy']
    np.testing.assert_allclose(list(found['joint_mae'].values()), [0.05, 0.02], atol=1e-9)
    np.testing.assert_allclose(found['step_mae'], 0.035, atol=1e-9)
    np.testing.assert_allclose(found['joint_rmse']['a'], 0.05, atol=1e-9)
    swapped = windows_of(replayed(episode, policy(lambda step, _: target(step)[::-1])), episode.commands, ROBOT)
    steps = [(r.chunk.observation_stamp_ns / 1e9 - BEGIN) * FPS + ahead for r in swapped.chunks for ahead in range(1, 13)]
    expected = np.abs([np.subtract(*target(step)) for step in steps])[swapped.counted.ravel()].mean()
    assert accuracy(swapped, episode.commands, ROBOT)['errors']['policy']['mae'] == pytest.approx(expected, abs=1e-9)


def test_late_answers_starve_and_tear(episode: BagEpisode) -> None:
    worse_ahead = policy(lambda step, ahead: [value + 0.004 * ahead**2 for value in target(step)])
    starved, jumps, chunks = [], [], []
    for latency in (0.0, 100.0, 300.0):
        run = replayed(episode, worse_ahead, latency)
        joined = continuity(run, executed(run, ROBOT), episode.commands, ROBOT)
        starved.append(joined['starved_s'])
        jumps.append(joined['seam_jump_mean'])
        chunks.append(len(run.chunks))
        assert all(chunk.ready_ns - chunk.asked_ns == round(latency * 1e6) for chunk in run.chunks)
    assert starved == sorted(starved) and starved[0] < starved[2]
    assert jumps == sorted(jumps) and jumps[0] < jumps[2]
    assert chunks[2] < chunks[0], 'answers that take longer than a period are fewer'


def test_the_span_that_was_asked_for_and_no_other(episode: BagEpisode) -> None:
    run = replayed(episode, perfect, start_offset=1.0, duration=1.5)
    assert (run.end_ns - run.begin_ns) / 1e9 == pytest.approx(1.5, abs=0.11)
    stamps = [(chunk.chunk.observation_stamp_ns / 1e9 - BEGIN) for chunk in run.chunks]
    assert min(stamps) > 0.9 and max(stamps) < 2.6
    assert run.chunks[0].chunk.instruction == 'pick up the cup', 'said before the span, and still in force'
    with pytest.raises(ValueError, match='no message in the span'):
        replayed(episode, perfect, start_offset=100.0)


def test_a_new_instruction_drops_the_answer_to_the_old_one(tmp_path: Path) -> None:
    said = [*entries(30), (TEXT, 1.42, text('put it back'))]
    run = replayed(BagEpisode(record(tmp_path / 'bag', said), ROBOT), perfect, 150.0)
    instructions = [chunk.chunk.instruction for chunk in run.chunks]
    assert instructions == sorted(instructions) and set(instructions) == {'pick up the cup', 'put it back'}
    assert run.dropped == 1


def test_a_camera_that_goes_dark_is_noticed_as_the_node_would(tmp_path: Path) -> None:
    dark = [entry for entry in entries(48) if not (entry[0] == IMAGE and 2.0 < entry[1] < 4.0)]
    run = replayed(BagEpisode(record(tmp_path / 'bag', dark), ROBOT), perfect)
    states = [state for state, _ in groupby(change.state for change in run.states)]
    assert states[-3:] == [State.RUNNING, State.HOLDING, State.RUNNING]
    holding = next(change for change in run.states if change.state is State.HOLDING)
    assert "camera 'top'" in holding.reason
    assert metrics.health(run)['seconds']['HOLDING'] > 1.0


def test_time_that_goes_back_or_leaps_ahead_is_refused(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'bag', entries(30)), ROBOT)
    forward = episode._clock.at

    class Moved:
        def __init__(self, by_ns: int) -> None:
            self.calls, self.by_ns = 0, by_ns

        def at(self, receive_ns: int) -> int:
            self.calls += 1
            return forward(receive_ns) + (self.by_ns if self.calls > 60 else 0)

    back, ahead = r'time goes back by [4-5]\.\d s, 1\.\d s after its begin', r'time leaps ahead by 4000 s, 1\.\d s after'
    for seconds, words in ((-5, back), (4000, ahead)):
        episode._clock = Moved(seconds * 1_000_000_000)
        with pytest.raises(EpisodeError, match=words):
            replayed(episode, perfect)


def test_a_policy_that_fails_is_a_fault_and_not_a_traceback(episode: BagEpisode) -> None:
    def fails(observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        raise RuntimeError('out of memory')

    run = replayed(episode, fails)
    assert run.chunks == [] and run.states[-1].state is State.FAULT and 'out of memory' in run.states[-1].reason
    assert accuracy(windows_of(run, episode.commands, ROBOT), episode.commands, ROBOT) is None


def test_chunks_that_cannot_be_followed_are_refused_by_name(episode: BagEpisode) -> None:
    run = replayed(episode, policy(lambda step, _: [np.nan, 0.0]))
    assert {chunk.outcome for chunk in run.chunks} == {'NON_FINITE'}
    assert metrics.demands(run, ROBOT)['rejected'] == {'NON_FINITE': len(run.chunks)}
    json.dumps(metrics.demands(run, ROBOT), allow_nan=False)


def test_the_same_question_has_the_same_numbers(episode: BagEpisode) -> None:
    drawn = ReplaySettings(latency=Latency((20.0, 120.0), 'two'), seed=4)
    first, again = (replay(episode, perfect, drawn) for _ in range(2))
    assert [chunk.ready_ns for chunk in first.chunks] == [chunk.ready_ns for chunk in again.chunks]
    other = replay(episode, perfect, ReplaySettings(latency=Latency((20.0, 120.0), 'two'), seed=5))
    assert [chunk.ready_ns for chunk in first.chunks] != [chunk.ready_ns for chunk in other.chunks]


def test_paired_differences_are_those_of_common_observations(episode: BagEpisode) -> None:
    good, bad = (
        windows_of(replayed(episode, one), episode.commands, ROBOT)
        for one in (perfect, policy(lambda step, _: [value + 0.1 for value in target(step)]))
    )
    paired = metrics.paired_difference(good, bad)
    assert paired['mae_difference'] == pytest.approx(0.1) and paired['observations'] == len(good.chunks)
    np.testing.assert_allclose(paired['interval95'], [0.1, 0.1], atol=1e-9)


def test_answers_of_a_live_node_are_asked_for_again(episode: BagEpisode) -> None:
    run = replayed(episode, perfect)
    live = as_recorded(run)
    same = reproduce(episode, perfect, live)
    assert same.recorded == same.matched == len(run.chunks) and same.largest == 0.0
    other = reproduce(episode, policy(lambda step, _: [value + 0.2 for value in target(step)]), live)
    assert other.largest == pytest.approx(0.2)
    moved = [replace(one, input_stamps={**one.input_stamps, 'state': 7}) for one in live]
    assert reproduce(episode, perfect, moved).matched == 0
    assert foreign(live, 'w', 's') == 0 and foreign(live, 'w', 't') == len(live)
    with pytest.raises(BagError, match='no topic of type vla_policy_msgs/msg/ActionChunk'):
        recorded_chunks(episode.path)


def test_an_observation_is_found_although_its_messages_were_recorded_in_another_order(episode: BagEpisode) -> None:
    period = round(1e9 / FPS)
    asked: list[Observation] = []

    def infer(observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        asked.append(observation)
        return perfect(observation, known)

    # The state of the moment before the picture: the recorder had heard a newer one before the picture came.
    live = [
        replace(one, input_stamps={**one.input_stamps, 'state': one.input_stamps['state'] - period})
        for one in as_recorded(replayed(episode, perfect))[1:]
    ]
    made = reproduce(episode, infer, live)
    assert made.recorded == made.matched == len(live) > 5 and made.largest == 0.0
    for observation, chunk in zip(asked, live, strict=True):
        assert observation.state_stamp_ns == chunk.input_stamps['state'] == observation.stamp_ns - period
        step = round((observation.stamp_ns / 1e9 - BEGIN) * FPS)
        np.testing.assert_allclose(observation.state, position(step - 1))
        assert number_of(observation.cameras['top'].rgb) == step % 32 and observation.cameras['top'].K is not None


def test_an_observation_is_not_put_together_from_what_the_node_did_not_see(episode: BagEpisode) -> None:
    live = as_recorded(replayed(episode, perfect))
    told_otherwise = [replace(one, instruction='something else') for one in live]
    of_two_cameras = [replace(one, input_stamps={**one.input_stamps, 'camera:wrist': 7}) for one in live]
    blind = [replace(one, input_stamps={'state': one.input_stamps['state']}) for one in live]
    for chunks in (told_otherwise, of_two_cameras, blind):
        assert reproduce(episode, perfect, chunks).matched == 0


def test_intrinsics_and_the_sentence_may_have_been_recorded_after_the_picture(episode: BagEpisode, tmp_path: Path) -> None:
    live = as_recorded(replayed(episode, perfect))
    late = [(topic, {INFO: 0.03, TEXT: 0.1}.get(topic, 0.0) + at, message) for topic, at, message in entries(40)]
    made = reproduce(BagEpisode(record(tmp_path / 'late', late), ROBOT), perfect, live)
    assert made.recorded == made.matched == len(live) and made.largest == 0.0


def test_what_comes_seconds_late_is_not_waited_for(episode: BagEpisode, tmp_path: Path) -> None:
    live = as_recorded(replayed(episode, perfect))
    first = [entry for entry in entries(40) if entry[0] != STATE_TOPIC or entry[1] > 0.5]
    much_later = [(topic, at + 3.0, message) for topic, at, message in entries(3) if topic == STATE_TOPIC]
    made = reproduce(BagEpisode(record(tmp_path / 'late', [*first, *much_later]), ROBOT), perfect, live)
    assert 0 < made.matched < made.recorded == len(live)


def test_of_two_states_with_one_stamp_the_later_is_taken(tmp_path: Path) -> None:
    played = [*entries(40), *((STATE_TOPIC, 0.002 + at, joint_state([9.0, 9.0], at=BEGIN + at)) for at in np.arange(40) / FPS)]
    episode = BagEpisode(record(tmp_path / 'twice', played), ROBOT)
    seen: list[Observation] = []

    def note(observation: Observation, known: KnownActions | None = None) -> ActionChunk:
        seen.append(observation)
        return perfect(observation, known)

    live = as_recorded(replayed(episode, perfect))
    assert reproduce(episode, note, live).matched == len(live) == len(seen)
    assert all((observation.state == 9.0).all() for observation in seen)


class TestPictures:
    def test_repeated_pictures_are_counted(self, tmp_path: Path) -> None:
        twice = [(t, at, raw_image(round(at * FPS) // 2, BEGIN + at - 0.02) if t == IMAGE else m) for t, at, m in entries(20)]
        episode = BagEpisode(record(tmp_path / 'bag', twice), ROBOT)
        pictures = StalePictures(episode.robot)
        replay(episode, perfect, ReplaySettings(), None, lambda camera, m, is_image: pictures.add(camera, m) if is_image else None)
        assert pictures.seen == {'top': 20} and pictures.stale == {'top': 10}

    def test_the_worst_moments_lie_apart(self, episode: BagEpisode) -> None:
        errors = iter([0.1, 0.9, 0.2, 0.8] * 20)
        worst = WorstMoments(lambda chunk: next(errors))
        replay(episode, perfect, ReplaySettings(replan_rate=10.0), worst)
        times = [moment.time_ns for moment in worst.moments]
        assert 2 <= len(times) <= 6 and min(np.diff(times)) >= 1_000_000_000
        assert all(moment.error == 0.9 and moment.pictures['top'] for moment in worst.moments)

    def test_a_calibration_that_is_too_regular_is_told(self) -> None:
        from episode_recordings import info

        assert 'fx = fy = 50' in str(ideal_calibration(info(0.0)))
        assert ideal_calibration(info(0.0, k=(50.0, 0.0, 30.1, 0.0, 50.4, 23.0, 0.0, 0.0, 1.0))) is None


class TestLatency:
    def test_what_may_be_written(self, tmp_path: Path) -> None:
        assert Latency.parse('120').samples_ms == (120.0,) and Latency.parse('measured').is_measured
        file = tmp_path / 'dist.json'
        file.write_text('{"samples_ms": [10, 20.5]}')
        assert Latency.parse(str(file)).samples_ms == (10.0, 20.5)
        assert Latency.parse('measured').draw_ns(np.random.default_rng(0), 12.5) == 12_500_000

    @pytest.mark.parametrize(
        ('content', 'words'), [('[]', 'list of milliseconds'), ('[1, -2]', '-2'), ('{', 'not JSON'), ('[true]', 'True')]
    )
    def test_what_may_not(self, tmp_path: Path, content: str, words: str) -> None:
        file = tmp_path / 'dist.json'
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            Latency.parse(str(file))
        for wrong in ('soon', '-1', 'nan'):
            with pytest.raises(ValueError, match='neither milliseconds'):
                Latency.parse(wrong)
