"""The policy as a managed (lifecycle) node.

configure   reads the robot file and the checkpoint (on the executor thread), warms up, subscribes; whatever is wrong fails here
activate    plans at `replan_rate` and publishes trajectories, unless a controller is set so that this is unsafe
deactivate  publishes a braking trajectory, or one to the park pose (`stop_policy`), then is silent
cleanup     frees the policy and its memory

Thread 1, the rclpy executor, runs every callback here. Thread 2, the policy executor, owns the model; it wakes thread 1 through a
guard condition. If thread 2 stalls or this process dies, the controller already holds a trajectory that ends at rest.
"""

from __future__ import annotations

import gc
import signal
import threading
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import Trigger

from vla_policy_msgs.msg import ActionChunk as ActionChunkMsg
from vla_policy_msgs.msg import PolicyStatus
from vla_policy_msgs.srv import SetInstruction
from vla_policy_ros.control.commanded import CommandedMotion
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.control.workspace import Workspace
from vla_policy_ros.episodes.shadow import Shadow
from vla_policy_ros.observation.instruction import InstructionError, clean_instruction
from vla_policy_ros.policy.executor import PolicyExecutor
from vla_policy_ros.resources import robot_path
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.ros import parameters, qos, status
from vla_policy_ros.ros.controllers import CheckMode, ControllerCheck
from vla_policy_ros.ros.inputs import Inputs, OperatorLog
from vla_policy_ros.ros.loading import load_policy
from vla_policy_ros.ros.messages import to_chunk
from vla_policy_ros.ros.outputs import Outputs
from vla_policy_ros.runtime import ChunkReport, PolicyRuntime, Settings, State
from vla_policy_ros.types import JointTrajectory

if TYPE_CHECKING:
    from vla_policy_ros.policy import Policy

_WATCH_PERIOD_S = 0.02
_RELEASE_PATIENCE_S = 5.0


