"""Checks of settings that methods share. No torch here.

NaN compares as false with everything, so what is right is asked for, not what is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from peftcli.core.config import not_one_of as not_one_of
from peftcli.core.config import other_choices, plain
from peftcli.errors import AdapterError
from peftcli.guard.typed_fields import read_section

Problems = list[tuple[str, str]]


class Section:
    """Settings that are the value of one field of a config, checked when they are made and with the config."""

    key: ClassVar[str]
    """The config's field."""

    def problems(self) -> Problems:
        """Return the problems of these settings, their choices aside: ``(name, message)`` each."""
        return []

    def __post_init__(self) -> None:
        read_section(type(self), plain(vars(self)), self.key)  # the types
        for name, message in other_choices(self) + self.problems():
            raise AdapterError(message, key=f"{self.key}.{name}")


def problems_of_sections(config: object) -> Problems:
    """Return the problems in the sections of a config."""
    values = [getattr(config, entry.name) for entry in dataclasses.fields(config)]  # type: ignore[arg-type]
    sections = [value for value in values if isinstance(value, Section)]
    found = [(section.key, problem) for section in sections for problem in other_choices(section) + section.problems()]
    return [(f"{key}.{name}", message) for key, (name, message) in found]


def _numbers(config: object, keys: Iterable[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield the settings that are given: ``(key, start of a message, value)``; of one like rank_pattern each entry."""
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, dict):
            yield from ((key, f"{name}: ", each) for name, each in value.items())
        elif value is not None:
            yield key, "", value


def too_small(config: object, **least: float) -> Problems:
    """Return the settings below their minimum."""
    return [
        (key, f"{entry}must be at least {least[key]}, not {value}")
        for key, entry, value in _numbers(config, least)
        if not value >= least[key]
    ]


def too_large(config: object, **most: float) -> Problems:
    """Return the settings above their maximum."""
    return [
        (key, f"{entry}must be at most {most[key]}, not {value}")
        for key, entry, value in _numbers(config, most)
        if not value <= most[key]
    ]


def not_positive(config: object, *keys: str) -> Problems:
    """Return the settings that are not above zero."""
    found = _numbers(config, keys)
    return [(key, f"{entry}must be above 0, not {value}") for key, entry, value in found if not value > 0]


def zero(config: object, *keys: str) -> Problems:
    """Return the settings that are zero."""
    found = _numbers(config, keys)
    return [(key, f"{entry}must not be 0: nothing would be learnt") for key, entry, value in found if value == 0]


def outside_unit_interval(config: object, *keys: str) -> Problems:
    """Return the settings outside [0, 1)."""
    found = _numbers(config, keys)
    return [(key, f"{entry}must be in [0, 1), not {value}") for key, entry, value in found if not 0 <= value < 1]


def negative(config: object, *keys: str) -> Problems:
    """Return the settings below zero."""
    return too_small(config, **dict.fromkeys(keys, 0))
