"""Regular expressions that answer in bounded time, whatever their author meant.

Python's ``re`` backtracks: ``(a*)*b`` takes it longer than the machine lives. It is asked only where a pattern cannot
make it do so. For any other, the places that a match can have reached in the text are a set of bits, and each part of
the pattern maps such a set to the next, so that the time grows with the pattern's length and a power of the text's.
That can only say whether the whole text matches, which is all that names need. References back to a group are no
regular expressions in that sense and are refused.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from peftcli.guard.files import shown

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

_LONGEST = 2000
_QUICK = 100_000.0
"""Up to so many ways to try a pattern, Python's own ``re`` is asked."""
_MOST_TRIED = 10_000_000.0
"""Ways to try all the patterns of a setting; each costs some nanoseconds a module."""
_LIMIT = 1e18
"""Any more count as so many."""
_USUAL_NAME = 100
"""Characters."""
_FIRST_STEPS, _MORE_STEPS = 200_000, 1000
"""Steps that the texts of one pattern may take: so many, and so many more for each text. A name takes some hundred."""
_NAME = re.compile(r"[\w.]+")
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


class PatternError(ValueError):
    """A pattern that cannot be read, or that would take too long."""


@functools.lru_cache(4096)
def compiled(pattern: str) -> Pattern:
    """The pattern, read once.

    Raises:
        PatternError: it is no regular expression, too long, or of a kind that is not supported.
    """
    if len(pattern) > _LONGEST:
        raise PatternError(f"a pattern of {len(pattern)} characters; at most {_LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that a later Python may read otherwise
            parsed = _parser.parse(pattern)
            tries = _tries(parsed, parsed.state.flags)
            # where Python's would take long, it may take long to compile, too
            return Pattern(pattern, tries, re.compile(pattern) if tries <= _QUICK else parsed)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{shown(pattern)} is no regular expression: {error}") from None


def ends_with(name: str, pattern: str) -> bool:
    """Whether the pattern matches the name, or its end behind a dot.

    Raises:
        PatternError: as ``compiled``, or it takes too many steps.
    """
    if not _NAME.fullmatch(pattern):
        return compiled(rf"(.*\.)?({pattern})").fullmatch(name)
    end = name[-len(pattern) :]
    if len(end) < len(pattern) or (len(name) > len(end) and name[-len(end) - 1] != "."):
        return False
    return end == pattern or all(one in (".", other) for one, other in zip(pattern, end, strict=True))


def check_cost(patterns: Iterable[str]) -> None:
    """Raises PatternError if ``ends_with`` would take long for patterns of which each is asked of each module."""
    tries = 0.0
    for pattern in patterns:
        tries += 1 if _NAME.fullmatch(pattern) else compiled(rf"(.*\.)?({pattern})").tries
        if tries > _MOST_TRIED:
            raise PatternError(f"{shown(pattern)}, and all before it, take too long to match; write them more simply")


@dataclass
class Pattern:
    """A pattern of Python's syntax."""

    text: str
    tries: float
    """How many ways Python's ``re`` may try on a name, at most."""
    read: Any
    """Compiled by ``re``, or where that may take long, its parts."""
    steps: int = _FIRST_STEPS
    """How many are left."""

    def fullmatch(self, text: str) -> bool:
        """Whether the pattern matches all of ``text``, as ``re.fullmatch`` would find.

        Raises:
            PatternError: it holds a kind of part that is not supported, or takes too many steps.
        """
        if isinstance(self.read, re.Pattern):
            return self.read.fullmatch(text) is not None
        self.steps += _MORE_STEPS
        try:
            places = _Matching(self, text).after(self.read, 1, self.read.state.flags)
        except RecursionError:
            raise PatternError(f"{shown(self.text)} is nested too deeply") from None
        return bool(places >> len(text) & 1)


def _tries(parts: Iterable[Any], flags: int) -> float:
    """How many ways Python's ``re`` may go through a name of usual length, which backtracking multiplies, at most."""
    tries = 1.0
    for kind, value in parts:
        name = str(kind)
        if name == "IN" and flags & re.IGNORECASE:  # compiled character by character
            tries *= 1 + sum(ends[1] - ends[0] for each, ends in value if str(each) == "RANGE") / _USUAL_NAME
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = value
            one, least, empty = _tries(inner, flags), int(least), inner.getwidth()[0] == 0
            times = min(int(most), _USUAL_NAME)
            if empty and least > 1:
                tries *= one * least  # nothing, again and again
            elif one == 1:
                tries *= max(1, times - least + 1)
            else:
                tries *= 1 + math.exp(min(times * math.log(one), math.log(_LIMIT)))
        elif name == "SUBPATTERN":
            tries *= _tries(value[3], (flags | value[1]) & ~value[2])
        elif name == "BRANCH":
            tries *= sum(_tries(branch, flags) for branch in value[1])
        elif name in ("ASSERT", "ASSERT_NOT"):
            tries *= 1 + _tries(value[1], flags)
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            return math.inf
        tries = min(tries, _LIMIT)
    return tries


class _Matching:
    """One text under one pattern. Bit i of a set of places: a match may have come as far as the i-th character."""

    def __init__(self, pattern: Pattern, text: str):
        self.pattern, self.text = pattern, text
        self.found: dict[tuple[str, int, int], int] = {}

    def after(self, parts: Iterable[Any], places: int, flags: int) -> int:
        """Where a match of ``parts``, one after the other, can end that starts at one of ``places``."""
        for kind, value in parts:
            self.pattern.steps -= 1
            if self.pattern.steps < 0:
                raise PatternError(f"{shown(self.pattern.text)} takes too long to match; write it more simply")
            if not places:
                return 0
            places = self._after_one(str(kind), value, places, flags)
        return places

    def _after_one(self, kind: str, value: Any, places: int, flags: int) -> int:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return (places & self._where(kind, value, flags)) << 1
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = value
            return self._repeated(least, most, inner, places, flags)
        if kind == "SUBPATTERN":
            _, more, fewer, inner = value
            return self.after(inner, places, (flags | more) & ~fewer)
        if kind == "BRANCH":
            return functools.reduce(int.__or__, [self.after(branch, places, flags) for branch in value[1]])
        if kind == "AT":
            return places & self._edges(str(value))
        if kind in ("ASSERT", "ASSERT_NOT"):
            direction, inner = value
            holds = self._asserted(direction, inner, places, flags)
            return holds if kind == "ASSERT" else places & ~holds
        what = kind.lower().replace("_", " ")
        raise PatternError(f"{shown(self.pattern.text)}: {what} is not supported in patterns")

    def _repeated(self, least: int, most: int, inner: Any, places: int, flags: int) -> int:
        for _ in range(least):
            before, places = places, self.after(inner, places, flags)
            if places in (0, before):
                break
        reached = new = places
        for _ in range(most - least):
            new = self.after(inner, new, flags) & ~reached
            reached |= new
            if not new:
                break
        return reached

    def _asserted(self, direction: int, inner: Any, places: int, flags: int) -> int:
        """Those of ``places`` that ``inner`` starts at, or for direction -1 ends at."""
        asked = [place for place in self._all() if places >> place & 1]
        if direction > 0:
            return self._set(place for place in asked if self.after(inner, 1 << place, flags))
        width, widest = inner.getwidth()
        if width != widest:
            raise PatternError(
                f"{shown(self.pattern.text)} is no regular expression: it looks back at texts of any length"
            )
        return self._set(p for p in asked if p >= width and self.after(inner, 1 << p - width, flags) >> p & 1)

    def _where(self, kind: str, value: Any, flags: int) -> int:
        """The places before a character that the part matches."""
        key = (kind, id(value), flags)  # the parsed pattern outlives the match
        if key not in self.found:
            matching = {char for char in set(self.text) if _matches(kind, value, char, flags)}
            self.found[key] = self._set(place for place, char in enumerate(self.text) if char in matching)
        return self.found[key]

    def _edges(self, kind: str) -> int:
        end = len(self.text)
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if kind in ("AT_END", "AT_END_STRING"):
            return 1 << end
        is_word = [False, *(_CATEGORIES["CATEGORY_WORD"](char) for char in self.text), False]
        boundaries = self._set(place for place in self._all() if is_word[place] != is_word[place + 1])
        return boundaries if kind == "AT_BOUNDARY" else ~boundaries

    def _all(self) -> range:
        return range(len(self.text) + 1)

    def _set(self, places: Iterable[int]) -> int:
        return sum(1 << place for place in places)


def _matches(kind: str, value: Any, char: str, flags: int) -> bool:
    """Whether a part of the pattern that stands for one character stands for ``char``."""
    if flags & re.IGNORECASE:
        forms = {char, char.lower(), char.upper()}
        if kind == "NOT_LITERAL":
            return not any(_matches("LITERAL", value, form, 0) for form in forms)
        if kind == "IN" and str(value[0][0]) == "NEGATE":
            return not any(_matches("IN", value[1:], form, 0) for form in forms)
        return any(_matches(kind, value, form, 0) for form in forms)
    if kind == "ANY":
        return char != "\n"
    if kind in ("LITERAL", "NOT_LITERAL"):
        return (chr(value) == char) == (kind == "LITERAL")
    if kind == "RANGE":
        return value[0] <= ord(char) <= value[1]
    if kind == "CATEGORY":
        name = str(value)
        return _CATEGORIES[name.replace("NOT_", "")](char) != ("NOT_" in name)
    negated = str(value[0][0]) == "NEGATE"
    return negated != any(_matches(str(inner), item, char, 0) for inner, item in value[negated:])
