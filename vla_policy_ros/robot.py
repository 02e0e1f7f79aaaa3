"""The robot file: what is true of one robot and of a checkpoint's view of it.

One YAML per robot, read by the live node, by bag replay and by training, so that the translation between messages and model
never exists twice. The schema is strict: an unknown or duplicated key is an error that names the nearest known one, and every
cross-reference (limits, controllers, action joints) is checked on loading, so that a mistake is found before anything moves.

Enters: a YAML file. Leaves: a validated, immutable `Robot`. Any thread.
Units are REP-103 (rad, m, s) unless a joint is not an angle, in which case its limits are in the unit its controller expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from vla_policy_ros.strict_yaml import SchemaError, Section, parse_mapping, unknown_name, validate_mapping
from vla_policy_ros.types import NS_PER_S

PositiveSeconds = Annotated[float, Field(gt=0.0, le=60.0)]
Name = Annotated[str, Field(pattern=r'^[A-Za-z][A-Za-z0-9_]*$')]
Topic = Annotated[str, Field(pattern=r'^(~/|/)?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*$')]
JointName = Annotated[str, Field(min_length=1)]


class RobotFileError(ValueError):
    """The robot file cannot be used; the message lists every problem with its place in the file and the remedy."""


class Camera(Section):
    """One camera that the policy looks through. Give either `camera_info` or a fixed `K` with `width` and `height`; neither
    means an uncalibrated camera, for which the geometry trunk runs without rays."""

    topic: Topic = Field(description='Image topic.')
    transport: Literal['raw', 'compressed'] = Field(
        'raw', description='`raw` is sensor_msgs/Image, `compressed` is sensor_msgs/CompressedImage.'
    )
    camera_info: Topic | None = Field(None, description='sensor_msgs/CameraInfo topic with the intrinsics.')
    K: tuple[float, float, float, float, float, float, float, float, float] | None = Field(
        None, description='Fixed row-major 3x3 intrinsics in pixels of the published image, instead of `camera_info`.'
    )
    width: int | None = Field(None, gt=0, description='Image width that `K` speaks about, pixels.')
    height: int | None = Field(None, gt=0, description='Image height that `K` speaks about, pixels.')
    resize: Literal['stretch', 'letterbox', 'crop'] = Field(
        'stretch', description='How the image reaches the model size; the intrinsics follow.'
    )

    @model_validator(mode='after')
    def _one_source_of_intrinsics(self) -> Camera:
        if self.K is not None and self.camera_info is not None:
            raise ValueError('give either camera_info or K, not both')
        if self.K is not None and (self.width is None or self.height is None):
            raise ValueError('a fixed K needs width and height, the image size it speaks about')
        if self.K is not None and not (self.K[0] > 0 and self.K[4] > 0 and self.K[8] == 1.0):
            raise ValueError(f'K must have fx > 0, fy > 0 and K[8] = 1, got {list(self.K)}')
        return self

    @property
    def fixed_K(self) -> NDArray[np.float64] | None:
        """The fixed intrinsics as float64 ``[3, 3]``, or None."""
        return None if self.K is None else np.asarray(self.K, dtype=np.float64).reshape(3, 3)


class State(Section):
    """The proprioceptive input."""

    topic: Topic = Field('/joint_states', description='sensor_msgs/JointState topic.')
    joints: tuple[JointName, ...] = Field(
        min_length=1, description='Joints in the order of the state vector; messages may use any order.'
    )
    fields: tuple[Literal['position', 'velocity', 'effort'], ...] = Field(
        ('position',), min_length=1, description='JointState arrays that enter the state vector, one block per field.'
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the state vector's elements, ``<joint>.<field>``, one block per field."""
        return tuple(f'{joint}.{field}' for field in self.fields for joint in self.joints)


class Instruction(Section):
    """Where the operator's sentence comes from."""

    topic: Topic = Field('/instruction', description='std_msgs/String topic (reliable, transient local).')
    max_length: int = Field(256, gt=0, le=4096, description='Longer instructions are refused, characters.')


