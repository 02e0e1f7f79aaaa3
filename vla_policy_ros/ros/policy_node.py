"""The policy as a managed (lifecycle) node.

configure   reads the robot file and the checkpoint (on the executor thread), warms up, subscribes; whatever is wrong fails here
activate    plans at `replan_rate` and publishes trajectories
deactivate  publishes a braking trajectory, then is silent
cleanup     frees the policy and its memory

Thread 1, the rclpy executor, runs every callback here. Thread 2, the policy executor, owns the model; it wakes thread 1 through a
guard condition. If thread 2 stalls or this process dies, the controller already holds a trajectory that ends at rest.
"""

from __future__ import annotations

import gc
import signal
import threading
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from vla_policy_msgs.msg import ActionChunk as ActionChunkMsg
from vla_policy_msgs.msg import PolicyStatus
from vla_policy_msgs.srv import SetInstruction
from vla_policy_ros.control.limits import JointLimits
from vla_policy_ros.control.planner import Emission, TrajectoryPlanner
from vla_policy_ros.observation.instruction import InstructionError, clean_instruction
from vla_policy_ros.policy.executor import PolicyExecutor
from vla_policy_ros.resources import checkpoint_path, robot_path
from vla_policy_ros.robot import Robot, load_robot
from vla_policy_ros.ros import parameters, qos, status
from vla_policy_ros.ros.inputs import Inputs, OperatorLog
from vla_policy_ros.ros.messages import to_chunk, to_trajectory
from vla_policy_ros.runtime import ChunkReport, PolicyRuntime, Settings, State
from vla_policy_ros.types import JointTrajectory

if TYPE_CHECKING:
    from vla_policy_ros.policy import Policy

