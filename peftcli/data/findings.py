"""Findings: what is wrong, or odd, with a dataset, under names that stay.

A finding of level ``error`` stops ``peftcli train`` and gives ``peftcli inspect`` exit code 3, unless the recipe allows
it by name in ``dataset.allow``. About evaluation rows, only bad ones can be. So whatever can be an error is found by
``from_records``, which both commands call and which reads one small record a row, and never the tokens. What needs the
tokens is found by ``peftcli.inspection.audit`` for ``inspect`` alone, and is a warning at most.

Readable without numpy, so that ``peftcli check`` knows the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

_SHOWN_ROWS = 10
_SHOWN_FINDINGS = 3
_HALF = 0.5


@dataclass(frozen=True)
class Kind:
    """What one name stands for."""

    level: Level
    summary: str
    """What is so about each of its rows."""
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


FINDINGS: dict[str, Kind] = {
    # An error, since the default on_bad_row stops at the first such row.
    "bad_rows": Kind(
        "error",
        "cannot be used, as the messages say",
        "Mend them, or set dataset.on_bad_row: skip.",
    ),
    # A few rows without an answer are common. Most of them: the mask or the format is wrong, and the run would learn
    # from a remnant.
    "no_trained_tokens": Kind(
        "warning",
        "would train nothing and are left out",
        "Look at dataset.train_on, dataset.format and dataset.max_length.",
        error_above=_HALF,
    ),
    # The model learns the beginning of an answer and never its end.
    "answers_cut": Kind(
        "warning",
        "lose trained tokens at dataset.max_length",
        "Raise dataset.max_length, or set dataset.overlong: drop or split.",
        error_above=_HALF,
    ),
    # Never an error: it happens only where the recipe asks for it.
    "rows_dropped_overlong": Kind(
        "warning",
        "are longer than dataset.max_length and are left out",
        "Raise dataset.max_length, or set dataset.overlong: truncate or split.",
    ),
    # Trained so, a model does not stop. In a few rows it can be meant.
    "end_not_trained": Kind(
        "warning",
        "have an answer whose end is not trained: the model does not learn there where to stop",
        "Give base_model.chat_template a template that ends its turns with a token, as chatml.",
        error_above=_HALF,
    ),
    # Never meant: generation starts with one.
    "double_bos": Kind(
        "error",
        "begin with two beginning-of-sequence tokens",
        "Take the token out of the rows' text: the tokenizer or its template adds it.",
    ),
    "markers_in_text": Kind(
        "warning",
        "hold special tokens of the tokenizer, written in their text",
        "Take chat markers out of the contents: the template writes them.",
    ),
    "odd_turns": Kind(
        "warning",
        "have two turns of one role in a row, begin with an answer or end without one",
        "Look whether turns are missing.",
    ),
    "turns_left_out": Kind(
        "warning",
        "hold a text or a tool call that the chat template leaves out",
        "Look at the rows: the model does not see all of them.",
    ),
    "encoding_damage": Kind(
        "warning",
        "hold text that was decoded wrongly, such as U+FFFD or 'Ã©'",
        "Make the file anew from its source, as UTF-8.",
    ),
    "rows_truncated": Kind(
        "info",
        "are cut at dataset.max_length and lose no trained token",
        "Nothing needs to be done.",
    ),
    "rows_split": Kind(
        "info",
        "are split into examples of dataset.max_length",
        "Nothing needs to be done.",
    ),
    "pieces_left_out": Kind(
        "info",
        "are split, and pieces of them in which nothing is trained are left out",
        "Nothing needs to be done, unless the prompts were to be trained: dataset.train_on: all.",
    ),
    # The rest needs the tokens: inspect alone.
    "empty_answers": Kind(
        "warning",
        "have an answer without text",
        "Take these rows out: they teach the model to say nothing.",
    ),
    "empty_prompts": Kind(
        "info",
        "have no prompt: all of their text is trained",
        "Look whether the prompt stands in another column: dataset.columns.",
    ),
    "exact_duplicates": Kind(
        "info",
        "repeat an earlier row, token by token",
        "Take them out: what is repeated is learnt by heart.",
        warning_above=0.01,
    ),
    "near_duplicates": Kind(
        "info",
        "nearly repeat an earlier row",
        "Look at them: what is repeated is learnt by heart.",
        warning_above=0.05,
    ),
    # A warning at most, since to measure on rows that were trained is a fair test of whether a model learns at all.
    "train_in_eval": Kind(
        "warning",
        "are trained on too: eval_loss is too good",
        "Take them out of one of the two.",
    ),
    "prompts_in_eval": Kind(
        "info",
        "have a prompt that is trained too, with another answer",
        "Look whether eval_loss shall measure that.",
        warning_above=0.1,
    ),
    "low_trained_share": Kind(
        "info",
        "have less than 1 trained token in 100",
        "Look whether the prompts need to be so long.",
        warning_above=_HALF,
    ),
}
"""Name -> what it stands for. The names are a promise: recipes allow them, scripts read them."""


@dataclass(frozen=True)
class Finding:
    """Something that is so about some rows."""

    name: str
    level: Level
    count: int
    """Rows."""
    rows: list[str]
    """Where the first ten of them stand: ``file:line``, or ``file row N``."""
    message: str
    """One sentence for the user."""
    split: str = "train"
    """Whose rows: ``train`` or ``eval``."""

    def as_dict(self) -> dict[str, Any]:
        """The finding as ``inspect --json`` gives it."""
        return {name: getattr(self, name) for name in ("name", "level", "count", "rows")}


def found(
    name: str, count: int, total: int, places: Iterator[Place], *, split: str = "train", more: str = ""
) -> Finding:
    """A finding about ``count`` of ``total`` rows.

    Args:
        name: One of FINDINGS.
        count: Rows that it is true of.
        total: Rows that were looked at.
        places: Where those rows stand; no more than ten are read.
        split: ``train`` or ``eval``.
        more: Added to the message.
    """
    kind = FINDINGS[name]
    rows = "rows" if split == "train" else "evaluation rows"
    message = f"{count} of {total} {rows} {kind.summary}{more}"
    shown_rows = list(map(shown, islice(places, _SHOWN_ROWS)))
    return Finding(name, kind.level_at(count / total), count, shown_rows, message, split)


def shown(place: Place) -> str:
    """``file:line``, or ``file row N`` where there are no lines."""
    return f"{place.source} row {place.number}" if place.line is None else f"{place.source}:{place.line}"


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Errors, then warnings, then the rest; else in their order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def from_records(parts: Sequence[Part], *, split: str = "train", skip_bad_rows: bool = False) -> list[Finding]:
    """What the records of the rows show, the worst first. Reads no token.

    Args:
        parts: The rows of the training data, or of the evaluation data.
        split: Which of the two they are: ``train`` or ``eval``.
        skip_bad_rows: The recipe says ``on_bad_row: skip``: bad rows are a warning.
    """
    from peftcli.data.encode import CUT_OFF, NO_TARGET, OVERLONG
    from peftcli.data.flags import Flag
    from peftcli.data.store import BAD

    rows = _Rows(parts)
    cut_off = rows.count(rows.became(CUT_OFF))
    more = f" ({cut_off} since all of their trained tokens are beyond dataset.max_length)" if cut_off else ""
    findings = [
        rows.finding("bad_rows", rows.became(BAD), split=split),
        rows.finding("no_trained_tokens", rows.became(NO_TARGET, CUT_OFF), split=split, more=more),
        rows.finding("rows_dropped_overlong", rows.became(OVERLONG), split=split),
        *(
            rows.finding(name, rows.marked(flag), split=split, of_used=True)
            for name, flag in (
                ("answers_cut", Flag.ANSWER_CUT),
                ("end_not_trained", Flag.OPEN),
                ("double_bos", Flag.DOUBLE_BOS),
                ("markers_in_text", Flag.MARKERS),
                ("odd_turns", Flag.ODD_TURNS),
                ("turns_left_out", Flag.UNSEEN),
                ("encoding_damage", Flag.DAMAGED),
                ("rows_split", Flag.SPLIT),
                ("pieces_left_out", Flag.PIECES_LEFT_OUT),
            )
        ),
        rows.finding("rows_truncated", rows.marked(Flag.TRUNCATED, but_not=Flag.ANSWER_CUT), split=split, of_used=True),
    ]
    some = [finding for finding in findings if finding is not None]
    # Evaluation rows train nothing wrongly, but bad ones among them stop a run as well.
    for at, each in enumerate(some):
        if each.level == "error" and (skip_bad_rows if each.name == "bad_rows" else split == "eval"):
            some[at] = replace(each, level="warning")
    return worst_first(some)


def stopping(findings: Sequence[Finding], allow: Sequence[str]) -> list[Finding]:
    """The errors that the recipe does not allow. Bad rows stop a run whatever it allows: ``on_bad_row`` is for them."""
    errors = [finding for finding in findings if finding.level == "error"]
    return [finding for finding in errors if finding.name == "bad_rows" or finding.name not in allow]


def refuse(findings: Sequence[Finding], allow: Sequence[str]) -> None:
    """Stops where the data holds an error.

    Raises:
        DataError: an error that the recipe does not allow.
    """
    errors = stopping(findings, allow)
    if not errors:
        return
    lines = [f"{each.name}: {each.message} ({each.rows[0]})" for each in errors[:_SHOWN_FINDINGS]]
    if len(errors) > _SHOWN_FINDINGS:
        lines[-1] += f"; and {len(errors) - _SHOWN_FINDINGS} more"
    names = ", ".join(sorted({each.name for each in errors} - {"bad_rows"}))
    allowing = f" To train all the same: dataset.allow: [{names}]." if names else ""
    raise DataError(
        "the data would be trained wrongly:\n  " + "\n  ".join(lines),
        key="dataset",
        hint=f"{FINDINGS[errors[0].name].advice}\nTo see the rows: peftcli inspect RECIPE.{allowing}",
    )


class _Rows:
    """The records of the rows of several parts."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        self.records = [part.records for part in parts]

    def became(self, *outcomes: str) -> list[np.ndarray]:
        """Which rows had one of these outcomes, part by part."""
        import numpy as np

        return [
            np.isin(records["outcome"], [at for at, name in enumerate(part.store.outcomes) if name in outcomes])
            for part, records in zip(self.parts, self.records, strict=True)
        ]

    def marked(self, flag: int, *, but_not: int = 0) -> list[np.ndarray]:
        """Which rows that are used carry the flag, part by part."""
        from peftcli.data.store import USED

        return [
            used & (records["flags"] & (flag | but_not) == flag)
            for used, records in zip(self.became(USED), self.records, strict=True)
        ]

    def count(self, masks: Sequence[np.ndarray]) -> int:
        return sum(int(mask.sum()) for mask in masks)

    def finding(
        self, name: str, masks: Sequence[np.ndarray], *, split: str, more: str = "", of_used: bool = False
    ) -> Finding | None:
        from peftcli.data.store import USED

        count = self.count(masks)
        if not count:
            return None
        total = self.count(self.became(USED)) if of_used else sum(map(len, self.records))
        return found(name, count, total, self._places(masks), split=split, more=more)

    def _places(self, masks: Sequence[np.ndarray]) -> Iterator[Place]:
        for part, mask in zip(self.parts, masks, strict=True):
            for at in mask.nonzero()[0]:
                yield part.store.place(int(at if part.chosen is None else part.chosen[at]))
