"""What is left of an MCAP file that has no end or holds damaged records, as a file that rosbags can read.

A recorder that is killed leaves a file without index and footer, which rosbags refuses as a whole. `RecoveredMcap` looks through
the records (https://mcap.dev/spec: one byte of type, eight of length, content) and presents the intact ones, without copying them,
between a header and a footer of its own. A chunk that breaks off gives what lies before the break if it is not compressed; a chunk
whose checksum or compression does not hold is left out.
"""

from __future__ import annotations

import io
import struct
from binascii import crc32
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from rosbags.rosbag2.storage_mcap import decompress

MAGIC = b'\x89MCAP0\r\n'
_SCHEMA, _CHANNEL, _MESSAGE, _CHUNK, _LAST_OPCODE = 0x03, 0x04, 0x05, 0x06, 0x0F
_ENDS = (0x02, 0x0F)  # footer, end of data
_RECORD = struct.Struct('<BQ')
_CHUNK_HEAD = struct.Struct('<QQQII')  # first and last time, uncompressed size, checksum, length of the compression's name
_SMALLEST_MESSAGE = 22
_HEADER = MAGIC + _RECORD.pack(0x01, 12) + struct.pack('<I4sI', 4, b'ros2', 0)
_FOOTER = _RECORD.pack(0x02, 20) + bytes(20) + MAGIC  # no summary: read by scanning

Span = tuple[int, int]


class RecoveredMcap:
    """The intact records of the MCAP file ``path``, for `rosbags.rosbag2.Reader` in place of a path.

    It has what the reader asks of the path of a file, and no more.

    Attributes:
        lost: a sentence for each part that is left out; empty where the file is whole.

    Raises:
        ValueError: the file does not begin as an MCAP file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: list[str] = []
        self._spans: list[Span] = []
        with path.open('rb') as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f'{path} does not begin as an MCAP file: nothing of it can be read')
            self._look_through(file, path.stat().st_size)

    def exists(self) -> bool:
        """It does."""
        return True

    def is_dir(self) -> bool:
        """It is a file."""
        return False

    @property
    def suffix(self) -> str:
        """By which the reader knows the format."""
        return '.mcap'

    def open(self, *args: Any, **kwargs: Any) -> BinaryIO:
        """The intact records as one binary file, whatever the mode asked for."""
        return io.BufferedReader(_Pieces(self.path, [_HEADER, *self._spans, _FOOTER]))

    def _look_through(self, file: BinaryIO, size: int) -> None:
        position = file.tell()
        while position < size:
            record = _record_at(file, position)
            if record is None or not 0 < record[0] <= _LAST_OPCODE:
                self.lost.append(f'bytes {position} to {size} of {self.path.name} are not readable')
                return
            opcode, end = record
            if opcode in _ENDS:
                return
            if opcode == _CHUNK:
                self._keep_chunk(file, position, end, size)
            elif end <= size and opcode in (_SCHEMA, _CHANNEL, _MESSAGE):
                self._keep(position, end)
            if end > size:
                self.lost.append(f'{self.path.name} breaks off in the record at byte {position}')
                return
            position = end
        self.lost.append(f'{self.path.name} breaks off at byte {size}')

    def _keep_chunk(self, file: BinaryIO, position: int, end: int, size: int) -> None:
        """Keep the chunk whole, or the intact records at its beginning, or nothing."""
        where = f'the chunk at byte {position} of {self.path.name}'
        file.seek(position + _RECORD.size)
        content = file.read(min(end, size) - file.tell())
        try:
            _, _, plain_size, checksum, name_length = _CHUNK_HEAD.unpack_from(content)
            compression = content[_CHUNK_HEAD.size : _CHUNK_HEAD.size + name_length].decode()
            begin = _CHUNK_HEAD.size + name_length + 8
            (stored_size,) = struct.unpack_from('<Q', content, begin - 8)
        except (struct.error, UnicodeDecodeError):
            self.lost.append(f'{where} is not readable')
            return
        records = content[begin : begin + stored_size]
        try:
            if compression:
                plain = decompress(records, compression, plain_size, checksum)
            else:
                plain = records
                if len(plain) == plain_size and checksum and crc32(plain) != checksum:
                    raise ValueError('the checksum does not hold')
        except Exception as error:  # whatever a decompressor makes of damaged bytes
            self.lost.append(f'{where} is left out: {error}')
            return
        intact = _intact_length(plain)
        if intact == plain_size and end <= size:
            self._keep(position, end)
        elif compression:
            self.lost.append(f'{where} is left out: it holds damaged records')
        else:
            first = position + _RECORD.size + begin
            self._keep(first, first + intact)
            self.lost.append(f'{where} is read for {intact} of its {plain_size} bytes')

    def _keep(self, begin: int, end: int) -> None:
        if self._spans and self._spans[-1][1] == begin:
            self._spans[-1] = (self._spans[-1][0], end)
        elif end > begin:
            self._spans.append((begin, end))


def _record_at(file: BinaryIO, position: int) -> tuple[int, int] | None:
    """Type of the record at ``position`` and where it ends, or None at the end of the file."""
    file.seek(position)
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        return None
    opcode, length = _RECORD.unpack(head)
    return opcode, position + _RECORD.size + length


def _intact_length(records: bytes) -> int:
    """Bytes up to the first record of a chunk that is none, or does not end in it."""
    position = 0
    while position + _RECORD.size <= len(records):
        opcode, length = _RECORD.unpack_from(records, position)
        end = position + _RECORD.size + length
        too_short = opcode == _MESSAGE and length < _SMALLEST_MESSAGE
        if opcode not in (_SCHEMA, _CHANNEL, _MESSAGE) or end > len(records) or too_short:
            break
        position = end
    return position


class _Pieces(io.RawIOBase):
    """Bytes, and spans of a file, read as one file."""

    def __init__(self, path: Path, pieces: list[bytes | Span]) -> None:
        super().__init__()
        self._file = path.open('rb')
        self._pieces = pieces
        self._starts = [0, *accumulate(len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces)]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        for piece, start, end in zip(self._pieces, self._starts, self._starts[1:], strict=False):
            if start <= self._position < end:
                offset = self._position - start
                count = min(len(buffer), end - self._position)
                if isinstance(piece, bytes):
                    data = piece[offset : offset + count]
                else:
                    self._file.seek(piece[0] + offset)
                    data = self._file.read(count)
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
        return 0

    def close(self) -> None:
        self._file.close()
        super().close()