_WATCH_PERIOD_S = 0.02
_CLOCK_STALL_S = 2.0
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
        self._command_publishers: dict[str, Any] = {}
        self._preview_publishers: dict[str, Any] = {}
        self._emission: Emission | None = None
        self.fault = ''
        self._log = OperatorLog(self)
        self._interrupted = threading.Event()
        self._clock_seen = (0, monotonic())

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
            slowest = min(controller.update_rate for controller in robot.controllers.values())
            self._emission = Emission.for_controller(slowest, values['trajectory_stamp'], 1e3 * values['transport_delay'])
            self._load_policy(robot, values)
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
        """Begin to plan and publish."""
        assert self.runtime is not None
        result = super().on_activate(state)
        self.runtime.activate(self.now_ns())
        dry = ' in dry run: nothing is sent to the controllers' if self.runtime.settings.dry_run else ''
        self.get_logger().info(f'active{dry}')
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brake, then be silent."""
        assert self.runtime is not None
        self.runtime.deactivate(self.now_ns())
        self._wait_for_delivery()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the policy and everything that configure made."""
        self._release()
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
        """Configure and activate without a lifecycle manager."""
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def brake_and_release(self) -> None:
        """End any motion and free everything; safe to call in any state."""
        if self.runtime is not None and self.runtime.active:
            self.runtime.deactivate(self.now_ns())
            self._wait_for_delivery()
        self._release()

    def interrupt(self) -> None:
        """Give up a configure that is still loading (called from a signal handler)."""
        self._interrupted.set()

    # ---- configure, step by step -------------------------------------------------------------------------------------------

    def _load_robot(self, values: dict[str, Any]) -> Robot:
        for name in ('robot_file', 'checkpoint'):
            if not values[name]:
                raise ValueError(f'parameter {name} is empty; give its path, for example -p {name}:=/path')
        return load_robot(robot_path(values['robot_file']))

    def _load_policy(self, robot: Robot, values: dict[str, Any]) -> None:
        """Load and warm up on the policy's own thread, which is the only one that ever touches the model."""
        path = checkpoint_path(values['checkpoint'])
        self._executor_thread = PolicyExecutor(num_threads=values['torch_threads'])
        done = threading.Event()
        results: list[Any] = []

        def load() -> Policy:
            from vla_policy_ros.policy import Policy

            policy = Policy.load(
                path,
                robot,
                device=values['device'],
                dtype=values['dtype'],
                num_steps=values['num_inference_steps'] or None,
                solver=values['solver'] or None,
                chunking=values['chunking'],
                seed=None if values['seed'] < 0 else values['seed'],
            )
            warm_up_ms = policy.warm_up()
            self.get_logger().info(f'checkpoint {policy.checkpoint_hash[:12]} loaded, first inference {warm_up_ms:.0f} ms')
            return policy

        def finished(result: Any) -> None:
            results.append(result)
            done.set()

        self._executor_thread.submit(load, finished)
        while not done.wait(0.1):
            if self._interrupted.is_set():
                raise RuntimeError('interrupted while loading the checkpoint')
        if results[0].error is not None:
            raise results[0].error
        self._policy = results[0].value
        # A full collection over the model's objects stalls every thread for a quarter second; they live as long as the node.
        gc.collect()
        gc.freeze()

    def _start(self, robot: Robot, values: dict[str, Any]) -> None:
        """Build the loop and connect it to topics, services and timers."""
        assert self._policy is not None and self._executor_thread is not None and self._emission is not None
        planner = TrajectoryPlanner(JointLimits.from_robot(robot), self._emission)
        settings = Settings(values['replan_rate'], values['dry_run'], values['max_inference_time'], values['chunking'])
        self.runtime = PolicyRuntime(
            robot, self._policy.infer, planner, self._executor_thread, self, self._wake.trigger, settings
        )
        for name, controller in robot.controllers.items():
            self._command_publishers[name] = self.create_lifecycle_publisher(JointTrajectoryMsg, controller.topic, qos.COMMAND)
            self._preview_publishers[name] = self.create_publisher(JointTrajectoryMsg, f'~/preview/{name}', qos.COMMAND)
        self._inputs = Inputs(self, robot, self.runtime, self.now_ns, self._log)
        self._loop_timers = [
            self.create_timer(1.0 / settings.replan_rate, self._tick),
            self.create_timer(_WATCH_PERIOD_S, self._watch),
        ]
        self._loop_services = [
            self.create_service(Trigger, '~/stop', self._on_stop),
            self.create_service(Trigger, '~/reset', self._on_reset),
            self.create_service(SetInstruction, '~/set_instruction', self._on_set_instruction),
        ]

    def _release(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
        for timer in self._loop_timers:
            self.destroy_timer(timer)
        for service in self._loop_services:
            self.destroy_service(service)
        for publisher in self._command_publishers.values():
            self.destroy_lifecycle_publisher(publisher)
        for publisher in self._preview_publishers.values():
            self.destroy_publisher(publisher)
        if self._executor_thread is not None and not self._executor_thread.close(_RELEASE_PATIENCE_S):
            self._policy = None  # still in use over there
            self.get_logger().error('the policy thread does not end and is left behind with its memory: restart the node')
        if self._policy is not None:
            self._policy.close()
        self._inputs, self._loop_timers, self._loop_services = None, [], []
        self._command_publishers, self._preview_publishers = {}, {}
        self.runtime, self._policy, self._executor_thread = None, None, None
        gc.unfreeze()
        gc.collect()

    # ---- callbacks ---------------------------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """The node's clock; 0 while simulated time has not begun."""
        return int(self.get_clock().now().nanoseconds)

    def _tick(self) -> None:
        if self.runtime is not None:
            self.runtime.tick(self.now_ns())

    def _watch(self) -> None:
        if self.runtime is not None:
            self.runtime.watch(self.now_ns())

    def _collect(self) -> None:
        if self.runtime is not None:
            self.runtime.collect(self.now_ns())

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.runtime is not None
        self.runtime.stop(self.now_ns(), 'soft stop requested; call ~/reset to go on')
        response.success, response.message = True, 'braking; call ~/reset to go on'
        return response

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        assert self.runtime is not None
        self.runtime.reset(self.now_ns())
        response.success = self.runtime.state is not State.FAULT
        response.message = f'{self.runtime.state.name} {self.runtime.reason}'.strip()
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
        configured, active = self.runtime is not None, self.runtime is not None and self.runtime.active
        new = {change.name: change.value for change in changes}
        refusal = parameters.refusal(new, configured=configured, active=active)
        if refusal is None and self.runtime is not None:
            names = {name: new[name] for name in ('replan_rate', 'dry_run', 'max_inference_time') if name in new}
            self.runtime.settings = replace(self.runtime.settings, **names)
            if 'replan_rate' in names:
                self._loop_timers[0].timer_period_ns = round(1e9 / names['replan_rate'])
        return SetParametersResult(successful=refusal is None, reason=refusal or '')

    # ---- what leaves -------------------------------------------------------------------------------------------------------

    def on_trajectory(self, trajectory: JointTrajectory, *, actuate: bool) -> None:
        """Listener of the runtime: preview always, command if ``actuate``."""
        assert self.runtime is not None and self._emission is not None
        for name, controller in self.runtime.robot.controllers.items():
            message = to_trajectory(trajectory.select(controller.joints), self._emission.header_stamp_ns(trajectory))
            if actuate:
                self._command_publishers[name].publish(message)
            self._preview_publishers[name].publish(message)

    def on_chunk(self, report: ChunkReport) -> None:
        """Listener of the runtime: the chunk with its provenance."""
        self._chunk_publisher.publish(to_chunk(report))

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
            message.reason = self._clock_problem(now_ns) or message.reason
        self._status_publisher.publish(message)
        hardware_id = '' if self.runtime is None else self.runtime.robot.name
        self._diagnostics_publisher.publish(status.diagnostics(message, self.get_fully_qualified_name(), hardware_id))

    def _clock_problem(self, now_ns: int) -> str:
        """Why simulated time is of no use, or an empty string."""
        if now_ns != self._clock_seen[0]:
            self._clock_seen = (now_ns, monotonic())
        if not self.get_parameter('use_sim_time').value:
            return ''
        if now_ns == 0:
            return 'use_sim_time is set but no /clock has arrived: start the simulator or the bag player with a clock'
        stalled = monotonic() - self._clock_seen[1]
        return f'/clock has not advanced for {stalled:.1f} s' if stalled > _CLOCK_STALL_S else ''

    def _wait_for_delivery(self) -> None:
        for publisher in self._command_publishers.values():
            publisher.wait_for_all_acked(Duration(seconds=0.5))


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
