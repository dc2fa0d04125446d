"""Ranges of numbers as metadata of a dataclass's fields, and one check that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

AT_LEAST_0, AT_LEAST_1, ABOVE_0, BELOW_1 = {"least": 0}, {"least": 1}, {"above": 0}, {"below": 1}
SHARE: dict[str, Any] = {"least": 0, "below": 1, "words": "in [0, 1)"}
FRACTION: dict[str, Any] = {"least": 0, "most": 1, "words": "in [0, 1]"}
INSIDE_0_1: dict[str, Any] = {"above": 0, "below": 1, "words": "in (0, 1)"}


def out_of_range(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield the fields of a dataclass that are outside of their range, and what is wrong with each.

    Of a mapping, each value has the range.
    """
    for entry in fields(settings):
        given = getattr(settings, entry.name)
        for key, value in given.items() if isinstance(given, dict) else [("", given)]:
            # NaN compares as false with everything
            if isinstance(value, (int, float)) and (problem := _problem(value, entry.metadata)):
                yield entry.name, f"{key}: must {problem}" if key else f"must {problem}"


def _problem(value: float, limits: Any) -> str | None:
    least, above, below, most = map(limits.get, ("least", "above", "below", "most"))
    too_small, too_low = least is not None and not value >= least, above is not None and not value > above
    too_high, too_large = below is not None and not value < below, most is not None and not value <= most
    if (too_small or too_low or too_high or too_large) and "words" in limits:
        return f"be {limits['words']}, not {value}"
    if too_small:
        return f"be at least {least}, not {value}" if least else f"not be negative, found {value}"
    if too_low or too_high:
        return f"be above {above}, not {value}" if too_low else f"be below {below}, not {value}"
    return f"be at most {most:,}, found {value}" if too_large else None
