"""Dataclasses as JSON objects: written, and read back with every key and type checked.

A field's annotation is its type in the file: str, int, float, bool, Any, ``X | None``, ``Literal``, ``list[X]``,
``dict[str, X]`` or another dataclass. ``Annotated[X, Keywords(...)]`` adds what a type alone does not say. A field
whose default is LATER or ABSENT may be missing from the file.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import date, datetime
from enum import Enum
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from peftcli.guard.typed_fields import branches

T = TypeVar("T")


class Missing(Enum):
    """The value of a field that the file does not hold; false as a condition."""

    LATER = "later"
    """Missing until it is known; a complete object holds it."""
    ABSENT = "absent"
    """Missing where it does not apply."""

    def __bool__(self) -> bool:
        return False


LATER: Any = Missing.LATER
ABSENT: Any = Missing.ABSENT


@dataclass(frozen=True)
class Keywords:
    """Keywords of JSON Schema. Values are checked against the first three."""

    minimum: int | None = None
    pattern: str | None = None
    format: Literal["date", "date-time"] | None = None
    definition: str | None = None
    """Its name under ``$defs``, for a type that is not a dataclass."""
    description: str | None = None
    ref: str | None = None
    """Instead: the definition that describes it, in another file."""


class WrongValue(ValueError):
    """A key that is missing, unknown, or holds a value of the wrong type."""


def to_json(value: Any) -> Any:
    """Convert a dataclass to a JSON object, with all that it contains."""
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    if not is_dataclass(value):
        return value
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: to_json(each) for name, each in held.items() if not isinstance(each, Missing)}


def from_json(cls: type[T], value: Any, *, complete: bool = False) -> T:
    """Read a dataclass from a JSON object.

    ``complete``: the fields whose default is LATER must be there.

    Raises:
        WrongValue: a key is missing, unknown, or holds a value of the wrong type.
    """
    read: T = _read(cls, value, "", complete)
    return read


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> annotation, of a dataclass."""
    return get_type_hints(cls, include_extras=True)


def without_null(hint: Any) -> tuple[Any, bool]:
    """``X`` of an annotation ``X | None``, and whether it was one."""
    if branches(hint) == (hint,):
        return hint, False
    (inner,) = (each for each in branches(hint) if each is not NoneType)
    return inner, True


def _read(hint: Any, value: Any, key: str, complete: bool) -> Any:
    hint, nullable = without_null(hint)
    if hint is Any or (nullable and value is None):
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _read(args[0], value, key, complete)
        _check_keywords(args[1], value, key)
    elif origin is Literal:
        _require(any(type(value) is type(each) and value == each for each in args), key)
    elif origin is list:
        _require(isinstance(value, list), key)
        value = [_read(args[0], each, f"{key}[{index}]", complete) for index, each in enumerate(value)]
    elif origin is dict:
        _require(isinstance(value, dict), key)
        value = {name: _read(args[1], each, key, complete) for name, each in value.items()}
    elif is_dataclass(hint):
        _require(isinstance(value, dict), key or "the file")
        value = _read_fields(hint, value, f"{key}." if key else "", complete)
    else:
        _require(type(value) in ((int, float) if hint is float else (hint,)), key)
    return value


def _read_fields(cls: Any, values: dict[str, Any], prefix: str, complete: bool) -> Any:
    hints = field_types(cls)
    if unknown := values.keys() - hints.keys():
        raise WrongValue(f"{prefix}{min(unknown)[:40]!r} is unknown")
    read = {}
    for field in fields(cls):
        if field.name in values:
            read[field.name] = _read(hints[field.name], values[field.name], prefix + field.name, complete)
        elif field.default is MISSING or (complete and field.default is LATER):
            raise WrongValue(f"{prefix}{field.name} is missing")
    return cls(**read)


def _check_keywords(keywords: Keywords, value: Any, key: str) -> None:
    if keywords.minimum is not None:
        _require(value >= keywords.minimum, key)
    if keywords.pattern is not None:
        _require(re.search(keywords.pattern, value) is not None, key)
    if keywords.format is not None:
        try:
            {"date": date, "date-time": datetime}[keywords.format].fromisoformat(value)
        except ValueError:
            raise WrongValue(f"{key} is wrong") from None


def _require(condition: bool, key: str) -> None:
    if not condition:
        raise WrongValue(f"{key} is wrong")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects: dotted key -> value."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (flatten(inner, f"{prefix}.{name}".lstrip(".")) for name, inner in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}
