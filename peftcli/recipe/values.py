"""Values of a recipe as in the file: text with its place. The setting decides the type."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from peftcli.errors import Problem
from peftcli.system.secrets import PART, SECRET_NAME, known_secrets, redact, redactor

MAX_PROBLEMS = 100
NO_TEXT = "contains a character that is not text (NUL or half a surrogate pair)"
_MAX_VARIABLES = 100
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_VARIABLE = re.compile(r"\$(?P<literal>\$\{)|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\})?")

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Position:
    """A place in a file; lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None


@dataclass(frozen=True)
class Value:
    """A scalar's text, a list or a mapping, with its place."""

    data: str | list[Value] | dict[str, Value]
    place: Position
    plain: bool = False
    """Whether this is a scalar without quotes, which may be a number, true, false or null."""
    key_place: Position | None = None
    """The place of the value's key."""
    refused: bool = False
    """Whether a problem of this value is reported already."""

    @property
    def children(self) -> dict[str, Value]:
        """The values of a mapping; none of a scalar or a list."""
        return self.data if isinstance(self.data, dict) else {}

    @property
    def scalar(self) -> Scalar:
        """The scalar that the text means by itself."""
        return read_scalar(self.data) if self.plain and isinstance(self.data, str) else str(self.data)

    def describe(self) -> str:
        """Describe the value in an error message."""
        if not isinstance(self.data, str):
            return "a mapping" if isinstance(self.data, dict) else "a list"
        if self.scalar is None:
            return "nothing"
        text = redact(self.data)  # before it is shortened: a part of a secret is not recognised
        text = text if len(text) <= 60 else text[:60] + "..."
        if isinstance(self.scalar, str):
            return repr(text)
        if isinstance(self.scalar, float) and not math.isfinite(self.scalar):
            return f"{text}, which is not finite"
        return f"{text}, which is too large" if isinstance(self.scalar, float) and _INT.fullmatch(text) else text


class Report(Protocol):
    """Report a problem of the first key, which depends on the other keys."""

    def __call__(self, keys: Sequence[str], message: str, suggestion: str | None = None) -> None: ...


class Problems:
    """Collect problems, up to a limit, without secrets in their text."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.left_out = 0
        self.redact = redactor()

    @property
    def full(self) -> bool:
        """Whether the limit is reached, so that further problems are only counted."""
        return len(self.found) >= MAX_PROBLEMS

    @property
    def count(self) -> int:
        """The number of problems, including those left out."""
        return len(self.found) + self.left_out

    def add(self, message: str, place: Position, key: str | None = None, suggestion: str | None = None) -> None:
        """Add one problem."""
        if self.full:
            self.left_out += 1
            return
        message, file = self.redact(message), self.redact(place.file)
        key, suggestion = key and self.redact(key), suggestion and self.redact(suggestion)
        self.found.append(Problem(message, file, place.line, place.column, key, suggestion))

    def in_order(self) -> list[Problem]:
        """Return the problems sorted by file and line."""
        files = list(dict.fromkeys(problem.file for problem in self.found))
        ordered = sorted(self.found, key=lambda p: (files.index(p.file), p.line or 0, p.column or 0))
        if self.left_out:
            ordered.append(Problem(f"{self.left_out} more problems", ordered[0].file))
        return ordered


def read_scalar(text: str) -> Scalar:
    """Convert an unquoted scalar to a number, true, false or null; otherwise return the text.

    ``yes``, ``no``, dates and numbers with leading zeros stay strings: YAML versions disagree about them.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if len(text) > 64 or text[0] not in "+-.0123456789":
        return text
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    with suppress(ValueError):  # 1__0
        if _INT.fullmatch(text):
            number = int(text, 0) if text.lstrip("+-")[:2] in ("0x", "0o") else int(text)
            return number if -(2**63) <= number < 2**63 else float(number)
        if _FLOAT.fullmatch(text) and not text.lstrip("+-").replace("_", "").isdigit():
            return float(text)
    return text


def resolve(value: Value, key: str, problems: Problems) -> Value:
    """Substitute ``${ENV}`` in a scalar; refuse it if it contains a secret or is not text."""
    before = problems.count
    text = _substitute(value, key, problems)
    whole = _VARIABLE.fullmatch(str(value.data))
    plain = value.plain or bool(whole and whole["name"])
    if not is_text(text):
        problems.add(NO_TEXT, value.place, key)
    if problems.redact(text) != text or problems.redact(key) != key:
        known = known_secrets().items()
        origin = next((origin for secret, origin in known if secret[:PART] in text or secret[:PART] in key), None)
        problems.add(
            f"looks like a token or password{f' (from {origin})' if origin else ''}, which a recipe must not contain; "
            "set HF_TOKEN in the environment, or log in with `hf auth login`",
            value.place,
            key,
        )
    return replace(value, data=text, plain=plain, refused=problems.count > before)


def _substitute(value: Value, key: str, problems: Problems) -> str:
    text = str(value.data)
    if text.count("${") > _MAX_VARIABLES:
        problems.add(f"contains more than {_MAX_VARIABLES} variables", value.place, key)
        return text

    def fill(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["literal"]:
            return "${"
        if name is None:
            problems.add("expected ${NAME} or ${NAME:-default}; a literal ${ is written $${", value.place, key)
            return ""
        if SECRET_NAME.search(name):
            problems.add(
                f"${{{name}}} is a secret; a recipe must not contain it, since it is saved beside the adapter",
                value.place,
                key,
            )
            return ""
        found = os.environ.get(name)
        if default is not None:
            return found or default
        if found is None:
            problems.add(
                f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}", value.place, key
            )
        return found or ""

    return _VARIABLE.sub(fill, text)


def is_text(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8 and contains no NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False
