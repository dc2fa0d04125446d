"""The JSON Schema of a file that is a dataclass of ``peftcli.train.runs.typed_json``."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from peftcli.recipe.settings import field_help
from peftcli.train.runs.typed_json import LATER, Keywords, Missing, field_types, without_null

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}


def schema_of(cls: Any, title: str) -> dict[str, Any]:
    """The schema of a dataclass. Those that it holds are its ``$defs``."""
    definitions: dict[str, Any] = {}
    top = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **_object(cls, definitions)}
    when_complete = {"if": {"properties": {"status": {"const": "complete"}}}, "then": _known_later(cls)}
    return {**top, **when_complete, "$defs": dict(sorted(definitions.items()))}


def _object(cls: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    properties = {}
    for name, hint in field_types(cls).items():
        properties[name] = {**_type(hint, definitions), "description": field_help(cls, name)}
    return {
        "type": "object",
        "description": " ".join((inspect.getdoc(cls) or "").split()),
        "properties": properties,
        "required": [field.name for field in fields(cls) if not _may_be_missing(field)],
        "additionalProperties": False,
    }


def _may_be_missing(field: Any) -> bool:
    return isinstance(field.default, Missing)


def _known_later(cls: Any) -> dict[str, Any]:
    """What is required besides once a run is complete."""
    hints = field_types(cls)
    inner = {name: _known_later(hint) for name, hint in hints.items() if is_dataclass(hint)}
    later = [field.name for field in fields(cls) if field.default is LATER]
    out: dict[str, Any] = {"required": later} if later else {}
    if found := {name: each for name, each in inner.items() if each}:
        out["properties"] = found
    return out


def _type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hint, nullable = without_null(hint)
    if nullable:
        found = _type(hint, definitions)
        if "$ref" in found:
            return {"anyOf": [found, {"type": "null"}]}
        return {**found, "type": [found["type"], "null"]}
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Annotated:
        return _annotated(args[0], args[1], definitions)
    if origin is Literal:
        return {"enum": list(args)} if len(args) > 1 else {"const": args[0]}
    if origin is list:
        return {"type": "array", "items": _type(args[0], definitions)}
    if origin is dict:
        # NaN and Inf are printed as null
        each = {"type": ["number", "null"]} if args[1] is float else _type(args[1], definitions)
        return {"type": "object", **({"additionalProperties": each} if each else {})}
    if is_dataclass(hint):
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", hint.__name__.removesuffix("Record")).lower()
        definitions[name] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    return {"type": _NAMES[hint]}


def _annotated(inner: Any, keywords: Keywords, definitions: dict[str, Any]) -> dict[str, Any]:
    if keywords.ref:
        return {"$ref": keywords.ref}
    given = {name: getattr(keywords, name) for name in ("minimum", "pattern", "format", "description")}
    found = {**_type(inner, definitions), **{name: value for name, value in given.items() if value is not None}}
    if keywords.definition:
        definitions[keywords.definition] = found
        return {"$ref": f"#/$defs/{keywords.definition}"}
    return found
