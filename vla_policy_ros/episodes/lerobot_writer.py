"""Episodes to a LeRobot dataset of version 3.0.

Row k of an episode is a step. LeRobot wants rows on a grid of ``1 / fps``, so its ``timestamp`` is nominal; the true stamps, and
the intrinsics, are kept in two kinds of features that LeRobot's policies do not look at:

- ``stamps_ns``: int64, one element per camera, ``state`` and ``action`` (the time at which the action is the target);
- ``intrinsics.<camera>``: float64 ``[9]``, row-major K in pixels of the image, all zeros where there is none.

Everything is written into the folder given; whoever calls makes it visible when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vla_policy_ros.episodes.episode import Episode, EpisodeError, write_json
from vla_policy_ros.episodes.lerobot import INTRINSICS_PREFIX, STAMPS_FEATURE
from vla_policy_ros.episodes.lerobot_stats import IMAGES_PER_EPISODE, ImageHistogram, Stats, vector_stats
from vla_policy_ros.episodes.mapping import ACTION_FEATURE, IMAGE_PREFIX, STATE_FEATURE
from vla_policy_ros.episodes.video import VideoError, VideoWriter
from vla_policy_ros.robot import Robot
from vla_policy_ros.types import NS_PER_S, CameraView, Observation

CHUNKS_SIZE, DATA_FILE_MB, VIDEO_FILE_MB = 1000, 100, 200
DATA_PATH = 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
VIDEO_PATH = 'videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4'
EPISODES_PATH = 'meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
_MB = 1024 * 1024
_DEFAULTS = ('timestamp', 'frame_index', 'episode_index', 'index', 'task_index')


@dataclass
class _Place:
    """Where the next episode of one kind of file goes."""

    chunk: int = 0
    file: int = 0

    def advance(self) -> None:
        self.chunk, self.file = (self.chunk, self.file + 1) if self.file + 1 < CHUNKS_SIZE else (self.chunk + 1, 0)


@dataclass
class _Video:
    """The video files of one camera."""

    feature: str
    place: _Place = field(default_factory=_Place)
    writer: VideoWriter | None = None


class LeRobotWriter:
    """Writes one dataset.

    Args:
        root: an empty folder.
        robot: whose episodes they are.
        fps: rows per second.
        codec: of the videos, see `video.choose_codec`.
    """

    def __init__(self, root: Path, robot: Robot, fps: int, codec: str) -> None:
        self.root, self.robot, self.fps, self.codec = root, robot, fps, codec
        self.frames = 0
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._vectors: dict[str, list[NDArray[Any]]] = {}
        self._histograms = {camera: ImageHistogram() for camera in robot.camera_names}
        self._videos = {camera: _Video(IMAGE_PREFIX + camera) for camera in robot.camera_names}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._data: Any = None
        self._data_place = _Place()

    @property
    def episodes(self) -> int:
        """How many were added."""
        return len(self._rows)

    def add(self, episode: Episode, steps: range, on_observation: Callable[[Observation], None]) -> None:
        """Append the steps of an episode as one episode of the dataset.

        Args:
            episode: the source.
            steps: which of its steps.
            on_observation: sees each observation as it passes.

        Raises:
            EpisodeError: an image cannot be decoded or is of another size than those before.
        """
        number = len(self._rows)
        places = {camera: self._begin_video(video) for camera, video in self._videos.items()}
        histograms = {camera: ImageHistogram() for camera in self.robot.camera_names}
        intrinsics: dict[str, list[NDArray[np.float64]]] = {camera: [] for camera in self.robot.camera_names}
        every = max(1, len(steps) // IMAGES_PER_EPISODE)
        for row, observation in enumerate(episode.observations(steps)):
            on_observation(observation)
            for camera, view in observation.cameras.items():
                self._add_frame(camera, view, episode.name)
                intrinsics[camera].append(np.zeros(9) if view.K is None else view.K.ravel())
                if row % every == 0:
                    histograms[camera].add(view.rgb)
        table = self._table(episode, steps, number, intrinsics)
        where = self._write_rows(table)
        stats = {name: vector_stats(values) for name, values in table.items()}
        for camera, histogram in histograms.items():
            stats[IMAGE_PREFIX + camera] = histogram.stats()
            self._histograms[camera].merge(histogram)
        for name, values in table.items():
            self._vectors.setdefault(name, []).append(values)
        self._rows.append(self._episode_row(episode, steps, number, where, places, stats))
        self.frames += len(steps)

    def close(self) -> None:
        """Finish the files and write ``meta/``. At least one episode must have been added."""
        for video in self._videos.values():
            if video.writer is not None:
                video.writer.close()
        if self._data is not None:
            self._data.close()
        meta = self.root / 'meta'
        episodes = self.root / EPISODES_PATH.format(chunk_index=0, file_index=0)
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._rows), episodes, compression='snappy')
        pq.write_table(_tasks_table(list(self._tasks)), meta / 'tasks.parquet', compression='snappy')
        stats = {name: vector_stats(np.concatenate(parts)) for name, parts in self._vectors.items()}
        stats |= {IMAGE_PREFIX + camera: histogram.stats() for camera, histogram in self._histograms.items()}
        write_json(meta / 'stats.json', stats)
        write_json(meta / 'info.json', self._info())

    def abort(self) -> None:
        """Close the files as they are."""
        for video in self._videos.values():
            if video.writer is not None:
                video.writer.abort()
        if self._data is not None:
            self._data.close()

    # ---- rows -------------------------------------------------------------------------------------------------------------------

    def _table(
        self, episode: Episode, steps: range, number: int, intrinsics: Mapping[str, list[NDArray[np.float64]]]
    ) -> dict[str, NDArray[Any]]:
        """Columns ``[N, D]`` of an episode."""
        chosen = [episode.steps[index] for index in steps]
        times = np.array([step.stamp_ns for step in chosen], dtype=np.int64) + round(NS_PER_S / self.fps)
        tasks = [self._tasks.setdefault(step.instruction, len(self._tasks)) for step in chosen]
        rows = np.arange(len(chosen))
        stamps = [[step.image_stamps_ns[c] for c in self.robot.camera_names] + [step.state_stamp_ns] for step in chosen]
        return {
            STATE_FEATURE: np.stack([step.state for step in chosen]).astype(np.float32),
            ACTION_FEATURE: episode.commands.sample(times).positions.astype(np.float32),
            STAMPS_FEATURE: np.concatenate([np.array(stamps, dtype=np.int64), times[:, None]], axis=1),
            **{INTRINSICS_PREFIX + camera: np.stack(matrices) for camera, matrices in intrinsics.items()},
            'timestamp': (rows / self.fps).astype(np.float32)[:, None],
            'frame_index': rows[:, None],
            'episode_index': np.full((len(chosen), 1), number),
            'index': self.frames + rows[:, None],
            'task_index': np.array(tasks)[:, None],
        }

    def _write_rows(self, table: Mapping[str, NDArray[Any]]) -> _Place:
        """One row group per episode, as LeRobot writes them."""
        if self._data is not None and Path(self._data.where).stat().st_size >= DATA_FILE_MB * _MB:
            self._data.close()
            self._data = None
            self._data_place.advance()
        arrays = {name: _arrow(name, values) for name, values in table.items()}
        if self._data is None:
            path = self.root / DATA_PATH.format(chunk_index=self._data_place.chunk, file_index=self._data_place.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, pa.table(arrays).schema, compression='snappy')
        self._data.write_table(pa.table(arrays))
        return _Place(self._data_place.chunk, self._data_place.file)

    def _episode_row(
        self, episode: Episode, steps: range, number: int, where: _Place, places: Mapping[str, tuple[_Place, float]],
        stats: Mapping[str, Stats],
    ) -> dict[str, Any]:  # fmt: skip
        row: dict[str, Any] = {
            'episode_index': number,
            'tasks': list(dict.fromkeys(episode.steps[index].instruction for index in steps)),
            'length': len(steps),
            'data/chunk_index': where.chunk,
            'data/file_index': where.file,
            'dataset_from_index': self.frames,
            'dataset_to_index': self.frames + len(steps),
        }
        for camera, (place, begin_s) in places.items():
            prefix = f'videos/{IMAGE_PREFIX}{camera}'
            row |= {
                f'{prefix}/chunk_index': place.chunk,
                f'{prefix}/file_index': place.file,
                f'{prefix}/from_timestamp': begin_s,
                f'{prefix}/to_timestamp': begin_s + len(steps) / self.fps,
            }
        row |= {f'stats/{name}/{key}': value for name, values in stats.items() for key, value in values.items()}
        return row | {'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0}

    # ---- videos -----------------------------------------------------------------------------------------------------------------

    def _begin_video(self, video: _Video) -> tuple[_Place, float]:
        """Where the next episode begins: file, and second in it."""
        if video.writer is not None and video.writer.size_bytes >= VIDEO_FILE_MB * _MB:
            video.writer.close()
            video.writer = None
            video.place.advance()
        begin_s = 0.0 if video.writer is None else video.writer.count / self.fps
        return _Place(video.place.chunk, video.place.file), begin_s

    def _add_frame(self, camera: str, view: CameraView, name: str) -> None:
        video, (height, width) = self._videos[camera], view.rgb.shape[:2]
        size = self._sizes.setdefault(camera, (width, height))
        if size != (width, height):
            raise EpisodeError(
                f'{name}: camera {camera!r} has images of {width}x{height}, but {size[0]}x{size[1]} before; '
                'a LeRobot dataset has one size: convert them apart'
            )
        if video.writer is None:
            path = self.root / VIDEO_PATH.format(
                video_key=video.feature, chunk_index=video.place.chunk, file_index=video.place.file
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            video.writer = VideoWriter(path, self.codec, self.fps, width, height)
        try:
            video.writer.add(view.rgb)
        except VideoError as error:
            raise EpisodeError(str(error)) from error

    # ---- meta -------------------------------------------------------------------------------------------------------------------

    def _info(self) -> dict[str, Any]:
        return {
            'codebase_version': 'v3.0',
            'robot_type': self.robot.name,
            'total_episodes': len(self._rows),
            'total_frames': self.frames,
            'total_tasks': len(self._tasks),
            'chunks_size': CHUNKS_SIZE,
            'data_files_size_in_mb': DATA_FILE_MB,
            'video_files_size_in_mb': VIDEO_FILE_MB,
            'fps': self.fps,
            'splits': {'train': f'0:{len(self._rows)}'},
            'data_path': DATA_PATH,
            'video_path': VIDEO_PATH,
            'features': self._features(),
        }

    def _features(self) -> dict[str, Any]:
        cameras = self.robot.camera_names
        names = self.robot.state.names if self.robot.state.fields != ('position',) else self.robot.state.joints
        k = [f'k{index}' for index in range(9)]
        features = {
            STATE_FEATURE: _feature('float32', list(names)),
            ACTION_FEATURE: _feature('float32', list(self.robot.action.joints)),
            **{IMAGE_PREFIX + camera: self._video_feature(camera) for camera in cameras},
            STAMPS_FEATURE: _feature('int64', [*cameras, 'state', 'action']),
            **{INTRINSICS_PREFIX + camera: _feature('float64', k) for camera in cameras},
        }
        kinds = {'timestamp': 'float32'}
        return features | {name: {'dtype': kinds.get(name, 'int64'), 'shape': [1], 'names': None} for name in _DEFAULTS}

    def _video_feature(self, camera: str) -> dict[str, Any]:
        (width, height), writer = self._sizes[camera], self._videos[camera].writer
        return {
            'dtype': 'video',
            'shape': [height, width, 3],
            'names': ['height', 'width', 'channels'],
            'info': {
                'video.height': height,
                'video.width': width,
                'video.codec': self.codec,
                'video.pix_fmt': writer.pixel_format if writer else 'yuv420p',
                'video.is_depth_map': False,
                'video.fps': self.fps,
                'video.channels': 3,
                'has_audio': False,
            },
        }


def _feature(dtype: str, names: list[str]) -> dict[str, Any]:
    return {'dtype': dtype, 'shape': [len(names)], 'names': names}


def _arrow(name: str, values: NDArray[Any]) -> pa.Array:
    """A column: a scalar per row for LeRobot's own columns, else a list of fixed length."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if name in _DEFAULTS else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _tasks_table(tasks: list[str]) -> pa.Table:
    """``task_index`` by the index ``task``, in the form in which pandas stores an index: LeRobot reads it through pandas."""
    table = pa.table({'task_index': pa.array(range(len(tasks)), pa.int64()), 'task': pa.array(tasks, pa.string())})
    described = {
        'index_columns': ['task'],
        'column_indexes': [
            {'name': None, 'field_name': None, 'pandas_type': 'unicode', 'numpy_type': 'object', 'metadata': {'encoding': 'UTF-8'}}
        ],
        'columns': [
            {'name': 'task_index', 'field_name': 'task_index', 'pandas_type': 'int64', 'numpy_type': 'int64', 'metadata': None},
            {'name': 'task', 'field_name': 'task', 'pandas_type': 'unicode', 'numpy_type': 'object', 'metadata': None},
        ],
        'creator': {'library': 'pyarrow', 'version': pa.__version__},
        'pandas_version': '2.0.0',
    }
    return table.replace_schema_metadata({'pandas': json.dumps(described)})
