"""Convert a tree of values into a Recipe, and report every problem with its place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.core.config import AdapterConfig
from peftcli.errors import Problem, RecipeError
from peftcli.guard.typed_fields import branches
from peftcli.methods import METHODS
from peftcli.recipe.accelerate_config import with_engine_files
from peftcli.recipe.checks import check
from peftcli.recipe.names import METHOD_ALIASES, REMEDIES, SAME, closest, find_alias, suggest_task, suggest_value
from peftcli.recipe.settings import (
    Setting,
    choices,
    describe_type,
    item_hint,
    kinds,
    method_settings,
    only_required,
    sections,
    settings,
    task_settings,
)
from peftcli.recipe.sources import read_tree
from peftcli.recipe.values import Position, Problems, Value
from peftcli.schema import BaseModel, Recipe
from peftcli.tasks import TASKS
from peftcli.tasks.settings import UNDER_DATASET

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
_TYPE = Setting("type", str, dataclasses.MISSING, Recipe)


@dataclass(frozen=True)
class Reading:
    """The result of reading a recipe."""

    recipe: Recipe | None
    """None if there are problems."""
    problems: list[Problem]
    file: str
    places: dict[str, Position]
    """Key -> place of its value."""

    def locate(self, problem: Problem) -> Problem:
        """Add the place of its key to a problem without a file (``file=""``)."""
        if problem.file:
            return problem
        place = _nearest_place(self.places, problem.key or "") or Position(self.file)
        return replace(problem, file=place.file, line=place.line, column=place.column)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe in a file, with ``KEY=VALUE`` overrides.

    Raises:
        RecipeError: the recipe has problems; the error contains all of them.
    """
    reading = read(Path(path), overrides)
    if reading.recipe is None:
        raise RecipeError(reading.problems)
    return reading.recipe


def read(path: Path, overrides: Sequence[str] = ()) -> Reading:
    """Like ``load_recipe``, but return the problems and the places of all keys."""
    problems = Problems()
    tree = read_tree(path, overrides, problems)
    if tree is None:
        return Reading(None, problems.in_order(), str(path), {})
    reader = _Reader(tree, problems)
    recipe = with_engine_files(reader.recipe(), reader.places, reader.report)
    check(recipe, reader.report)
    found = problems.in_order()
    return Reading(None if found else recipe, found, str(path), reader.places)


def method_config(recipe: Recipe) -> AdapterConfig:
    """Create the adapter config of ``recipe.method``."""
    values = dict(recipe.method)
    return METHODS[values.pop("type")].config_class()(**values)


