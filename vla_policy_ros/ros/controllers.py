"""What the controllers themselves say about how they are set: their parameters, read from their nodes and judged before motion.

A `ParameterReader` asks one node through the standard services, never waiting for an answer. `ControllerCheck` owns one per
controller of the robot file (and one per controller manager, for the update rate), asks again every second until
it is closed, and says what speaks against sending trajectories there. Runs on the thread of the node's executor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.parameter import parameter_value_to_python

from vla_policy_ros.control.jtc_advice import advise
from vla_policy_ros.control.jtc_rules import DISTROS, ControllerParameters, Distro
from vla_policy_ros.control.planner import Emission
from vla_policy_ros.robot import Controller, Robot

CheckMode = Literal['refuse', 'warn', 'skip']
PATIENCE_S = 3.0
_POLL_PERIOD_S = 0.1
_REPEAT_AFTER_S = 1.0
_ANSWER_WITHIN_S = 2.0

# Parameters of the controller that a field of ControllerParameters is named after.
_PLAIN = (
    'interpolate_from_desired_state',
    'open_loop_control',
    'allow_trajectory_replacement',
    'allow_partial_joints_goal',
    'allow_nonzero_velocity_at_trajectory_end',
    'allow_integration_in_goal_trajectories',
    'interpolation_method',
    'cmd_timeout',
)
# The same for those whose name there is another.
_NAMED = {
    'goal_time': 'constraints.goal_time',
    'decelerate_on_cancel': 'constraints.decelerate_on_cancel',
    'speed_scaling': 'speed_scaling.initial_scaling_factor',
}
_OTHER = ('joints', 'interface_name', 'command_interfaces', 'update_rate')
_PER_JOINT = {
    'trajectory_tolerance': 'trajectory',
    'goal_tolerance': 'goal',
    'max_deceleration_on_cancel': 'max_deceleration_on_cancel',
}


@dataclass(frozen=True)
class Judgement:
    """What speaks against one controller: sentences that forbid to use it, and sentences that only warn."""

    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class ParameterReader:
    """Reads parameters of another node. ``values`` is None until it has answered, and again while it is not there.

    Args:
        node: owns the service clients.
        remote: name of the other node.
        wanted: whether a parameter of this name is wanted.
    """

    def __init__(self, node: Node, remote: str, wanted: Callable[[str], bool]) -> None:
        self.remote = remote
        self.values: dict[str, Any] | None = None
        self.answers = 0
        self._node, self._wanted = node, wanted
        self._list = node.create_client(ListParameters, f'{remote}/list_parameters')
        self._get = node.create_client(GetParameters, f'{remote}/get_parameters')
        self._pending: tuple[Any, Any, float] | None = None
        self._next = float('-inf')

    def poll(self) -> None:
        """Ask, if it is time to; call it often. Never waits."""
        now = monotonic()
        if self._pending is not None:
            client, future, since = self._pending
            if now - since > _ANSWER_WITHIN_S:
                client.remove_pending_request(future)
                self.values, self._pending = None, None
            return
        if not (self._list.service_is_ready() and self._get.service_is_ready()):
            self.values = None
        elif now >= self._next:
            # The node answers nothing at all when one name of the request is not declared, so it is asked for the names first.
            self._ask(self._list, ListParameters.Request(), self._on_names)

    def close(self) -> None:
        """Destroy the clients."""
        self._pending = None
        for client in (self._list, self._get):
            self._node.destroy_client(client)

    def _ask(self, client: Any, request: Any, on_answer: Callable[[Any], None]) -> None:
        future = client.call_async(request)
        self._pending = (client, future, monotonic())

        def done(answered: Any) -> None:
            if self._pending is not None and self._pending[1] is answered:
                self._pending = None
                on_answer(answered.result())

        future.add_done_callback(done)

    def _on_names(self, answer: ListParameters.Response) -> None:
        names = [name for name in answer.result.names if self._wanted(name)]

        def on_values(response: GetParameters.Response) -> None:
            self._next = monotonic() + _REPEAT_AFTER_S
            self.answers += 1
            if len(response.values) == len(names):  # else it has undeclared one meanwhile
                values = [parameter_value_to_python(value) for value in response.values]
                self.values = dict(zip(names, values, strict=True))

        self._ask(self._get, GetParameters.Request(names=names), on_values)


class ControllerCheck:
    """Reads and judges the controllers of a robot.

    Args:
        node: the node that asks.
        robot: names the controllers.
        emission: how trajectories are timed, which decides what is unsafe.
        mode: what is done about unsafe parameters: ``refuse``, ``warn``, or ``skip`` the asking.
        running: whether the robot may move. Until then parameters may change and are read again and again, then only those of
            controllers that have not answered.
        on_news: called when a node has answered, and when all have had the time to.
    """

    def __init__(
        self,
        node: Node,
        robot: Robot,
        emission: Emission,
        mode: Callable[[], CheckMode],
        running: Callable[[], bool],
        on_news: Callable[[], None],
    ) -> None:
        self._node, self._emission, self._mode, self._running, self._on_news = node, emission, mode, running, on_news
        self._began = monotonic()
        self._told = (0, False)
        self._controllers = robot.controllers
        self._readers: dict[str, ParameterReader] = {}
        self._managers: dict[str, ParameterReader] = {}
        for name, controller in self._controllers.items():
            remote = controller.parameter_node
            if remote is None:
                continue
            self._readers[name] = ParameterReader(node, remote, _is_of_interest)
            manager = f'{remote.rpartition("/")[0]}/controller_manager'
            if manager not in self._managers:
                self._managers[manager] = ParameterReader(node, manager, lambda parameter: parameter == 'update_rate')
        # Wall-paced: the controllers are asked also while simulated time stands still.
        self._timer = node.create_timer(_POLL_PERIOD_S, self._poll, clock=Clock(clock_type=ClockType.STEADY_TIME))

    @property
    def settled(self) -> bool:
        """Whether nothing has to wait for the answers: they cannot forbid anything, are all there, or have had the time to come."""
        return self._mode() != 'refuse' or not self.unread or self.overdue

    @property
    def overdue(self) -> bool:
        """Whether a controller that has not answered is not going to."""
        return monotonic() - self._began > PATIENCE_S

    @property
    def unread(self) -> dict[str, str]:
        """Controllers whose parameters are wanted and not known, with the reason as a sentence."""
        sentences: dict[str, str] = {}
        if self._mode() == 'skip':
            return sentences
        for name, controller in self._controllers.items():
            if name not in self._readers:
                sentences[name] = (
                    f'controller {name!r}: its parameters could not be read, because topic {controller.topic} does not tell the '
                    f'name of its node: give it as controllers.{name}.node in the robot file'
                )
            elif self._readers[name].values is None:
                sentences[name] = (
                    f'controller {name!r}: its parameters could not be read, node {self._readers[name].remote} does not answer: '
                    f'is it loaded, and is that its name (controllers.{name}.node in the robot file)?'
                )
        return sentences

    def judge(self) -> Judgement:
        """What speaks against the controllers whose parameters are known; where the mode says so, only warnings."""
        refusals: list[str] = []
        warnings: list[str] = []
        mode = self._mode()
        for name, reader in self._readers.items():
            if reader.values is None or mode == 'skip':
                continue
            manager = self._managers[f'{reader.remote.rpartition("/")[0]}/controller_manager'].values or {}
            found = judge_controller(name, self._controllers[name], reader.values, manager.get('update_rate'), self._emission)
            refusals += found.refusals
            warnings += found.warnings
        return Judgement(tuple(refusals), tuple(warnings)) if mode == 'refuse' else Judgement((), (*refusals, *warnings))

    def close(self) -> None:
        """Ask no more."""
        self._node.destroy_timer(self._timer)
        for reader in (*self._readers.values(), *self._managers.values()):
            reader.close()

    def _poll(self) -> None:
        skip, running = self._mode() == 'skip', self._running()
        for reader in (*self._readers.values(), *self._managers.values()):
            if not skip and (reader.values is None or not running):
                reader.poll()
        news = (sum(reader.answers for reader in self._readers.values()), self.overdue)
        if news != self._told:
            self._told = news
            self._on_news()


def judge_controller(
    name: str, controller: Controller, values: Mapping[str, Any], manager_rate: float | None, emission: Emission
) -> Judgement:
    """What speaks against sending trajectories to one controller, whose parameters are ``values``."""
    where = f'controller {name!r}: '
    joints = tuple(values.get('joints') or ())
    if controller.type == 'forward_command':
        return _judge_forward(where, controller, joints, values.get('interface_name', 'position'))
    if set(joints) != set(controller.joints):
        missing = sorted(set(controller.joints) - set(joints))
        extra = sorted(set(joints) - set(controller.joints))
        differences = [f'it lacks {", ".join(missing)}'] * bool(missing) + [f'it also has {", ".join(extra)}'] * bool(extra)
        return Judgement((f'{where}its joints are not those of the robot file: {" and ".join(differences)}; make them the same',))
    try:
        parameters = to_parameters(values, controller, manager_rate)
    except ValueError as error:
        return Judgement((f'{where}{error}; say which distribution it runs on as controllers.{name}.distro in the robot file',))
    advice = advise(parameters, emission.stamp)
    warnings = [where + item.sentence for item in advice if item.severity == 'warn']
    if abs(parameters.update_rate - controller.update_rate) > 0.01 * controller.update_rate:
        warnings.append(
            f'{where}it is updated at {parameters.update_rate:g} Hz, but update_rate in the robot file is '
            f'{controller.update_rate:g}: write the true one there'
        )
    return Judgement(tuple(where + item.sentence for item in advice if item.severity == 'refuse'), tuple(warnings))


def _judge_forward(where: str, controller: Controller, joints: tuple[str, ...], interface: str) -> Judgement:
    """A forward_command_controller has no names in its messages, so the order of its joints counts."""
    refusals = []
    if joints != controller.joints:
        refusals.append(f'{where}its joints are {", ".join(joints) or "none"}; list the same in that order in the robot file')
    if interface != 'position':
        refusals.append(f'{where}it commands {interface}, but positions are sent: set its interface_name to position')
    return Judgement(tuple(refusals))


def to_parameters(values: Mapping[str, Any], controller: Controller, manager_rate: float | None) -> ControllerParameters:
    """The parameters that a controller reported, by their names there; absent ones have the distribution's defaults.

    The update rate is the controller's own where it has one, else the manager's, else that of the robot file.

    Raises:
        ValueError: the controller has a parameter that its distribution does not know.
    """
    joints = tuple(values['joints'])
    known: dict[str, Any] = {name: values[name] for name in _PLAIN if values.get(name) is not None}
    known |= {field: values[name] for field, name in _NAMED.items() if values.get(name) is not None}
    for field, suffix in _PER_JOINT.items():
        known[field] = {joint: value for joint in joints if (value := values.get(f'constraints.{joint}.{suffix}')) is not None}
    return ControllerParameters.for_distro(
        controller.distro or _distro(),
        joints,
        update_rate=float(values.get('update_rate') or manager_rate or controller.update_rate),
        effort_command_interface='effort' in (values.get('command_interfaces') or ()),
        **known,
    )


def _distro() -> Distro:
    """The distribution of this process, as far as controllers differ: those after Kilted have Rolling's."""
    name = os.environ.get('ROS_DISTRO', 'jazzy')
    return next((distro for distro in DISTROS if distro == name), 'rolling')


def _is_of_interest(parameter: str) -> bool:
    return parameter in (*_PLAIN, *_NAMED.values(), *_OTHER) or parameter.startswith('constraints.')
