"""Message types by name: the Python class to publish with, and the definition to store in a bag.

Definitions come from the `share/<package>/msg` folder beside the installed package, so that custom messages are recorded as they
were built here. No thread of its own; reads files.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore


class MessageTypeError(LookupError):
    """A message type is not installed; the message names it and the remedy."""


def message_class(name: str) -> Any:
    """The Python class of ``package/msg/Type``. Raises MessageTypeError."""
    package, _, kind = name.split('/')
    try:
        return getattr(importlib.import_module(f'{package}.msg'), kind)
    except (ImportError, AttributeError) as error:
        raise MessageTypeError(f'message type {name} is not installed here; install or build the package {package!r}') from error


def message_name(message_type: Any) -> str:
    """``package/msg/Type`` of a Python message class."""
    package, kind, *_ = message_type.__module__.split('.')
    return f'{package}/{kind}/{message_type.__name__}'


def typestore_for(names: Iterable[str]) -> Typestore:
    """Definitions of ``names`` and all they contain, on top of those of this ROS distribution. Raises MessageTypeError."""
    store = get_typestore(_distribution())
    found: dict[str, Any] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in store.fielddefs or name in found:
            continue
        found |= get_types_from_msg(_definition(name), name)
        pending += [part for _, field in found[name][1] for part in _names_in(field)]
    store.register(found)
    return store


def _distribution() -> Stores:
    name = f'ROS2_{os.environ.get("ROS_DISTRO", "jazzy").upper()}'
    return Stores[name] if name in Stores.__members__ else Stores.LATEST


def _definition(name: str) -> str:
    package, kind, short = name.split('/')
    origin = importlib.import_module(package).__file__ if importlib.util.find_spec(package) else None
    for prefix in Path(origin).resolve().parents if origin else ():
        path = prefix / 'share' / package / kind / f'{short}.msg'
        if path.is_file():
            return path.read_text(encoding='utf-8')
    raise MessageTypeError(f'no definition of {name} is installed here; install or build the package {package!r}')


def _names_in(field: Any) -> list[str]:
    """Names of the message types in a field description of rosbags."""
    kind, content = field
    if kind == Nodetype.NAME:
        return [content]
    return _names_in(content[0]) if kind in (Nodetype.ARRAY, Nodetype.SEQUENCE) else []