class _Reader:
    """Read all settings. One that cannot be read gets its default, and its key is added to ``bad``."""

    def __init__(self, tree: Value, problems: Problems):
        self.tree, self.problems = tree, problems
        self.bad: set[str] = set()
        self.places: dict[str, Position] = {}

    def recipe(self) -> Recipe:
        top = dict(self.tree.children)
        known = settings(Recipe)
        self.refuse_unknown(top, known, "")
        self.require(top, known, "", Position(self.tree.place.file, 1, 1))
        if "base_model" in top:
            top["base_model"] = _expand_short_form(top["base_model"], BaseModel)
        task, method = self.task(top.get("task")), self.method(top.get("method"))
        parts = {name: self.section(cls, top.get(name), name) for name, cls in sections().items()}
        if "method" in top and parts["training"]["init_adapter_from"] is not None:
            # what is not given is as that adapter has it
            given = {"type", *top["method"].children}
            method = {name: value for name, value in method.items() if name in given}
        self.share_settings(task, parts["dataset"])
        return Recipe(
            task=task,
            method=method,
            gates=self.setting(known["gates"], top["gates"], "gates") if "gates" in top else {},
            **{name: _build(cls, parts[name]) for name, cls in sections().items()},
        )

    def section(self, cls: type, value: Value | None, path: str) -> dict[str, Any]:
        """Return every setting of a section by name."""
        given = self.mapping(value, path)
        if given is not None and value is not None:
            given = self.respell(given, settings(cls), path)
            self.refuse_unknown(given, settings(cls), path)
            self.require(given, settings(cls), path, value.key_place or value.place)
        return self.all_settings(settings(cls), given or {}, path)

    def respell(self, given: dict[str, Value], known: dict[str, Setting], path: str) -> dict[str, Value]:
        """Return the values under our spelling; report two spellings of a setting that differ."""
        out = dict(given)
        for theirs, ours in SAME.get(path, {}).items():
            if theirs not in out:
                continue
            value, keys = out.pop(theirs), (f"{path}.{theirs}", f"{path}.{ours}")
            if ours in out:
                found = [
                    self.setting(known[ours], each, key) for each, key in zip((value, out[ours]), keys, strict=True)
                ]
                if self.bad.isdisjoint(keys) and found[0] != found[1]:
                    self.report(keys, f"is another name of {keys[1]}, and differs from it; give it only once")
            out.setdefault(ours, value)
        return out

    def method(self, value: Value | None) -> dict[str, Any]:
        """Return ``type`` and every setting of the method; only ``type`` if the method is unknown."""
        given = self.mapping(value, "method")
        if given is None or value is None:
            return {"type": ""}
        self.require(given, {"type": _TYPE}, "method", value.key_place or value.place)
        name = self.setting(_TYPE, given["type"], "method.type") if "type" in given else ""
        if name not in METHODS:
            if "method.type" not in self.bad:
                known, suggestion = ", ".join(METHODS), METHOD_ALIASES.get(name.lower()) or closest(name, METHODS)
                self.report(("method.type",), f"unknown method: {name[:60]!r}; known: {known}", suggestion)
                self.bad.add("method.type")
            return {"type": name}
        known_settings = method_settings(name)
        own = {key: child for key, child in given.items() if key != "type"}
        self.refuse_unknown(own, known_settings, "method", kind=name)
        self.require(own, known_settings, "method", value.key_place or value.place)
        return {"type": name, **self.all_settings(known_settings, own, "method")}

    def task(self, value: Value | None) -> dict[str, Any] | None:
        """Return ``type`` and the given settings of the task; None if the recipe names no task."""
        if value is None or (value.plain and value.scalar is None):
            return None
        alone = isinstance(value.data, str)
        given = {"type": value} if alone else self.mapping(value, "task")
        if given is None:
            return None
        key = "task" if alone else "task.type"
        own = {one: child for one, child in given.items() if one != "type"}
        if "type" not in given:
            return self.settings_of_any_task(own, value.key_place or value.place) or None
        name = self.setting(_TYPE, given["type"], key)
        if name not in TASKS:
            if key not in self.bad:
                by_type = {str(row.task_type).lower(): task for task, row in reversed(TASKS.items())}  # the first one
                suggestion = by_type.get(name.lower()) or suggest_task(name, TASKS)
                self.report((key,), f"unknown task: {name[:60]!r}; known: {', '.join(TASKS)}", suggestion)
            self.bad |= {"task", key}
            return {"type": name}
        self.refuse_unknown(own, task_settings(name), "task", kind=name)
        return {"type": name} | self.settings_of_task(name, own)

    def settings_of_task(self, name: str, own: dict[str, Value]) -> dict[str, Any]:
        known = task_settings(name)
        return {one: self.setting(known[one], own[one], f"task.{one}") for one in own if one in known}

    def settings_of_any_task(self, own: dict[str, Value], place: Position) -> dict[str, Any]:
        """Return the given settings of a task that is found later, as the first task that takes them reads them."""
        self.refuse_unknown(own, {key: entry for name in TASKS for key, entry in task_settings(name).items()}, "task")
        having = [name for name in TASKS if own.keys() <= task_settings(name).keys()]
        if not having:
            self.problem("is required, since no task has all of these settings", place, "task.type")
            return {}

        def takes(name: str) -> bool:
            trial = _Reader(self.tree, Problems())
            trial.settings_of_task(name, own)
            return not trial.problems.count

        return self.settings_of_task(next(filter(takes, having), having[0]), own)

    def share_settings(self, task: dict[str, Any] | None, dataset: dict[str, Any]) -> None:
        """Move the settings that recipes may also give under ``dataset`` from the task to ``dataset``."""
        for name in [name for name in UNDER_DATASET if name in (task or {})]:
            assert task is not None
            value, here, there = task.pop(name), f"task.{name}", f"dataset.{name}"
            if there in self.places and dataset[name] != value:
                self.report((here, there), f"differs from {there}; give it only once")
            dataset[name] = value
            self.places.setdefault(there, self.places[here])

    def all_settings(self, known: dict[str, Setting], given: dict[str, Value], path: str) -> dict[str, Any]:
        return {
            name: self.setting(entry, given[name], f"{path}.{name}") if name in given else _default(entry)
            for name, entry in known.items()
        }

    def mapping(self, value: Value | None, path: str) -> dict[str, Value] | None:
        """Return the keys of a section; report a problem and return None if it is not a mapping."""
        if value is None:
            return None
        self.places[path] = value.key_place or value.place
        if isinstance(value.data, str) and value.scalar is None:
            return {}
        if not isinstance(value.data, dict):
            meant = None
            if path == "method" and isinstance(value.data, str):
                meant = f"{{type: {value.data}}}" if value.data in METHODS else METHOD_ALIASES.get(value.data.lower())
            elif path == "dataset" and isinstance(value.data, str) and isinstance(value.scalar, str):
                meant = f"{{train: {value.data[:60]}}}"
            self.problem(f"expected a mapping of settings, found {value.describe()}", value.place, path, meant)
            return None
        return value.data

    def refuse_unknown(
        self, given: dict[str, Value], known: dict[str, Setting], path: str, kind: str | None = None
    ) -> None:
        for name, value in given.items():
            if name in known:
                continue
            message, suggestion = ("unknown key", None) if self.problems.full else _advice(name, known, path, kind)
            key = f"{path}.{name}" if path else name
            self.problems.add(message, value.key_place or value.place, key[:200], suggestion)

    def require(self, given: dict[str, Value], known: dict[str, Setting], path: str, place: Position) -> None:
        for name, entry in known.items():
            if entry.required and name not in given:
                self.problem("is required", place, f"{path}.{name}" if path else name)

    def setting(self, entry: Setting, value: Value, key: str) -> Any:
        """Return the value of a setting; report a problem and return the default if its type is wrong."""
        from pydantic import ValidationError

        self.places[key] = value.place
        if value.refused:
            self.bad.add(key)
        if isinstance(value.data, list):
            self.places |= {f"{key}[{index}]": item.place for index, item in enumerate(value.data)}
        self.places |= {f"{key}.{name}": item.place for name, item in value.children.items()}
        if entry.items:
            return self.items(entry.items, value, entry.hint, key)
        alone = entry.section and only_required(entry.section)
        if entry.section and value.scalar is not None and not (alone and isinstance(value.data, list)):
            return self.section(entry.section, _expand_short_form(value, entry.section), key)
        try:
            return _adapter(entry.hint).validate_python(_to_python(value, entry.hint))
        except ValidationError as error:
            items = [_find_item(value, entry.hint, key, problem["loc"]) for problem in error.errors(include_url=False)]
        wrong = {item.key: item for item in items}
        if len(wrong) > 1:  # the problem of the whole value only says that it is no other member of the union
            wrong.pop(key, None)
        for item in wrong.values():
            if item.value.refused:
                continue
            found = item.value.describe() + (" in quotes; remove the quotes" if item.is_quoted else "")
            one, is_list = item.value.scalar, kinds(item.hint) <= {list, type(None)}
            known = choices(item_hint(item.hint, list))
            fits = one in known if known else one is not None and re.fullmatch(r"[\w.-]+", str(one))
            listed = f"[{one}]" if is_list and fits else "[]" if is_list and one == "none" else None
            if item.key == "dataset.train" and isinstance(item.value.data, list):
                listed = "dataset.mix"
            self.problem(
                f"expected {describe_type(item.hint)}, found {found}",
                item.value.place,
                item.key,
                item.suggestion or listed,
            )
        self.bad.add(key)
        return _default(entry)

    def items(self, cls: type, value: Value, hint: Any, key: str) -> list[dict[str, Any]]:
        """Return every setting of each section of a list."""
        if isinstance(value.data, list):
            return [
                self.section(cls, _expand_short_form(item, cls), f"{key}[{index}]")
                for index, item in enumerate(value.data)
            ]
        if not value.refused and (isinstance(value.data, dict) or value.scalar is not None):
            example = f"[{{{only_required(cls)}: ...}}]"
            self.problem(f"expected {describe_type(hint)}, found {value.describe()}", value.place, key, example)
        return []

    def report(self, keys: Sequence[str], message: str, suggestion: str | None = None) -> None:
        """Report a problem of ``keys[0]``, unless one of ``keys`` could not be read."""
        parts = {key[:end] for key in keys for end in [*(i for i, c in enumerate(key) if c in ".["), len(key)]}
        if not parts & self.bad:
            place = _nearest_place(self.places, keys[0]) or Position(self.tree.place.file)
            self.problems.add(message, place, keys[0], suggestion)

    def problem(self, message: str, place: Position, key: str, suggestion: str | None = None) -> None:
        self.bad.add(key)
        self.problems.add(message, place, key, suggestion)


