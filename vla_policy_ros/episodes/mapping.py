"""Which feature of a LeRobot dataset is which camera, joint and field of a robot.

What has the same name needs no word. The rest is said in a mapping: a YAML file, or options of the command line. Whatever stays
open is an error that lists what the dataset has and names the closest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vla_policy_ros.episodes.episode import EpisodeError
from vla_policy_ros.robot import Robot
from vla_policy_ros.strict_yaml import SchemaError, Section, parse_mapping, unknown_name, validate_mapping

STATE_FEATURE, ACTION_FEATURE, IMAGE_PREFIX = 'observation.state', 'action', 'observation.images.'
# How datasets spell the field of a joint behind its name.
_FIELD_SUFFIXES = {'position': ('', '.position', '.pos'), 'velocity': ('.velocity', '.vel'), 'effort': ('.effort', '.eff')}


class CameraMapping(Section):
    """Where the images of one camera are."""

    feature: str = Field(description='Image or video feature of the dataset.')
    K: tuple[float, float, float, float, float, float, float, float, float] | None = Field(
        None, description='Row-major 3x3 intrinsics in pixels of these images, where they are known and the dataset has none.'
    )


class DatasetMapping(Section):
    """How a dataset names what the robot file names. Everything is optional."""

    cameras: dict[str, CameraMapping] = Field({}, description='Camera of the robot file to feature.')
    joints: dict[str, str] = Field({}, description="Joint of the robot file to the dataset's name of it.")
    state: str = Field(STATE_FEATURE, description='Feature of the state.')
    action: str = Field(ACTION_FEATURE, description='Feature of the action, absolute positions.')
    state_names: tuple[str, ...] | None = Field(None, description='Names of the elements of the state, where it has none.')
    action_names: tuple[str, ...] | None = Field(None, description='Names of the elements of the action, where it has none.')
    instruction: str | None = Field(None, description="Instead of the dataset's tasks.")


def load_mapping(path: str | Path) -> DatasetMapping:
    """Read a mapping file. Raises EpisodeError where it is missing, is not YAML, or breaks the schema."""
    try:
        text = Path(path).read_text(encoding='utf-8')
        return validate_mapping(parse_mapping(text, DatasetMapping, str(path)), DatasetMapping, str(path))
    except (OSError, UnicodeDecodeError, SchemaError) as error:
        raise EpisodeError(f'mapping {path} cannot be used: {error}') from error


def with_cameras(mapping: DatasetMapping, pairs: Sequence[str]) -> DatasetMapping:
    """``mapping`` with cameras given as ``camera=feature``. Raises EpisodeError for another form."""
    cameras = dict(mapping.cameras)
    for pair in pairs:
        camera, separator, feature = pair.partition('=')
        if not (camera and separator and feature):
            raise EpisodeError(f'--camera {pair!r}: give CAMERA=FEATURE, such as head={IMAGE_PREFIX}cam_high')
        before = cameras.get(camera)
        cameras[camera] = CameraMapping(feature=feature, K=before.K if before else None)
    return mapping.model_copy(update={'cameras': cameras})


@dataclass(frozen=True)
class Columns:
    """Elements of features, in the robot's order: (feature, element) each."""

    elements: tuple[tuple[str, int], ...]

    @property
    def features(self) -> tuple[str, ...]:
        """The features that are needed."""
        return tuple(dict.fromkeys(feature for feature, _ in self.elements))

    def of(self, table: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """float64 ``[N, len(elements)]`` out of ``[N, D]`` per feature."""
        return np.stack([table[feature][:, element] for feature, element in self.elements], axis=1)


@dataclass(frozen=True)
class ResolvedMapping:
    """A mapping that fits a robot and a dataset.

    Attributes:
        state, action: where the elements of ``robot.state.names`` and ``robot.action.joints`` are.
        cameras: camera to feature, in the order of the robot file; ``K``: camera to ``[3, 3]`` where the mapping gives it.
    """

    state: Columns
    action: Columns
    cameras: Mapping[str, str]
    K: Mapping[str, NDArray[np.float64]]
    instruction: str | None


def resolve_mapping(robot: Robot, features: Mapping[str, Mapping[str, Any]], mapping: DatasetMapping, name: str) -> ResolvedMapping:
    """Find everything that ``robot`` needs among the ``features`` of ``info.json``.

    Raises:
        EpisodeError: something is not there; everything that is missing is listed.
    """
    problems = [f'mapping.cameras: {unknown_name(c, robot.camera_names)}' for c in mapping.cameras if c not in robot.cameras]
    joints = dict.fromkeys((*robot.state.joints, *robot.action.joints))
    problems += [f'mapping.joints: {unknown_name(joint, tuple(joints))}' for joint in mapping.joints if joint not in joints]
    images = [key for key, feature in features.items() if feature.get('dtype') in ('video', 'image')]
    cameras, K = {}, {}
    for camera in robot.camera_names:
        given = mapping.cameras.get(camera)
        feature = given.feature if given else IMAGE_PREFIX + camera
        if feature not in images:
            hint = _closest(feature, images)
            say = '' if given else f' (say it with --camera {camera}=FEATURE)'
            problems.append(f'camera {camera!r}: no image feature {feature!r}{hint}; it has {", ".join(images) or "none"}{say}')
        cameras[camera] = feature
        if given and given.K is not None:
            K[camera] = np.asarray(given.K, dtype=np.float64).reshape(3, 3)
    names = _Names(features, mapping)
    state = []
    for field in robot.state.fields:
        places = (mapping.state, *([] if field == 'position' else [f'observation.{field}']))
        state += [names.find('state', mapping.joints.get(joint, joint), field, places) for joint in robot.state.joints]
    action = [
        names.find('action', mapping.joints.get(joint, joint), 'position', (mapping.action,)) for joint in robot.action.joints
    ]
    problems += dict.fromkeys(names.problems)
    if problems:
        raise EpisodeError('\n  '.join([f'{name} does not have what robot {robot.name} needs:', *problems]))
    return ResolvedMapping(Columns(tuple(state)), Columns(tuple(action)), cameras, K, mapping.instruction)


class _Names:
    """Elements of features by name; what is not found is kept as problems."""

    def __init__(self, features: Mapping[str, Mapping[str, Any]], mapping: DatasetMapping) -> None:
        self._features = features
        self._given = {mapping.state: mapping.state_names, mapping.action: mapping.action_names}
        self.problems: list[str] = []

    def find(self, what: str, joint: str, field: str, places: Sequence[str]) -> tuple[str, int]:
        known: list[str] = []
        for place in places:
            names = self._of(place)
            known += names
            for suffix in (*_FIELD_SUFFIXES[field], *([''] if place == f'observation.{field}' else [])):
                if joint + suffix in names:
                    return place, names.index(joint + suffix)
        if known:
            self.problems.append(f'{what}: no {field} of joint {joint!r}{_closest(joint, known)}; it has {", ".join(known)}')
        return places[0], 0

    def _of(self, feature: str) -> list[str]:
        described = self._features.get(feature)
        if described is None:
            there = list(self._features)
            if feature.startswith(('observation.velocity', 'observation.effort')):
                return []
            self.problems.append(f'no feature {feature!r}{_closest(feature, there)}; it has {", ".join(there)}')
            return []
        names = list(self._given.get(feature) or _flat(described.get('names')))
        size = int(np.prod(described.get('shape') or [1]))
        if not names:
            self.problems.append(f'feature {feature!r} has {size} elements without names: give them as state_names or action_names')
        elif len(names) != size:
            self.problems.append(f'feature {feature!r} has {size} elements but {len(names)} names')
            return []
        return names


def _flat(names: Any) -> list[str]:
    """Names of a feature, which datasets nest in lists or under keys such as ``motors``."""
    if names is None:
        return []
    if isinstance(names, str):
        return [names]
    parts = names.values() if isinstance(names, Mapping) else names
    return [name for part in parts for name in _flat(part)]


def _closest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f', closest: {near[0]!r}' if near else ''
