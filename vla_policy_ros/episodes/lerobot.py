"""A LeRobot dataset folder as episodes, without its library and without a hub.

Row k of an episode is a step: its images, its state, and its action, which is the target one row later, as `types.ActionChunk`
has it. The rows lie on a grid of ``1 / fps``. A dataset that was converted from a bag by this package also holds the stamps and the
intrinsics of the recording, and is read with them; other ones have no clock, so theirs starts at `FIRST_STAMP_NS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vla_policy_ros.episodes.commands import CommandError, Commands, targets_of_rows
from vla_policy_ros.episodes.episode import Episode, EpisodeError, InputTimes, Provenance, Step, read_provenance
from vla_policy_ros.episodes.lerobot_layout import EpisodeFiles, LeRobotLayout, read_schema, read_table
from vla_policy_ros.episodes.mapping import IMAGE_PREFIX, DatasetMapping, ResolvedMapping, resolve_mapping
from vla_policy_ros.episodes.video import VideoError, frames
from vla_policy_ros.observation.instruction import InstructionError, clean_instruction
from vla_policy_ros.observation.intrinsics import IntrinsicsError
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S, CameraView, Observation

# Features that conversion adds; see `lerobot_writer`.
STAMPS_FEATURE = 'stamps_ns'
INTRINSICS_PREFIX = 'intrinsics.'
FIRST_STAMP_NS = NS_PER_S  # zero would say that there is no stamp
# LeRobot's own tolerance for the distance of a timestamp from the grid.
_GRID_TOLERANCE_S = 1e-4


class LeRobotDataset:
    """A dataset of one robot.

    Args:
        root: the folder.
        robot: the robot file.
        mapping: names that differ.

    Raises:
        EpisodeError: it cannot be read, or does not have what the robot needs.
    """

    def __init__(self, root: Path, robot: Robot, mapping: DatasetMapping | None = None) -> None:
        self.layout = LeRobotLayout(root)
        self.robot = robot
        self.mapping = resolve_mapping(robot, self.layout.features, mapping or DatasetMapping(), str(root))

    @property
    def episodes(self) -> list[int]:
        """Numbers of the episodes that are there."""
        return self.layout.episodes

    def episode(self, index: int) -> LeRobotEpisode:
        """An episode. Raises EpisodeError where it is not there or cannot be used."""
        return LeRobotEpisode(self, index)


class LeRobotEpisode(Episode):
    """One episode of a dataset. Rows whose state is not finite are left out and counted."""

    def __init__(self, dataset: LeRobotDataset, index: int) -> None:
        layout, self.robot = dataset.layout, dataset.robot
        self._fps, self._mapping = layout.fps, dataset.mapping
        self._files = layout.files(index)
        self.name = f'{layout.root.name}/{index}'
        self.skipped, self.notes = Counter(), []
        table = _rows(layout, self._files, dataset.mapping)
        stamps = _Stamps(layout, table, dataset.mapping.cameras, self.name)
        state = dataset.mapping.state.of(table)
        usable: NDArray[np.bool_] = np.all(np.isfinite(state), axis=1)
        self._count_unusable(state, usable)
        if not usable.any():
            raise EpisodeError(f'{self.name}: no row has a finite state')
        instructions = self._instructions(layout, table)
        self._row_of = np.flatnonzero(usable)
        self.steps = tuple(
            Step(
                max(images.values()),
                MappingProxyType(images),
                state[row],
                int(stamps.state[row]),
                instructions[int(table['task_index'][row, 0])],
            )
            for row in self._row_of
            for images in [{camera: int(times[row]) for camera, times in stamps.cameras.items()}]
        )
        self.commands = self._commands(dataset.mapping, table, stamps)
        self._K = {
            camera: table[key].reshape(-1, 3, 3)
            for camera, feature in dataset.mapping.cameras.items()
            if (key := INTRINSICS_PREFIX + feature.removeprefix(IMAGE_PREFIX)) in table
        }
        self.inputs = tuple(InputTimes(f'camera:{camera}', times) for camera, times in stamps.cameras.items())
        self.inputs += (InputTimes('state', stamps.state), InputTimes('command:action', stamps.action))
        self.uncalibrated = tuple(camera for camera in self.robot.camera_names if self._intrinsics(camera, 0) is None)
        self.provenance = Provenance.of(self.name, f'LeRobot {layout.version}', self.robot, read_provenance(layout.root / 'meta'))

    def observations(self, indices: Sequence[int] | None = None) -> Iterator[Observation]:
        """See `Episode.observations`: videos are decoded from the key frame before the first step on."""
        wanted = self.checked(indices)
        rows = [int(self._row_of[index]) for index in wanted]
        with ExitStack() as stack:
            sources = {}
            for camera, feature in self._mapping.cameras.items():
                sources[camera] = self._images(feature, rows)
                stack.callback(sources[camera].close)
            for index, row in zip(wanted, rows, strict=True):
                step = self.steps[index]
                try:
                    views = {camera: self._view(camera, row, next(source), step) for camera, source in sources.items()}
                except (VideoError, IntrinsicsError) as error:
                    raise EpisodeError(f'{self.name}, row {row}: {error}') from error
                yield Observation(step.stamp_ns, MappingProxyType(views), step.state, step.state_stamp_ns, step.instruction)

    def _images(self, feature: str, rows: Sequence[int]) -> Any:
        if feature in self._files.videos:
            path, begin_s = self._files.videos[feature]
            return frames(path, self._fps, rows, begin_s)
        return self._stored_images(feature, rows)

    def _stored_images(self, feature: str, rows: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Images that are stored in the table as files."""
        column = read_table(self._files.data, [feature], self._files.index)[feature]
        for row in rows:
            stored = column[row].as_py()
            data = stored.get('bytes') if isinstance(stored, dict) else stored
            pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR) if data else None
            if pixels is None:
                raise VideoError(f'image {feature} cannot be decoded')
            yield np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)

    def _view(self, camera: str, row: int, rgb: NDArray[np.uint8], step: Step) -> CameraView:
        described = self.robot.cameras[camera]
        height, width = rgb.shape[:2]
        if described.K is not None and (described.width, described.height) != (width, height):
            raise IntrinsicsError(f'image is {width}x{height} but K in the robot file is for {described.width}x{described.height}')
        return CameraView(rgb, self._intrinsics(camera, row), step.image_stamps_ns[camera])

    def _intrinsics(self, camera: str, row: int) -> NDArray[np.float64] | None:
        """K of a row: as recorded, else of the mapping, else of the robot file."""
        if camera in self._K:
            K = self._K[camera][row]
            return K if K.any() else None  # all zeros is how CameraInfo says that there is none
        return self._mapping.K.get(camera, self.robot.cameras[camera].fixed_K)

    def _count_unusable(self, state: NDArray[np.float64], usable: NDArray[np.bool_]) -> None:
        for row in np.flatnonzero(~usable):
            element = self.robot.state.names[int(np.flatnonzero(~np.isfinite(state[row]))[0])]
            self.skipped[f'no step: state {element} is not finite'] += 1

    def _instructions(self, layout: LeRobotLayout, table: dict[str, NDArray[Any]]) -> dict[int, str]:
        used = sorted({int(index) for index in table['task_index'][:, 0]})
        instructions = {}
        for index in used:
            text = self._mapping.instruction or layout.tasks.get(index)
            if text is None:
                raise EpisodeError(f'{self.name}: task_index {index} is not in meta/tasks; it has {sorted(layout.tasks)}')
            try:
                instructions[index] = clean_instruction(text, self.robot.instruction.max_length)
            except InstructionError as error:
                raise EpisodeError(f'{self.name}: {error}') from error
        return instructions

    def _commands(self, mapping: ResolvedMapping, table: dict[str, NDArray[Any]], stamps: _Stamps) -> Commands:
        action = mapping.action.of(table)
        finite = np.isfinite(action).all(axis=1)
        if not finite.all():
            self.skipped['action: a value is not finite'] += int((~finite).sum())
        rows = [(int(stamps.action[row]), action[row]) for row in np.flatnonzero(finite)]
        try:
            targets = targets_of_rows(self.robot.action.joints, rows, f'feature {mapping.action.features[0]}')
            return Commands(self.robot.action.joints, (targets,))
        except CommandError as error:
            raise EpisodeError(f'{self.name}: {error}') from error


