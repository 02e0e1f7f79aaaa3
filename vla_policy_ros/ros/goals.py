"""Moves as goals of a controller's FollowJointTrajectory action, which tells how they ended. For one-shot moves only.

control_msgs is looked for when a robot file names an action, because it is not installed everywhere. A goal is left behind as soon
as a trajectory goes to the controller's topic: that replaces the motion, and the answer is then about another one.

Runs on the thread of the node's executor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.action import ActionClient
from rclpy.node import Node
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg


class GoalSender:
    """Sends trajectories to one controller's action.

    Args:
        node: owns the action client.
        name: of the controller, for sentences.
        action: its name.
        tell: takes a sentence for the operator about a goal that did not end well.

    Raises:
        ValueError: control_msgs is not installed.
    """

    def __init__(self, node: Node, name: str, action: str, tell: Callable[[str], None]) -> None:
        try:
            from control_msgs.action import FollowJointTrajectory
        except ImportError as error:
            raise ValueError(
                f'controllers.{name}.action needs the package control_msgs, which is not installed here: install it, or remove '
                'action from the robot file, so that moves go to the topic'
            ) from error
        self._kind: Any = FollowJointTrajectory
        self._name, self._action, self._tell = name, action, tell
        self._client = ActionClient(node, FollowJointTrajectory, action)
        self._current: Any = None

    def send(self, trajectory: JointTrajectoryMsg) -> bool:
        """Send ``trajectory`` as a goal, without waiting. False where nobody serves the action, which the operator is told."""
        if not self._client.server_is_ready():
            self._tell(
                f'controller {self._name!r}: nobody serves the action {self._action}, so the move goes to its topic; '
                'is that the name of the action, and is the controller active?'
            )
            return False
        future = self._client.send_goal_async(self._kind.Goal(trajectory=trajectory))
        self._current = future
        future.add_done_callback(self._on_answer)
        return True

    def leave(self) -> None:
        """A trajectory has gone to the topic: what becomes of the goal says nothing any more."""
        self._current = None

    def close(self) -> None:
        """Destroy the action client."""
        self._current = None
        self._client.destroy()

    def _on_answer(self, future: Any) -> None:
        if future is not self._current:
            return
        handle = future.result()
        if not handle.accepted:
            self._current = None
            self._tell(f'controller {self._name!r} refused the move as a goal of {self._action}: its log says why')
            return
        self._current = handle.get_result_async()
        self._current.add_done_callback(self._on_result)

    def _on_result(self, future: Any) -> None:
        if future is not self._current:
            return
        self._current = None
        result = future.result().result
        if result.error_code != self._kind.Result.SUCCESSFUL:
            reason = result.error_string or 'no reason given'
            self._tell(f'controller {self._name!r} did not finish the move: error {result.error_code}, {reason}')
