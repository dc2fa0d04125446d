"""Help on the keys of a recipe, and the JSON Schema, from the dataclasses and their docstrings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from peftcli.guard.typed_fields import branches, section_class
from peftcli.methods import METHODS
from peftcli.recipe.names import SAME
from peftcli.recipe.settings import (
    Setting,
    choices,
    describe_type,
    item_hint,
    kinds,
    method_settings,
    only_required,
    settings,
    task_settings,
)
from peftcli.schema import Recipe
from peftcli.tasks import TASKS

_VARIABLE = r"\$\{.+\}"
_WITH_VARIABLE = {"type": "string", "pattern": _VARIABLE}
_JSON_TYPES: dict[Any, tuple[str, str]] = {
    # The JSON type, and the strings that a recipe may contain instead.
    int: ("integer", _VARIABLE),
    float: ("number", _VARIABLE),
    bool: ("boolean", f"^([yY]es|[nN]o|[oO]n|[oO]ff|{_VARIABLE})$"),
}
_EXTENDS = "Path of a recipe, relative to this one, whose settings this one inherits and overrides."


@dataclass(frozen=True)
class Explanation:
    """The help on one name."""

    key: str
    kind: str
    """setting, section, method, task, finding, exit code, metric or message."""
    help: str
    type: str | None = None
    """Of a setting: its type; of a finding: its levels; of a metric: its scale."""
    default: str | None = None
    allowed: tuple[str, ...] = ()
    example: str | None = None
    settings: tuple[tuple[str, str, str], ...] = ()
    """For sections and methods: name, default and help of each setting."""
    link: str | None = None
    """The paper of a method, or the page of the documentation about a message."""


@cache
def explained_settings() -> dict[str, Explanation]:
    """Return the explanations of all settings, sections, methods and tasks, by their full names."""
    example = "extends: base.yaml"
    out = {"extends": Explanation("extends", "setting", _EXTENDS, "a string", "(unset)", example=example)}
    for name, entry in settings(Recipe).items():
        if entry.section:
            children = settings(entry.section)
            out[name] = Explanation(name, "section", entry.help, settings=_rows(children))
            for child, inner in children.items():
                out |= _explain_nested(f"{name}.{child}", inner, name)
        else:
            out[name] = _explain_setting(name, entry)
    _explain_type(out, "method", METHODS, default=None)
    _explain_type(out, "task", TASKS, allowed=tuple(TASKS), example=f"task: {next(iter(TASKS))}")
    for name, row in METHODS.items():
        known = method_settings(name)
        out[name] = Explanation(name, "method", row.summary, settings=_rows(known), link=row.paper)
        _explain_own(out, "method", name, known)
    for name, task in TASKS.items():
        known = task_settings(name)
        out[name] = Explanation(name, "task", task.summary, example=f"task: {name}", settings=_rows(known))
        _explain_own(out, "task", name, known)
    return out


def _explain_type(out: dict[str, Explanation], name: str, table: Mapping[str, Any], **own: Any) -> None:
    """Explain the section ``method`` or ``task``, and its ``type``, which names a row of the table."""
    rows = tuple(("type", each, row.summary) for each, row in table.items())
    out[name] = dataclasses.replace(out[name], kind="section", type=None, settings=rows, **own)
    text, example = f"The {name}; see `peftcli info {name}s`.", f"{name}:\n  type: {next(iter(table))}"
    kind = f"{name}.type"
    out[kind] = Explanation(kind, "setting", text, "a string", "(required)", tuple(table), example)


def _explain_own(out: dict[str, Explanation], section: str, kind: str, known: Mapping[str, Setting]) -> None:
    """Explain the settings of a method or task, under its name and under the section's, if no other has these."""
    for name, entry in known.items():
        for key in (f"{kind}.{name}", f"{section}.{name}"):
            for one, found in _explain_nested(key, entry, section).items():
                out.setdefault(one, found)


def _explain_nested(key: str, entry: Setting, section: str) -> dict[str, Explanation]:
    """Explain a setting of a section, and the settings within it if it is a mapping or a list of mappings."""
    whole, name = _explain_setting(key, entry, section), key.rpartition(".")[2]
    held = entry.section or entry.items
    if held is None:
        return {key: whole}
    out = {key: dataclasses.replace(whole, settings=_rows(settings(held)))}
    for inner, found in settings(held).items():
        one, given = _explain_setting(f"{key}.{inner}", found), f"{inner}: {_example(found)}"
        if entry.items:
            given = f"- {given}" if found.required else f"- {only_required(held)}: ...\n      {given}"
        out[one.key] = dataclasses.replace(one, example=f"{section}:\n  {name}:\n    {given}")
    return out


def _explain_setting(key: str, entry: Setting, section: str | None = None) -> Explanation:
    first, _, name = key.rpartition(".")
    line = f"{name}: {_example(entry)}"
    return Explanation(
        key=key,
        kind="setting",
        help=entry.help,
        type=describe_type(entry.hint),
        default=_default(entry),
        allowed=tuple(choices(entry.hint)),
        example=f"{section or first}:\n  {line}" if first else line,
    )


