"""What a report consists of, whatever it is written as."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Points = Sequence[tuple[float, float]]


Tone = Literal["", "good", "bad", "plain"]


@dataclass(frozen=True)
class Note:
    """A paragraph; with a tone, one that is marked."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; no head where all of ``columns`` are empty."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Series:
    """One curve. Dots are drawn where there are few points, as of evaluations."""

    name: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the steps."""

    title: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Code:
    """Commands or code; folded: it is shown on a click."""

    text: str
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Outputs:
    """Texts about one row, side by side: name -> text."""

    title: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Picture:
    """A small picture, as JPEG."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Pictures:
    """Pictures of one thing, side by side."""

    title: str
    pictures: Sequence[Picture]


Block = Note | Table | Chart | Code | Outputs | Pictures


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it. ``brief``: a pull request needs it; else it is folded there."""

    title: str
    blocks: Sequence[Block]
    brief: bool = False


def number(value: float | None, sign: str = "") -> str:
    """Return a figure as reports show it: an empty text for None."""
    if value is None:
        return ""
    usual = value == 0 or 1e-3 <= abs(value) < 1e5
    return format(value, f"{sign}.4f" if usual else f"{sign}.4g") if math.isfinite(value) else "not finite"


def clock(seconds: float) -> str:
    """Return a duration as 3:07 or 2:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def gib(count: float) -> str:
    """Return a number of bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"


def in_order(metrics: Iterable[str], main: str) -> list[str]:
    """Return the names of metrics: the task's main metric, the loss, then the others."""
    return sorted(metrics, key=lambda name: (name != main, name != "eval_loss", name))


def setting_text(value: Any) -> str:
    """Return a setting as a table shows it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
