"""YAML files of a strict schema: every problem is one sentence that names its place and the nearest known key.

Enters: the text of a file and the pydantic model that it must fit. Leaves: the validated model, or a `SchemaError`. Any thread.
Both the robot file and the training file are read through here.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class SchemaError(ValueError):
    """The text does not fit the schema; the message lists every problem with its place and the remedy."""


class Section(BaseModel):
    """A mapping whose keys are all known; unknown ones, NaN and infinity are refused."""

    model_config = ConfigDict(extra='forbid', frozen=True, allow_inf_nan=False)


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would otherwise drop silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key {key!r} is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


Model = TypeVar('Model', bound=BaseModel)


def parse_mapping(text: str, schema: type[BaseModel], source: str) -> dict[str, Any]:
    """The mapping that a YAML text holds, before validation.

    Raises:
        SchemaError: the text is not YAML, or not a mapping; ``source`` names it, ``schema`` the keys it should have.
    """
    try:
        data = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise SchemaError(f'{source}: not valid YAML: {error}') from error
    if not isinstance(data, dict):
        raise SchemaError(f'{source}: must be a mapping with the keys {", ".join(schema.model_fields)}')
    return data


def validate_mapping(data: Mapping[str, Any], schema: type[Model], source: str) -> Model:
    """A model from a mapping. Raises SchemaError with one line per problem."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [f'  {problem}' for problem in _explain(error, schema)]
        raise SchemaError('\n'.join([f'{source}: {len(lines)} problem(s)', *lines])) from error


def unknown_name(name: str, known: Sequence[str]) -> str:
    """Half a sentence: ``name`` is not known, and the nearest name that is."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else f'; known: {", ".join(known)}'
    return f'{name!r} is not known{hint}'


def _explain(error: ValidationError, schema: type[BaseModel]) -> Iterator[str]:
    for item in error.errors():
        place = '.'.join(str(part) for part in item['loc'])
        if item['type'] == 'extra_forbidden':
            text = unknown_name(str(item['loc'][-1]), _keys_at(schema, item['loc'][:-1])).replace(
                'is not known', 'is not a key here'
            )
        elif item['type'] == 'missing':
            text = 'is required'
        else:
            text = item['msg'].removeprefix('Value error, ')
            if item['type'] != 'value_error':
                text += f' (got {item["input"]!r})'
        yield f'{place}: {text}' if place else text


def _keys_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that ``schema`` allows at a place such as ``('cameras', 'scene')``."""
    options: list[Any] = [schema]
    for part in location:
        options = [inner for option in options for inner in _inside(option, part)]
    sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return [name for section in sections for name in section.model_fields]


def _inside(annotation: Any, part: int | str) -> list[Any]:
    """What may stand below ``part`` of a value of this type, with unions and annotations taken apart."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        if field is None:  # of a union of sections, pydantic's place also has the tag that chose this one
            tags = [tag for known in annotation.model_fields.values() for tag in typing.get_args(known.annotation)]
            return [annotation] if part in tags else []
        return _alternatives(field.annotation)
    if typing.get_origin(annotation) in (dict, tuple, list):
        return _alternatives(typing.get_args(annotation)[-1])
    return []


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the one type."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _alternatives(member)]
    return [annotation]
