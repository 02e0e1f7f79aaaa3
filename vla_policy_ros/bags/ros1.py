"""ROS 1 bags: converted to a rosbag2 bag once per process, by the library, into a temporary folder that goes with the process.

Enters: a `.bag` file. Leaves: the folder of a rosbag2 bag with the same messages, receive times and topics. Caller's thread.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from rosbags.convert.converter import ConverterError, convert
from rosbags.typesys import Stores, get_typestore

SUFFIX = '.bag'


def as_rosbag2(path: Path) -> Path:
    """The rosbag2 bag of a ROS 1 bag; takes as much room in the temporary folder (``TMPDIR``) as the bag.

    Raises:
        ValueError: it is not a ROS 1 bag, or damaged; the message says what helps.
        OSError: the temporary folder is full.
    """
    stat = path.stat()
    return Path(_converted(path.absolute(), stat.st_size, stat.st_mtime_ns).name) / 'bag'


@lru_cache(maxsize=8)
def _converted(path: Path, size: int, changed_ns: int) -> TemporaryDirectory[str]:
    """The folder is removed once it is no longer one of the newest. Size and time tell a bag that was written anew."""
    folder = TemporaryDirectory(prefix='rosbag2_of_')
    try:
        _convert(path, Path(folder.name) / 'bag')
    except ConverterError as error:
        folder.cleanup()
        remedy = '`rosbag reindex` mends one that was not closed'
        raise ValueError(f'{path} cannot be read as a ROS 1 bag ({error}); {remedy}') from error
    if not (Path(folder.name) / 'bag').is_dir():
        folder.cleanup()
        raise ValueError(f'{path} holds no messages')
    return folder


def _convert(path: Path, target: Path) -> None:
    convert(
        [path],
        target,
        dst_storage='mcap',
        dst_version=9,
        compress=None,
        compress_mode='message',
        default_typestore=None,
        typestore=get_typestore(Stores.ROS2_JAZZY),
        exclude_topics=(),
        include_topics=(),
        exclude_msgtypes=(),
        include_msgtypes=(),
    )
