"""Finds the files that ship beside the code: robot files, node parameters, the Fast DDS profile, launch files, checkpoints.

Enters: a path relative to the share folder of the package, such as ``config/robots/tabletop.yaml``. Leaves: where it lies, in a
source tree or in an installation (colcon or pip). Any thread; nothing is read but folder entries.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = 'vla_policy_ros'


class ResourceError(FileNotFoundError):
    """A shipped file is not where it should be; the message lists the places that were tried."""


def share_path(relative: str | Path) -> Path:
    """Absolute path of a shipped file or folder.

    A source tree comes first, so that an editable installation shows edits at once; then the prefix that the package was
    installed to; then every prefix of ``AMENT_PREFIX_PATH``.

    Raises:
        ResourceError: no place has it.
        ValueError: ``relative`` is absolute or leaves the share folder.
    """
    relative = Path(relative)
    if relative.is_absolute() or '..' in relative.parts:
        raise ValueError(f'share_path takes a path inside the share folder, such as config/fastdds.xml; got {str(relative)!r}')
    tried = [folder / relative for folder in _share_folders()]
    for path in tried:
        if path.exists():
            return path
    places = ''.join(f'\n  {path}' for path in tried)
    raise ResourceError(
        f'{relative} of {PACKAGE} was not found; tried:{places}\n'
        'Install the package again, or source the setup file of the workspace it was built in.'
    )


def robot_path(name: str | Path) -> Path:
    """Path of a robot file given as a path, or as the name of a shipped one (``tabletop``).

    Raises:
        ResourceError: neither; the message lists the shipped names.
    """
    return _shipped_file(name, 'config/robots', 'robot file', 'robot')


def training_path(name: str | Path) -> Path:
    """Path of a training file given as a path, or as the name of a shipped one (``tabletop``).

    Raises:
        ResourceError: neither; the message lists the shipped names.
    """
    return _shipped_file(name, 'config/training', 'training file', 'training file')


def checkpoint_path(name: str | Path) -> Path:
    """Path of a checkpoint folder given as a path, or as the name of a shipped one (``tabletop``).

    Raises:
        ResourceError: neither.
    """
    path = Path(name)
    if path.is_dir():
        return path.absolute()
    try:
        return share_path(Path('checkpoints') / path)
    except (ResourceError, ValueError) as error:
        raise ResourceError(f'checkpoint {str(name)!r}: no such folder, and no shipped checkpoint of that name') from error


def message_path(name: str) -> Path:
    """Path of the definition of a message of vla_policy_msgs, such as ``ActionChunk``: in the source tree, or installed.

    Raises:
        ResourceError: it is in neither.
    """
    beside = [folder / 'msg' / f'{name}.msg' for folder in _share_folders()]
    installed = [folder.parent / 'vla_policy_msgs' / 'msg' / f'{name}.msg' for folder in _share_folders()]
    for path in (*beside, *installed):
        if path.is_file():
            return path
    raise ResourceError(f'the definition of vla_policy_msgs/msg/{name} was not found: install the package vla_policy_msgs')


def _shipped_file(name: str | Path, place: str, kind: str, noun: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path.absolute()
    folder = share_path(place)
    shipped = folder / f'{name}.yaml'
    if len(path.parts) == 1 and shipped.is_file():
        return shipped
    known = ', '.join(sorted(file.stem for file in folder.glob('*.yaml')))
    raise ResourceError(f'{kind} {str(name)!r}: no such file, and no shipped {noun} of that name (shipped: {known})')


def _share_folders() -> list[Path]:
    """Every folder that may be the share folder, best first, without repetition."""
    module = Path(__file__).resolve()
    source = module.parent.parent
    folders = [source] if (source / 'package.xml').is_file() else []
    prefixes = [*module.parents[2:], *(Path(p) for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p)]
    for prefix in prefixes:
        folder = prefix / 'share' / PACKAGE
        if folder.is_dir() and folder not in folders:
            folders.append(folder)
    return folders