def _rows(children: dict[str, Setting]) -> tuple[tuple[str, str, str], ...]:
    return tuple((name, _default(entry), entry.help) for name, entry in children.items())


def _example(entry: Setting) -> str:
    """Return an example value: the default, or one of the right type."""
    if not entry.required and entry.default not in (None, {}, []):
        return _default(entry)
    if found := choices(entry.hint):
        return found[0]
    accepted = kinds(entry.hint)
    if entry.section:
        alone = only_required(entry.section)
        return _example(settings(entry.section)[alone]) if alone else "{...}"
    if entry.items:
        return f"[{{{only_required(entry.items)}: ...}}]"
    for kind, text in ((list, "[...]"), (dict, "{...}"), (int, "1"), (float, "0.1"), (bool, "true")):
        if kind in accepted:
            return text
    return "..."


def _default(entry: Setting) -> str:
    if entry.required:
        return "(required)"
    if entry.default is None:
        return "(unset)"
    return entry.default if isinstance(entry.default, str) else json.dumps(entry.default)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, for editors."""
    top = settings(Recipe)
    properties: dict[str, Any] = {"extends": {"type": "string", "description": _EXTENDS}}
    needed: dict[str, Any] = {"method": {"required": ["type"]}}
    for name, entry in top.items():
        if entry.section:
            properties[name] = {**_object(settings(entry.section)), "description": entry.help}
            if required := _required(settings(entry.section)):
                needed[name] = {"required": required}
            else:
                properties[name]["type"] = ["object", "null"]
        else:
            properties[name] = _property(entry)
    for section, spellings in SAME.items():
        held = properties[section]["properties"]
        held |= {theirs: {**held[ours], "description": f"The same as {ours}."} for theirs, ours in spellings.items()}
    needed["dataset"] = {"type": "object", "anyOf": [{"required": ["train"]}, {"required": ["mix"]}]}
    properties["base_model"] = {
        "description": top["base_model"].help,
        "anyOf": [{"type": "string"}, {k: v for k, v in properties["base_model"].items() if k != "description"}],
    }
    methods = {name: (row.summary, method_settings(name)) for name, row in METHODS.items()}
    properties["method"] = {"description": top["method"].help, **_kinds_schema(methods)}
    tasks = {name: (row.summary, task_settings(name)) for name, row in TASKS.items()}
    whole = {**_kinds_schema(tasks), "required": ["type"]}
    of_any = _object({}) | {"properties": {key: {} for _, own in tasks.values() for key in own}}
    forms = [{"enum": list(TASKS)}, _WITH_VARIABLE, whole, of_any, {"type": "null"}]
    properties["task"] = {"description": top["task"].help, "anyOf": forms}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftcli recipe",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "if": {"required": ["extends"]},
        "else": {
            "required": _required(top),
            "properties": needed,
        },
    }


def _kinds_schema(kinds: dict[str, tuple[str, dict[str, Setting]]]) -> dict[str, Any]:
    """Return the schema of a mapping whose ``type`` decides its settings."""
    rules = [
        {
            "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
            "then": _object({}) | {"properties": {"type": {}, **_properties(own)}},
        }
        for name, (_, own) in kinds.items()
    ]
    summaries = "; ".join(f"{name}: {summary}" for name, (summary, _) in kinds.items())
    return {
        "type": "object",
        "properties": {"type": {"anyOf": [{"enum": list(kinds)}, _WITH_VARIABLE], "description": summaries}},
        "allOf": rules,
    }


def _object(children: dict[str, Setting]) -> dict[str, Any]:
    return {"type": "object", "properties": _properties(children), "additionalProperties": False}


def _properties(children: dict[str, Setting]) -> dict[str, Any]:
    return {name: _property(entry) for name, entry in children.items()}


def _property(entry: Setting) -> dict[str, Any]:
    out: dict[str, Any] = {"description": entry.help, **_hint_schema(entry.hint)}
    if not entry.required:
        out["default"] = entry.default
    return out


def _required(children: dict[str, Setting]) -> list[str]:
    return [name for name, entry in children.items() if entry.required]


def _hint_schema(hint: Any) -> dict[str, Any]:
    found = [_branch_schema(branch) for branch in branches(hint)]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _branch_schema(hint: Any) -> dict[str, Any]:
    if hint in _JSON_TYPES:
        name, strings = _JSON_TYPES[hint]
        return {"type": [name, "string"], "pattern": strings}
    if get_origin(hint) is Literal:
        return {"anyOf": [{"enum": list(get_args(hint))}, _WITH_VARIABLE]}
    accepted = kinds(hint)
    if section := section_class(hint):
        known, alone = settings(section), only_required(section)
        whole = _object(known) | ({"required": needed} if (needed := _required(known)) else {})
        return {"anyOf": [_property(known[alone]), whole]} if alone else whole  # also in short, as this setting
    if list in accepted:
        return {"type": ["array", "null"], "items": _hint_schema(item_hint(hint, list))}
    if dict in accepted:
        return {"type": ["object", "null"], "additionalProperties": _hint_schema(item_hint(hint, dict))}
    if accepted == {type(None)}:
        return {"type": "null"}
    return {"type": ["string", "number"]} if accepted == {str} else {}
