"""A tree of values -> a Recipe, with every problem at its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.core.config import AdapterConfig
from peftcli.errors import Problem, RecipeError
from peftcli.methods import METHODS
from peftcli.recipe.checks import check
from peftcli.recipe.names import alias_of, meant_value, near
from peftcli.recipe.settings import (
    Setting,
    branches,
    choices,
    in_words,
    item_hint,
    kinds,
    method_settings,
    sections,
    settings,
    sole_required,
    task_settings,
)
from peftcli.recipe.sources import read_tree
from peftcli.recipe.values import Place, Problems, Value
from peftcli.schema import BaseModel, Recipe
from peftcli.tasks import TASKS
from peftcli.tasks.settings import UNDER_DATASET

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
_TYPE = Setting("type", str, dataclasses.MISSING, Recipe)


@dataclass(frozen=True)
class Reading:
    """What reading a recipe gave."""

    recipe: Recipe | None
    """None where there are problems."""
    problems: list[Problem]
    file: str
    places: dict[str, Place]
    """Where each key's value stands."""

    def place(self, key: str) -> Place | None:
        """The place of ``key``, else that of the nearest key above it."""
        return _nearest(self.places, key)

    def placed(self, problem: Problem) -> Problem:
        """``problem`` at the place of its key, where it names no file of its own (``file=""``)."""
        if problem.file:
            return problem
        place = _nearest(self.places, problem.key or "") or Place(self.file)
        return replace(problem, file=place.file, line=place.line, column=place.column)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with ``KEY=VALUE`` overrides on top.

    Raises:
        RecipeError: with every problem that was found.
    """
    reading = read(path, overrides)
    if reading.recipe is None:
        raise RecipeError(reading.problems)
    return reading.recipe


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[Problem]]:
    """As load_recipe, with the problems returned."""
    reading = read(path, overrides)
    return reading.recipe, reading.problems


def read(path: Path, overrides: Sequence[str] = ()) -> Reading:
    """As load_recipe, with the problems returned and the places of all keys."""
    problems = Problems()
    tree = read_tree(path, overrides, problems)
    if tree is None:
        return Reading(None, problems.in_order(), str(path), {})
    reader = _Reader(tree, problems)
    recipe = reader.recipe()
    check(recipe, reader.report)
    found = problems.in_order()
    return Reading(None if found else recipe, found, str(path), reader.places)


def method_config(recipe: Recipe) -> AdapterConfig:
    """The config that ``recipe.method`` describes."""
    values = dict(recipe.method)
    return METHODS[values.pop("type")].config_class()(**values)


class _Reader:
    """Reads what can be read; a setting that cannot holds its default, and its key is in ``bad``."""

    def __init__(self, tree: Value, problems: Problems):
        self.tree, self.problems = tree, problems
        self.bad: set[str] = set()
        self.places: dict[str, Place] = {}

    def recipe(self) -> Recipe:
        top = self.children(self.tree)
        known = settings(Recipe)
        self.refuse_unknown(top, known, "")
        self.require(top, known, "", Place(self.tree.place.file, 1, 1))
        if "base_model" in top:
            top["base_model"] = _written_out(top["base_model"], BaseModel)
        task, method = self.task(top.get("task")), self.method(top.get("method"))
        parts = {name: self.section(cls, top.get(name), name) for name, cls in sections().items()}
        self.share_settings(task, parts["dataset"])
        return Recipe(
            task=task,
            method=method,
            gates=self.setting(known["gates"], top["gates"], "gates") if "gates" in top else {},
            **{name: _built(cls, parts[name]) for name, cls in sections().items()},
        )

    def section(self, cls: type, value: Value | None, path: str) -> dict[str, Any]:
        """Every setting of a section, by name."""
        given = self.mapping(value, path)
        if given is not None and value is not None:
            self.refuse_unknown(given, settings(cls), path)
            self.require(given, settings(cls), path, value.key_place or value.place)
        return self.all_settings(settings(cls), given or {}, path)

    def method(self, value: Value | None) -> dict[str, Any]:
        """``type`` and every setting of the method; only ``type`` where the method is unknown."""
        given = self.mapping(value, "method")
        if given is None or value is None:
            return {"type": ""}
        self.require(given, {"type": _TYPE}, "method", value.key_place or value.place)
        name = self.setting(_TYPE, given["type"], "method.type") if "type" in given else ""
        if name not in METHODS:
            if "method.type" not in self.bad:
                known = ", ".join(METHODS)
                self.report(("method.type",), f"no method is called {name[:60]!r}; known: {known}", near(name, METHODS))
                self.bad.add("method.type")
            return {"type": name}
        known_settings = method_settings(name)
        own = {key: child for key, child in given.items() if key != "type"}
        self.refuse_unknown(own, known_settings, "method", kind=name)
        self.require(own, known_settings, "method", value.key_place or value.place)
        return {"type": name, **self.all_settings(known_settings, own, "method")}

    def task(self, value: Value | None) -> dict[str, Any] | None:
        """``type`` and the settings that the recipe gives; None where the task is left out."""
        if value is None or (value.plain and value.scalar is None):
            return None
        alone = isinstance(value.data, str)
        given = {"type": value} if alone else self.mapping(value, "task")
        if given is None:
            return None
        key, place = "task" if alone else "task.type", value.key_place or value.place
        self.require(given, {"type": _TYPE}, "task", place)
        name = self.setting(_TYPE, given["type"], key) if "type" in given else ""
        if name not in TASKS:
            if key not in self.bad:
                by_type = {str(row.task_type).lower(): task for task, row in TASKS.items()}
                suggestion = by_type.get(name.lower()) or near(name, TASKS)
                self.report((key,), f"no task is called {name[:60]!r}; known: {', '.join(TASKS)}", suggestion)
            self.bad |= {"task", key}
            return {"type": name}
        known, own = task_settings(name), {one: child for one, child in given.items() if one != "type"}
        self.refuse_unknown(own, known, "task", kind=name)
        return {"type": name} | {one: self.setting(known[one], own[one], f"task.{one}") for one in own if one in known}

    def share_settings(self, task: dict[str, Any] | None, dataset: dict[str, Any]) -> None:
        """Move settings that may also stand under ``dataset`` from the task to where they are kept: there."""
        for name in [name for name in UNDER_DATASET if name in (task or {})]:
            assert task is not None
            value, here, there = task.pop(name), f"task.{name}", f"dataset.{name}"
            if there in self.places and dataset[name] != value:
                self.report((here, there), f"is given as {there} too, with another value; give it once")
            dataset[name] = value
            self.places.setdefault(there, self.places[here])

    def all_settings(self, known: dict[str, Setting], given: dict[str, Value], path: str) -> dict[str, Any]:
        return {
            name: self.setting(entry, given[name], f"{path}.{name}") if name in given else _absent(entry)
            for name, entry in known.items()
        }

    def mapping(self, value: Value | None, path: str) -> dict[str, Value] | None:
        """The keys of a section; None, and a problem, where it is no mapping."""
        if value is None:
            return None
        self.places[path] = value.key_place or value.place
        if isinstance(value.data, str) and value.scalar is None:
            return {}
        if not isinstance(value.data, dict):
            meant = None
            if path == "method" and isinstance(value.data, str) and value.data in METHODS:
                meant = f"{{type: {value.data}}}"
            elif path == "dataset" and isinstance(value.data, str) and isinstance(value.scalar, str):
                meant = f"{{train: {value.data[:60]}}}"
            self.problem(f"expected a mapping of settings, found {value.shown()}", value.place, path, meant)
            return None
        return value.data

    def children(self, value: Value) -> dict[str, Value]:
        return dict(value.data) if isinstance(value.data, dict) else {}

    def refuse_unknown(
        self, given: dict[str, Value], known: dict[str, Setting], path: str, kind: str | None = None
    ) -> None:
        for name, value in given.items():
            if name in known:
                continue
            message, suggestion = ("unknown key", None) if self.problems.full else _advice(name, known, path, kind)
            key = f"{path}.{name}" if path else name
            self.problems.add(message, value.key_place or value.place, key[:200], suggestion)

    def require(self, given: dict[str, Value], known: dict[str, Setting], path: str, place: Place) -> None:
        for name, entry in known.items():
            if entry.required and name not in given:
                self.problem("is required", place, f"{path}.{name}" if path else name)

    def setting(self, entry: Setting, value: Value, key: str) -> Any:
        """The value of one setting; its default, and a problem, where it is of the wrong type."""
        from pydantic import ValidationError

        self.places[key] = value.place
        if value.refused:
            self.bad.add(key)
        if isinstance(value.data, list):
            self.places |= {f"{key}[{index}]": item.place for index, item in enumerate(value.data)}
        if entry.items:
            return self.items(entry.items, value, entry.hint, key)
        if entry.section and (isinstance(value.data, dict) or value.scalar is not None):
            return self.section(entry.section, _written_out(value, entry.section), key)
        try:
            return _adapter(entry.hint).validate_python(_fit(value, entry.hint))
        except ValidationError as error:
            items = [_inside(value, entry.hint, key, problem["loc"]) for problem in error.errors(include_url=False)]
        wrong = {item.key: item for item in items}
        if len(wrong) > 1:  # the value as a whole is only no other member of a union
            wrong.pop(key, None)
        for item in wrong.values():
            if item.value.refused:
                continue
            found = item.value.shown() + (" in quotes; leave them out" if item.is_quoted else "")
            self.problem(f"expected {in_words(item.hint)}, found {found}", item.value.place, item.key, item.instead)
        self.bad.add(key)
        return _absent(entry)

    def items(self, cls: type, value: Value, hint: Any, key: str) -> list[dict[str, Any]]:
        """Every setting of each section of a list."""
        if isinstance(value.data, list):
            return [
                self.section(cls, _written_out(item, cls), f"{key}[{index}]") for index, item in enumerate(value.data)
            ]
        if not value.refused and (isinstance(value.data, dict) or value.scalar is not None):
            example = f"[{{{sole_required(cls)}: ...}}]"
            self.problem(f"expected {in_words(hint)}, found {value.shown()}", value.place, key, example)
        return []

    def report(self, keys: Sequence[str], message: str, suggestion: str | None = None) -> None:
        """Notes a problem of ``keys[0]``, unless one of ``keys`` could not be read."""
        parts = {key[:end] for key in keys for end in [*(i for i, c in enumerate(key) if c in ".["), len(key)]}
        if not parts & self.bad:
            place = _nearest(self.places, keys[0]) or Place(self.tree.place.file)
            self.problems.add(message, place, keys[0], suggestion)

    def problem(self, message: str, place: Place, key: str, suggestion: str | None = None) -> None:
        self.bad.add(key)
        self.problems.add(message, place, key, suggestion)


def _nearest(places: dict[str, Place], key: str) -> Place | None:
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return places.get(key)


def _written_out(value: Value, section: type) -> Value:
    """A section that is given as its sole required setting alone, as the mapping that it means."""
    alone = sole_required(section)
    if alone and isinstance(value.data, str) and (value.refused or value.scalar is not None):
        return replace(value, data={alone: value})
    return value


def _built(cls: Any, values: dict[str, Any]) -> Any:
    """The dataclass of a section, and those of the sections within it."""
    out = dict(values)
    for name, entry in settings(cls).items():
        if entry.section and isinstance(out[name], dict):
            out[name] = _built(entry.section, out[name])
        elif entry.items:
            out[name] = [_built(entry.items, item) for item in out[name]]
    return cls(**out)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _fit(value: Value, hint: Any) -> Any:
    """A value as Python data, where what a scalar means depends on the types that the setting takes."""
    if isinstance(value.data, dict):
        return {name: _fit(child, item_hint(hint, dict)) for name, child in value.data.items()}
    if isinstance(value.data, list):
        return [_fit(child, item_hint(hint, list)) for child in value.data]
    text, found, accepted = value.data, value.scalar, kinds(hint)
    if not value.plain or text in choices(hint):
        return text
    if found is None and type(None) not in accepted and accepted & {dict, list}:
        return {} if dict in accepted else []
    if bool in accepted and text.lower() in _YES_NO:
        return _YES_NO[text.lower()]
    if type(found) in (int, float) and any(branch is str for branch in branches(hint)) and not accepted & {int, float}:
        return text
    return found


def _absent(entry: Setting) -> Any:
    return "" if entry.required else copy(entry.default)


@dataclass(frozen=True)
class _Item:
    """A value, or an item within it, that is not of the type that it should be."""

    value: Value
    hint: Any
    key: str

    @property
    def is_quoted(self) -> bool:
        """Whether a scalar would be of the right type without its quotes."""
        plain = replace(self.value, plain=True)
        return (
            isinstance(self.value.data, str) and not self.value.plain and type(plain.scalar) in kinds(self.hint) - {str}
        )

    @property
    def instead(self) -> str | None:
        """A value that would be valid, close to the one that was found."""
        if not isinstance(self.value.data, str):
            return None
        found = self.value.scalar
        if isinstance(found, float) and found.is_integer() and int in kinds(self.hint) and abs(found) < 2**53:
            return str(int(found))
        if kinds(self.hint) == {list} and item_hint(self.hint, list) is str and isinstance(found, str):
            return f"[{found[:60]}]"
        return meant_value(self.value.data, choices(self.hint))


def _inside(value: Value, hint: Any, key: str, loc: Sequence[int | str]) -> _Item:
    """The item that a pydantic location names. Parts of it that name no item name members of unions."""
    for part in loc:
        if isinstance(value.data, list) and isinstance(part, int):
            value, hint, key = value.data[part], item_hint(hint, list), f"{key}[{part}]"
        elif isinstance(value.data, dict) and str(part) in value.data:
            value, hint, key = value.data[str(part)], item_hint(hint, dict), f"{key}.{part}"
    return _Item(value, hint, key)


def _advice(name: str, known: dict[str, Setting], path: str, kind: str | None) -> tuple[str, str | None]:
    """Message and suggestion for an unknown key: where it belongs, or what may be meant.

    ``kind``: the method or task whose settings are read.
    """
    own = (*known, "type") if kind else tuple(known)
    top = path.partition(".")[0]
    if found := alias_of(name, top):
        section, _, last = found.partition(".")
        return "unknown key", last if section == top and last.partition(":")[0] in own else found
    elsewhere = _everywhere()
    if found := elsewhere.get(name):
        section = found.rpartition(".")[0]
        table, settings_of = (METHODS, method_settings) if path == "method" else (TASKS, task_settings)
        owners = [other for other in table if name in settings_of(other)]
        if kind and owners and section in (path, "dataset"):
            more = f" and {len(owners) - 4} other {path}s" if len(owners) > 4 else ""
            return f"not a setting of {kind}, but of {', '.join(owners[:4])}{more}", None
        return f"belongs {f'in the section {section}' if section else 'at the top level'}", found
    return "unknown key", near(name, own) or elsewhere.get(near(name, elsewhere, 0.8) or "")


@cache
def _everywhere() -> dict[str, str]:
    """Every key of a recipe by its last name; of equal names, the first."""
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
