"""Findings: problems and oddities of a dataset, under names that never change.

A finding of level ``error`` stops ``peftcli train`` and gives ``peftcli inspect`` exit code 3, unless the recipe allows
it by name in ``dataset.allow``. For evaluation rows, only bad rows are an error. Every finding that can be an error
comes from ``find_in_records``, which both commands call; it reads one small record per row, never the examples.
Findings that need the examples come from ``inspect`` alone, and are at most warnings.

Imported without numpy, so that ``peftcli check`` knows the names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from peftcli.data.rows import BAD, USED, Place
from peftcli.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from peftcli.data.store import Selection

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
"""From the worst to the least."""

_MAX_PLACES = 10
_MAX_REFUSED = 3
_BAD_ROWS = "bad_rows"


@dataclass(frozen=True)
class Kind:
    """The kind of a finding: its name, level and texts."""

    name: str
    level: Level
    summary: str
    """What is true of each row: the rest of a sentence that begins with the rows."""
    advice: str
    """What to do."""
    warning_above: float | None = None
    """Share of the rows above which the finding is a warning."""
    error_above: float | None = None
    """Share of the rows above which the finding is an error."""

    def level_at(self, share: float) -> Level:
        """Return the level of a finding about this share of the rows."""
        if self.error_above is not None and share > self.error_above:
            return "error"
        if self.warning_above is not None and share > self.warning_above:
            return "warning"
        return self.level

    @property
    def levels(self) -> str:
        """The levels that the finding may have, in words."""
        raised = {"warning": self.warning_above, "error": self.error_above}
        return ", ".join(
            [self.level, *(f"{level} above {share:.0%} of the rows" for level, share in raised.items() if share)]
        )

    @property
    def can_stop(self) -> bool:
        """Whether the finding can be an error."""
        return self.level == "error" or self.error_above is not None

    def finding(
        self,
        count: int,
        total: int,
        places: Iterable[Place],
        *,
        split: str = "train",
        more: str = "",
        unit: str = "rows",
    ) -> Finding:
        """Return a finding of this kind about ``count`` of ``total`` rows, or of another ``unit``.

        At most ten of the ``places`` of its rows are read; ``more`` is added to the message.
        """
        listed = list(map(str, islice(places, _MAX_PLACES)))
        return Finding(self, self.level_at(count / total), count, total, listed, more, split, unit)


def by_name(*kinds: Kind) -> dict[str, Kind]:
    """Return the kinds by name."""
    return {kind.name: kind for kind in kinds}


FINDINGS = by_name(
    # An error, since the default on_bad_row stops at the first such row.
    Kind(
        "bad_rows",
        "error",
        "cannot be used; the messages give the reasons",
        "Correct them, or set dataset.on_bad_row: skip.",
    ),
    Kind(
        "exact_duplicates",
        "info",
        "repeat an earlier row exactly",
        "Remove them: what is repeated is memorised.",
        warning_above=0.01,
    ),
    Kind(
        "labels_differ",
        "warning",
        "have the same input as another row, and another label",
        "Find out which label is right: no model can learn both.",
    ),
    Kind(
        "near_duplicates",
        "info",
        "nearly repeat an earlier row",
        "Check them: what is repeated is memorised.",
        warning_above=0.05,
    ),
    # Prodigy keeps what its users reject.
    Kind(
        "rows_not_accepted",
        "warning",
        "were rejected or ignored by the annotator, as their column answer says, and are left out",
        "Nothing needs to be done.",
    ),
    # A warning at most: measuring on trained rows is a fair test of whether a model learns at all.
    Kind(
        "train_in_eval",
        "warning",
        "are also training rows, so evaluation looks better than it is",
        "Remove them from the training or the evaluation rows.",
    ),
)
"""The findings of every task. The names are a promise: recipes allow them, scripts read them."""


@dataclass(frozen=True)
class Finding:
    """A problem or oddity of some rows."""

    kind: Kind
    level: Level
    count: int
    """Rows that it is true of."""
    total: int
    """Rows that were examined."""
    rows: list[str]
    """The places of the first ten rows: ``file:line``, or ``file row N``."""
    more: str = ""
    """Added to the message."""
    split: str = "train"
    """The split of the rows: ``train`` or ``eval``."""
    unit: str = "rows"
    """What is counted, in the plural."""

    @property
    def name(self) -> str:
        """One of the names that never change."""
        return self.kind.name

    @property
    def message(self) -> str:
        """One sentence for the user."""
        unit = self.unit if self.split == "train" else f"evaluation {self.unit}"
        return f"{self.count} of {self.total} {unit} {self.kind.summary}{self.more}"

    @property
    def advice(self) -> str:
        """What to do."""
        return self.kind.advice

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as ``inspect --json`` prints it."""
        return {name: getattr(self, name) for name in ("name", "level", "count", "rows", "split")}


