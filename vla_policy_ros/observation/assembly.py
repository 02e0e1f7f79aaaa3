"""Assembles observations from latest-value slots, with age and skew gates on header stamps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_policy_ros.observation.images import ImageError, check_image, decode_compressed, decode_image
from vla_policy_ros.observation.instruction import InstructionError, clean_instruction
from vla_policy_ros.observation.intrinsics import IntrinsicsError, intrinsics_of
from vla_policy_ros.observation.joints import JointStateError, state_vector
from vla_policy_ros.observation.slots import Slot, seconds
from vla_policy_ros.robot import Camera, Robot
from vla_policy_ros.types import NS_PER_S, CameraView, Observation


class ObservationError(ValueError):
    """A snapshot that cannot become an observation; the message names the camera and what is wrong."""


@dataclass(frozen=True)
class InputHealth:
    """How one input does: what `PolicyStatus` and the diagnostics show. Times in s, NaN where nothing applies."""

    name: str
    topic: str
    rate: float
    age: float
    max_age: float
    problem: str


@dataclass(frozen=True)
class Snapshot:
    """One message of every input, still undecoded: the newest ones, or those that a live node had looked at.

    Attributes:
        images: camera name to (image message, stamp in ns, CameraInfo message or None).
        state: float64 ``[S]``.
    """

    robot: Robot
    images: Mapping[str, tuple[Any, int, Any | None]]
    state: NDArray[np.float64]
    state_stamp_ns: int
    instruction: str

    @property
    def stamp_ns(self) -> int:
        """Acquisition time of the newest image."""
        return max(stamp for _, stamp, _ in self.images.values())

    @property
    def input_stamps(self) -> dict[str, int]:
        """Stamp of every message used, by input name."""
        stamps = {f'camera:{name}': stamp for name, (_, stamp, _) in self.images.items()}
        return {**stamps, 'state': self.state_stamp_ns}

    def decode(self) -> Observation:
        """Decode the images. Expensive: run it on the executor thread. Raises ObservationError."""
        views = {}
        for name, (message, stamp_ns, info) in self.images.items():
            try:
                views[name] = _view(self.robot.cameras[name], message, stamp_ns, info)
            except (ImageError, IntrinsicsError) as error:
                raise ObservationError(f'camera {name!r}: {error} (topic {self.robot.cameras[name].topic})') from error
        return Observation(self.stamp_ns, MappingProxyType(views), self.state, self.state_stamp_ns, self.instruction)


class ObservationAssembler:
    """The latest value of every input that the robot file names.

    Every ``put_*`` method returns None, or the sentence that says why the message was refused. Not thread-safe: all methods belong
    to the thread that receives messages.
    """

    def __init__(self, robot: Robot) -> None:
        timing = robot.timing
        image_age, state_age = round(timing.max_image_age * NS_PER_S), round(timing.max_state_age * NS_PER_S)
        self.robot = robot
        self._cameras = {name: Slot(f'camera {name!r}', c.topic, image_age) for name, c in robot.cameras.items()}
        self._infos = {
            name: Slot(f'camera_info of {name!r}', c.camera_info, None) for name, c in robot.cameras.items() if c.camera_info
        }
        self._state = Slot('joint state', robot.state.topic, state_age)
        self._instruction = Slot('instruction', robot.instruction.topic, None, 'publish one or call ~/set_instruction')
        self._max_future_ns = round(timing.max_future * NS_PER_S)

    def clear(self) -> None:
        """Forget all sensor values, as after a jump of the clock; the instruction stays, it has no stamp."""
        for slot in (*self._cameras.values(), *self._infos.values(), self._state):
            slot.clear()

    def put_image(self, camera: str, message: Any, now_ns: int) -> str | None:
        """Offer a sensor_msgs/Image or CompressedImage of ``camera`` that arrived at ``now_ns``."""
        slot = self._cameras[camera]
        if self.robot.cameras[camera].transport == 'raw':
            try:
                check_image(message)
            except ImageError as error:
                return slot.refuse(str(error))
        return slot.offer(message, _stamp_ns(message), now_ns, self._max_future_ns)

    def put_camera_info(self, camera: str, message: Any, now_ns: int) -> str | None:
        """Offer a sensor_msgs/CameraInfo. It may repeat an old stamp: intrinsics do not age."""
        slot = self._infos[camera]
        width = (int(message.roi.width) or int(message.width)) // max(1, int(message.binning_x))
        height = (int(message.roi.height) or int(message.height)) // max(1, int(message.binning_y))
        try:
            intrinsics_of(message, width, height)
        except IntrinsicsError as error:
            slot.clear()  # a camera that is no longer calibrated must not go on with the old K
            return slot.refuse(str(error))
        return slot.offer(message, max(now_ns, 1), now_ns, self._max_future_ns)

    def put_joint_state(self, message: Any, now_ns: int) -> str | None:
        """Offer a sensor_msgs/JointState."""
        try:
            vector = state_vector(message, self.robot.state)
        except JointStateError as error:
            return self._state.refuse(str(error))
        return self._state.offer(vector, _stamp_ns(message), now_ns, self._max_future_ns)

    def put_instruction(self, text: str, now_ns: int) -> str | None:
        """Set the instruction. An empty one means that there is nothing to do; a refused one clears the instruction too, because
        whoever sent it no longer wants the old one."""
        slot = self._instruction
        slot.clear()
        try:
            text = clean_instruction(text, self.robot.instruction.max_length)
        except InstructionError as error:
            return slot.refuse(str(error))
        if text:
            slot.offer(text, max(now_ns, 1), now_ns, self._max_future_ns)
        return None

    @property
    def instruction(self) -> str:
        """The instruction in force, or an empty string."""
        return self._instruction.value or ''

    @property
    def state(self) -> tuple[NDArray[np.float64], int] | None:
        """The newest state vector and its stamp, whatever its age, or None."""
        return None if self._state.value is None else (self._state.value, self._state.stamp_ns)

    def problems(self, now_ns: int) -> list[str]:
        """Everything that keeps an observation from being made at ``now_ns``, as sentences for the operator."""
        problems = [problem for slot in self._slots() if (problem := slot.problem(now_ns))]
        return problems or list(self._skew_problem().values())

    def snapshot(self) -> Snapshot:
        """The newest messages; what is missing is None. It can be decoded where ``problems`` is empty."""
        images = {}
        for name, slot in self._cameras.items():
            info = self._infos.get(name)
            images[name] = (slot.value, slot.stamp_ns, info.value if info else None)
        return Snapshot(self.robot, MappingProxyType(images), self._state.value, self._state.stamp_ns, self.instruction)

    def silent_slots(self) -> list[Slot]:
        """Inputs without a usable message so far; whoever knows the reason may write it into their ``remedy``."""
        return [slot for slot in self._slots() if slot.value is None]

    def health(self, now_ns: int) -> list[InputHealth]:
        """One row per input."""
        rows = []
        apart = {} if any(slot.problem(now_ns) for slot in self._slots()) else self._skew_problem()
        for key, slot in self._named_slots():
            age = slot.age_ns(now_ns)
            rows.append(
                InputHealth(
                    name=key,
                    topic=slot.topic,
                    rate=slot.rate(now_ns),
                    age=float('nan') if age is None else seconds(age),
                    max_age=float('nan') if slot.max_age_ns is None else seconds(slot.max_age_ns),
                    problem=slot.problem(now_ns) or apart.get(key, ''),
                )
            )
        return rows

    def _named_slots(self) -> list[tuple[str, Slot]]:
        return [
            *((f'camera:{name}', slot) for name, slot in self._cameras.items()),
            *((f'camera_info:{name}', slot) for name, slot in self._infos.items()),
            ('state', self._state),
            ('instruction', self._instruction),
        ]

    def _slots(self) -> list[Slot]:
        return [slot for _, slot in self._named_slots()]

    def _skew_problem(self) -> dict[str, str]:
        """The input that is of another moment than the others, and the sentence about it; empty if all belong together."""
        stamps = {name: slot.stamp_ns for name, slot in self._cameras.items()}
        newest, oldest = max(stamps, key=stamps.__getitem__), min(stamps, key=stamps.__getitem__)
        timing = self.robot.timing
        skew = seconds(stamps[newest] - stamps[oldest])
        if skew > timing.max_camera_skew:
            return {
                f'camera:{oldest}': f'camera {oldest!r} is {skew:.3f} s behind camera {newest!r} '
                f'(limit {timing.max_camera_skew:g} s): check their rates and clocks'
            }
        skew = abs(seconds(stamps[newest] - self._state.stamp_ns))
        if skew > timing.max_state_skew:
            return {
                'state': f'joint state and camera {newest!r} are {skew:.3f} s apart (limit {timing.max_state_skew:g} s): '
                'check their rates and clocks'
            }
        return {}


def _stamp_ns(message: Any) -> int:
    stamp = message.header.stamp
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def _view(camera: Camera, message: Any, stamp_ns: int, info: Any | None) -> CameraView:
    rgb = decode_image(message) if camera.transport == 'raw' else decode_compressed(message)
    height, width = rgb.shape[:2]
    if info is not None:
        return CameraView(rgb, intrinsics_of(info, width, height), stamp_ns)
    if camera.K is not None and (camera.width, camera.height) != (width, height):
        raise IntrinsicsError(f'image is {width}x{height} but K in the robot file is for {camera.width}x{camera.height}')
    return CameraView(rgb, camera.fixed_K, stamp_ns)
