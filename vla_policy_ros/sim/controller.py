"""The robot around the world: controllers that turn trajectories into drive commands, and an exact record of what they
commanded.

`SimulatedRobot` owns a `TabletopWorld` and one joint_trajectory_controller emulator per controller of the robot file. Each
`tick` is one cycle of the controller manager: update the controllers, hand their command to the drives, step the physics by
the period. Time is simulated and never goes back, also when a new scene is laid out.

Enters: a robot file, trajectory messages, an instruction. Leaves: joint states, controller references, camera views and a
report. One thread (see `world`). Units rad, m, s; stamps in ns of simulated time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.control.jtc import Acceptance, Command, ControllerParameters, JointTrajectoryController, TrajectoryMessage
from vla_policy_ros.robot import Robot
from vla_policy_ros.sim.dataset import RobotMismatch, check_robot, has_gripper
from vla_policy_ros.sim.instructions import Target, parse_instruction
from vla_policy_ros.sim.mjcf import FINGER_JOINTS, TIMESTEP
from vla_policy_ros.sim.scene import Scene, sample_scene
from vla_policy_ros.sim.tasks import Episode, Task
from vla_policy_ros.sim.world import TabletopWorld
from vla_policy_ros.types import NS_PER_S, CameraView

# Zero is "no time yet" in ROS, so the first stamp must be later.
START_NS = NS_PER_S

_REST_SPEED = 1e-3
_CLEAR_OF_TOOL = 0.10
# A controller that starts from its last command dates it one cycle early, so the cycle after a replacement steps about twice
# as far as the one before it. The record of how the arm comes to rest begins after that.
_BRIDGE_TICKS = 3


class CommandRecord:
    """Largest steps, velocities and accelerations of the commanded positions, from tick to tick.

    Args:
        positions: commanded positions ``[J]`` to start from, at rest.
        velocity_limit, acceleration_limit: float64 ``[J]``.
        period: time between ticks, s.
    """

    def __init__(
        self,
        positions: NDArray[np.float64],
        velocity_limit: NDArray[np.float64],
        acceleration_limit: NDArray[np.float64],
        period: float,
    ) -> None:
        self.velocity_limit, self.acceleration_limit, self.period = velocity_limit, acceleration_limit, period
        self.ticks = 0
        self.max_step = np.zeros_like(positions)
        self.max_acceleration = np.zeros_like(positions)
        self.restart(positions)
        self.trajectory_arrived()

    def restart(self, positions: NDArray[np.float64]) -> None:
        """Go on from ``positions [J]`` at rest, without counting the way there as a step."""
        self._last = positions.copy()
        self._velocity = np.zeros_like(positions)

    def trajectory_arrived(self) -> None:
        """A trajectory was accepted: what follows is its execution until the next one."""
        self._ticks_since = 0
        self._moved_until = 0
        self._tail_acceleration = np.zeros_like(self._last)

    def add(self, positions: NDArray[np.float64]) -> None:
        """One tick commanded ``positions [J]``."""
        step = positions - self._last
        velocity = step / self.period
        acceleration = np.abs(velocity - self._velocity) / self.period
        self.ticks += 1
        self._ticks_since += 1
        self.max_step = np.maximum(self.max_step, np.abs(step))
        self.max_acceleration = np.maximum(self.max_acceleration, acceleration)
        if self._ticks_since > _BRIDGE_TICKS:
            self._tail_acceleration = np.maximum(self._tail_acceleration, acceleration)
        if np.abs(velocity).max() > _REST_SPEED:
            self._moved_until = self._ticks_since
        self._last, self._velocity = positions.copy(), velocity

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The record as plain numbers; ratios are to the limits of the robot file, and at most 1 when they are kept.

        A finger's numbers are in m; ``max_step_rad`` leaves it out.
        """
        turning = [i for i, name in enumerate(names) if name not in FINGER_JOINTS]
        joints = {
            name: {
                'max_step': float(self.max_step[i]),
                'max_velocity': float(self.max_step[i] / self.period),
                'velocity_limit': float(self.velocity_limit[i]),
                'max_acceleration': float(self.max_acceleration[i]),
                'acceleration_limit': float(self.acceleration_limit[i]),
            }
            for i, name in enumerate(names)
        }
        return {
            'ticks': self.ticks,
            'period_s': self.period,
            'max_step_rad': float(self.max_step[turning].max()),
            'max_step_ratio': float((self.max_step / (self.velocity_limit * self.period)).max()),
            'joints': joints,
        }

    def report_since_trajectory(self) -> dict[str, Any]:
        """How the last accepted trajectory is being executed; after its sender died, how the arm came to rest.

        Accelerations count from the fourth tick on, see `_BRIDGE_TICKS`.
        """
        return {
            'elapsed_s': self._ticks_since * self.period,
            'max_acceleration': float(self._tail_acceleration.max()),
            'max_acceleration_ratio': float((self._tail_acceleration / self.acceleration_limit).max()),
            'speed': float(np.abs(self._velocity).max()),
            'at_rest': bool(np.abs(self._velocity).max() <= _REST_SPEED),
            'moved_for_s': self._moved_until * self.period,
        }


