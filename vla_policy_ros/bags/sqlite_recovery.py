"""What is left of a damaged sqlite3 storage file of a bag.

A reader that asks sqlite for counts or for an order by time needs every page of the file. `RecoveredSqlite` walks the table of
messages from its beginning until a page is missing or damaged, and then from its end, and gives what both walks reach.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote

from rosbags.interfaces import Connection, ConnectionExtRosbag2, MessageDefinition, MessageDefinitionFormat


class RecoveredSqlite:
    """The readable messages of the storage file ``path``, with what is used of `rosbags.rosbag2.Reader`.

    Attributes:
        connections: the topics. They have no message definitions.
        lost: a sentence for each topic that is not complete, known after it was read.

    Raises:
        sqlite3.Error: not even the table of topics can be read.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._database = sqlite3.connect(f'file:{quote(str(path.absolute()))}?immutable=1', uri=True)
        self.lost: list[str] = []
        try:
            # Without this, sqlite refuses a file that is shorter than it says of itself.
            self._database.execute('PRAGMA writable_schema=ON')
            topics = self._database.execute('SELECT id, name, type FROM topics').fetchall()
        except BaseException:
            self._database.close()
            raise
        self.connections = [
            Connection(
                number,
                str(topic),
                str(kind),
                MessageDefinition(MessageDefinitionFormat.NONE, ''),
                '',
                0,
                ConnectionExtRosbag2('cdr', []),
                self,
            )
            for number, topic, kind in topics
        ]

    def messages(self, connections: Collection[Connection]) -> Iterator[tuple[Connection, int, bytes]]:
        """(connection, receive time in ns, data) of each readable message; see ``lost`` afterwards."""
        for connection in connections:
            found: dict[int, tuple[int, bytes]] = {}
            problem = self._walk(connection.id, 'ASC', found)
            if problem:
                self._walk(connection.id, 'DESC', found)
                self.lost.append(f'{connection.topic} of {self._name} is read for {len(found)} messages: {problem}')
            for _, (time_ns, data) in sorted(found.items()):
                yield connection, time_ns, data

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _walk(self, topic: int, order: str, found: dict[int, tuple[int, bytes]]) -> str:
        """Rows of ``topic`` in order of their id until sqlite stops; why it did, or nothing."""
        query = f'SELECT id, timestamp, data FROM messages NOT INDEXED WHERE topic_id = ? ORDER BY id {order}'
        try:
            for number, time_ns, data in self._database.execute(query, (topic,)):
                if isinstance(time_ns, int) and isinstance(data, bytes):
                    found[number] = (time_ns, data)
        except sqlite3.Error as error:
            return str(error)
        return ''