def _rows(layout: LeRobotLayout, files: EpisodeFiles, mapping: ResolvedMapping) -> dict[str, NDArray[Any]]:
    """Columns ``[N, D]`` of an episode, without images."""
    there = read_schema(files.data).names
    needed = [*mapping.state.features, *mapping.action.features, 'timestamp', 'frame_index', 'task_index', 'episode_index']
    missing = [name for name in needed if name not in there]
    if missing:
        raise EpisodeError(f'{files.data} has no column {missing[0]!r}; it has {", ".join(there)}')
    added = [name for name in there if name == STAMPS_FEATURE or name.startswith(INTRINSICS_PREFIX)]
    table = read_table(files.data, dict.fromkeys([*needed, *added]), files.index)
    if table.num_rows == 0:
        raise EpisodeError(f'{files.data} has no row of episode {files.index}')
    return {name: _array(table[name], files.data, name) for name in table.column_names}


def _array(column: pa.ChunkedArray, file: Path, name: str) -> NDArray[Any]:
    """``[N, D]``: int64 for integers, else float64 with NaN for what is missing."""
    flat = column.combine_chunks()
    kind = flat.type
    nested = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    values = flat.flatten() if nested else flat
    if nested and (flat.null_count or len(values) % len(flat)):
        raise EpisodeError(f'{file}: rows of {name} have different lengths')
    array = values.to_numpy(zero_copy_only=False)
    if array.dtype == object:
        raise EpisodeError(f'{file}: {name} holds {kind}, not numbers')
    exact = np.issubdtype(array.dtype, np.integer)
    return np.asarray(array, dtype=np.int64 if exact else np.float64).reshape(len(flat), -1)


