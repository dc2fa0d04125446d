"""Findings: what is wrong, or odd, with a dataset, under names that never change.

A finding of level ``error`` stops ``peftcli train`` and gives ``peftcli inspect`` exit code 3, unless the recipe allows
it by name in ``dataset.allow``. Of evaluation rows, only bad ones are an error. Whatever can be an error is found by
``find_in_records``, which both commands call and which reads one small record per row, never the examples. What needs
the examples is found for ``inspect`` alone, and is a warning at most.

Readable without numpy, so that ``peftcli check`` knows the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from peftcli.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from peftcli.data.rows import Place
    from peftcli.data.store import Part

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
"""The worst first."""

_MAX_PLACES = 10
_MAX_REFUSED = 3
_BAD_ROWS = "bad_rows"


@dataclass(frozen=True)
class Kind:
    """What the findings of one name have in common."""

    name: str
    level: Level
    summary: str
    """What is true of each of its rows."""
    advice: str
    """What to do."""
    warning_above: float | None = None
    """It is a warning when it is true of a larger share of the rows."""
    error_above: float | None = None
    """It is an error when it is true of a larger share of the rows."""

    def level_at(self, share: float) -> Level:
        """The level when it is true of ``share`` of the rows."""
        if self.error_above is not None and share > self.error_above:
            return "error"
        if self.warning_above is not None and share > self.warning_above:
            return "warning"
        return self.level

    @property
    def can_stop(self) -> bool:
        """Whether it can be an error."""
        return self.level == "error" or self.error_above is not None

    def finding(
        self, count: int, total: int, places: Iterable[Place], *, split: str = "train", more: str = ""
    ) -> Finding:
        """A finding of this kind about ``count`` of ``total`` rows.

        Args:
            count: Rows that it is true of.
            total: Rows that were examined.
            places: The places of those rows; at most ten are read.
            split: ``train`` or ``eval``.
            more: Added to the message.
        """
        listed = list(map(str, islice(places, _MAX_PLACES)))
        return Finding(self, self.level_at(count / total), count, total, listed, more, split)


def by_name(*kinds: Kind) -> dict[str, Kind]:
    """The kinds under their names."""
    return {kind.name: kind for kind in kinds}


FINDINGS = by_name(
    # An error, since the default on_bad_row stops at the first such row.
    Kind(
        "bad_rows",
        "error",
        "cannot be used, as the messages say",
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
        "near_duplicates",
        "info",
        "nearly repeat an earlier row",
        "Look at them: what is repeated is memorised.",
        warning_above=0.05,
    ),
    # A warning at most: measuring on trained rows is a fair test of whether a model learns at all.
    Kind(
        "train_in_eval",
        "warning",
        "are trained on too: evaluation looks better than it is",
        "Remove them from one of the two.",
    ),
)
"""The findings of every task. The names are a promise: recipes allow them, scripts read them."""


@dataclass(frozen=True)
class Finding:
    """Something that is true of some rows."""

    kind: Kind
    level: Level
    count: int
    """Rows that it is true of."""
    total: int
    """Rows that were examined."""
    rows: list[str]
    """The places of the first ten of them: ``file:line``, or ``file row N``."""
    more: str = ""
    """Added to the message."""
    split: str = "train"
    """Which rows: ``train`` or ``eval``."""

    @property
    def name(self) -> str:
        """One of the names that never change."""
        return self.kind.name

    @property
    def message(self) -> str:
        """One sentence for the user."""
        rows = "rows" if self.split == "train" else "evaluation rows"
        return f"{self.count} of {self.total} {rows} {self.kind.summary}{self.more}"

    @property
    def advice(self) -> str:
        """What to do."""
        return self.kind.advice

    def as_dict(self) -> dict[str, Any]:
        """The finding as ``inspect --json`` prints it."""
        return {name: getattr(self, name) for name in ("name", "level", "count", "rows")}


class Records:
    """The records of the rows of several parts: what became of each row, without its examples.

    Args:
        parts: The training rows, or the evaluation rows.
        split: Which of the two: ``train`` or ``eval``.
    """

    def __init__(self, parts: Sequence[Part], split: str = "train"):
        self.parts, self.split = parts, split
        self._records = [part.records for part in parts]

    def became(self, *outcomes: str) -> list[np.ndarray]:
        """A mask of the rows with one of these outcomes, part by part."""
        import numpy as np

        return [
            np.isin(records["outcome"], [at for at, name in enumerate(part.store.outcomes) if name in outcomes])
            for part, records in zip(self.parts, self._records, strict=True)
        ]

    def flagged(self, flag: int, *, but_not: int = 0) -> list[np.ndarray]:
        """A mask of the used rows that have the flag, part by part."""
        from peftcli.data.store import USED

        return [
            used & (records["flags"] & (flag | but_not) == flag)
            for used, records in zip(self.became(USED), self._records, strict=True)
        ]

    def count(self, masks: Sequence[np.ndarray]) -> int:
        """The number of rows in the masks."""
        return sum(int(mask.sum()) for mask in masks)

    def findings(
        self, kind: Kind, masks: Sequence[np.ndarray], *, more: str = "", of_used: bool = False
    ) -> list[Finding]:
        """The finding about the rows in the masks; none where there are no such rows.

        Args:
            kind: What is true of them.
            masks: The rows, part by part.
            more: Added to the message.
            of_used: The share is that of the used rows, not of all rows.
        """
        from peftcli.data.store import USED

        count = self.count(masks)
        total = self.count(self.became(USED)) if of_used else sum(map(len, self._records))
        return [kind.finding(count, total, self._places(masks), split=self.split, more=more)] if count else []

    def _places(self, masks: Sequence[np.ndarray]) -> Iterator[Place]:
        for part, mask in zip(self.parts, masks, strict=True):
            for at in mask.nonzero()[0]:
                yield part.store.place(int(at if part.chosen is None else part.chosen[at]))


def find_in_records(
    records: Records, of_task: Callable[[Records], list[Finding]], *, skip_bad_rows: bool = False
) -> list[Finding]:
    """The findings that need only the records of the rows, the worst first.

    Args:
        records: Those of the training rows, or of the evaluation rows.
        of_task: Returns the task's own findings.
        skip_bad_rows: The recipe says ``on_bad_row: skip``: bad rows are a warning.
    """
    from peftcli.data.store import BAD

    findings = [*records.findings(FINDINGS[_BAD_ROWS], records.became(BAD)), *of_task(records)]
    # Evaluation rows train nothing wrongly, but bad ones among them stop a run as well.
    for at, each in enumerate(findings):
        if each.level == "error" and (skip_bad_rows if each.name == _BAD_ROWS else records.split == "eval"):
            findings[at] = replace(each, level="warning")
    return worst_first(findings)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Errors, then warnings, then the rest; otherwise in their order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def stopping(findings: Sequence[Finding], allow: Sequence[str]) -> list[Finding]:
    """The errors that the recipe does not allow. Bad rows cannot be allowed: ``on_bad_row`` is for them."""
    errors = [finding for finding in findings if finding.level == "error"]
    return [finding for finding in errors if finding.name == _BAD_ROWS or finding.name not in allow]


def refuse(findings: Sequence[Finding], allow: Sequence[str]) -> None:
    """Refuse data with an error.

    Raises:
        DataError: an error that the recipe does not allow.
    """
    errors = stopping(findings, allow)
    if not errors:
        return
    lines = [f"{each.name}: {each.message} ({each.rows[0]})" for each in errors[:_MAX_REFUSED]]
    if len(errors) > _MAX_REFUSED:
        lines[-1] += f"; and {len(errors) - _MAX_REFUSED} more"
    names = ", ".join(sorted({each.name for each in errors} - {_BAD_ROWS}))
    allowing = f" To train anyway: dataset.allow: [{names}]." if names else ""
    raise DataError(
        "the data would be trained wrongly:\n  " + "\n  ".join(lines),
        key="dataset",
        hint=f"{errors[0].advice}\nTo see the rows: peftcli inspect RECIPE.{allowing}",
    )
