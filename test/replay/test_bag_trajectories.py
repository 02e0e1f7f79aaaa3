"""Bags become recordings: topics are found or named, clocks agree, and what is damaged is read as far as it goes and told."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from bag_writing import (
    COMMAND,
    STATE,
    T0,
    S,
    arm_bag,
    clock,
    controller_state,
    joint_state,
    move,
    text,
    write_bag,
)

from vla_policy_ros.replay.bag_trajectories import BagError, read_recordings


@pytest.mark.parametrize('options', [{}, {'sqlite': True}, {'compressed': True}])
def test_every_storage_gives_messages_with_their_receive_times(tmp_path: Path, options: dict[str, bool]) -> None:
    (recording,) = read_recordings(arm_bag(tmp_path / 'bag', 4, **options))
    assert recording.topic == COMMAND and recording.notes == ()
    assert [item.now_ns - T0 for item in recording.messages] == [S // 10 + index * S // 5 for index in range(4)]
    first = recording.messages[0].message
    assert first.joint_names == ('a', 'b') and first.stamp_ns == 0
    assert [point.time_from_start_ns for point in first.points] == [150_000_000, 250_000_000]
    assert first.points[0].positions.tolist() == [0.05, 0.05] and first.points[0].velocities.tolist() == [0.0, 0.0]
    assert recording.begin_ns == T0 + S // 20


def test_a_storage_file_is_a_bag_too(tmp_path: Path) -> None:
    (recording,) = read_recordings(arm_bag(tmp_path / 'bag', 3) / 'bag.mcap')
    assert len(recording.messages) == 3


def test_a_topic_that_is_not_there_is_answered_with_the_closest_and_the_list(tmp_path: Path) -> None:
    bag = arm_bag(tmp_path / 'bag')
    with pytest.raises(BagError, match=f'did you mean {COMMAND}') as error:
        read_recordings(bag, '/arm/joint_trajectory')
    assert '/joint_states (sensor_msgs/msg/JointState)' in str(error.value)


def test_a_topic_of_another_type_is_refused_with_those_that_fit(tmp_path: Path) -> None:
    with pytest.raises(BagError, match=r'is of type sensor_msgs/msg/JointState, not trajectory_msgs.*it has /arm_controller'):
        read_recordings(arm_bag(tmp_path / 'bag'), '/joint_states')


def test_a_bag_without_trajectories_lists_what_it_has(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', [('/chatter', 0.0, text('hello'))])
    with pytest.raises(BagError, match=r'no topic of type trajectory_msgs/msg/JointTrajectory; it has /chatter'):
        read_recordings(bag)


def test_a_topic_without_messages_is_refused(tmp_path: Path) -> None:
    silent = [(COMMAND, 'trajectory_msgs/msg/JointTrajectory')]
    bag = write_bag(tmp_path / 'bag', [('/joint_states', 0.0, joint_state([0.0, 0.0]))], silent=silent)
    with pytest.raises(BagError, match=f'holds no message on {COMMAND}'):
        read_recordings(bag)


@pytest.mark.parametrize('make', ['nothing', 'empty folder', 'text file', 'empty file'])
def test_what_is_no_bag_is_refused_in_a_sentence(tmp_path: Path, make: str) -> None:
    path = tmp_path / ('bag' if make in ('nothing', 'empty folder') else 'bag.mcap')
    if make == 'empty folder':
        path.mkdir()
    elif make != 'nothing':
        path.write_text('these are no records' if make == 'text file' else '')
    with pytest.raises(BagError, match=r'does not exist|no \.mcap|begin as an MCAP'):
        read_recordings(path)


def test_all_command_topics_are_read_unless_the_robot_names_some(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', [('/left/joint_trajectory', 0.0, move(0.1)), ('/right/joint_trajectory', 0.1, move(0.1))])
    assert [recording.topic for recording in read_recordings(bag)] == ['/left/joint_trajectory', '/right/joint_trajectory']
    preferred = ['/right/joint_trajectory', '/gripper/joint_trajectory']
    assert [recording.topic for recording in read_recordings(bag, preferred=preferred)] == ['/right/joint_trajectory']
    with pytest.raises(BagError, match='--topic: /left/joint_trajectory, /right/joint_trajectory'):
        read_recordings(bag, preferred=['/gripper/joint_trajectory'])


def test_the_controllers_reference_comes_before_the_joint_states_and_before_the_first_message(tmp_path: Path) -> None:
    entries = [
        ('/joint_states', 0.0, joint_state([9.0, 9.0])),
        (STATE, 0.0, controller_state([8.0, 8.0], [7.0, 7.0], ('b', 'a'))),
        ('/joint_states', 0.1, joint_state([0.1, 0.2])),
        (STATE, 0.1, controller_state([0.3, 0.4], [7.0, 7.0], ('b', 'a'))),
        (COMMAND, 0.2, move(1.0)),
        (STATE, 0.3, controller_state([5.0, 5.0], [7.0, 7.0], ('b', 'a'))),
    ]
    (recording,) = read_recordings(write_bag(tmp_path / 'bag', entries))
    assert [state.source for state in recording.states] == [STATE, '/joint_states']
    assert recording.states[0].positions == {'b': 0.3, 'a': 0.4}
    assert recording.states[1].positions == {'a': 0.1, 'b': 0.2}
    assert recording.controller_joints == ('b', 'a')


def test_a_state_after_the_first_message_is_better_than_none(tmp_path: Path) -> None:
    entries = [
        (COMMAND, 0.0, move(1.0)),
        ('/joint_states', 0.1, joint_state([0.1, 0.2])),
        ('/joint_states', 0.2, joint_state([3, 3])),
    ]
    (recording,) = read_recordings(write_bag(tmp_path / 'bag', entries))
    assert recording.states[0].positions == {'a': 0.1, 'b': 0.2}


def test_receive_times_are_brought_onto_the_recorded_clock(tmp_path: Path) -> None:
    # Simulated time runs at half the pace of the recorder's clock.
    entries = [('/clock', time, clock(5.0 + time / 2)) for time in (0.0, 1.0, 2.0)]
    entries += [(COMMAND, 0.5, move(1.0)), (COMMAND, 1.5, move(1.0)), (COMMAND, 2.5, move(1.0))]
    (recording,) = read_recordings(write_bag(tmp_path / 'bag', sorted(entries, key=lambda entry: entry[1])))
    assert [item.now_ns / S for item in recording.messages] == pytest.approx([5.25, 5.75, 6.5])
    assert '/clock' in recording.notes[0]


def test_receive_times_are_brought_onto_the_clock_of_the_states_where_that_is_another(tmp_path: Path) -> None:
    entries = [('/joint_states', time / 10, joint_state([0.0, 0.0], at=30.0 + time / 10)) for time in range(10)]
    entries.append((COMMAND, 0.95, move(1.0)))
    (recording,) = read_recordings(write_bag(tmp_path / 'bag', entries))
    assert recording.messages[0].now_ns / S == pytest.approx(30.95)
    assert 'from the receive times' in recording.notes[0]


def test_receive_times_stay_where_states_are_merely_late(tmp_path: Path) -> None:
    entries = [('/joint_states', 0.3, joint_state([0.0, 0.0], at=T0 / S)), (COMMAND, 0.4, move(1.0))]
    (recording,) = read_recordings(write_bag(tmp_path / 'bag', entries))
    assert recording.messages[0].now_ns == T0 + 4 * S // 10
    assert recording.notes == ()


def test_a_recorder_that_was_killed_before_it_wrote_metadata_loses_nothing(tmp_path: Path) -> None:
    bag = arm_bag(tmp_path / 'bag', 5)
    (bag / 'metadata.yaml').unlink()
    (recording,) = read_recordings(bag)
    assert len(recording.messages) == 5
    assert 'was not finished' in recording.notes[0]


def test_a_file_that_breaks_off_is_read_up_to_there(tmp_path: Path) -> None:
    bag = arm_bag(tmp_path / 'bag', 20)
    data = (bag / 'bag.mcap').read_bytes()
    (bag / 'bag.mcap').write_bytes(data[: data.rindex(COMMAND.encode()) * 2 // 3])
    (recording,) = read_recordings(bag)
    assert 0 < len(recording.messages) < 20
    assert [item.now_ns - T0 for item in recording.messages] == [S // 10 + i * S // 5 for i in range(len(recording.messages))]
    assert any('is read for' in note for note in recording.notes)
    assert any('breaks off' in note for note in recording.notes)


def test_a_database_that_breaks_off_is_read_up_to_there(tmp_path: Path) -> None:
    bag = arm_bag(tmp_path / 'bag', 300, sqlite=True)
    data = (bag / 'bag.db3').read_bytes()
    (bag / 'bag.db3').write_bytes(data[: len(data) // 2])
    (recording,) = read_recordings(bag)
    assert 50 < len(recording.messages) < 250
    assert recording.messages[0].now_ns == T0 + S // 10
    assert any(f'{COMMAND} of bag.db3 is read for {len(recording.messages)} messages' in note for note in recording.notes)


def test_a_damaged_page_of_a_database_costs_only_what_lies_on_it(tmp_path: Path) -> None:
    bag = arm_bag(tmp_path / 'bag', 300, sqlite=True)
    data = bytearray((bag / 'bag.db3').read_bytes())
    page = data.index(struct.pack('<dd', 0.05 * 150, 0.05 * 150)) // 4096 * 4096
    data[page : page + 4096] = bytes(4096)
    (bag / 'bag.db3').write_bytes(data)
    (recording,) = read_recordings(bag)
    assert 280 < len(recording.messages) < 300
    assert recording.messages[0].now_ns == T0 + S // 10
    assert recording.messages[-1].now_ns == T0 + S // 10 + 299 * S // 5


def test_a_chunk_that_does_not_decompress_costs_only_itself(tmp_path: Path) -> None:
    noise = ''.join(chr(33 + index * 7919 % 90) for index in range(1_100_000))
    entries = [(COMMAND, 0.0, move(0.1)), ('/chatter', 0.1, text(noise)), (COMMAND, 0.2, move(0.2)), ('/chatter', 0.3, text(noise))]
    bag = write_bag(tmp_path / 'bag', [*entries, (COMMAND, 0.4, move(0.3))], compressed=True)
    file = bag / 'bag.mcap'
    data = bytearray(file.read_bytes())
    starts = [index for index in range(len(data) - 4) if data[index : index + 4] == b'\x28\xb5\x2f\xfd']
    assert len(starts) == 3, 'one zstd frame per chunk'
    data[starts[1] : starts[1] + 4] = b'\0\0\0\0'
    file.write_bytes(data)
    (recording,) = read_recordings(bag)
    assert [round((item.now_ns - T0) / S, 1) for item in recording.messages] == [0.0, 0.4]
    assert any('is left out' in note for note in recording.notes)


def test_a_message_that_cannot_be_decoded_is_counted(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', [(COMMAND, index / 10, move(0.1)) for index in range(5)])
    file = bag / 'bag.mcap'
    # The length of joint_names of the last message, just before its first name.
    data = bytearray(file.read_bytes())
    place = data.rindex(b'\x02\0\0\0\x02\0\0\0a\0')
    data[place] = 0xFF
    file.write_bytes(data)
    (recording,) = read_recordings(bag)
    assert len(recording.messages) == 4
    assert any(f'1 messages of {COMMAND} cannot be decoded' in note for note in recording.notes)