class Records:
    """The records of the rows of several parts: the outcome of each row, without its examples.

    ``split`` is ``train`` or ``eval``.
    """

    def __init__(self, parts: Sequence[Selection], split: str = "train"):
        self.parts, self.split = parts, split
        self._records = [part.records for part in parts]

    def with_outcome(self, *outcomes: str) -> list[np.ndarray]:
        """Return masks of the rows with one of these outcomes, part by part."""
        import numpy as np

        return [
            np.isin(records["outcome"], [at for at, name in enumerate(part.store.outcomes) if name in outcomes])
            for part, records in zip(self.parts, self._records, strict=True)
        ]

    def with_flag(self, flag: int, *, without: int = 0) -> list[np.ndarray]:
        """Return masks of the used rows with ``flag`` and not ``without``, part by part."""
        return [
            used & (records["flags"] & (flag | without) == flag)
            for used, records in zip(self.with_outcome(USED), self._records, strict=True)
        ]

    def with_unread(self, columns: Collection[str]) -> list[np.ndarray]:
        """Return masks of the used rows whose source has one of these columns, which the task does not read."""
        unread = [not part.columns_not_read.isdisjoint(columns) for part in self.parts]
        return [used & some for used, some in zip(self.with_outcome(USED), unread, strict=True)]

    def count(self, masks: Sequence[np.ndarray]) -> int:
        """Return the number of rows in the masks."""
        return sum(int(mask.sum()) for mask in masks)

    def findings(
        self, kind: Kind, masks: Sequence[np.ndarray], *, more: str = "", of_used: bool = False
    ) -> list[Finding]:
        """Return the finding about the rows in the masks; an empty list if there are none.

        Their share is relative to all rows, or with ``of_used`` to the used ones; ``more`` is added to the message.
        """
        count = self.count(masks)
        total = self.count(self.with_outcome(USED)) if of_used else sum(map(len, self._records))
        return [kind.finding(count, total, self._places(masks), split=self.split, more=more)] if count else []

    def _places(self, masks: Sequence[np.ndarray]) -> Iterator[Place]:
        for part, mask in zip(self.parts, masks, strict=True):
            for at in mask.nonzero()[0]:
                yield part.store.place(int(at if part.chosen is None else part.chosen[at]))


def find_in_records(
    records: Records, of_task: Callable[[Records], list[Finding]], *, skip_bad_rows: bool = False
) -> list[Finding]:
    """Return the findings that need only the records of the rows, the worst first.

    With ``skip_bad_rows``, as the recipe's ``on_bad_row: skip`` says it, bad rows are a warning.
    """
    findings = [*records.findings(FINDINGS[_BAD_ROWS], records.with_outcome(BAD)), *of_task(records)]
    # Evaluation rows do not change the model, but bad rows among them stop a run too.
    for at, each in enumerate(findings):
        if each.level == "error" and (skip_bad_rows if each.name == _BAD_ROWS else records.split == "eval"):
            findings[at] = replace(each, level="warning")
    return worst_first(findings)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Sort findings by level: errors, then warnings, then the rest."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def refuse(findings: Sequence[Finding], allow: Sequence[str]) -> None:
    """Refuse data with findings that the recipe does not allow. Bad rows cannot be allowed by name.

    Raises:
        DataError: a finding is an error, and the recipe does not allow it.
    """
    errors = [each for each in findings if each.level == "error" and (each.name == _BAD_ROWS or each.name not in allow)]
    if not errors:
        return
    lines = [f"{each.name}: {each.message} ({each.rows[0]})" for each in errors[:_MAX_REFUSED]]
    if len(errors) > _MAX_REFUSED:
        lines[-1] += f"; and {len(errors) - _MAX_REFUSED} more"
    names = ", ".join(sorted({each.name for each in errors} - {_BAD_ROWS}))
    allow_hint = f" To train anyway: dataset.allow: [{names}]." if names else ""
    raise DataError(
        "the data has problems that would spoil the training:\n  " + "\n  ".join(lines),
        key="dataset",
        hint=f"{errors[0].advice}\nTo see the rows: peftcli inspect RECIPE.{allow_hint}",
    )