class Action(Section):
    """What the policy answers: a chunk of `horizon` targets, `period` seconds apart."""

    type: Literal['joint_position'] = Field('joint_position', description='Kind of action.')
    joints: tuple[JointName, ...] = Field(min_length=1, description='Joints in the order of the action vector.')
    representation: Literal['absolute', 'delta'] = Field(
        'absolute', description='`delta`: the model predicts target minus the observed state; the chunk is absolute either way.'
    )
    absolute_joints: tuple[JointName, ...] = Field((), description='Joints that stay absolute under `delta`, such as grippers.')
    period: PositiveSeconds = Field(description='Control period: time between two actions of a chunk, s.')
    horizon: int = Field(gt=0, le=200, description='Actions per chunk.')

    @property
    def period_ns(self) -> int:
        """`period` in nanoseconds."""
        return round(self.period * NS_PER_S)

    @property
    def delta_mask(self) -> NDArray[np.bool_]:
        """bool ``[A]``: the elements that the model predicts relative to the observed state."""
        if self.representation == 'absolute':
            return np.zeros(len(self.joints), dtype=bool)
        return np.array([joint not in self.absolute_joints for joint in self.joints])


class JointLimit(Section):
    """Planning limits of one joint; choose them below the hardware's."""

    position: tuple[float, float] = Field(description='Lower and upper position, rad (m for a prismatic joint).')
    velocity: float = Field(gt=0.0, description='Largest |velocity|, rad/s.')
    acceleration: float = Field(gt=0.0, description='Largest |acceleration|, rad/s^2.')
    jerk: float | None = Field(
        None, gt=0.0, description='Largest |jerk|, rad/s^3. None: not limited beyond what bounded acceleration gives.'
    )
    following_error: float | None = Field(
        None, gt=0.0, description='Largest |commanded - measured| position; beyond it the node stops. None: not watched.'
    )

    @field_validator('position')
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f'lower limit {value[0]} must be below upper limit {value[1]}')
        return value


class Controller(Section):
    """A controller that executes some of the action joints."""

    topic: Topic = Field(description='Command topic of the controller.')
    type: Literal['joint_trajectory', 'forward_command'] = Field(
        'joint_trajectory',
        description='`joint_trajectory`: trajectory_msgs/JointTrajectory, as joint_trajectory_controller takes it. '
        '`forward_command`: std_msgs/Float64MultiArray, one position per joint and controller period, as '
        'forward_command_controller takes it.',
    )
    joints: tuple[JointName, ...] = Field(
        min_length=1, description='All joints of the controller; for `forward_command` in its own order.'
    )
    state_topic: Topic | None = Field(
        None,
        description='Topic of the controller state, whose reference anchors the first trajectory and shows whether trajectories '
        'are accepted. None for `forward_command`, which has none.',
    )
    update_rate: float = Field(100.0, gt=0.0, le=2000.0, description='Update rate of the controller manager, Hz.')
    node: Topic | None = Field(
        None,
        description='Node of the controller, which is asked for its parameters. None: `topic` without `/joint_trajectory` or '
        '`/commands`.',
    )
    distro: Literal['humble', 'jazzy', 'kilted', 'rolling'] | None = Field(
        None, description='ROS 2 distribution that the controller runs on. None: that of the policy node (`ROS_DISTRO`).'
    )
    action: Topic | None = Field(
        None,
        description='control_msgs/FollowJointTrajectory action of the controller, for moves to `home` and `park`. None: its topic.',
    )

    @property
    def parameter_node(self) -> str | None:
        """Name of the controller's node, or None where neither `node` nor the name of the topic tells."""
        stem = self.topic.removesuffix('/joint_trajectory' if self.type == 'joint_trajectory' else '/commands')
        return self.node or (stem if stem != self.topic else None)

    @model_validator(mode='after')
    def _state_of_its_type(self) -> Controller:
        if self.type == 'forward_command' and self.state_topic is not None:
            raise ValueError(f'a forward_command controller reports no reference: remove state_topic {self.state_topic}')
        if self.type == 'forward_command' and self.action is not None:
            raise ValueError(f'a forward_command controller has no action: remove action {self.action}')
        return self


class Timing(Section):
    """How old and how far apart inputs may be, judged on header stamps."""

    max_image_age: PositiveSeconds = Field(0.5, description='Oldest usable image, s.')
    max_state_age: PositiveSeconds = Field(0.2, description='Oldest usable joint state, s.')
    max_camera_skew: PositiveSeconds = Field(0.2, description='Largest stamp difference between cameras of one observation, s.')
    max_state_skew: PositiveSeconds = Field(
        0.2, description='Largest stamp difference between the newest image and the joint state, s.'
    )
    max_future: PositiveSeconds = Field(0.05, description='A stamp further ahead of the clock than this is refused, s.')


Point = tuple[float, float, float]


