"""Regular expressions from untrusted files: Python's syntax, matched by `regex` within a time limit.

Python's ``re`` has no limit: ``(a*)*b`` keeps it busy for longer than a machine lives. `regex` has one, and gives the
same answers but for syntax that it alone knows, which is refused here. Its compiler writes repetitions out, so their
number is limited.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from re import _parser  # type: ignore[attr-defined]  # private, and the only parser that counts a pattern's parts
from typing import Any

import regex

from peftcli.errors import AdapterError
from peftcli.guard.files import short_repr

_MAX_CHARACTERS = 2000
_MAX_PARTS, _MAX_PARTS_TOGETHER = 20_000, 50_000
"""Parts of one pattern, and of all patterns of a setting, repetitions written out. A usual pattern has 20."""
_SECONDS = 2.0
"""Processor time for matching all patterns of a setting with all names. A usual match takes microseconds."""
PLAIN_NAME = re.compile(r"[\w.]+")
"""A pattern that is a name."""
_OF_REGEX_ALONE = re.compile(r"\{[^}]*[deis][^}]*\}|\[:\^?\w*:\]")
"""Fuzzy matches and POSIX classes."""


@dataclass
class _Clock:
    left: float
    """Seconds."""


@dataclass
class Pattern:
    """A regular expression with its share of time.

    Raises:
        AdapterError: as ``check_patterns``.
    """

    text: str
    clock: _Clock = field(default_factory=lambda: _Clock(_SECONDS))

    def __post_init__(self) -> None:
        _count_parts(self.text)
        try:
            self._expression = regex.compile(self.text)
        except (regex.error, RecursionError) as error:
            raise AdapterError(f"{short_repr(self.text)} is not a regular expression: {error}") from None

    def fullmatch(self, text: str) -> bool:
        """Return whether the pattern matches all of ``text``, as ``re.fullmatch`` does.

        Raises:
            AdapterError: the time is used up.
        """
        start = time.thread_time()
        try:
            if self.clock.left <= 0:
                raise TimeoutError
            return self._expression.fullmatch(text, timeout=self.clock.left) is not None
        except (TimeoutError, MemoryError):
            raise AdapterError(f"{short_repr(self.text)} takes too long to match; write it more simply") from None
        finally:
            self.clock.left -= time.thread_time() - start


def ends_with(name: str, pattern: str) -> bool:
    """Return whether the pattern matches the name, or its end after a dot.

    Raises:
        AdapterError: as ``check_patterns``, or the time is used up.
    """
    if not PLAIN_NAME.fullmatch(pattern):
        return _ending(pattern).fullmatch(name)
    end = name[-len(pattern) :]
    if len(end) < len(pattern) or (len(name) > len(end) and name[-len(end) - 1] != "."):
        return False
    return end == pattern or all(one in (".", other) for one, other in zip(pattern, end, strict=True))


def check_patterns(patterns: Iterable[str]) -> None:
    """Refuse patterns for ``ends_with`` that cannot be read or would take long together; give them new time.

    Raises:
        AdapterError: one is not a regular expression, or too long, or has syntax that only `regex` knows.
    """
    parts, expressions = 0, [pattern for pattern in patterns if not PLAIN_NAME.fullmatch(pattern)]
    for pattern in expressions:
        parts += _count_parts(pattern)
        if parts > _MAX_PARTS_TOGETHER:
            raise AdapterError(
                f"{short_repr(pattern)}, and all before it, take too long to match; write them more simply"
            )
    clock = _Clock(_SECONDS)
    for pattern in expressions:
        _ending(pattern).clock = clock


@functools.lru_cache(4096)
def _ending(pattern: str) -> Pattern:
    _count_parts(pattern)
    return Pattern(rf"(.*\.)?({pattern})")


def _count_parts(pattern: str) -> int:
    """Return how many parts the pattern has, repetitions written out."""
    if len(pattern) > _MAX_CHARACTERS:
        raise AdapterError(f"a pattern of {len(pattern)} characters; at most {_MAX_CHARACTERS}")
    if found := _OF_REGEX_ALONE.search(pattern):
        raise AdapterError(f"{short_repr(pattern)} contains {short_repr(found[0])}, which is not supported in patterns")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that a later Python may read otherwise
            parts = _length(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise AdapterError(f"{short_repr(pattern)} is not a regular expression: {error}") from None
    if parts > _MAX_PARTS:
        raise AdapterError(f"{short_repr(pattern)} repeats its parts too often")
    return parts


def _length(parts: Iterable[Any]) -> int:
    length = 0
    for kind, value in parts:
        times = max(value[0], 1) if str(kind).endswith("REPEAT") else 1
        length += times * (1 + sum(map(_length, _inner(value))))
        if str(kind).startswith("ASSERT") and value[0] < 0 and len(set(value[1].getwidth())) > 1:
            raise re.error("look-behind requires fixed-width pattern")
    return length


def _inner(value: Any) -> Iterator[Any]:
    """Yield the parts within what Python's parser says of a part."""
    if isinstance(value, _parser.SubPattern):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _inner(each)