def _nearest_place(places: dict[str, Position], key: str) -> Position | None:
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return places.get(key)


def _expand_short_form(value: Value, section: type) -> Value:
    """Expand a section that is given as its only required setting to a mapping."""
    alone = only_required(section)
    if alone and isinstance(value.data, str) and (value.refused or value.scalar is not None):
        return replace(value, data={alone: value})
    return value


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """Build the dataclass of a section and of the sections within it."""
    out = dict(values)
    for name, entry in settings(cls).items():
        if entry.section and isinstance(out[name], dict):
            out[name] = _build(entry.section, out[name])
        elif entry.items:
            out[name] = [_build(entry.items, item) for item in out[name]]
    return cls(**out)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _to_python(value: Value, hint: Any) -> Any:
    """Convert a value to Python data; the meaning of a scalar depends on the types that the setting accepts."""
    if isinstance(value.data, dict):
        return {name: _to_python(child, item_hint(hint, dict)) for name, child in value.data.items()}
    if isinstance(value.data, list):
        return [_to_python(child, item_hint(hint, list)) for child in value.data]
    text, found, accepted = value.data, value.scalar, kinds(hint)
    if not value.plain or text in choices(hint):
        return text
    if found is None and type(None) not in accepted and accepted & {dict, list}:
        return {} if dict in accepted else []
    if accepted & {bool, Any} and text.lower() in _YES_NO:
        return _YES_NO[text.lower()]
    if type(found) in (int, float) and any(branch is str for branch in branches(hint)) and not accepted & {int, float}:
        return text
    return found


