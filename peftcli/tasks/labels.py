"""The labels of rows: read from their columns, found in the training data, kept in order, weighed and counted."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from peftcli.data.findings import Finding
from peftcli.data.rows import Reader, Row, Table, listed, shortened, truth_in
from peftcli.data.text_rows import parse_json
from peftcli.errors import DataError
from peftcli.tasks.findings import CLASSES as FINDINGS
from peftcli.tasks.shown import Description

if TYPE_CHECKING:
    pass

UNBALANCED = 0.95
"""A larger share of one class is a finding."""
_LIST = re.compile(r"""\s*\[\s*(["'].*["']\s*)?\]\s*""", re.DOTALL)
"""A text that holds a list of texts."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_SEPARATORS = ("|", ";", ",")
T = TypeVar("T")
Tables = Iterable[tuple[Table, Iterator[Row]]]
"""What ``Task.scan`` gets: each source and its rows."""


@dataclass(frozen=True)
class LabelReader(Reader):
    """Which columns hold a row's inputs and its label."""

    classes: tuple[str, ...] = ()
    """What the numbers in the column of labels stand for, if the source says so."""
    labels: tuple[str, ...] = ()
    """The classes as far as the settings name them."""
    one_hot: tuple[str, ...] = ()
    """The columns of 0 and 1 that hold the labels instead of one column: each is the name of its class."""
    separator: str | None = None
    """What stands between several labels in one text."""
    are_numbers: bool = False
    """Whether labels are numbers to predict, also without a decimal point."""

    @property
    def key(self) -> str:
        """What errors name as the place of the label."""
        return self.names.get("label", "dataset.columns.labels")

    def label(self, row: Row) -> str | float | list[str]:
        """Return a row's label: a class or several by their names, or a number with a decimal point."""
        if self.one_hot:
            return [name for name in self.one_hot if self._is_of(name, row)]
        value = self.value(row, "label")
        try:
            value = _list_in(value)
            if self.separator and not isinstance(value, list):
                parts = value.split(self.separator) if isinstance(value, str) else [value]
                value = [each for each in parts if each is not None and str(each).strip()]
            if isinstance(value, list):
                return [self.class_name(each) for each in value]
            if isinstance(value, float) and math.isfinite(value):
                return value
            return float(value) if isinstance(value, int) and self.are_numbers else self.class_name(value)
        except ValueError as error:
            below = isinstance(value, int) and not self.classes and not places_of(self.labels)
            hint = (
                f"Where {value} is a class, name all classes in task.labels, '{value}' among them." if below else None
            )
            raise row.place.error(str(error), key=self.key, hint=hint) from None

    def _is_of(self, name: str, row: Row) -> bool:
        value = self.value(row, f"labels.{name}")
        if (found := truth_in(value)) is None:
            raise row.place.error(f"expected 0 or 1, found {shortened(value)}", key=name)
        return found

    def class_name(self, value: Any) -> str:
        """Return the name of a class, without blanks around it, in which no two classes differ.

        Raises:
            ValueError: the value does not name one.
        """
        if isinstance(value, bool) or (isinstance(value, str) and value.strip()):
            return str(value).strip()
        if not isinstance(value, int):
            raise ValueError(f"expected a label, found {shortened(value)}")
        if value >= 0 and (not self.classes or value < len(self.classes)):
            return self.classes[value] if self.classes else str(value)
        if str(value) in self.labels:
            return str(value)
        raise ValueError(f"{value} is not the number of a class; it marks rows without a label in some datasets")


@dataclass
class LabelScan:
    """What one pass over the training rows finds besides their labels."""

    readers: list[LabelReader] = field(default_factory=list)
    error: DataError | None = None
    """That of the first row that cannot be read."""
    is_limited: bool = False
    """Whether a source has a limit, which takes its first rows."""

    def labels(self, tables: Tables, read: Callable[[Table], Any], label_of: Callable[[Row, Any], T]) -> Iterator[T]:
        """Yield the label of each row that can be read."""
        for table, rows in tables:
            self.readers.append(reader := read(table))
            self.is_limited |= table.source.limit is not None
            for row in (each for each in rows if not reader.left_out(each)):
                try:
                    yield label_of(row, reader)
                except DataError as error:
                    self.error = self.error or error

    @property
    def declared(self) -> list[str]:
        """The names that the sources give to numbers, in order."""
        return list(dict.fromkeys(name for reader in self.readers for name in reader.classes))

    @property
    def all_declare(self) -> bool:
        """Whether all sources name their classes."""
        return all(reader.classes for reader in self.readers)

    @property
    def hint(self) -> str | None:
        """The hint of an error, where rows that cannot be read were left out."""
        return f"Rows that cannot be read were left out. The first: {self.error}" if self.error else None


# --- names ------------------------------------------------------------------------------------------------------------


def index_of(labels: Sequence[str], what: str, *, by_number: bool = False) -> dict[str, int]:
    """Return the place of each label, by its name, the name without blanks around it and, if so, its number.

    Raises:
        DataError: there are two of one name.
    """
    exact = {name: at for at, name in enumerate(labels)}
    if len(exact) < len(labels):
        raise DataError(f"names a {what} twice", key="task.labels")
    return {name.strip(): at for name, at in exact.items()} | exact | (places_of(labels) if by_number else {})


def places_of(labels: Sequence[str]) -> dict[str, int]:
    """Return the numbers by which rows may give classes: number -> place; none where a class has one for a name."""
    return {} if any(number_of(name) is not None for name in labels) else {str(at): at for at in range(len(labels))}


def number_of(value: str | float) -> float | None:
    """Return the number that a value is or spells, if it is finite."""
    with suppress(ValueError):
        if math.isfinite(number := float(value)):
            return number
    return None


def refuse_decimal_commas(names: Collection[str]) -> None:
    """Raise DataError if all names are numbers, some with a decimal comma: they may be meant as numbers."""
    commas = [name for name in names if _DECIMAL_COMMA.fullmatch(name)]
    if commas and all(number_of(name.replace(",", ".")) is not None for name in names):
        hint = (
            "Write numbers with a point. If they are classes: task: {problem_type: single_label}. If they are lists of"
            ' classes: task: {label_separator: ","}.'
        )
        raise DataError(f"labels as {commas[0]!r} may be numbers with a decimal comma", key="dataset.train", hint=hint)


def weights_of(labels: Sequence[str], given: Mapping[str, float]) -> list[float]:
    """Return the weight of each class.

    Raises:
        DataError: a weight is of no class, or all are 0.
    """
    if labels and (unknown := [name for name in given if name not in labels]):
        raise DataError(f"{unknown[0]!r} is not one of the classes: {listed(labels)}", key="task.class_weights")
    weights = [given.get(name, 1.0) for name in labels]
    if labels and not any(weights):
        raise DataError("no class has a weight above 0: nothing would be learnt", key="task.class_weights")
    return weights


def balanced_weights(labels: Sequence[str], counts: Mapping[str, int], index: Mapping[str, int]) -> dict[str, float]:
    """Return weights by which each class counts as much as the others; 1 for a class without rows."""
    rows = [0] * len(labels)
    for name, count in counts.items():
        if name in index:
            rows[index[name]] += count
    there = sum(count > 0 for count in rows)
    return {name: sum(rows) / (there * count) if count else 1.0 for name, count in zip(labels, rows, strict=True)}


def _list_in(value: Any) -> Any:
    """Return the list that a text holds as JSON, as CSV files have it; any other value as it is."""
    if not isinstance(value, str) or not _LIST.fullmatch(value):
        return value
    with suppress(ValueError):
        return parse_json(value)[0]
    raise ValueError(f'is a list that is not JSON, as in ["red", "blue"]: {shortened(value)}')


def joined_labels(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the names that seem to be several labels in one text, with what stands between these.

    Each part of such a name is a part of another name, or another name by itself. Where this is not true of most names
    with the separator, it belongs to the names, as in ``Trucks, vans``.
    """
    for separator in _SEPARATORS:
        parts = {name: {part.strip() for part in name.split(separator)} - {""} for name in names}
        counts = Counter(part for each in parts.values() for part in each)
        several = [name for name, each in parts.items() if len(each) > 1]
        joined = [name for name in several if min(counts[part] for part in parts[name]) > 1]
        if 2 * len(joined) > len(several):
            return separator, joined
    return "", []


# --- counts -----------------------------------------------------------------------------------------------------------


def describe_counts(name: str, counts: Mapping[str, int], total: int, digits: int = 1) -> Description:
    """Describe how often there is each class."""
    shares = [f"{label} {count / total:.{digits}%}" for label, count in counts.items()]
    return Description({name: dict(counts)}, {name: listed(shares)})


def missing_classes(missing: Collection[str], total: int, more: str = "", unit: str = "rows") -> list[Finding]:
    """Return the finding about classes that none of the rows, or of another ``unit``, is of."""
    kind, named = FINDINGS["missing_classes"], f" {listed(missing)}{more}"
    return [kind.finding(total, total, (), more=named, unit=unit)] if missing else []