class PolicyNode(LifecycleNode):
    """The node. Its topics, services and parameters are listed in the README and in docs/reference."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__('policy_node', **kwargs)
        parameters.declare(self)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.runtime: PolicyRuntime | None = None
        self._policy: Policy | None = None
        self._executor_thread: PolicyExecutor | None = None
        self._inputs: Inputs | None = None
        self._loop_timers: list[Any] = []
        self._loop_services: list[Any] = []
        self._outputs: Outputs | None = None
        self._check: ControllerCheck | None = None
        self._shadow: Shadow | None = None
        self._emission: Emission | None = None
        self._autostarting = self._activated = False
        self.fault = ''
        self.refusal = ''
        self._log = OperatorLog(self)
        self._interrupted = threading.Event()
        self._clock_watch = status.ClockWatch()

        self._status_publisher = self.create_publisher(PolicyStatus, '~/status', qos.LATCHED)
        self._chunk_publisher = self.create_publisher(ActionChunkMsg, '~/chunk', qos.REPORT)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, '/diagnostics', qos.REPORT)
        # Wall-paced, so that the operator still hears from the node when simulated time stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0 / self.get_parameter('status_rate').value, self.publish_status, clock=steady)
        self._wake = self.create_guard_condition(self._collect)

    # ---- lifecycle ---------------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read, load, warm up, subscribe."""
        values = parameters.values(self)
        try:
            robot = self._load_robot(values)
            if values['stop_policy'] == 'park' and robot.park is None:
                raise ValueError('stop_policy is park, but the robot file has no park pose: give one, or set stop_policy to brake')
            slowest = min(controller.update_rate for controller in robot.controllers.values())
            self._emission = Emission.for_controller(slowest, values['trajectory_stamp'], 1e3 * values['transport_delay'])
            self._executor_thread = PolicyExecutor(num_threads=values['torch_threads'])
            self._policy = load_policy(self._executor_thread, robot, values, self._interrupted, self.get_logger().info)
            self._start(robot, values)
        except Exception as error:  # whatever is wrong with the files must end in a sentence, not in a dead node
            self._release()
            self.fault = f'cannot configure: {error}'
            self.get_logger().error(self.fault)
            self.publish_status()
            return TransitionCallbackReturn.FAILURE
        self.fault = ''
        self.publish_status()
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to plan and publish, once the controllers have said how they are set, or have had the time to."""
        assert self._check is not None
        self.refusal = '; '.join(self._check.judge().refusals)
        if self.refusal:
            self.get_logger().error(f'not activated: {self.refusal}')
            self.publish_status()
            return TransitionCallbackReturn.FAILURE
        result = super().on_activate(state)
        self._activated = True
        self._on_controllers()
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brake, then be silent."""
        assert self.runtime is not None
        self._activated = False
        self.runtime.deactivate(self.now_ns())
        assert self._outputs is not None
        self._outputs.wait_for_delivery()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the policy and everything that configure made."""
        self.brake_and_release()
        self.fault = ''
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brake and free, from any state."""
        self.brake_and_release()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """An error in a transition: free everything and stay unconfigured, in FAULT."""
        self.brake_and_release()
        self.fault = self.fault or 'a lifecycle transition failed; see the log'
        return TransitionCallbackReturn.SUCCESS

    def autostart(self) -> None:
        """Configure and, once the controllers are known, activate without a lifecycle manager."""
        self._autostarting = self.trigger_configure() == TransitionCallbackReturn.SUCCESS
        self._on_controllers()

    def brake_and_release(self) -> None:
        """End any motion and free everything; safe to call in any state."""
        # A stream that parks the robot ends with the node, so it must brake now; a controller with a trajectory needs no node.
        streaming = self._outputs is not None and any(stream.running for stream in self._outputs.streams.values())
        if self.runtime is not None and (self.runtime.active or streaming):
            self.runtime.deactivate(self.now_ns(), only_brake=True)
            assert self._outputs is not None
            self._outputs.wait_for_delivery()
        self._release()

    def interrupt(self) -> None:
        """Give up a configure that is still loading (called from a signal handler)."""
        self._interrupted.set()

    # ---- configure, step by step -------------------------------------------------------------------------------------------

    def _load_robot(self, values: dict[str, Any]) -> Robot:
        if problem := parameters.wrong_choice(values):
            raise ValueError(problem)
        for name in ('robot_file', 'checkpoint'):
            if not values[name]:
                raise ValueError(f'parameter {name} is empty; give its path, for example -p {name}:=/path')
        return load_robot(robot_path(values['robot_file']))

    def _start(self, robot: Robot, values: dict[str, Any]) -> None:
        """Build the loop and connect it to topics, services and timers."""
        assert self._policy is not None and self._executor_thread is not None and self._emission is not None
        planner = TrajectoryPlanner(JointLimits.from_robot(robot), self._emission, Workspace.from_robot(robot))
        settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
        self.runtime = PolicyRuntime(robot, self._policy.infer, planner, self._executor_thread, self, self._wake.trigger, settings)
        self._outputs = Outputs(self, robot, self._emission, self._commanded, self.now_ns, self._log.tell)
        self._check = ControllerCheck(self, robot, self._emission, self._check_mode, lambda: self._is_running, self._on_controllers)
        self._inputs = Inputs(self, robot, self.runtime, self.now_ns, self._log)
        self._shadow = Shadow(robot, values['shadow_window']) if values['shadow_window'] else None
        self._loop_timers = [
            self.create_timer(1.0 / settings.replan_rate, self._tick),
            self.create_timer(_WATCH_PERIOD_S, self._watch),
        ]
        self._loop_services = [
            self.create_service(Trigger, '~/stop', self._on_stop),
            self.create_service(Trigger, '~/reset', self._on_reset),
            self.create_service(SetInstruction, '~/set_instruction', self._on_set_instruction),
            *(self.create_service(Trigger, f'~/{pose}', partial(self._on_pose, pose)) for pose in robot.poses),
        ]

    def _release(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
        for timer in self._loop_timers:
            self.destroy_timer(timer)
        for service in self._loop_services:
            self.destroy_service(service)
        if self._outputs is not None:
            self._outputs.close()
        if self._check is not None:
            self._check.close()
        if self._executor_thread is not None and not self._executor_thread.close(_RELEASE_PATIENCE_S):
            self._policy = None  # still in use over there
            self.get_logger().error('the policy thread does not end and is left behind with its memory: restart the node')
        if self._policy is not None:
            self._policy.close()
        self._inputs, self._loop_timers, self._loop_services = None, [], []
        self._shadow = None
        self._outputs, self._check, self._activated, self._autostarting, self.refusal = None, None, False, False, ''
        self.runtime, self._policy, self._executor_thread = None, None, None
        gc.unfreeze()
        gc.collect()

    # ---- the controllers ---------------------------------------------------------------------------------------------------

    def _check_mode(self) -> CheckMode:
        """What the controllers' parameters may do now; where nothing is sent, they are only told."""
        mode: CheckMode = self.get_parameter('check_controllers').value
        return 'warn' if mode == 'refuse' and self.get_parameter('dry_run').value else mode

    @property
    def _is_running(self) -> bool:
        return self.runtime is not None and self.runtime.active

    def _on_controllers(self) -> None:
        """The controllers have been asked once more: go on with what waits for that."""
        if self._check is None or self.runtime is None or not (self._activated or self._autostarting):
            return
        judgement = self._check.judge()
        if not (judgement.refusals or self._check.settled):
            return
        if self._autostarting:
            self._autostarting = False
            self.trigger_activate()
        elif judgement.refusals:  # one that did not answer before
            self.trigger_deactivate()
            self.refusal = '; '.join(judgement.refusals)
            self.get_logger().error(f'deactivated: {self.refusal}')
            self.publish_status()
        else:
            for sentence in (*judgement.warnings, *(self._check.unread.values() if self._check.overdue else ())):
                self._log.tell(sentence)
            if not self.runtime.active:
                self.runtime.activate(self.now_ns())
                dry = ' in dry run: nothing is sent to the controllers' if self.runtime.settings.dry_run else ''
                self.get_logger().info(f'active{dry}')

    # ---- callbacks ---------------------------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """The node's clock; 0 while simulated time has not begun."""
        return int(self.get_clock().now().nanoseconds)

    def _tick(self) -> None:
        if self.runtime is not None:
            self.runtime.tick(self.now_ns())

    def _watch(self) -> None:
        if self.runtime is None or self._inputs is None or self._outputs is None:
            return
        self.runtime.watch(self.now_ns())
        if self._shadow is not None and self.runtime.settings.dry_run and (at := self.runtime.robot_at()) is not None:
            self._shadow.robot_at(*at)
        for name, stream in self._outputs.streams.items():
            if stream.held is not None:
                self._inputs.put_held(name, stream.held, self.now_ns())

    def _commanded(self) -> CommandedMotion | None:
        return None if self.runtime is None else self.runtime.timeline.commanded

    def _collect(self) -> None:
        if self.runtime is not None:
            self.runtime.collect(self.now_ns())

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.runtime is not None
        self.runtime.stop(self.now_ns(), 'soft stop requested; call ~/reset to go on')
        response.success, response.message = True, 'stopping; call ~/reset to go on'
        return response

    def _on_pose(self, pose: str, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.runtime is not None
        response.message = self.runtime.move(pose, self.now_ns())
        response.success = not response.message
        response.message = response.message or f'moving to {pose}; call ~/reset afterwards to go on'
        return response

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.runtime is not None
        refusal = self.runtime.reset(self.now_ns())
        response.success = not refusal and self.runtime.state is not State.FAULT
        response.message = refusal or f'{self.runtime.state.name} {self.runtime.reason}'.strip()
        return response

    def _on_set_instruction(self, request: SetInstruction.Request, response: SetInstruction.Response) -> SetInstruction.Response:
        """Unlike on the topic, a refused instruction leaves the old one in force: the caller is told."""
        assert self.runtime is not None
        try:
            clean_instruction(request.instruction, self.runtime.robot.instruction.max_length)
        except InstructionError as error:
            response.success, response.message = False, str(error)
            return response
        self.runtime.instruct(request.instruction, self.now_ns())
        response.success = True
        return response

    def _on_set_parameters(self, changes: list[Any]) -> SetParametersResult:
        configured, active = self.runtime is not None, self._activated
        new = {change.name: change.value for change in changes}
        refusal = parameters.refusal(new, configured=configured, active=active)
        if refusal is None and self.runtime is not None:
            names = {name: new[name] for name in vars(self.runtime.settings) if name in new}
            self.runtime.settings = replace(self.runtime.settings, **names)
            if 'replan_rate' in names:
                self._loop_timers[0].timer_period_ns = round(1e9 / names['replan_rate'])
        return SetParametersResult(successful=refusal is None, reason=refusal or '')

    # ---- what leaves -------------------------------------------------------------------------------------------------------

    def on_trajectory(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Listener of the runtime: preview always, command if ``actuate``."""
        assert self._outputs is not None
        self._outputs.send(trajectory, actuate=actuate)

    def on_move(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Listener of the runtime: a move to a pose."""
        assert self._outputs is not None
        self._outputs.send(trajectory, actuate=actuate, move=True)

    def on_chunk(self, report: ChunkReport) -> None:
        """Listener of the runtime: the chunk with its provenance."""
        self._chunk_publisher.publish(to_chunk(report))
        if self._shadow is not None and not report.actuated:
            self._shadow.answered(report.chunk)

    def on_state(self, state: State, reason: str) -> None:
        """Listener of the runtime: tell the operator at once."""
        self._log.tell(f'{state.name}: {reason}' if reason else state.name, warn=state not in (State.READY, State.RUNNING))
        self.publish_status()

    def on_warning(self, sentence: str) -> None:
        """Listener of the runtime: for the log."""
        self._log.tell(sentence)

    def publish_status(self) -> None:
        """Publish PolicyStatus and diagnostics now."""
        now_ns, lifecycle_state = self.now_ns(), self._state_machine.current_state[1]
        if self.runtime is None or self._policy is None:
            message = status.unconfigured_status(now_ns, lifecycle_state, self.fault)
        else:
            assert self._inputs is not None
            self._inputs.explain_silence()
            hashes = (self._policy.checkpoint_hash, self._policy.stats_hash)
            message = status.policy_status(self.runtime, now_ns, lifecycle_state, hashes)
        if message.state != int(State.FAULT):
            clock_problem = self._clock_watch.problem(now_ns, self.get_parameter('use_sim_time').value)
            message.reason = clock_problem or self.refusal or message.reason
        self._status_publisher.publish(message)
        hardware_id = '' if self.runtime is None else self.runtime.robot.name
        shadow = None if self._shadow is None else self._shadow.score()
        self._diagnostics_publisher.publish(status.diagnostics(message, self.get_fully_qualified_name(), hardware_id, shadow))


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM, then brake and leave."""
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    leave = threading.Event()
    node = PolicyNode()

    def on_signal(*_: Any) -> None:
        leave.set()
        node.interrupt()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if node.get_parameter('autostart').value:
            node.autostart()
        while not leave.is_set():
            executor.spin_once(timeout_sec=0.2)
    finally:
        # Also after an exception in a callback: brake while there is still a node to publish with.
        node.brake_and_release()
        executor.remove_node(node)
        node.destroy_node()
        rclpy.shutdown()


if __name__ == '__main__':
    main()
