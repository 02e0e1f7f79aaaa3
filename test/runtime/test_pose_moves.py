"""The robot can be sent to its poses, and parked when it is stopped; the policy waits meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_runtime
from test_runtime import MS, Bench

from vla_policy_ros.control.check import violation
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.robot import Robot
from vla_policy_ros.runtime import State
from vla_policy_ros.types import JointTrajectory

HOME, PARK = {'a': -0.6, 'b': 0.4}, {'a': 0.8}


class Mover(Bench):
    """A bench that notes moves apart from what the policy sends, and warnings."""

    def __init__(self, policy: str = 'brake', **arguments: Any) -> None:
        super().__init__(**arguments)
        self.moves: list[JointTrajectory] = []
        self.warnings: list[str] = []
        self.recorder.on_warning = self.warnings.append  # type: ignore[method-assign]

        def on_move(trajectory: JointTrajectory, *, actuate: bool) -> None:
            self.moves.append(trajectory)
            self.recorder.on_trajectory(trajectory, actuate=actuate)

        self.recorder.on_move = on_move  # type: ignore[attr-defined]
        self.runtime.settings = replace(self.runtime.settings, stop_policy=policy)

    def rest(self) -> np.ndarray:
        """Where the robot is once all has come to rest."""
        self.run(self.runtime.commanded_until(self.now) + 0.1)
        assert self.runtime.commanded_until(self.now) == 0.0
        return self.commanded(self.now)


@pytest.fixture(autouse=True)
def _with_poses(monkeypatch: pytest.MonkeyPatch) -> None:
    data = test_runtime.ROBOT.model_dump() | {'home': HOME, 'park': PARK}
    monkeypatch.setattr(test_runtime, 'ROBOT', Robot.model_validate(data))
    monkeypatch.setattr(Bench, 'stamp', 'start')


def test_a_running_robot_goes_home_in_one_trajectory_within_limits_and_waits_for_a_reset():
    bench = Mover().running()
    assert bench.runtime.move('home', bench.now) == ''
    assert bench.runtime.state is State.STOPPED and bench.runtime.reason == 'sent to home; call ~/reset to go on'
    sent = len(bench.recorder.trajectories)
    limits = JointLimits.from_robot(test_runtime.ROBOT)
    assert len(bench.moves) == 1 and violation(bench.moves[0], limits) is None
    np.testing.assert_allclose(bench.rest(), [-0.6, 0.4], atol=2e-3)
    assert len(bench.recorder.trajectories) == sent, 'the policy is silent, also an answer that was on its way'
    assert bench.runtime.reset(bench.now) == ''
    bench.run(1.0)
    assert bench.runtime.state is State.RUNNING and len(bench.recorder.trajectories) > sent


def test_a_reset_while_it_is_under_way_is_refused_and_a_stop_brakes_it():
    bench = Mover().running()
    bench.runtime.move('home', bench.now)
    bench.run(0.4)
    assert 'sent to home and not there yet' in bench.runtime.reset(bench.now)
    assert bench.runtime.state is State.STOPPED
    bench.runtime.stop(bench.now, 'operator')
    assert len(bench.moves) == 1 and bench.runtime.commanded_until(bench.now) < 0.8
    assert np.abs(bench.rest() - [-0.6, 0.4]).max() > 0.1
    assert bench.runtime.reset(bench.now) == ''


def test_a_robot_that_has_not_moved_yet_goes_home_from_where_it_is_measured():
    bench = Mover()
    bench.feed()
    bench.runtime.activate(bench.now)
    assert bench.runtime.state is State.WAITING
    assert bench.runtime.move('home', bench.now) == ''
    np.testing.assert_allclose(bench.moves[0].positions[0], [0.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(bench.rest(), [-0.6, 0.4], atol=1e-6)


def test_joints_that_the_pose_leaves_out_stay():
    bench = Mover()
    bench.measured = None
    bench.feed()
    bench.runtime.activate(bench.now)
    assert bench.runtime.move('park', bench.now) == ''
    np.testing.assert_allclose(bench.rest(), [0.8, 0.0], atol=1e-6)


def test_a_lost_camera_does_not_end_a_move():
    bench = Mover().running()
    bench.runtime.move('home', bench.now)
    bench.camera_on = False
    np.testing.assert_allclose(bench.rest(), [-0.6, 0.4], atol=2e-3)


def test_a_robot_that_is_blocked_on_its_way_is_stopped():
    bench = Mover().running()
    held = bench.commanded(bench.now)
    bench.runtime.move('home', bench.now)
    bench.measured = lambda _: held
    bench.run(3.0)
    assert bench.runtime.state is State.STOPPED and 'from where it was commanded' in bench.runtime.reason
    assert 'has not come to its end' in bench.runtime.move('home', bench.now)
    bench.run(bench.runtime.commanded_until(bench.now) + 0.1)
    assert bench.runtime.move('home', bench.now) == ''
    np.testing.assert_allclose(bench.moves[-1].positions[0], held, atol=1e-9)


@pytest.mark.parametrize('how', ['stop', 'deactivate'])
def test_the_stop_policy_decides_between_braking_and_parking(how: str):
    for policy, parked in (('brake', False), ('park', True)):
        bench = Mover(policy).running()
        if how == 'stop':
            bench.runtime.stop(bench.now, 'operator')
        else:
            bench.runtime.deactivate(bench.now)
        assert len(bench.moves) == parked
        assert bool(abs(bench.rest()[0] - 0.8) < 2e-3) is parked


def test_deactivation_lets_a_parking_robot_park_and_the_end_of_the_node_brakes_it():
    bench = Mover('park').running()
    bench.runtime.stop(bench.now, 'operator')
    bench.run(0.3)
    sent = len(bench.recorder.trajectories)
    bench.runtime.deactivate(bench.now)
    assert len(bench.recorder.trajectories) == sent
    assert bench.rest()[0] == pytest.approx(0.8, abs=2e-3)
    bench = Mover('park').running()
    bench.runtime.deactivate(bench.now, only_brake=True)
    assert bench.moves == [] and bench.runtime.commanded_until(bench.now) < 0.8


def test_a_robot_that_does_not_follow_is_not_parked():
    bench = Mover('park').running()
    held = bench.commanded(bench.now)
    bench.answer = lambda o: bench.chunk(o, o.state + np.linspace(0.1, 0.9, 10)[:, None] * np.array([0.9, -0.9]))
    bench.measured = lambda _: held - 0.35
    bench.run(0.5)
    assert bench.runtime.state is State.STOPPED and 'from where it was commanded' in bench.runtime.reason
    bench.runtime.stop(bench.now, 'operator')
    bench.runtime.deactivate(bench.now)
    assert bench.moves == []


def test_what_stands_against_a_move_is_said_and_changes_nothing():
    bench = Mover()
    bench.feed()
    assert 'not active' in bench.runtime.move('home', bench.now)
    bench.runtime.activate(bench.now)
    bench.now += 900 * MS
    assert 'its joint state is 0.9 s old; check topic /joint_states' in bench.runtime.move('home', bench.now)
    assert bench.moves == [] and bench.runtime.state is State.WAITING


def test_in_dry_run_a_move_is_shown_and_not_sent():
    bench = Mover(dry_run=True).running()
    assert 'dry run' in bench.runtime.move('home', bench.now)
    assert len(bench.moves) == 1 and not bench.recorder.trajectories[-1][1]
    assert bench.runtime.state is State.RUNNING


def test_a_pose_outside_of_the_limits_is_refused_with_the_robot_file():
    data = test_runtime.ROBOT.model_dump()
    with pytest.raises(ValueError, match=r"home: 1.5 of joint 'a' is outside its limits \[-1, 1\]"):
        Robot.model_validate(data | {'home': {'a': 1.5}})
    with pytest.raises(ValueError, match="park: 'c' is not known"):
        Robot.model_validate(data | {'park': {'c': 0.5}})
