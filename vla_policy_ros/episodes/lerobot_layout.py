"""Files of a LeRobot dataset: where the rows, videos and instructions of an episode are, for v2.0, v2.1 and v3.0.

Up to v2.1 each episode has files of its own and JSON lines say what there is; in v3.0 files hold many episodes, and parquet tables
under ``meta/episodes`` say where each begins. Only what is asked for is read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vla_policy_ros.episodes.episode import EpisodeError

INFO_FILE = 'meta/info.json'
VERSIONS = ('v2.0', 'v2.1', 'v3.0')
TASK_COLUMNS = ('task', '__index_level_0__')  # the index of the table of tasks, as pandas calls it


@dataclass(frozen=True)
class EpisodeFiles:
    """Where one episode is.

    Attributes:
        index: its number in the dataset.
        data: parquet file, which may hold other episodes too.
        videos: feature to (file, second at which the episode begins in it).
    """

    index: int
    data: Path
    videos: Mapping[str, tuple[Path, float]]


class LeRobotLayout:
    """A dataset folder.

    Attributes:
        root: the folder.
        info: what ``meta/info.json`` says.

    Raises:
        EpisodeError: it is not a LeRobot dataset, or of a version that cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        file = root / INFO_FILE
        if not file.is_file():
            raise EpisodeError(f'{root} is not a LeRobot dataset: it has no {INFO_FILE}')
        self.info = _json(file)
        self.version = str(self.info.get('codebase_version'))
        if self.version not in VERSIONS:
            raise EpisodeError(f'{root}: LeRobot {self.version} cannot be read; known are {", ".join(VERSIONS)}')
        missing = [key for key in ('fps', 'features', 'data_path') if not self.info.get(key)]
        if missing:
            raise EpisodeError(f'{file}: {missing[0]} is missing; the file is damaged or of another format')

    @property
    def fps(self) -> float:
        """Rows per second."""
        return float(self.info['fps'])

    @property
    def features(self) -> Mapping[str, Mapping[str, Any]]:
        """Features by name, as described in ``info.json``."""
        features: Mapping[str, Mapping[str, Any]] = self.info['features']
        return features

    @cached_property
    def tasks(self) -> dict[int, str]:
        """Instructions by ``task_index``."""
        if not self._is_v3:
            return {int(line['task_index']): str(line['task']) for line in _json_lines(self.root / 'meta/tasks.jsonl', 'task')}
        table = read_table(self.root / 'meta/tasks.parquet')
        column = next((name for name in TASK_COLUMNS if name in table.column_names), None)
        if column is None or 'task_index' not in table.column_names:
            raise EpisodeError(f'{self.root}/meta/tasks.parquet needs the columns task and task_index, has {table.column_names}')
        pairs = zip(table['task_index'].to_pylist(), table[column].to_pylist(), strict=True)
        return {int(index): str(task) for index, task in pairs}

    @cached_property
    def episodes(self) -> list[int]:
        """Numbers of the episodes whose rows are there. Of a dataset that was fetched in part, some are not."""
        if self._is_v3:
            return sorted(row['episode_index'] for row in self._rows.values())
        listed = [int(line['episode_index']) for line in _json_lines(self.root / 'meta/episodes.jsonl', 'episode_index')]
        return [index for index in sorted(listed) if self._legacy_data(index).is_file()]

    def files(self, index: int) -> EpisodeFiles:
        """Where an episode is. Raises EpisodeError where it is not in the dataset."""
        if index not in self.episodes:
            raise EpisodeError(f'{self.root} has no episode {index}; it has {_ranges(self.episodes)}')
        videos = [key for key, feature in self.features.items() if feature.get('dtype') == 'video']
        if not self._is_v3:
            return EpisodeFiles(index, self._legacy_data(index), {key: (self._legacy_video(index, key), 0.0) for key in videos})
        row = self._rows[index]
        try:
            data = self._path('data_path', chunk_index=row['data/chunk_index'], file_index=row['data/file_index'])
            places = {
                key: (
                    self._path(
                        'video_path',
                        video_key=key,
                        chunk_index=row[f'videos/{key}/chunk_index'],
                        file_index=row[f'videos/{key}/file_index'],
                    ),
                    float(row[f'videos/{key}/from_timestamp']),
                )
                for key in videos
            }
        except (KeyError, TypeError) as error:
            raise EpisodeError(f'{self.root}/meta/episodes: episode {index} lacks {error}; the table is damaged') from error
        return EpisodeFiles(index, data, places)

    @property
    def _is_v3(self) -> bool:
        return self.version == 'v3.0'

    @cached_property
    def _rows(self) -> dict[int, dict[str, Any]]:
        """v3.0: the row of each episode, without its statistics."""
        files = sorted((self.root / 'meta/episodes').glob('*/*.parquet'))
        if not files:
            raise EpisodeError(f'{self.root} has no tables under meta/episodes; fetch or convert the dataset again')
        rows = {}
        for file in files:
            names = [name for name in read_schema(file).names if not name.startswith('stats/')]
            for row in read_table(file, names).to_pylist():
                if 'episode_index' not in row:
                    raise EpisodeError(f'{file} has no column episode_index; it has {", ".join(names)}')
                rows[int(row['episode_index'])] = row
        return rows

    def _legacy_data(self, index: int) -> Path:
        return self._path('data_path', episode_chunk=self._chunk(index), episode_index=index)

    def _legacy_video(self, index: int, key: str) -> Path:
        return self._path('video_path', episode_chunk=self._chunk(index), episode_index=index, video_key=key)

    def _chunk(self, index: int) -> int:
        return index // int(self.info.get('chunks_size') or 1000)

    def _path(self, template: str, **values: Any) -> Path:
        text = self.info.get(template)
        try:
            return self.root / str(text).format(**values)
        except (KeyError, ValueError, IndexError) as error:
            raise EpisodeError(f'{self.root / INFO_FILE}: {template} {text!r} cannot be filled in ({error})') from error


def read_table(file: Path, columns: Collection[str] | None = None, episode: int | None = None) -> pa.Table:
    """Columns of a parquet file, of one episode or all. Raises EpisodeError where it is missing or damaged."""
    filters = None if episode is None else [('episode_index', '=', episode)]
    try:
        return pq.read_table(file, columns=None if columns is None else list(columns), filters=filters, partitioning=None)
    except FileNotFoundError as error:
        raise EpisodeError(f'{file} is missing; fetch or convert the dataset again') from error
    except (pa.ArrowException, OSError) as error:
        raise EpisodeError(f'{file} cannot be read, it is damaged ({error}); fetch the dataset again') from error


def read_schema(file: Path) -> pa.Schema:
    """Columns of a parquet file. Raises EpisodeError where it is missing or damaged."""
    try:
        return pq.read_schema(file)
    except FileNotFoundError as error:
        raise EpisodeError(f'{file} is missing; fetch or convert the dataset again') from error
    except (pa.ArrowException, OSError) as error:
        raise EpisodeError(f'{file} cannot be read, it is damaged ({error}); fetch the dataset again') from error


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EpisodeError(f'{file} cannot be read, it is damaged ({error}); fetch the dataset again') from error
    if not isinstance(data, dict):
        raise EpisodeError(f'{file} must hold a JSON object')
    return data


def _json_lines(file: Path, key: str) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines() if line.strip()]
        for line in lines:
            line[key]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise EpisodeError(f'{file} cannot be read, it is damaged ({error!r}); fetch the dataset again') from error
    return lines


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ', '.join('-'.join(map(str, part)) for part in parts) or 'none'
