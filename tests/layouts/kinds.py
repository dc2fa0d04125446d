"""What is known of a layout, and the table that the modules ``of_*`` fill."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from contents import numbers

ASKS, REFUSES = "asks", "refuses"
"""In place of a task: several readings are as good as each other; nothing can be trained on it."""
Columns = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Layout:
    """Files as a public data set or a program has them, and what a person would make of them."""

    name: str
    after: str
    """The data set or program."""
    fill: Callable[[Path, random.Random], None]
    """Writes the files into an empty folder."""
    tasks: tuple[str, ...]
    """The likeliest first; more than one where reasonable people differ."""
    columns: tuple[Columns, ...]
    """What each column of the task is called in the files, or each way to read them. Of rows that must be converted
    first, nothing."""
    base: str
    """Kind of the base model: encoder, chat, seq2seq, whisper, pictures, masks, pipeline."""
    data: tuple[str, ...]
    """Arguments of ``init``, relative to the folder."""

    def write(self, folder: Path) -> list[Path]:
        """Write the files, the same ones each time, and return the arguments."""
        folder.mkdir(parents=True, exist_ok=True)
        self.fill(folder, numbers(self.name))
        return [folder / each for each in self.data]


LAYOUTS: dict[str, Layout] = {}


def layout(
    after: str, tasks: str, base: str, *columns: Columns, data: str = "."
) -> Callable[[Callable[[Path, random.Random], None]], Callable[[Path, random.Random], None]]:
    """Enter the function into the table under its own name."""

    def enter(fill: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
        name = fill.__name__
        LAYOUTS[name] = Layout(name, after, fill, tuple(tasks.split()), columns, base, tuple(data.split()))
        return fill

    return enter