class SimulatedRobot:
    """The simulated arm behind the interfaces that a robot file names.

    Args:
        robot: the robot file; it must fit the arm.
        seed: of the first scene.
        interpolate_from_desired_state: the controllers' parameter of that name.

    Raises:
        RobotMismatch: the robot file does not fit the arm, or its controllers cannot share one physics clock.
    """

    def __init__(self, robot: Robot, seed: int, *, interpolate_from_desired_state: bool = True) -> None:
        check_robot(robot)
        self.robot = robot
        self.period_ns = _common_period_ns(robot)
        self.world = TabletopWorld(gripper=has_gripper(robot))
        self.world.reset(seed)
        self._elapsed_ns = 0
        self._episode: tuple[Task, Episode, float] | None = None
        self.instruction = ''
        self.target = Target(None, 'no instruction yet')
        self.faults = 0
        self._rejections: Counter[str] = Counter()
        self._last_rejection = ''
        names = self.world.joint_names
        positions, _ = self.world.joint_state()
        self.columns = {
            name: np.array([names.index(joint) for joint in controller.joints]) for name, controller in robot.controllers.items()
        }
        self.controllers = {
            name: JointTrajectoryController(
                ControllerParameters(
                    joints=controller.joints,
                    update_rate=controller.update_rate,
                    interpolate_from_desired_state=interpolate_from_desired_state,
                ),
                positions[self.columns[name]],
            )
            for name, controller in robot.controllers.items()
        }
        self.commands: dict[str, Command] = {}
        self.record = CommandRecord(
            positions,
            np.array([robot.limits[name].velocity for name in names]),
            np.array([robot.limits[name].acceleration for name in names]),
            self.period_ns / NS_PER_S,
        )

    @property
    def time_ns(self) -> int:
        """Simulated time; starts at `START_NS`."""
        return START_NS + self._elapsed_ns + self.world.time_ns

    def receive(self, controller: str, message: TrajectoryMessage) -> Acceptance:
        """Hand a trajectory message to a controller, as its topic would. Raises KeyError for an unknown controller."""
        acceptance = self.controllers[controller].receive(message, self.time_ns)
        if acceptance.finding is None:
            self.record.trajectory_arrived()
        else:
            self._rejections[acceptance.finding.rule.name] += 1
            self._last_rejection = acceptance.reason
        return acceptance

    def tick(self) -> None:
        """One cycle: controllers, drives, physics. Afterwards `time_ns` is one period later."""
        positions, velocities = self.world.joint_state()
        targets, feed = np.empty_like(positions), np.empty_like(positions)
        for name, controller in self.controllers.items():
            columns = self.columns[name]
            command = controller.update(self.time_ns, positions[columns], velocities[columns])
            if not np.isfinite(command.positions).all():
                command = self._recover(controller, positions[columns], velocities[columns])
            self.commands[name] = command
            targets[columns] = command.positions
            feed[columns] = np.where(np.isfinite(command.velocities), command.velocities, 0.0)
        self.record.add(targets)
        self.world.set_position_targets(targets, feed)
        self.world.step(self.record.period)

    def _recover(
        self, controller: JointTrajectoryController, positions: NDArray[np.float64], velocities: NDArray[np.float64]
    ) -> Command:
        """The controller passes NaN on; the drives refuse it, and as after a drive fault it is activated anew where the arm
        is."""
        self.faults += 1
        self._activate(controller, positions)
        return controller.update(self.time_ns, positions, velocities)

    @staticmethod
    def _activate(controller: JointTrajectoryController, positions: NDArray[np.float64]) -> None:
        """Activate anew at ``positions``; what was counted stays."""
        counters = controller.counters
        controller.activate(positions)
        controller.counters = counters

    def lay_out_next_scene(self) -> Scene:
        """Lay out the objects and set the camera of the next seed. The arm stays where it is and goes on with what it does,
        as a real one would; seeds whose objects would lie under the tool are passed over."""
        tool = self.world.tcp()
        seed = self.world.scene.seed
        while True:
            seed += 1
            scene = sample_scene(seed)
            if all(np.hypot(spec.x - tool[0], spec.y - tool[1]) > _CLEAR_OF_TOOL for spec in scene.objects):
                break
        self.world.lay_out(scene)
        self._episode = None
        self.set_instruction(self.instruction)
        return scene

    def begin_episode(self, task: Task, episode: Episode) -> None:
        """Lay out an episode's scene and put the arm, at rest, where the episode begins: somebody has carried it there and switched
        its controllers on again. Time goes on. What was commanded is forgotten, so stop whoever commands before."""
        self._elapsed_ns += self.world.time_ns
        self.world.reset_to(episode.scene)
        positions, _ = self.world.joint_state()
        for name, controller in self.controllers.items():
            self._activate(controller, positions[self.columns[name]])
        self.commands = {}
        self.record.restart(positions)
        self._episode = task, episode, self._simulated_s
        self.set_instruction(self.instruction)

    @property
    def _simulated_s(self) -> float:
        return (self.time_ns - START_NS) / NS_PER_S

    def set_instruction(self, instruction: str) -> Target:
        """Take note of the sentence that the policy was given, to measure how near the tool is to what it names."""
        self.instruction = instruction
        if self._episode is None:
            self.target = parse_instruction(instruction, self.world.objects)
        else:
            self.target = Target(self.world.objects[self._episode[1].targets[0]])
        return self.target

    def render(self, camera: str) -> CameraView:
        """A camera's view, stamped with `time_ns`. Raises KeyError for an unknown camera, RenderError without OpenGL."""
        view = self.world.render(camera)
        return CameraView(view.rgb, view.K, self.time_ns)

    def report(self) -> dict[str, Any]:
        """Everything counted so far as plain JSON values. ``distance_m`` is None while no object is named."""
        accepted = sum(controller.counters.accepted for controller in self.controllers.values())
        overwritten = sum(controller.counters.overwritten for controller in self.controllers.values())
        rejected = sum(self._rejections.values())
        target = self.target.object
        return {
            'simulated_s': self._simulated_s,
            'seed': self.world.scene.seed,
            'objects': [spec.name for spec in self.world.objects],
            'instruction': self.instruction,
            'target': target.name if target else None,
            'target_reason': self.target.reason,
            'distance_m': self.world.distance(target.name) if target else None,
            'success': self.world.success(target.name) if target else False,
            'episode': self._judged(),
            'tcp_m': [float(value) for value in self.world.tcp()],
            'trajectories': {
                'received': accepted + rejected,
                'accepted': accepted,
                'rejected': rejected,
                'overwritten': overwritten,
                'rejections': dict(self._rejections),
                'last_rejection': self._last_rejection,
            },
            'commands': self.record.report(self.world.joint_names),
            'since_last_trajectory': self.record.report_since_trajectory(),
            'drive_faults': self.faults,
        }

    def _judged(self) -> dict[str, Any] | None:
        """The episode under way and how it would have ended now; None without one."""
        if self._episode is None:
            return None
        task, episode, begun_s = self._episode
        outcome = task.measure(self.world, episode)
        return {'task': episode.task, 'begun_s': begun_s, **asdict(outcome)}


def _common_period_ns(robot: Robot) -> int:
    """The update period of all controllers, ns. Raises RobotMismatch unless they agree on a whole number of physics steps."""
    rates = {name: controller.update_rate for name, controller in robot.controllers.items()}
    if len(set(rates.values())) > 1:
        raise RobotMismatch(f'the simulator runs all controllers at one rate, but {rates} differ: give them one update_rate')
    rate = next(iter(rates.values()))
    steps = 1.0 / rate / TIMESTEP
    if abs(steps - round(steps)) > 1e-6:
        raise RobotMismatch(
            f'update_rate {rate} Hz is not a whole number of physics steps of {TIMESTEP} s: use 500, 250, 125, 100 or 50 Hz'
        )
    return round(steps) * round(TIMESTEP * NS_PER_S)
