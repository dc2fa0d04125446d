"""The settings that a sweep tries, from the words of its command line. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from peftcli.errors import UsageError

Settings = dict[str, str]
"""Key of the recipe -> its value, as an override gives it."""

LARGEST_GRID = 30
"""The most settings that are all tried; of more, or of a range, some are proposed."""
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_WIDE = 10.0
"""How many times larger the end of a range is than its beginning, from which on it is searched by factors."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``."""

    low: float
    high: float
    whole: bool
    """Whether they are whole numbers."""

    @property
    def by_factors(self) -> bool:
        """Whether the range is so wide that a factor is what matters, not a difference."""
        return self.low > 0 and self.high >= _WIDE * self.low


@dataclass(frozen=True)
class Space:
    """What a sweep tries."""

    fixed: list[str] = field(default_factory=list)
    """Overrides of all runs."""
    choices: dict[str, list[str]] = field(default_factory=dict)
    """Key -> its values."""
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def size(self) -> float:
        """How many settings there are."""
        return float("inf") if self.ranges else prod(len(each) for each in self.choices.values())

    @property
    def keys(self) -> list[str]:
        """What is tried."""
        return [*self.choices, *self.ranges]

    def grid(self) -> Iterator[Settings]:
        """Every combination of the values."""
        for values in itertools.product(*self.choices.values()):
            yield dict(zip(self.choices, values, strict=True))

    def alone(self) -> Iterator[Settings]:
        """Each value, and the ends of each range, without those of the other keys."""
        for key, values in self.choices.items():
            yield from ({key: value} for value in values)
        for key, each in self.ranges.items():
            yield from ({key: str(int(end) if each.whole else end)} for end in (each.low, each.high))


def read_space(words: Sequence[str]) -> Space:
    """Read ``KEY=VALUE`` (for all runs), ``KEY=A,B,C`` and ``KEY=LOW..HIGH``.

    Raises:
        UsageError: a word is none of these, or a key is given twice.
    """
    space = Space()
    for word in words:
        key, equals, written = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"expected KEY=A,B,C or KEY=LOW..HIGH, found {word[:60]!r}", file="command line")
        if key in space.keys:
            raise UsageError("is given twice", file="command line", key=key)
        if key == "training.output_dir":
            raise UsageError("each run of a sweep has its own", key=key, hint="--output DIR names the sweep's folder")
        values = list(dict.fromkeys(_parts(written)))
        if (match := _RANGE.fullmatch(written.strip())) is not None:
            space.ranges[key] = _range(key, match[1], match[2])
        elif len(values) > 1:
            if not all(values):
                raise UsageError(f"a value is empty: {written[:60]!r}", file="command line", key=key)
            space.choices[key] = values
        else:
            space.fixed.append(word)
    return space


def _range(key: str, low: str, high: str) -> Range:
    found = Range(float(low), float(high), all(re.fullmatch(r"[-+]?[0-9]+", each) for each in (low, high)))
    if not found.low < found.high:
        raise UsageError(f"{low}..{high} is no range: the first number is not smaller", file="command line", key=key)
    return found


def _parts(text: str) -> list[str]:
    """Divide a text at commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "[{(") - (char in ")}]")
            if char == "," and depth == 0:
                parts.append("")
                continue
        parts[-1] += char
    return [part.strip() for part in parts]