class Box(Section):
    """A box along the axes of the base link (REP-103: x forward, y left, z up)."""

    lower: Point = Field(description='Smallest x, y and z, m.')
    upper: Point = Field(description='Largest x, y and z, m.')


class WorkspaceLimit(Section):
    """A box that the tip of the arm stays in, computed from a URDF on the interpolated curve. A motion that would leave it ends at
    rest inside; a tip that is outside at the start may only come in."""

    urdf: str = Field(min_length=1, description='Path of the URDF (not xacro), relative to the robot file.')
    tip: str = Field(min_length=1, description='Link whose origin is kept in the box.')
    base: str | None = Field(None, description='Link above the tip that the box is fixed to. None: the root of the URDF.')
    box: Box = Field(description='The box.')
    margin: float = Field(0.0, ge=0.0, description='Distance from the faces that a motion keeps, m.')
    held: dict[JointName, float] = Field(
        {}, description='Positions of joints that the policy does not command, rad or m; 0 where none is given.'
    )
    unrelated: tuple[JointName, ...] = Field(
        (), description='Action joints that do not move the tip and that the URDF need not have, such as a gripper.'
    )

    @model_validator(mode='after')
    def _not_empty(self) -> WorkspaceLimit:
        for axis, lower, upper in zip('xyz', self.box.lower, self.box.upper, strict=True):
            if not lower + self.margin < upper - self.margin:
                raise ValueError(
                    f'box is empty in {axis}: from {lower:g} to {upper:g} m with a margin of {self.margin:g} m on each side; '
                    'make it larger or the margin smaller'
                )
        return self


class Robot(Section):
    """The whole robot file."""

    name: Name = Field(description='Name of the robot, stored in checkpoints made for it.')
    cameras: dict[Name, Camera] = Field(min_length=1, description='Cameras by name, in the order the model sees them.')
    state: State = Field(description='Proprioceptive input.')
    instruction: Instruction = Field(default_factory=Instruction, description='Language input.')
    action: Action = Field(description='Action chunk.')
    limits: dict[JointName, JointLimit] = Field(description='Planning limits of every action joint.')
    controllers: dict[Name, Controller] = Field(min_length=1, description='Controllers by name.')
    timing: Timing = Field(default_factory=Timing, description='Freshness and skew limits.')
    workspace: WorkspaceLimit | None = Field(None, description='Cartesian limit of the tip. None: joint limits only.')
    home: dict[JointName, float] | None = Field(
        None,
        min_length=1,
        description='Pose that `~/home` moves to, joint to position; joints left out stay. None: no such service.',
    )
    park: dict[JointName, float] | None = Field(
        None, min_length=1, description='The same for `~/park`, where the robot may stay when nobody uses it.'
    )

    @model_validator(mode='after')
    def _consistent(self) -> Robot:
        problems = [
            *_repeated('state.joints', self.state.joints),
            *_repeated('state.fields', self.state.fields),
            *_repeated('action.joints', self.action.joints),
            *self._limit_problems(),
            *self._controller_problems(),
            *self._pose_problems(),
        ]
        for joint in self.action.absolute_joints:
            if joint not in self.action.joints:
                problems.append(f'action.absolute_joints: {unknown_name(joint, self.action.joints)}')
        if self.workspace is not None:
            unknown = [joint for joint in self.workspace.unrelated if joint not in self.action.joints]
            problems += [f'workspace.unrelated: {unknown_name(joint, self.action.joints)}' for joint in unknown]
        if self.action.representation == 'delta':
            missing = [j for j in self.action.joints if j not in self.state.joints and j not in self.action.absolute_joints]
            if missing or 'position' not in self.state.fields:
                problems.append(f'action.representation: delta needs the position of {missing or "every joint"} in state')
        if problems:
            raise ValueError('; '.join(problems))
        return self

    def _limit_problems(self) -> list[str]:
        problems = [f'limits: no limits for action joint {j!r}' for j in self.action.joints if j not in self.limits]
        problems += [f'limits: {unknown_name(j, self.action.joints)}' for j in self.limits if j not in self.action.joints]
        return problems

    def _controller_problems(self) -> list[str]:
        problems: list[str] = []
        owner: dict[str, str] = {}
        topics: dict[str, str] = {}
        for name, controller in self.controllers.items():
            problems += _repeated(f'controllers.{name}.joints', controller.joints)
            for joint in controller.joints:
                if joint not in self.action.joints:
                    problems.append(f'controllers.{name}.joints: {unknown_name(joint, self.action.joints)}')
                elif owner.setdefault(joint, name) != name:
                    problems.append(f'controllers: joint {joint!r} belongs to both {owner[joint]!r} and {name!r}')
            if topics.setdefault(controller.topic, name) != name:
                problems.append(f'controllers: {topics[controller.topic]!r} and {name!r} share topic {controller.topic}')
        problems += [f'controllers: no controller executes joint {j!r}' for j in self.action.joints if j not in owner]
        unmeasured = [j for j in self.action.joints if j not in self.state.joints]
        if unmeasured or 'position' not in self.state.fields:
            problems.append(
                f'state: the positions of all action joints are needed to start a motion; missing {unmeasured or "position"}'
            )
        return problems

    def _pose_problems(self) -> list[str]:
        problems = []
        for name, pose in self.poses.items():
            for joint, position in pose.items():
                if joint not in self.action.joints:
                    problems.append(f'{name}: {unknown_name(joint, self.action.joints)}')
                elif joint in self.limits and not self.limits[joint].position[0] <= position <= self.limits[joint].position[1]:
                    low, high = self.limits[joint].position
                    problems.append(f'{name}: {position:g} of joint {joint!r} is outside its limits [{low:g}, {high:g}]')
        return problems

    @property
    def poses(self) -> dict[str, dict[str, float]]:
        """The poses that the robot can be sent to, by name: those of `home` and `park` that are given."""
        named = {'home': self.home, 'park': self.park}
        return {name: pose for name, pose in named.items() if pose is not None}

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Camera names in the order the model sees them."""
        return tuple(self.cameras)

    def action_positions(self, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Measured positions ``[A]`` of the action joints, taken from a state vector ``[S]``."""
        names = self.state.names
        return np.array([state[names.index(f'{joint}.position')] for joint in self.action.joints])


