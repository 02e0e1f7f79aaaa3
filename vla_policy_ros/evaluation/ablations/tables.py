"""Tables as JSON files, and a page of documentation put together from them.

A page holds places for tables: ``<!-- table: NAME -->`` up to ``<!-- end of table -->``. What stands between is replaced by the
table of the file ``NAME.json``, which is the document of an ablation or of `vla-policy evaluate`. Pure, but for reading and writing
files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_policy_ros.evaluation.command import ros_line
from vla_policy_ros.evaluation.report import SCHEMA as EVALUATION_SCHEMA
from vla_policy_ros.evaluation.report import TABLE_HEAD, markdown, table_rows

SCHEMA, VERSION = 'vla_policy_ros/ablation', 1
_NAME = '[a-z0-9_]+'
_PLACE = re.compile(rf'(<!-- table: ({_NAME}) -->\n).*?(<!-- end of table -->)', re.DOTALL)


@dataclass(frozen=True)
class Table:
    """One ablation.

    Attributes:
        name: of its file and its place.
        head: names of the columns; the first ``words`` hold text.
        rows: the cells, as text.
        numbers: the same for machines, one object per row.
        facts: what it was measured with: checkpoint, seeds, settings.
    """

    name: str
    head: tuple[str, ...]
    words: int
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[dict[str, Any], ...]
    facts: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            'schema': SCHEMA, 'version': VERSION, 'name': self.name, 'head': list(self.head), 'words': self.words,
            'rows': [list(row) for row in self.rows], 'numbers': list(self.numbers), 'facts': self.facts,
        }  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Write the document into ``folder``; a former one is replaced only by a whole one."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f'{self.name}.json'
        part = path.with_suffix('.part')
        part.write_text(json.dumps(self.document(), indent=1, allow_nan=False) + '\n', encoding='utf-8')
        part.replace(path)
        return path


def check_name(name: str) -> None:
    """Raise ValueError where no page could have a place for a table of this name."""
    if re.fullmatch(_NAME, name) is None:
        raise ValueError(f'a table cannot be named {name!r}: use small letters, digits and underscores')


def table_text(document: Any) -> str:
    """The Markdown of a document, with a line that says what it was measured with. Raises ValueError for any other document."""
    schema = document.get('schema') if isinstance(document, dict) else None
    if schema == SCHEMA:
        table = markdown(document['head'], document['rows'], document['words'])
        return f'{table}\n\n{_facts_line(document["facts"])}'
    if schema == EVALUATION_SCHEMA:
        table = markdown(TABLE_HEAD, table_rows(document['tasks']), 2)
        facts = {'checkpoint': document['checkpoint'], 'seeds': document['seeds'], 'settings': document['settings']}
        over_ros = f'\n{ros_line(document["ros"])}.' if 'ros' in document else ''
        return f'{table}\n\n{_facts_line(facts)}{over_ros}'
    raise ValueError(f'schema {schema!r} is no table; use the JSON of an ablation or of vla-policy evaluate')


def _facts_line(facts: dict[str, Any]) -> str:
    parts = []
    if 'checkpoint' in facts:
        parts.append(f'Checkpoint `{facts["checkpoint"]["hash"][:12]}`')
    if 'seeds' in facts:
        seeds = facts['seeds']
        parts.append(f'scenes {seeds["first"]}–{seeds["last"]} ({seeds["purpose"]} seed {seeds["seed"]})')
    parts += [str(fact) for fact in facts.get('notes', ())]
    return '; '.join(parts) + '.'


def assembled(page: str, folder: Path) -> str:
    """The page with the tables of ``folder`` in their places; a place without a file says so.

    Raises:
        ValueError: a file is no table; the message names it.
    """

    def fill(place: re.Match[str]) -> str:
        path = folder / f'{place[2]}.json'
        if not path.is_file():
            return f'{place[1]}\nNot measured yet.\n\n{place[3]}'
        try:
            text = table_text(json.loads(path.read_text(encoding='utf-8')))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is no table: {error!r}') from error
        return f'{place[1]}\n{text}\n\n{place[3]}'

    return _PLACE.sub(fill, page)


def places(page: str) -> Sequence[str]:
    """The names of the tables that a page has places for."""
    return [place[2] for place in _PLACE.finditer(page)]