class _Stamps:
    """Times of the rows: int64 ``[N]`` per camera, of the state and of the target that the action is.

    Raises:
        EpisodeError: times go back, or rows are missing.
    """

    def __init__(self, layout: LeRobotLayout, table: dict[str, NDArray[Any]], cameras: Mapping[str, str], name: str) -> None:
        period_ns = round(NS_PER_S / layout.fps)
        index, seconds = table['frame_index'][:, 0], table['timestamp'][:, 0]
        if (index != np.arange(len(index))).any():
            row = int(np.flatnonzero(index != np.arange(len(index)))[0])
            raise EpisodeError(f'{name}: row {row} has frame_index {index[row]}: rows are missing or out of order')
        back = np.flatnonzero(~(np.diff(seconds) > 0))
        if back.size:
            row = int(back[0])
            raise EpisodeError(
                f'{name}: time goes from {seconds[row]:.4f} s to {seconds[row + 1]:.4f} s at row {row + 1}; it must increase'
            )
        grid = index / layout.fps
        seconds = np.where(np.abs(seconds - grid) < _GRID_TOLERANCE_S, grid, seconds)
        times = FIRST_STAMP_NS + np.round(seconds * NS_PER_S).astype(np.int64)
        self.cameras = dict.fromkeys(cameras, times)
        self.state, self.action = times, times + period_ns
        if STAMPS_FEATURE in table:
            columns = {str(n): table[STAMPS_FEATURE][:, i] for i, n in enumerate(layout.features[STAMPS_FEATURE]['names'])}
            self.cameras = {camera: columns.get(feature.removeprefix(IMAGE_PREFIX), times) for camera, feature in cameras.items()}
            self.state, self.action = columns['state'], columns['action']
