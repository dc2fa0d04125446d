"""A row of a dataset, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftcli.errors import DataError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands."""

    source: str
    """File or hub id, as it is shown to the user."""
    number: int
    """Which row of it, from 1."""
    line: int | None = None
    """Line of the file that the row starts on, from 1; None where there are no lines."""

    def __str__(self) -> str:
        """``file:line``, or ``file row N`` where there are no lines."""
        return f"{self.source} row {self.number}" if self.line is None else f"{self.source}:{self.line}"

    def error(self, message: str, *, key: str | None = None, hint: str | None = None) -> DataError:
        """A DataError about the row."""
        if self.line is not None:
            return DataError(message, file=self.source, line=self.line, key=key, hint=hint)
        return DataError(f"row {self.number}: {message}", file=self.source, key=key, hint=hint)


@dataclass(frozen=True, slots=True)
class Row:
    """One row, as its file holds it."""

    values: dict[str, Any]
    place: Place