def load_robot(path: str | Path) -> Robot:
    """Read and validate a robot file.

    Raises:
        RobotFileError: the file is missing, is not YAML, or breaks the schema; all problems are listed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise RobotFileError(f'robot file {path}: cannot be read ({error}); give the path of a YAML robot file') from error
    return parse_robot(text, source=str(path), folder=path.absolute().parent)


def parse_robot(text: str, source: str = 'robot file', folder: Path | None = None) -> Robot:
    """Validate the text of a robot file. Raises RobotFileError.

    ``source`` names it in messages; paths in it are relative to ``folder``, or stay as they are where that is None.
    """
    try:
        robot = validate_mapping(parse_mapping(text, Robot, source), Robot, source)
    except SchemaError as error:
        raise RobotFileError(str(error)) from error
    return robot if folder is None else _with_paths_from(folder, robot)


def remapped(robot: Robot, rules: Sequence[str]) -> Robot:
    """The robot where a recording has other names of topics: each rule is ``OLD:=NEW`` as `ros2 bag play --remap` has it, NEW being
    the robot file's name of what was recorded as OLD.

    Raises:
        RobotFileError: a rule is not of that form, or the robot file has no such topic.
    """
    recorded: dict[str, str] = {}
    for rule in rules:
        old, sign, new = rule.partition(':=')
        if not (old and sign and new):
            raise RobotFileError(f'remap {rule!r} is not of the form OLD:=NEW, such as /cam0/image:=/camera/image')
        recorded[new] = old
    met: set[str] = set()

    def renamed(value: Any, key: str = '') -> Any:
        if isinstance(value, dict):
            return {name: renamed(inner, name) for name, inner in value.items()}
        if key not in ('topic', 'camera_info', 'state_topic') or value is None:
            return value
        met.add(value)
        return recorded.get(value, value)

    data = renamed(robot.model_dump(mode='json'))
    unknown = sorted(set(recorded) - met)
    if unknown:
        raise RobotFileError(f'remap: robot {robot.name!r} has no topic {unknown[0]}; it has {", ".join(sorted(met))}')
    try:
        return validate_mapping(data, Robot, 'robot file with remapped topics')
    except SchemaError as error:
        raise RobotFileError(str(error)) from error


def _with_paths_from(folder: Path, robot: Robot) -> Robot:
    if robot.workspace is None:
        return robot
    urdf = str(folder / robot.workspace.urdf)
    return robot.model_copy(update={'workspace': robot.workspace.model_copy(update={'urdf': urdf})})


def _repeated(place: str, values: tuple[str, ...]) -> list[str]:
    return [f'{place}: {value!r} is listed twice' for value in sorted({v for v in values if values.count(v) > 1})]
