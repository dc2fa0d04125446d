"""Values of untrusted JSON for the fields of a dataclass, each of its annotation's type."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.guard.files import short_name, short_repr

OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values of a setting that is switched off."""
_LARGEST_FLOAT, _LARGEST_INT = 3.4e38, 2**63 - 1
"""The largest numbers of float32 and int64; nothing can be computed with larger ones."""
_LONGEST_NAME = 4096
"""Characters of a path that file systems take, and more than a module's name or a pattern has."""


def read_fields(cls: Any, values: dict[str, Any], file: str | None) -> dict[str, Any]:
    """Return those of the values that are fields of ``cls``, each of its field's type.

    null is an empty list or mapping where that is the default, and the default where the metadata ``nullable`` says so.

    Raises:
        AdapterError: a value is of another type, or cannot be a name. The metadata ``prose`` says that a field is text.
    """
    given = {}
    for entry in fields(cls):
        if entry.name not in values:
            continue
        given[entry.name] = value = _typed(entry, hints_of(cls)[entry.name], values[entry.name], entry.name, file)
        if not entry.metadata.get("prose") and (strange := _strange_name(value)):
            raise AdapterError(f"holds {strange}", key=entry.name, file=file)
    return given


def mapping_at(values: Any, *names: str) -> dict[str, Any]:
    """Return the object under these keys, one inside the other; empty where something else is there."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return dict(values) if isinstance(values, dict) else {}


def read_section(cls: Any, values: dict[str, Any], key: str) -> Any:
    """Return the dataclass ``cls`` that the mapping under ``key`` describes. What it checks when it is made is not.

    Raises:
        AdapterError: it lacks a field of that name, or a value is of another type.
    """
    known = {entry.name: entry for entry in fields(cls)}
    given = {}
    for name, value in values.items():
        if name in known:
            given[name] = _typed(known[name], hints_of(cls)[name], value, f"{key}.{name}", None)
        elif value not in OFF:
            raise AdapterError(f"is not known; {key} takes {', '.join(known)}", key=f"{key}.{short_name(name)}")
    section = cls.__new__(cls)
    for name, entry in known.items():
        setattr(section, name, given.get(name, default_of(entry)))
    return section


def branches(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; the hint itself if it is not a union."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def section_class(hint: Any) -> type | None:
    """Return the dataclass among the types of a field, whose value is then a mapping with settings of its own."""
    return next((one for one in branches(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


@functools.cache
def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values that a field may have if a Literal says them; empty where others are right too."""
    if not any(get_origin(one) is Literal for one in branches(hint)):
        return ()
    found: list[Any] = []
    for one in branches(hint):
        if get_origin(one) is Literal:
            found += get_args(one)
        elif one is bool:
            found += [True, False]
        elif one is NoneType:
            found.append(None)
        else:
            return ()
    return tuple(found)


@functools.cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of the fields of a dataclass or a TypedDict, by name."""
    return get_type_hints(cls)


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """Return a field's default, or None if it has none."""
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return None if entry.default is dataclasses.MISSING else entry.default


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from JSON has the type of an annotation."""
    if (members := branches(hint)) != (hint,):
        return any(fits(value, one) for one in members)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())  # JSON's keys are text
    if origin is Literal:
        return isinstance(value, tuple(map(type, inner)))  # the config's problems() say which ones there are
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict) or type(value) is hint  # for read_section, or read by it
    if is_typeddict(hint):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], of) for key, of in hints_of(hint).items()
        )
    if hint is Any:
        return True
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_INT
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT
    return isinstance(value, hint)


def _typed(entry: dataclasses.Field[Any], hint: Any, value: Any, key: str, file: str | None) -> Any:
    if fits(value, hint):
        return value
    if isinstance(value, float) and value.is_integer() and fits(int(value), hint):
        return int(value)
    if value is None and (
        entry.metadata.get("nullable") or default_of(entry) in ([], {}) or default_of(entry) is False
    ):
        return default_of(entry)  # what is off by default is off
    if value is None and (choices := choices_of(hint)):
        raise AdapterTypeError(f"must be {' or '.join(map(str, choices))}, not null", key=key, file=file)
    found = "null" if value is None else short_repr(value)
    raise AdapterTypeError(f"expected {entry.type}, found {found}", key=key, file=file)


def _strange_name(value: object) -> str | None:
    """Describe a value that cannot be a name where a setting names something, or return None."""
    for name in [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else ():
        if isinstance(name, str) and not name.isprintable():
            return f"{short_repr(name)}, and no name has such characters"
        if isinstance(name, str) and len(name) > _LONGEST_NAME:
            return f"a name of {len(name):,} characters"
    return None
