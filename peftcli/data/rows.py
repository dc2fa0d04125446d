"""Rows of a dataset, where they come from, and the columns that a task reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peftcli.errors import DataError
from peftcli.schema import Source

USED, BAD = "used", "cannot be used"
"""Outcomes of a row that has examples, and of one that its reader or the task refused."""
_LEFT_OUT = {"reject": "rejected by the annotator", "ignore": "ignored by the annotator"}
"""Values of Prodigy's column ``answer`` -> why such a row is left out."""
UNANSWERED = tuple(_LEFT_OUT.values())
"""Outcomes of a row that its annotator did not accept."""
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
_LISTED = 12
"""Names that a message lists."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place that a row comes from."""

    source: str
    """File or hub id, as messages name it."""
    number: int
    """Number of the row in its source, from 1."""
    line: int | None = None
    """Line on which the row starts, from 1; None if the source has no lines."""

    def __str__(self) -> str:
        """Return ``file:line``, or ``file row N`` if there are no lines."""
        return f"{self.source} row {self.number}" if self.line is None else f"{self.source}:{self.line}"

    def error(self, message: str, *, key: str | None = None, hint: str | None = None) -> DataError:
        """Return a DataError about the row."""
        if self.line is not None:
            return DataError(message, file=self.source, line=self.line, key=key, hint=hint)
        return DataError(f"row {self.number}: {message}", file=self.source, key=key, hint=hint)


@dataclass(frozen=True, slots=True)
class Row:
    """One row, as its file contains it."""

    values: dict[str, Any]
    place: Place
    folder: Path = field(default=Path(), compare=False)
    """The folder of its file, to which paths in the row are relative."""


@dataclass(frozen=True)
class Reader:
    """Which columns of a source a task reads, and under which names the source has them."""

    name: str
    """The format of the rows, as run.json reports it."""
    names: dict[str, str]
    """The task's column -> the source's."""
    implied: str = field(default="", kw_only=True)
    """Which columns are read under other names than the usual ones, though the recipe does not say so."""

    def value(self, row: Row, column: str) -> Any:
        """The value of one of the task's columns.

        Raises:
            DataError: the row lacks it.
        """
        name = self.names[column]
        if name not in row.values:
            raise row.place.error(f"missing; the row has: {listed(row.values)}", key=name)
        return row.values[name]

    def text(self, row: Row, column: str, *, blank: bool = True) -> str:
        """The text in one of the task's columns; ``blank`` says whether it may have no words.

        Raises:
            DataError: the row has none.
        """
        value = self.value(row, column)
        if not isinstance(value, str) or not (blank or value.strip()):
            raise row.place.error(f"expected a text, found {shortened(value)}", key=self.names[column])
        return value

    def left_out(self, row: Row) -> str | None:
        """Return why a row is left out: its annotator did not accept it, as Prodigy's ``answer`` says. Else None.

        A column of that name which the task reads says something else.
        """
        answer = row.values.get("answer")
        is_verdict = isinstance(answer, str) and "answer" not in self.names.values()
        return _LEFT_OUT.get(str(answer)) if is_verdict else None