def _default(entry: Setting) -> Any:
    return "" if entry.required else copy(entry.default)


@dataclass(frozen=True)
class _Item:
    """A value, or an item of a value, of the wrong type."""

    value: Value
    hint: Any
    key: str

    @property
    def is_quoted(self) -> bool:
        """Whether a scalar would have the right type without its quotes."""
        plain = replace(self.value, plain=True)
        return (
            isinstance(self.value.data, str) and not self.value.plain and type(plain.scalar) in kinds(self.hint) - {str}
        )

    @property
    def suggestion(self) -> str | None:
        """A similar value that is valid."""
        if not isinstance(self.value.data, str):
            return None
        found = self.value.scalar
        if isinstance(found, float) and found.is_integer() and int in kinds(self.hint) and abs(found) < 2**53:
            return str(int(found))
        if kinds(self.hint) == {list} and item_hint(self.hint, list) is str and isinstance(found, str):
            return f"[{found[:60]}]"
        return suggest_value(self.value.data, choices(self.hint))


def _find_item(value: Value, hint: Any, key: str, loc: Sequence[int | str]) -> _Item:
    """Find the item of a pydantic location. Parts of the location that are not items are members of unions."""
    for part in loc:
        if isinstance(value.data, list) and isinstance(part, int):
            value, hint, key = value.data[part], item_hint(hint, list), f"{key}[{part}]"
        elif str(part) in value.children:
            value, hint, key = value.children[str(part)], item_hint(hint, dict), f"{key}.{part}"
    return _Item(value, hint, key)


def _advice(name: str, known: dict[str, Setting], path: str, kind: str | None) -> tuple[str, str | None]:
    """Return message and suggestion for an unknown key: where it belongs, or a similar key.

    ``kind`` is the method or task whose settings are read.
    """
    own = (*known, "type") if kind else tuple(known)
    top = path.partition(".")[0]
    if remedy := REMEDIES.get(name):
        return f"unknown key; {remedy}", None
    if found := find_alias(name, top):
        section, _, last = found.partition(".")
        if section == top and last.partition(":")[0] in own:
            return "unknown key", last
        if section != top or not kind:  # else it is a setting of other methods
            return "unknown key", found
    elsewhere = _keys_by_name()
    if found := elsewhere.get(name):
        section = found.rpartition(".")[0]
        table, settings_of = (METHODS, method_settings) if path == "method" else (TASKS, task_settings)
        owners = [other for other in table if name in settings_of(other)]
        if kind and owners and section in (path, "dataset"):
            shown = owners if len(owners) < 6 else owners[:4]
            more = f" and {len(owners) - 4} other {path}s" if len(owners) > len(shown) else ""
            return f"not a setting of {kind}, only of {', '.join(shown)}{more}", None
        return f"belongs {f'in the section {section}' if section else 'at the top level'}", found
    return "unknown key", closest(name, own) or elsewhere.get(closest(name, elsewhere, 0.8) or "")


@cache
def _keys_by_name() -> dict[str, str]:
    """Return every key of a recipe by its last name; of equal names, the first."""
    out: dict[str, str] = {name: name for name in settings(Recipe)}
    for section, cls in sections().items():
        for name in settings(cls):
            out.setdefault(name, f"{section}.{name}")
    for method in METHODS:
        for name in ("type", *method_settings(method)):
            out.setdefault(name, f"method.{name}")
    for task in TASKS:
        for name in task_settings(task):
            out.setdefault(name, f"task.{name}")
    return out
