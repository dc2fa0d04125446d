"""Checks of settings that methods share. No torch here."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from peftcli.core.config import not_one_of as not_one_of
from peftcli.core.config import other_choices, plain
from peftcli.errors import AdapterError
from peftcli.guard.ranges import out_of_range
from peftcli.guard.typed_fields import read_section

Problems = list[tuple[str, str]]
ZERO = "must not be 0: nothing would be learnt"
"""The problem of a factor that stays 0."""


class Section:
    """Settings that are the value of one field of a config, checked when they are made and with the config."""

    key: ClassVar[str]
    """The config's field."""

    def problems(self) -> Problems:
        """Return the problems of these settings, their choices and ranges aside: ``(name, message)`` each."""
        return []

    def __post_init__(self) -> None:
        read_section(type(self), plain(vars(self)), self.key)  # the types
        for name, message in _problems(self):
            raise AdapterError(message, key=f"{self.key}.{name}")


def _problems(section: Section) -> Problems:
    return [*other_choices(section), *out_of_range(section), *section.problems()]


def problems_of_sections(config: object) -> Problems:
    """Return the problems in the sections of a config."""
    values = [getattr(config, entry.name) for entry in dataclasses.fields(config)]  # type: ignore[arg-type]
    sections = [value for value in values if isinstance(value, Section)]
    found = [(section.key, problem) for section in sections for problem in _problems(section)]
    return [(f"{key}.{name}", message) for key, (name, message) in found]
