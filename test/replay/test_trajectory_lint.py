"""Which recorded messages a controller rejects or turns into a step: one promise per test, judged by the emulated controller."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from vla_policy_ros.bags.recording import JointPositions, Received, Recording
from vla_policy_ros.control.jtc import JointTrajectoryController
from vla_policy_ros.control.jtc_rules import ControllerParameters
from vla_policy_ros.control.jtc_trajectory import TrajectoryMessage, TrajectoryPoint
from vla_policy_ros.replay import trajectory_lint
from vla_policy_ros.replay.lint_report import LintReport, TopicReport
from vla_policy_ros.replay.trajectory_lint import lint_recording

MS = 1_000_000
S = 1000 * MS
T0 = 100 * S
JOINTS = ('a', 'b')
JAZZY = ControllerParameters.for_distro('jazzy', JOINTS)
LIMITS = {'a': 1.0, 'b': 1.0}
AT_ZERO = (JointPositions('/joint_states', {'a': 0.0, 'b': 0.0}),)


def point(ms: int, position: float, velocity: float | None = 0.0) -> TrajectoryPoint:
    return TrajectoryPoint(ms * MS, np.full(2, position), np.zeros(0) if velocity is None else np.full(2, velocity))


def message(*points: TrajectoryPoint, stamp_ns: int = 0, joints: tuple[str, ...] = JOINTS) -> TrajectoryMessage:
    return TrajectoryMessage(joints, list(points), stamp_ns)


def smooth(target: float, ms: int = 500) -> TrajectoryMessage:
    return message(point(ms, target), point(ms + 100, target))


def judge(
    messages: Sequence[tuple[int, TrajectoryMessage]],
    parameters: ControllerParameters = JAZZY,
    limits: dict[str, float] = LIMITS,
    states: tuple[JointPositions, ...] = AT_ZERO,
) -> TopicReport:
    """Messages given with their arrival in ms after T0."""
    received = tuple(Received(T0 + ms * MS, item) for ms, item in messages)
    return lint_recording(Recording('/c/joint_trajectory', received, states, (), T0), parameters, limits)


def rules(report: TopicReport, index: int | None = None) -> list[str]:
    return [finding.rule for finding in report.findings if index is None or finding.message == index]


def test_a_smooth_recording_is_clean_and_measured() -> None:
    report = judge([(0, smooth(0.2)), (700, smooth(0.4)), (1400, smooth(0.0, 1000))])
    assert report.findings == () and report.notes == ()
    assert (report.messages, report.accepted, report.rejected) == (3, 3, 0)
    # The cubic from rest to rest over 0.2 rad in 0.5 s peaks at 1.5 times its mean speed, 0.4 rad/s.
    assert report.peaks[0].velocity == pytest.approx(0.6, rel=0.01)
    assert report.peaks[0].step == pytest.approx(0.006, rel=0.01)


def test_a_point_stamped_now_is_rejected_because_it_has_ended_when_it_arrives() -> None:
    report = judge([(0, smooth(0.1)), (300, message(point(0, 0.1), stamp_ns=T0 + 299 * MS))])
    assert rules(report) == ['ENDS_IN_PAST'] and report.rejected == 1
    finding = report.findings[0]
    assert finding.message == 1 and finding.time_s == pytest.approx(0.3) and finding.consequence.startswith('rejected')


def test_a_point_without_lead_time_is_a_step_where_it_takes_over() -> None:
    report = judge([(0, message(point(0, 1.0)))])
    assert {'STEP_TO_FIRST_POINT', 'STEP'} <= set(rules(report))
    step = next(finding for finding in report.findings if finding.rule == 'STEP')
    assert 'a moves 1.0000 in 10 ms (limit 1 per second allows 0.0100)' in step.sentence
    assert 'where it takes over' in step.sentence


def test_points_that_are_too_fast_are_a_step_between_them() -> None:
    report = judge([(0, message(point(200, 0.0), point(300, 0.5), point(500, 0.5)))])
    step = next(finding for finding in report.findings if finding.rule == 'STEP')
    assert 'between its own points' in step.sentence


def test_a_motion_that_goes_on_too_fast_is_no_fault_of_the_seam() -> None:
    def fast(begin: float) -> TrajectoryMessage:
        points = [point(100 * step, begin + 0.2 * step, 2.0) for step in range(1, 5)]
        return message(*points, point(700, begin + 1.0), point(800, begin + 1.0))

    report = judge([(0, fast(0.0)), (300, fast(0.6))])
    assert 'between its own points' in next(item for item in report.findings if item.message == 1).sentence


def test_a_step_belongs_to_the_message_that_made_it() -> None:
    chunk = message(*(point(100 * (index + 1), 0.05 * (index + 1), 0.5) for index in range(5)), point(700, 0.3), point(800, 0.3))
    restart = message(point(0, 0.0), point(100, 0.05), point(200, 0.05))
    report = judge([(0, chunk), (400, restart), (900, smooth(0.1))])
    assert 'STEP' in rules(report, 1)
    assert 'STEP' not in rules(report, 0) and 'STEP' not in rules(report, 2)


@pytest.mark.parametrize(('target', 'found'), [(0.3332, []), (0.34, ['STEP'])])
def test_the_limit_itself_is_allowed(target: float, found: list[str]) -> None:
    # A cubic from rest over 0.5 s peaks at 3 times the distance per second.
    assert rules(judge([(0, smooth(target))])) == found


def test_without_a_limit_steps_are_measured_and_not_judged() -> None:
    report = judge([(0, message(point(0, 1.0), point(100, 1.0)))], limits={})
    assert 'STEP' not in rules(report)
    assert report.peaks[0].step == pytest.approx(1.0) and report.peaks[0].velocity == pytest.approx(100.0)
    assert 'steps of any joint are measured, but not judged' in report.notes[0]


def test_one_joint_without_a_limit_does_not_hide_the_other() -> None:
    step = message(TrajectoryPoint(0, [5.0, 0.5], [0.0, 0.0]), TrajectoryPoint(100 * MS, [5.0, 0.5], [0.0, 0.0]))
    report = judge([(0, step)], limits={'b': 1.0})
    assert 'b moves 0.5000' in next(finding for finding in report.findings if finding.rule == 'STEP').sentence
    assert 'steps of a are measured, but not judged' in report.notes[0]


def test_without_a_state_the_first_point_is_the_start_and_that_is_said() -> None:
    report = judge([(0, message(point(0, 1.0), point(100, 1.0)))], states=())
    assert 'STEP' not in rules(report)
    assert report.start == 'the first point of message 0' and 'cannot be seen' in report.notes[0]


def test_a_state_that_lacks_a_joint_is_not_the_start() -> None:
    states = (JointPositions('/other', {'a': 3.0}), JointPositions('/joint_states', {'a': 0.0, 'b': 0.0, 'c': 1.0}))
    assert judge([(0, smooth(0.1))], states=states).start == '/joint_states'


def test_a_message_that_another_overtakes_within_a_period_was_never_executed() -> None:
    report = judge([(0, smooth(0.1)), (2, smooth(0.1))])
    assert rules(report) == ['OVERWRITTEN'] and report.findings[0].message == 0
    assert judge([(0, smooth(0.1)), (12, smooth(0.1))]).findings == ()


def test_values_that_are_not_finite_are_found_and_the_report_stays_json() -> None:
    report = judge([(0, smooth(0.1)), (700, message(point(100, float('nan')), point(200, 0.2)))])
    assert {'NOT_FINITE', 'NOT_FINITE_COMMAND'} <= set(rules(report, 1))
    assert rules(report, 0) == []
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_huge_values_are_a_step_and_the_report_stays_json() -> None:
    report = judge([(0, message(point(0, 1e308), point(100, -1e308), point(200, -1e308)))])
    assert 'STEP' in rules(report)
    json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_a_message_that_the_controller_cannot_execute_is_told_and_the_rest_is_judged() -> None:
    partial = ControllerParameters.for_distro('jazzy', JOINTS, allow_partial_joints_goal=True)
    wide = TrajectoryMessage(('a', 'a', 'b'), [TrajectoryPoint(100 * MS, [0.1, 0.1, 0.1]), TrajectoryPoint(200 * MS, [0.1] * 3)])
    report = judge([(0, smooth(0.1)), (800, wide), (1600, message(point(0, 5.0), point(100, 5.0)))], partial)
    assert 'UNDEFINED' in rules(report, 1) and 'STEP' in rules(report, 2)


def test_every_message_of_a_recording_is_numbered_and_timed() -> None:
    empty = TrajectoryMessage(JOINTS, [])
    report = judge([(0, empty), (250, empty), (500, smooth(0.1)), (900, empty)])
    assert [(finding.message, finding.rule, round(finding.time_s, 3)) for finding in report.findings] == [
        (0, 'NO_POINTS', 0.0),
        (1, 'NO_POINTS', 0.25),
        (3, 'NO_POINTS', 0.9),
    ]


def test_an_hour_of_silence_costs_nothing_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = 0
    update = JointTrajectoryController.update

    def counting(self: JointTrajectoryController, *args: object) -> object:
        nonlocal updates
        updates += 1
        return update(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(JointTrajectoryController, 'update', counting)
    near = judge([(0, smooth(0.1)), (1000, smooth(0.3))])
    far = judge([(0, smooth(0.1)), (3_600_000, smooth(0.3))])
    assert updates < 500
    for a, b in zip(near.peaks, far.peaks, strict=True):
        assert (a.step, a.acceleration) == pytest.approx((b.step, b.acceleration), rel=1e-6)
    assert far.findings == ()


def test_a_trajectory_without_end_is_followed_for_a_minute_and_that_is_said() -> None:
    report = judge([(0, message(point(10_000_000, 0.1), point(10_000_100, 0.1)))])
    assert 'goes on for 10000 s' in report.notes[0]


def test_only_so_many_updates_are_executed_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_lint, 'MAX_CYCLES', 100)
    report = judge([(0, smooth(0.1, 5000)), (8000, message(point(0, 9.0)))])
    assert 'only the first 100 updates' in report.notes[-1]
    assert 'STEP_TO_FIRST_POINT' in rules(report, 1)


def test_a_clock_that_goes_back_starts_the_controller_anew_where_it_was() -> None:
    report = judge([(50_000, smooth(0.3)), (50_700, smooth(0.3)), (0, smooth(0.4))])
    assert 'goes back by 50.' in report.notes[0]
    assert report.findings == () and report.peaks[0].step == pytest.approx(0.009, rel=0.01)


def test_the_profile_decides() -> None:
    moving = message(point(200, 0.1, 0.2), point(400, 0.15, 0.2))
    assert rules(judge([(0, moving)])) == ['MOVING_END']
    humble = ControllerParameters.for_distro('humble', JOINTS)
    assert 'MOVING_END' not in rules(judge([(0, moving)], humble))


def test_a_stamp_in_the_past_is_late_where_messages_are_blended() -> None:
    late = message(point(0, 0.1), point(500, 0.2), point(600, 0.2), stamp_ns=T0 + 200 * MS)
    rolling = ControllerParameters.for_distro('rolling', JOINTS)
    assert 'PAST_STAMP' in rules(judge([(0, smooth(0.2)), (300, late)], rolling), 1)
    forgetting = ControllerParameters.for_distro('rolling', JOINTS, allow_trajectory_replacement=False)
    assert 'STEP' in rules(judge([(0, smooth(0.2)), (300, late)], forgetting), 1)


def test_a_start_from_the_desired_state_is_what_the_parameter_says() -> None:
    """Jazzy dates the desired state an update early: the first step after a bridged replacement is nearly twice the nominal one."""
    stream = [(100 * index, message(point(100, 0.09 * (index + 1), 0.9), point(400, 0.09 * (index + 2)))) for index in range(6)]
    desired = ControllerParameters.for_distro('jazzy', JOINTS, interpolate_from_desired_state=True)
    nominal = 0.009
    assert judge(stream, desired).peaks[0].step > 1.8 * nominal
    assert judge(stream, JAZZY).peaks[0].step < 1.4 * nominal


def test_text_tells_each_kind_once_with_its_first_messages() -> None:
    empty = TrajectoryMessage(JOINTS, [])
    report = LintReport('bag', 'jazzy', {'goal_time': 0.5}, (judge([(index * 100, empty) for index in range(9)]),))
    lines = list(report.lines())
    assert lines[0] == 'bag for a joint_trajectory_controller of jazzy, goal_time=0.5'
    assert sum(line.strip().startswith('NO_POINTS, 9 of 9 messages: rejected') for line in lines) == 1
    assert sum('message ' in line and 'at 0.' in line for line in lines) == 3
    assert '    and 6 more' in lines and lines[-1] == '9 of 9 messages have findings'
    assert not report.clean


def test_a_clean_report_says_so() -> None:
    report = LintReport('bag', 'jazzy', {}, (judge([(0, smooth(0.1))]),))
    assert report.clean and list(report.lines())[-1] == 'nothing found in 1 messages'
    assert report.to_dict()['topics'][0]['peaks']['a']['velocity_limit'] == 1.0