@dataclass(frozen=True)
class Table:
    """A source whose first rows have been read."""

    source: Source
    """Its settings: ``format``, ``columns``."""
    described: str
    """The source as errors name it."""
    columns: tuple[str, ...]
    """The columns of its first rows, in order."""
    class_names: Callable[[], Mapping[str, tuple[str, ...]]] = dict
    """Returns the columns whose numbers stand for names (``ClassLabel``): column -> names, in order."""
    first: Mapping[str, Any] = field(default_factory=dict)
    """The values of its first row, where columns may hold a text or messages."""
    truths: Collection[str] = ()
    """Its columns that hold true or false, or 1 or 0, in all of its first rows."""

    def reader(
        self, name: str, *, optional: Sequence[str] = (), lists: Sequence[str] = (), **columns: Sequence[str]
    ) -> Reader:
        """Find columns by their usual names, or by ``dataset.columns``.

        Args:
            name: The format that the reader reports.
            optional: Those of ``columns`` that may be missing.
            lists: The task's columns for which ``dataset.columns`` may name several of the source, each of which the
                reader has as ``column.name``.
            columns: The task's column -> names that sources usually give it, the likeliest first.

        Raises:
            DataError: a column is missing, or ``dataset.columns`` names one that the source or the task lacks.
        """
        self.refuse_columns([*columns, *lists], lists)
        renamed = self.source.renamed()
        names = {f"{column}.{name}": name for column, name in renamed if column in lists}
        for column, usual in columns.items():
            found = dict(renamed).get(column) or next((each for each in usual if each in self.columns), None)
            if found is not None:
                names[column] = found
            elif column not in optional:
                raise DataError(
                    f"no column {' or '.join(map(repr, usual))}; the rows have: {listed(self.columns)}",
                    file=self.described,
                    key="dataset.columns",
                    hint=f"Name the column in the recipe: dataset: {{columns: {{{column}: ...}}}}.",
                )
        return Reader(name, names)

    def refuse_columns(self, known: Collection[str], lists: Collection[str] = ()) -> None:
        """Raise DataError where ``dataset.columns`` names a column that the source lacks, or none of ``known``.

        Those of ``lists`` must be given as lists, and no others.
        """
        for column, value in self.source.columns.items():
            if column in known and isinstance(value, list) != (column in lists):
                found, wanted = ("a list", "one column") if isinstance(value, list) else ("one column", "a list")
                more = f"; lists are given as {listed(lists)}" if lists else ""
                message = f"names {found}, and the task reads {wanted} there{more}"
                raise DataError(message, file=self.described, key=f"dataset.columns.{column}")
        for column, given in self.source.renamed():
            key = f"dataset.columns.{column}"
            self._refuse_other(column, known, "the task reads no column {!r}; it reads: {}", key)
            self.refuse_missing(given, key)

    def refuse_missing(self, column: str, key: str) -> None:
        """Raise DataError where the source lacks a column that the setting ``key`` names."""
        self._refuse_other(column, self.columns, "no column {!r}; the rows have: {}", key)

    def _refuse_other(self, name: str, names: Collection[str], problem: str, key: str) -> None:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"Closest: {near[0]}" if near else None
            raise DataError(problem.format(name, listed(names)), file=self.described, key=key, hint=hint)


def of_all_rows(error: DataError, which: str = "all rows") -> DataError:
    """Return the error of the first row, where it says of ``which`` rows that they have errors: not to skip them."""
    error.message += f"; {which} have errors"
    error.hint = error.hint or "Look for one cause, in the file or in the recipe."
    return error


def truth_in(value: Any) -> bool | None:
    """The truth value that a value of a row is, or is written as: true, 1, "True", "0"; None: it is something else."""
    return _TRUTHS.get(str(value).strip().lower()) if isinstance(value, str | bool | int | float) else None


def is_true_or_false(value: Any) -> bool:
    """Return whether a value of a row is true or false, or one of these words."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def truth_columns(rows: Sequence[Row]) -> frozenset[str]:
    """The columns that hold a truth value in each of the rows."""
    names = {name for row in rows for name in row.values}
    return frozenset(name for name in names if all(truth_in(row.values.get(name)) is not None for row in rows))


def add_keys(values: dict[str, Any], names: Iterable[str]) -> None:
    """Give a row the columns of ``names`` that are keys of an object in it: translation.en is en of translation."""
    for name in names:
        column, _, key = name.partition(".")
        if name not in values and isinstance(inner := values.get(column), dict) and key in inner:
            values[name] = inner[key]


def listed(names: Iterable[str]) -> str:
    """Return names as messages list them; of many, the first."""
    shown = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join([*shown[:_LISTED], *(["..."] if len(shown) > _LISTED else [])])[:300] or "none"


def count_of(number: int, noun: str) -> str:
    """Return a number and what it counts: 1 step, 2,000 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def shortened(value: Any) -> str:
    """Return a value as errors show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
