"""Checks of settings that methods share. No torch here.

NaN compares as false with everything, so what is right is asked for, not what is wrong.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from peftcli.core.config_classes import plain
from peftcli.errors import AdapterError
from peftcli.guard.typed_fields import read_section

Problems = list[tuple[str, str]]
_NOTHING_LEARNT = "must not be 0: nothing would be learnt"


class Section:
    """Settings that are the value of one field of a config, checked when they are made and with the config."""

    key: ClassVar[str]
    """The config's field."""

    def problems(self) -> Problems:
        """Return the problems of these settings: ``(name, message)`` each."""
        return []

    def __post_init__(self) -> None:
        read_section(type(self), plain(vars(self)), self.key)  # the types
        for name, message in self.problems():
            raise AdapterError(message, key=f"{self.key}.{name}")


def problems_of_sections(config: object) -> Problems:
    """Return the problems in the sections of a config."""
    values = [getattr(config, entry.name) for entry in dataclasses.fields(config)]  # type: ignore[arg-type]
    sections = [value for value in values if isinstance(value, Section)]
    return [(f"{section.key}.{name}", told) for section in sections for name, told in section.problems()]


def _given(config: object, *keys: str) -> dict[str, Any]:
    """Return the settings that are not unset."""
    return {key: value for key in keys if (value := getattr(config, key)) is not None}


def too_small(config: object, **least: float) -> Problems:
    """Return the settings below their minimum."""
    found = _given(config, *least)
    return [
        (key, f"must be at least {least[key]}, not {value}") for key, value in found.items() if not value >= least[key]
    ]


def too_large(config: object, **most: float) -> Problems:
    """Return the settings above their maximum."""
    found = _given(config, *most)
    return [
        (key, f"must be at most {most[key]}, not {value}") for key, value in found.items() if not value <= most[key]
    ]


def not_positive(config: object, *keys: str) -> Problems:
    """Return the settings that are not above zero."""
    return [(key, f"must be above 0, not {value}") for key, value in _given(config, *keys).items() if not value > 0]


def zero(config: object, *keys: str) -> Problems:
    """Return the settings that are zero."""
    return [(key, _NOTHING_LEARNT) for key, value in _given(config, *keys).items() if value == 0]


def outside_unit_interval(config: object, *keys: str) -> Problems:
    """Return the settings outside [0, 1)."""
    found = _given(config, *keys)
    return [(key, f"must be in [0, 1), not {value}") for key, value in found.items() if not 0 <= value < 1]


def negative(config: object, *keys: str) -> Problems:
    """Return the settings below zero."""
    return too_small(config, **dict.fromkeys(keys, 0))


def not_one_of(config: object, key: str, *choices: object) -> Problems:
    """Return the setting if it is not one of the choices."""
    value = getattr(config, key)
    shown = ", ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices)
    return [] if value in choices else [(key, f"must be one of {shown}, not {value!r}")]


def pattern_too_small(config: object, key: str) -> Problems:
    """Return the entries of a setting like rank_pattern that are below 1."""
    found: dict[str, int] = getattr(config, key)
    return [(key, f"{name}: must be at least 1, not {value}") for name, value in found.items() if not value >= 1]


def pattern_not_positive(config: object, key: str) -> Problems:
    """Return the entries of a setting like alpha_pattern that are not above zero."""
    found: dict[str, float] = getattr(config, key)
    return [(key, f"{name}: must be above 0, not {value}") for name, value in found.items() if not value > 0]


def pattern_zero(config: object, key: str) -> Problems:
    """Return the entries of a setting like lambda_pattern that are zero."""
    found: dict[str, float] = getattr(config, key)
    return [(key, f"{name}: {_NOTHING_LEARNT}") for name, value in found.items() if value == 0]
