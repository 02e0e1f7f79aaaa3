"""A bag becomes what the live node would have seen: its latencies, its gates, its refusals; and says where actions come from."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from bag_writing import controller_state, joint_state, point, text, trajectory
from episode_recordings import (
    BEGIN,
    COMMAND,
    FPS,
    IMAGE,
    INFO,
    REFERENCE,
    ROBOT,
    ROBOT_TEXT,
    STATE_TOPIC,
    TEXT,
    K,
    entries,
    info,
    number_of,
    position,
    raw_image,
    record,
    target,
)

from vla_policy_ros.episodes.bag_episode import BagEpisode
from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.robot import parse_robot


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def test_every_picture_with_its_inputs_is_a_step(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'bag', entries(12)), ROBOT)
    assert [step.stamp_ns for step in episode.steps] == [ns(BEGIN + i / FPS) for i in range(12)]
    assert episode.instructions == ('pick up the cup',)
    seen = list(episode.observations())
    assert [number_of(o.cameras['top'].rgb) for o in seen] == list(range(12))
    np.testing.assert_allclose([o.state for o in seen], [position(i) for i in range(12)])
    np.testing.assert_array_equal(seen[3].cameras['top'].K, np.reshape(K, (3, 3)))
    assert not episode.skipped and not episode.notes and not episode.uncalibrated


def test_a_target_belongs_to_the_time_at_which_it_is_to_be_reached(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'bag', entries(12)), ROBOT)
    times = np.array([ns(BEGIN + i / FPS) for i in (1, 1.5, 12)])
    sampled = episode.commands.sample(times)
    np.testing.assert_allclose(sampled.positions, [target(1), target(1.5), target(12)], atol=1e-9)
    assert episode.commands.source == f'commands on {COMMAND}'


def test_chosen_steps_are_the_same_as_among_all(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'bag', entries(12)), ROBOT)
    chosen = list(episode.observations([2, 7, 11]))
    assert [number_of(o.cameras['top'].rgb) for o in chosen] == [2, 7, 11]
    assert [o.stamp_ns for o in chosen] == [episode.steps[i].stamp_ns for i in (2, 7, 11)]
    with pytest.raises(ValueError, match='0 to 11'):
        list(episode.observations([5, 12]))
    with pytest.raises(ValueError, match='increase'):
        list(episode.observations([5, 5]))


def test_a_state_that_overtakes_the_picture_is_seen_as_the_node_would(tmp_path: Path) -> None:
    late = [(topic, at + (0.095 if topic == IMAGE else 0.0), message) for topic, at, message in entries(6)]
    episode = BagEpisode(record(tmp_path / 'bag', late), ROBOT)
    np.testing.assert_allclose([s.state for s in episode.steps], [position(i + 1) for i in range(5)] + [position(5)])


def test_what_the_node_refuses_is_left_out_and_counted(tmp_path: Path) -> None:
    broken = entries(12)
    broken[1 + 4 * 4] = (STATE_TOPIC, 0.401, joint_state([np.nan, 0.0], at=BEGIN + 0.4))
    broken.append((IMAGE, 0.65, raw_image(30, BEGIN + 0.3)))  # older than the one before
    broken.append((IMAGE, 0.66, raw_image(6, BEGIN + 0.6)))  # again
    broken.append((COMMAND, 0.67, trajectory([point(0.1, [np.inf, 0.0])], at=BEGIN + 0.67)))
    episode = BagEpisode(record(tmp_path / 'bag', broken), ROBOT)
    assert len(episode.steps) == 12
    np.testing.assert_allclose(episode.steps[4].state, position(3))
    told = '\n'.join(episode.skipped)
    assert "position of joint 'a' is nan" in told and 'older than that of the message before' in told
    assert "camera 'top': an image of the same stamp again" in told and 'a position is not finite' in told
    assert np.isfinite(episode.commands.streams[0].positions).all()


def test_a_silent_camera_makes_no_steps_and_a_late_one_is_told(tmp_path: Path) -> None:
    early = [entry for entry in entries(20) if entry[0] != STATE_TOPIC or entry[1] < 0.8]
    episode = BagEpisode(record(tmp_path / 'bag', early), ROBOT)
    assert len(episode.steps) == 9  # the joint state of 0.7 s may be 0.2 s old
    assert any(reason.startswith('no step: joint state') for reason in episode.skipped)


def test_a_step_waits_for_a_new_picture_of_every_camera(tmp_path: Path) -> None:
    robot = parse_robot(ROBOT_TEXT.replace('cameras:', 'cameras:\n  side: {topic: /side}'))
    both = entries(8) + [('/side', i / FPS + 0.06, raw_image(20 + i, BEGIN + i / FPS + 0.01)) for i in range(8) if i != 3]
    episode = BagEpisode(record(tmp_path / 'bag', both), robot)
    assert len(episode.steps) == 7
    pairs = [[number_of(o.cameras[c].rgb) for c in ('top', 'side')] for o in episode.observations()]
    assert pairs == [[i, 20 + i] for i in (0, 1, 2, 4, 5, 6, 7)]
    assert episode.uncalibrated == ('side',)


@pytest.mark.parametrize('raw', [True, False])
def test_either_transport_of_a_picture_will_do(tmp_path: Path, raw: bool) -> None:
    robot = (
        ROBOT if not raw else parse_robot(ROBOT_TEXT.replace('{topic: /top,', '{topic: /top/compressed, transport: compressed,'))
    )
    episode = BagEpisode(record(tmp_path / 'bag', entries(4, raw=raw)), robot)
    assert [number_of(o.cameras['top'].rgb) for o in episode.observations()] == [0, 1, 2, 3]


def test_missing_topics_are_listed_with_the_closest(tmp_path: Path) -> None:
    bag = record(tmp_path / 'bag', [('/joint_state', at, m) if t == STATE_TOPIC else (t, at, m) for t, at, m in entries(3)])
    with pytest.raises(EpisodeError, match=r'joint state: no topic /joint_states; closest: /joint_state\n') as error:
        BagEpisode(bag, ROBOT)
    assert '/top (sensor_msgs/msg/Image)' in str(error.value)


def test_a_topic_of_another_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match='topic /top is of type std_msgs/msg/String, not sensor_msgs/msg/Image'):
        BagEpisode(record(tmp_path / 'bag', [e for e in entries(3) if e[0] != IMAGE] + [(IMAGE, 0.5, text('x'))]), ROBOT)


def test_without_an_instruction_one_must_be_given(tmp_path: Path) -> None:
    bag = record(tmp_path / 'bag', entries(3)[1:])
    with pytest.raises(EpisodeError, match='--instruction'):
        BagEpisode(bag, ROBOT)
    assert BagEpisode(bag, ROBOT, 'wave').instructions == ('wave',)
    with pytest.raises(EpisodeError, match=r'U\+0007'):
        BagEpisode(bag, ROBOT, 'wa\x07ve')


def test_a_given_instruction_stands_above_the_recorded_ones(tmp_path: Path) -> None:
    changing = [*entries(6), (TEXT, 0.25, text('now the bowl'))]
    assert BagEpisode(record(tmp_path / 'a', changing), ROBOT).instructions == ('pick up the cup', 'now the bowl')
    assert BagEpisode(record(tmp_path / 'b', changing), ROBOT, 'wave').instructions == ('wave',)


def test_a_camera_without_recorded_intrinsics_is_uncalibrated_and_one_with_zeros_is_refused(tmp_path: Path) -> None:
    episode = BagEpisode(record(tmp_path / 'a', [entry for entry in entries(3) if entry[0] != INFO]), ROBOT)
    assert episode.uncalibrated == ('top',) and 'uncalibrated: /top/info was not recorded' in episode.notes[0]
    assert next(episode.observations()).cameras['top'].K is None
    with pytest.raises(EpisodeError, match=r'no observation can be made.*K is all zeros: the camera is not calibrated'):
        BagEpisode(record(tmp_path / 'b', entries(3, k=[0.0] * 9)), ROBOT)


def test_intrinsics_of_another_size_end_with_the_step(tmp_path: Path) -> None:
    other = [(t, at, info(at, width=32, height=24)) if t == INFO else (t, at, m) for t, at, m in entries(3)]
    episode = BagEpisode(record(tmp_path / 'bag', other), ROBOT)
    with pytest.raises(EpisodeError, match=r'step 0: .*image is 64x48 but camera_info describes 32x24'):
        next(episode.observations())


def test_without_commands_the_reference_is_taken_and_without_that_what_followed(tmp_path: Path) -> None:
    plain = entries(8, command=False)
    reported = [(REFERENCE, i / FPS + 0.003, controller_state([0.5 * i, 0.0], [9.0, 9.0])) for i in range(8)]
    for index, (_, _, message) in enumerate(reported):
        message.header.stamp.sec, message.header.stamp.nanosec = int(BEGIN), index * 100_000_000
    by_reference = BagEpisode(record(tmp_path / 'a', plain + reported), ROBOT)
    assert by_reference.commands.source == f'reference on {REFERENCE}'
    np.testing.assert_allclose(by_reference.commands.sample(np.array([ns(BEGIN + 0.25)])).positions, [[1.25, 0.0]])
    measured = BagEpisode(record(tmp_path / 'b', plain), ROBOT)
    assert measured.commands.source == f'joint states on {STATE_TOPIC}'
    assert 'the joint states that followed are taken for actions' in measured.notes[0]
    np.testing.assert_allclose(measured.commands.sample(np.array([ns(BEGIN + 0.4)])).positions, [position(4)])


def test_trajectories_of_several_points_are_what_the_controller_makes_of_them(tmp_path: Path) -> None:
    plan = trajectory([point(0.5, [0.5, 0.0], [0.0, 0.0]), point(0.6, [0.5, 0.0], [0.0, 0.0])])
    replaced = trajectory([point(0.2, [0.4, 0.1], [0.0, 0.0]), point(0.3, [0.4, 0.1], [0.0, 0.0])])
    still = [(t, at, joint_state([0.0, 0.0], at=BEGIN + at)) if t == STATE_TOPIC else (t, at, m) for t, at, m in entries(12)]
    commanded = [e for e in still if e[0] != COMMAND] + [(COMMAND, 0.1, plan), (COMMAND, 0.35, replaced)]
    episode = BagEpisode(record(tmp_path / 'bag', commanded), ROBOT)
    assert episode.commands.source == f'commands on {COMMAND} as executed'
    times = np.array([ns(BEGIN + at) for at in (0.1, 0.35, 0.6)])
    positions = episode.commands.sample(times).positions
    np.testing.assert_allclose(positions[0], [0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(positions[1], [0.25, 0.0], atol=0.02)  # half of the way of a cubic, half of its time
    np.testing.assert_allclose(positions[2], [0.4, 0.1], atol=1e-6)


def test_a_recorder_that_was_killed_leaves_an_episode(tmp_path: Path) -> None:
    bag = record(tmp_path / 'bag', entries(200))
    (bag / 'metadata.yaml').unlink()
    data = (bag / 'bag.mcap').read_bytes()
    (bag / 'bag.mcap').write_bytes(data[: len(data) * 2 // 3])
    episode = BagEpisode(bag, ROBOT)
    assert 100 < len(episode.steps) < 150
    assert any('was not finished' in note for note in episode.notes) and any('breaks off' in note for note in episode.notes)
    assert [number_of(o.cameras['top'].rgb) for o in episode.observations([0, 50, 99])] == [0, 50 % 32, 99 % 32]


def test_the_clock_of_the_stamps_counts_where_the_recorder_had_another(tmp_path: Path) -> None:
    from bag_writing import write_bag

    episode = BagEpisode(write_bag(tmp_path / 'bag', entries(6)), ROBOT)  # received years later
    assert len(episode.steps) == 6 and 'from the receive times' in episode.notes[0]


def test_what_is_no_bag_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match='does not exist'):
        BagEpisode(tmp_path / 'none', ROBOT)
    (tmp_path / 'text.mcap').write_text('no records')
    with pytest.raises(EpisodeError, match='begin as an MCAP'):
        BagEpisode(tmp_path / 'text.mcap', ROBOT)


def test_pictures_pass_one_at_a_time(tmp_path: Path) -> None:
    size = {'width': 320, 'height': 240}
    large = [
        (t, at, raw_image(round(at * FPS - 0.2), BEGIN + at - 0.02, **size)) if t == IMAGE else (t, at, m)
        for t, at, m in entries(60)
    ]
    large = [(t, at, info(at, **size)) if t == INFO else (t, at, m) for t, at, m in large]
    episode = BagEpisode(record(tmp_path / 'bag', large), ROBOT)
    tracemalloc.start()
    count = sum(1 for _ in episode.observations())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 60
    # A chunk of the file (1 MB and what follows it), its records, and a handful of pictures of 230 kB; all of them are 14 MB.
    assert peak < 6e6
