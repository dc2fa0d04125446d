"""Merge a recipe's files and overrides into one tree of values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftcli.guard.files import is_file
from peftcli.recipe.values import NO_TEXT, Position, Problems, Value, is_text, resolve
from peftcli.recipe.yaml_file import parse_text, read_file
from peftcli.system.outputs import expand_user
from peftcli.tasks.settings import UNDER_DATASET

COMMAND_LINE = Position("command line")
MAX_EXTENDS = 16
_SHORT_FORMS = {"base_model": "name", "task": "type", "quantization": "type"}
"""Sections, of whatever level, that may be given as one setting: section -> setting."""
_OF_ONE_MODEL = ("revision", "trust_remote_code")
"""Settings that another base model does not inherit."""


def recipes_and_overrides(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the recipes among the words of a command, and the ``KEY=VALUE`` overrides for all of them."""
    overrides = [word for word in words if "=" in word and not is_file(Path(word))]
    return [Path(word) for word in words if word not in overrides], overrides


def read_tree(path: Path, overrides: Sequence[str], problems: Problems) -> Value | None:
    """Read a recipe, the recipes it extends, and the overrides; return None if a file cannot be read."""
    tree = _read_chain(path, Position(str(path)), (), problems)
    top = tree or Value({}, Position(str(path)))
    for text in overrides:
        top = _override(top, text, problems)
    return top if tree else None


def _read_chain(path: Path, named_at: Position, below: tuple[str, ...], problems: Problems) -> Value | None:
    """Merge the file at ``path`` over the file that it extends. ``below`` is the chain of files so far."""
    tree = read_file(path, problems, named_at)
    if tree is None or "extends" not in tree.children:
        return tree
    named = tree.children["extends"]
    tree = replace(tree, data={name: value for name, value in tree.children.items() if name != "extends"})
    if not isinstance(named.data, str) or not named.data:
        problems.add(f"expected the path of a recipe, found {named.describe()}", named.place, "extends")
        return None
    if "\0" in named.data:  # reported where it was read
        return None
    chain = (*below, os.path.realpath(path))
    base_path = path.parent / expand_user(Path(named.data))
    if os.path.realpath(base_path) in chain:
        problems.add(f"{base_path} extends itself through {path}", named.place, "extends")
        return None
    if len(chain) >= MAX_EXTENDS:
        problems.add(f"more than {MAX_EXTENDS} recipes extend one another", named.place, "extends")
        return None
    base = _read_chain(base_path, named.place, chain, problems)
    return None if base is None else _merge(_without_other_names(base, tree), tree)


def _without_other_names(below: Value, above: Value) -> Value:
    """Return ``below`` without the settings of ``dataset`` or ``task`` that ``above`` gives in the other section."""
    sections = below.children
    for section, other in (("dataset", "task"), ("task", "dataset")):
        given, old = above.children.get(other), sections.get(section)
        if given and old and old.children:
            again = given.children.keys() & set(UNDER_DATASET)
            left = {name: each for name, each in old.children.items() if name not in again}
            sections = {**sections, section: replace(old, data=left)}
    return replace(below, data=sections)


def _merge(base: Value, top: Value) -> Value:
    """Merge ``top`` over ``base``. Mappings merge key by key, unless their ``type`` differs."""
    if not isinstance(base.data, dict) or not isinstance(top.data, dict):
        return top
    if "type" in base.data and "type" in top.data and base.data["type"].data != top.data["type"].data:
        return top
    merged = dict(base.data)
    for name, value in top.data.items():
        below = merged.get(name)
        merged[name] = value if below is None else _merge_section(below, value, name)
    return replace(top, data=merged)


def _merge_section(below: Value, value: Value, section: str) -> Value:
    """Merge the values of one name; of a section that one of them gives in short, as mappings."""
    if not (isinstance(below.data, dict) or isinstance(value.data, dict)):
        return value
    below, value = _in_full(below, section), _in_full(value, section)
    name, other = below.children.get("name"), value.children.get("name")
    if section == "base_model" and name and other and name.data != other.data:
        kept = {
            key: each for key, each in below.children.items() if key not in _OF_ONE_MODEL or each.place == COMMAND_LINE
        }
        below = replace(below, data=kept)
    return _merge(below, value)


def _in_full(value: Value, section: str) -> Value:
    """Expand a section that is given as one setting to a mapping."""
    is_short = section in _SHORT_FORMS and isinstance(value.data, str) and value.scalar is not None
    return replace(value, data={_SHORT_FORMS[section]: value}) if is_short else value


def _override(tree: Value, text: str, problems: Problems) -> Value:
    key, equals, written = text.partition("=")
    path = [part.strip("\"'") for part in key.strip().split(".", 2)]
    if not is_text(key):
        problems.add(NO_TEXT, COMMAND_LINE, key[:60])
        return tree
    if not equals or not all(path):
        more = "; several recipes are for --together" if text.endswith((".yaml", ".yml")) else ""
        problems.add(f"expected KEY=VALUE, found {text[:60]!r}{more}", COMMAND_LINE)
        return tree
    if path == ["extends"]:
        problems.add("cannot be overridden", COMMAND_LINE, "extends")
        return tree
    value = _parse_value(written.strip(), key, problems)
    if value is None:
        return tree
    if path == ["base_model", "name"]:
        path = path[:1]
    section = tree.children.get(path[0]) if len(path) == 1 else None
    if section and value.children:
        value = _merge_section(section, value, path[0])
    tree = _without_other_names(tree, _set(Value({}, COMMAND_LINE), path, value))
    return _set(tree, path, value)


def _parse_value(written: str, key: str, problems: Problems) -> Value | None:
    """Parse a value of the command line: YAML if it starts like a list, mapping or quoted string, else plain text."""
    if not written.startswith(("[", "{", '"', "'")):
        return resolve(Value(written, COMMAND_LINE, plain=True, key_place=COMMAND_LINE), key, problems)
    own = Problems()
    document = parse_text(f"value: {written}", COMMAND_LINE.file, own)
    for problem in own.found:
        at = (problem.key or "value").replace("value", key, 1)
        problems.add(problem.message, COMMAND_LINE, at, problem.suggestion)
    if document is None or own.found:
        return None
    if list(document.children) != ["value"]:
        problems.add("expected one value", COMMAND_LINE, key)
    return _at_command_line(document.children["value"])


def _at_command_line(value: Value) -> Value:
    data = value.data
    if isinstance(data, list):
        data = [_at_command_line(item) for item in data]
    elif isinstance(data, dict):
        data = {name: _at_command_line(item) for name, item in data.items()}
    return Value(data, COMMAND_LINE, value.plain, COMMAND_LINE)


def _set(tree: Value, path: list[str], value: Value) -> Value:
    """Return ``tree`` with ``value`` at ``path``."""
    name, *rest = path
    if not isinstance(tree.data, dict):
        tree = Value({}, COMMAND_LINE, key_place=COMMAND_LINE)
    old = tree.children.get(name)
    if rest:
        new = _set(_in_full(old, name) if old else Value({}, COMMAND_LINE, key_place=COMMAND_LINE), rest, value)
    elif old and isinstance(old.data, dict) and isinstance(value.data, str):
        new = _merge_section(old, value, name)
    else:
        new = value
    return replace(tree, data={**tree.children, name: new})
