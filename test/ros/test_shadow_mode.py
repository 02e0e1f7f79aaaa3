"""The node in dry run beside something else that moves the robot: /diagnostics says how far its chunks are from that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy')

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from episode_recordings import REFERENCE, ROBOT  # noqa: E402
from fake_robot import FakeRobot  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402

from vla_policy_ros.policy import new_checkpoint  # noqa: E402
from vla_policy_ros.ros import qos  # noqa: E402
from vla_policy_ros.ros.messages import to_time  # noqa: E402

pytestmark = pytest.mark.dds

OFFSET = np.array([0.3, -0.4])


def test_the_rolling_error_is_told_in_diagnostics_and_nothing_is_sent(ros_domain: int, tmp_path: Path) -> None:
    robot = FakeRobot(ROBOT)
    try:
        rows: list[DiagnosticStatus] = []

        def remember(message: DiagnosticArray) -> None:
            rows.extend(row for row in message.status if row.name.endswith(': shadow'))

        robot.node.create_subscription(DiagnosticArray, '/diagnostics', remember, qos.REPORT)
        checkpoint = new_checkpoint(ROBOT, 'tiny', tmp_path / 'checkpoint')
        node = robot.start_policy(tmp_path, checkpoint, dry_run=True, check_controllers='skip', replan_rate=10.0)
        # The policy says where the robot is, plus an offset: the error is the offset, and standing still has none.
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        infer = node.runtime._infer

        def offset(observation, known):  # type: ignore[no-untyped-def]
            made = infer(observation, known)
            made.actions[:] = robot.positions + OFFSET
            return made

        node.runtime._infer = offset
        robot.instruct()
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        robot.spin_until(lambda: rows)
        row = rows[-1]
        values = {pair.key: pair.value for pair in row.values}
        assert values['compared_with'] == 'the measured positions'
        assert float(values['rmse']) == pytest.approx(np.sqrt(np.mean(OFFSET**2)), abs=1e-6)
        assert float(values['hold_rmse']) == 0.0 and values['worst_joint'] == 'b'
        assert row.level == DiagnosticStatus.WARN and row.message.startswith('worse than standing still')
        assert robot.statuses[-1].trajectories_published == 0

        # What the controller says it commands counts more than what is measured.
        states = robot.node.create_publisher(JointState, REFERENCE, qos.STATE)

        def report() -> None:
            message = JointState(name=['a', 'b'], position=(robot.positions + OFFSET).tolist())
            message.header.stamp = to_time(robot.node.get_clock().now().nanoseconds)
            states.publish(message)

        from vla_policy_ros.ros.inputs import controller_state_type

        if controller_state_type() is not JointState:
            pytest.skip('control_msgs is installed: the controller state has another type than this test publishes')
        robot.node.create_timer(0.02, report)
        seen = len(rows)
        robot.spin_until(lambda: any('controllers' in row.message for row in rows[seen:]))
        values = {pair.key: pair.value for pair in rows[-1].values}
        assert float(values['rmse']) == pytest.approx(0.0, abs=1e-6)
    finally:
        robot.close()
