"""Read a YAML file into values with places. Stricter than YAML: no guessed types, repeated keys or unbounded sizes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from peftcli.guard.files import irregular_kind, os_reason, read_small
from peftcli.recipe.names import closest_file
from peftcli.recipe.values import NO_TEXT, Position, Problems, Value, is_text, read_scalar, resolve

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_VALUES = 20_000
_MAX_NAME = 200

_PLAIN, _QUOTED, _COLLECTION = "plain", "quoted", "collection"
_TAGS = {
    **dict.fromkeys((f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")), _PLAIN),
    "tag:yaml.org,2002:str": _QUOTED,
    "tag:yaml.org,2002:map": _COLLECTION,
    "tag:yaml.org,2002:seq": _COLLECTION,
}
_NO_TAGS = "has a YAML tag, which recipes do not use; remove it"
_EXPLANATIONS = (
    (r"found character '\\t'", "a tab; YAML uses spaces for indentation"),
    (r"cannot start any token", "a value cannot start with this character; quote it"),
    (r"mapping values are not allowed here", "a second ': ' on this line; quote a value that contains one"),
    (r"could not find expected ':'", "a key without ':'"),
    (
        r"expected <block end>",
        "text after a closing quote or bracket, or a line that does not fit the indentation of those above",
    ),
    (r"found unexpected end of stream|while scanning a quoted", "a quote that is never closed"),
    (r"expected ',' or '[\]}]'", "a [ or { that is never closed, or a missing comma"),
    (r"found undefined alias", "an alias whose anchor is not defined above it"),
    (r"found duplicate anchor", "an anchor that is defined twice"),
)


class _Refused(Exception):
    """Reading stops, with a message and its place in the file."""

    def __init__(self, message: str, mark: Any):
        super().__init__(message)
        self.message, self.mark = message, mark


class _Composer(yaml.SafeLoader):
    """PyYAML's loader up to the nodes, without types of scalars, and limited in depth and number."""

    depth = count = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is not yaml.ScalarNode:
            return _COLLECTION
        return _PLAIN if implicit[0] else _QUOTED

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep", self.get_mark())
        if self.count > MAX_VALUES:
            raise _Refused(f"more than {MAX_VALUES} values", self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_file(path: Path, problems: Problems, named_at: Position) -> Value | None:
    """Read the top mapping of a file; return None if it cannot be read, with the reason in ``problems``.

    ``named_at`` is the place that names the file, for problems of the whole file.
    """
    text = _read_text(path, problems, named_at)
    return None if text is None else parse_text(text, str(path), problems)


def parse_text(text: str, file: str, problems: Problems) -> Value | None:
    """Parse the top mapping of a YAML document."""
    loader = None
    try:
        loader = _Composer(text)
        root = loader.get_single_node()
        value = None if root is None else _Converter(file, problems).convert(root, "", 1)
    except _Refused as error:
        problems.add(error.message, _place_at(file, error.mark))
        return None
    except yaml.MarkedYAMLError as error:
        problems.add(_explain(error), _place_at(file, error.problem_mark or error.context_mark))
        return None
    except yaml.reader.ReaderError as error:
        character = f"a character that YAML does not allow (0x{error.character:02x})"
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        problems.add(f"{character}; write it as an escape in double quotes", Position(file, line, column))
        return None
    except (AttributeError, ValueError, RecursionError, TypeError, IndexError, OverflowError):
        # PyYAML raises these on some malformed input.
        problems.add("not valid YAML", _place_at(file, loader.get_mark() if loader else None))
        return None
    if value is None or value.scalar is None:
        problems.add("the recipe is empty", Position(file, 1, 1))
        return None
    if not isinstance(value.data, dict):
        problems.add(f"expected a mapping of sections, found {value.describe()}", value.place)
        return None
    return value


class _Converter:
    def __init__(self, file: str, problems: Problems):
        self.file, self.problems, self.count = file, problems, 0

    def convert(self, node: yaml.Node, key: str, depth: int) -> Value:
        """Convert a node, with its aliases expanded, which is why the number of values is limited."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise _Refused(f"more than {MAX_VALUES} values once its aliases are expanded", node.start_mark)
        if depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} levels deep, or within itself", node.start_mark)
        place = _place_at(self.file, node.start_mark)
        kind = _TAGS.get(node.tag, node.tag)
        if kind not in (_PLAIN, _QUOTED, _COLLECTION):
            self.problems.add(_NO_TAGS, place, key or None)
        if isinstance(node, yaml.MappingNode):
            return Value(self.mapping(node, key, depth), place)
        if isinstance(node, yaml.SequenceNode):
            items = [self.convert(item, f"{key}[{index}]", depth + 1) for index, item in enumerate(node.value)]
            return Value(items, place)
        return resolve(Value(node.value, place, plain=kind == _PLAIN), key, self.problems)

    def mapping(self, node: yaml.MappingNode, key: str, depth: int) -> dict[str, Value]:
        own: dict[str, Value] = {}
        merged: dict[str, Value] = {}
        places: dict[str, Position] = {}
        for key_node, value_node in node.value:
            place = _place_at(self.file, key_node.start_mark)
            name = self.name(key_node, place, key)
            if name is None:
                continue
            path = f"{key}.{name}" if key else name
            value = replace(self.convert(value_node, path, depth + 1), key_place=place)
            first = places.setdefault(name, place)
            if first is not place:
                self.problems.add(f"given twice; first in line {first.line}", place, path)
            elif name == "<<" and key_node.tag == _PLAIN:
                merged = self.merged_keys(value, place)
            else:
                own[name] = value
        return {**merged, **own}

    def name(self, node: yaml.Node, place: Position, key: str) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self.problems.add("a key must be a name, not a list or a mapping", place, key or None)
            return None
        kind = _TAGS.get(node.tag, node.tag)
        if kind == _PLAIN and not isinstance(read_scalar(node.value), str):
            found = node.value[:60] or "nothing"
            self.problems.add(f"a key must be a name, found {found}; quote it", place, key or None)
            return None
        if kind not in (_PLAIN, _QUOTED):
            self.problems.add(_NO_TAGS, place, key or None)
        if not is_text(node.value):
            self.problems.add(NO_TEXT, place, f"{key}.{node.value}" if key else node.value)
        return str(node.value)

    def merged_keys(self, value: Value, place: Position) -> dict[str, Value]:
        sources = value.data if isinstance(value.data, list) else [value]
        out: dict[str, Value] = {}
        for source in sources:
            if not isinstance(source.data, dict):
                self.problems.add("<< takes a mapping or a list of mappings", place)
            out = {**source.children, **out}
        return out


def _read_text(path: Path, problems: Problems, named_at: Position) -> str | None:
    name = str(path) if len(str(path)) <= _MAX_NAME else f"{str(path)[:_MAX_NAME]}..."
    named = "" if named_at.file == str(path) else f"{name}: "  # where another file names it
    try:
        raw = read_small(path, MAX_BYTES)
    except FileNotFoundError:
        problems.add(f"{named}no such file", named_at, suggestion=closest_file(str(path)))
        return None
    except (OSError, ValueError) as error:
        problems.add(f"{named}{irregular_kind(path) or f'cannot be read: {os_reason(error)}'}", named_at)
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add("not UTF-8 text", Position(str(path), line))
        return None


def _explain(error: yaml.MarkedYAMLError) -> str:
    found, mark = error.problem or error.context or "cannot be read", error.problem_mark
    if mark and mark.buffer and mark.buffer[mark.pointer - 1 : mark.pointer + 1] == "${":
        return "not valid YAML: quote ${NAME} within [ ] or { }"
    for pattern, words in _EXPLANATIONS:
        if re.search(pattern, f"{error.context}; {found}"):
            return f"not valid YAML: {words}"
    if "but found another document" in found:
        return "a second YAML document; a recipe has only one"
    return f"not valid YAML: {found[:200]}"


def _place_at(file: str, mark: Any) -> Position:
    return Position(file) if mark is None else Position(file, mark.line + 1, mark.column + 1)
