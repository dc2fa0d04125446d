"""Help on one key of a recipe, and the JSON Schema: both read from the dataclasses and their docstrings."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from peftcli.core.config import section_class
from peftcli.errors import UsageError
from peftcli.methods import METHODS
from peftcli.recipe.names import alias_of, near
from peftcli.recipe.settings import (
    Setting,
    branches,
    choices,
    in_words,
    item_hint,
    kinds,
    method_settings,
    settings,
    sole_required,
    task_settings,
)
from peftcli.schema import Recipe
from peftcli.tasks import TASKS

_VARIABLE = r"\$\{.+\}"
_JSON_TYPES: dict[Any, tuple[str, str]] = {
    # What a YAML editor sees, and which strings stand for it.
    int: ("integer", f"^{_VARIABLE}$"),
    float: ("number", f"^{_VARIABLE}$"),
    bool: ("boolean", f"^([yY]es|[nN]o|[oO]n|[oO]ff|{_VARIABLE})$"),
}


@dataclass(frozen=True)
class Explanation:
    """What is to be said about one key, method or task."""

    key: str
    kind: str
    """setting, section, method or task."""
    help: str
    type: str | None = None
    default: str | None = None
    allowed: tuple[str, ...] = ()
    example: str | None = None
    settings: tuple[tuple[str, str, str], ...] = ()
    """Of a section or a method: name, default and help of each setting."""
    link: str | None = None


def explain(key: str) -> Explanation:
    """What ``key`` is: a setting, a section, a method or a task, by its full or its last name.

    An item of a list may be named as problems name it: ``dataset.mix[1].weight``.

    Raises:
        UsageError: there is none.
    """
    known, key = _explainable(), re.sub(r"\[[0-9]+\]", "", key)
    if key in known:
        return known[key]
    ends = [found for name, found in known.items() if name.endswith(f".{key}")]
    if ends:
        return min(ends, key=lambda found: found.key.count("."))
    alias = alias_of(key.rpartition(".")[2], key.partition(".")[0]) or ""
    suggestion = (
        alias.partition(":")[0]
        or near(key, (name for name in known if "." not in name))
        or near(key, known)
        or near(key, (name.rpartition(".")[2] for name in known))
    )
    hint = f"did you mean {suggestion!r}?" if suggestion else "`peftcli schema` lists every key"
    raise UsageError(f"no setting, section, method or task is called {key[:60]!r}", hint=hint)


def _explainable() -> dict[str, Explanation]:
    out: dict[str, Explanation] = {}
    for name, entry in settings(Recipe).items():
        if entry.section:
            children = settings(entry.section)
            out[name] = Explanation(name, "section", entry.help, settings=_rows(children))
            for child, inner in children.items():
                out |= _explain_nested(f"{name}.{child}", inner, name)
        else:
            out[name] = _explain_setting(name, entry)
    types = tuple(METHODS)
    out["method"] = dataclasses.replace(
        out["method"],
        kind="section",
        default=None,
        type=None,
        settings=tuple(("type", name, row.summary) for name, row in METHODS.items()),
    )
    out["method.type"] = Explanation(
        "method.type",
        "setting",
        "The method; see `peftcli info methods`.",
        "a string",
        "(required)",
        types,
        f"method:\n  type: {types[0]}",
    )
    out["task"] = dataclasses.replace(
        out["task"],
        kind="section",
        type=None,
        allowed=tuple(TASKS),
        example=f"task: {next(iter(TASKS))}",
        settings=tuple(("type", name, row.summary) for name, row in TASKS.items()),
    )
    out["task.type"] = Explanation(
        "task.type",
        "setting",
        "The task; see `peftcli info tasks`.",
        "a string",
        "(required)",
        tuple(TASKS),
        f"task:\n  type: {next(iter(TASKS))}",
    )
    for name, row in METHODS.items():
        children = method_settings(name)
        out[name] = Explanation(name, "method", row.summary, settings=_rows(children), link=row.paper)
        for child, entry in children.items():
            for key, found in _explain_own_setting("method", name, child, entry).items():
                out.setdefault(key, found)
    for name, task in TASKS.items():
        children = task_settings(name)
        out[name] = Explanation(name, "task", task.summary, example=f"task: {name}", settings=_rows(children))
        for child, entry in children.items():
            for key, found in _explain_own_setting("task", name, child, entry).items():
                out.setdefault(key, found)
    return out


def _explain_own_setting(section: str, kind: str, name: str, entry: Setting) -> dict[str, Explanation]:
    """One setting of a method or task, and those that it holds where it is a mapping."""
    keys = (f"{kind}.{name}", f"{section}.{name}")
    return {one: found for key in keys for one, found in _explain_nested(key, entry, section).items()}


def _explain_nested(key: str, entry: Setting, section: str) -> dict[str, Explanation]:
    """One setting of a section, and those that it holds where it is a mapping or a list of them."""
    whole, name = _explain_setting(key, entry, section), key.rpartition(".")[2]
    held = entry.section or entry.items
    if held is None:
        return {key: whole}
    out = {key: dataclasses.replace(whole, settings=_rows(settings(held)))}
    for inner, found in settings(held).items():
        one, given = _explain_setting(f"{key}.{inner}", found), f"{inner}: {_example(found)}"
        if entry.items:
            given = f"- {given}" if found.required else f"- {sole_required(held)}: ...\n      {given}"
        out[one.key] = dataclasses.replace(one, example=f"{section}:\n  {name}:\n    {given}")
    return out


def _explain_setting(key: str, entry: Setting, section: str | None = None) -> Explanation:
    first, _, name = key.rpartition(".")
    line = f"{name}: {_example(entry)}"
    return Explanation(
        key=key,
        kind="setting",
        help=entry.help,
        type=in_words(entry.hint),
        default="(required)" if entry.required else _shown(entry.default),
        allowed=tuple(choices(entry.hint)),
        example=f"{section or first}:\n  {line}" if first else line,
    )


def _rows(children: dict[str, Setting]) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (name, "(required)" if entry.required else _shown(entry.default), entry.help)
        for name, entry in children.items()
    )


def _example(entry: Setting) -> str:
    """A value of the right type: the default, else what the type suggests."""
    if not entry.required and entry.default not in (None, {}, []):
        return _shown(entry.default)
    if found := choices(entry.hint):
        return found[0]
    accepted = kinds(entry.hint)
    if entry.section:
        alone = sole_required(entry.section)
        return _example(settings(entry.section)[alone]) if alone else "{...}"
    if entry.items:
        return f"[{{{sole_required(entry.items)}: ...}}]"
    for kind, text in ((list, "[...]"), (dict, "{...}"), (int, "1"), (float, "0.1"), (bool, "true")):
        if kind in accepted:
            return text
    return "..."


def _shown(default: Any) -> str:
    if default is None:
        return "(unset)"
    return default if isinstance(default, str) else json.dumps(default)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors."""
    top = settings(Recipe)
    properties: dict[str, Any] = {
        "extends": {"type": "string", "description": "Another recipe, relative to this one, that this one changes."}
    }
    needed: dict[str, Any] = {"method": {"required": ["type"]}}
    for name, entry in top.items():
        if entry.section:
            properties[name] = {**_object(settings(entry.section)), "description": entry.help}
            if required := _required(settings(entry.section)):
                needed[name] = {"required": required}
        else:
            properties[name] = _property(entry)
    needed["dataset"] = {"anyOf": [{"required": ["train"]}, {"required": ["mix"]}]}
    properties["base_model"] = {
        "description": top["base_model"].help,
        "anyOf": [{"type": "string"}, {k: v for k, v in properties["base_model"].items() if k != "description"}],
    }
    methods = {name: (row.summary, method_settings(name)) for name, row in METHODS.items()}
    properties["method"] = {"description": top["method"].help, **_kinds_schema(methods)}
    tasks = {name: (row.summary, task_settings(name)) for name, row in TASKS.items()}
    whole = {**_kinds_schema(tasks), "required": ["type"]}
    properties["task"] = {"description": top["task"].help, "anyOf": [{"enum": list(TASKS)}, whole, {"type": "null"}]}
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
    """A mapping whose ``type`` decides which settings it may hold."""
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
        "properties": {"type": {"enum": list(kinds), "description": summaries}},
        "allOf": rules,
    }


def _section_schema(section: type) -> dict[str, Any]:
    """A mapping, or its sole required setting alone."""
    known, alone = settings(section), sole_required(section)
    whole = _object(known)
    if needed := _required(known):
        whole["required"] = needed
    return {"anyOf": [_property(known[alone]), whole]} if alone else whole


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
    if literals := choices(hint):
        return {"enum": literals}
    accepted = kinds(hint)
    if section := section_class(hint):
        return _section_schema(section)
    if list in accepted:
        return {"type": "array", "items": _hint_schema(item_hint(hint, list))}
    if dict in accepted:
        return {"type": "object", "additionalProperties": _hint_schema(item_hint(hint, dict))}
    if accepted == {type(None)}:
        return {"type": "null"}
    return {"type": "string"} if accepted == {str} else {}
