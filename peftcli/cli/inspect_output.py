"""The output of ``peftcli inspect``: rows as they are trained, the audit, and the findings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from peftcli.cli import console
from peftcli.data.findings import Finding
from peftcli.inspection.report import (
    Inspection,
    ShownRow,
    bars,
    colour,
    has_labels,
    has_sizes,
    has_targets,
    shortened,
    what_is_wrong,
)
from peftcli.tasks.shown import Image, Label, Part, Text, TokenText, side_by_side

_MAX_TOKENS = 2000
"""Of a longer row, the beginning and the end are shown."""
_DETAILS = 3
"""Rows of a finding of which more is said."""
_BAR = 40
_NEWLINE = "\u23ce\n"
"""A newline that the data holds: a mark, and the newline."""
_BORDER = "\u00a6"
_STYLES = {
    # (trained, special)
    (False, False): "dim",
    (False, True): "dim reverse",
    (True, False): "bold green",
    (True, True): "bold green reverse",
}
_COLUMN = 40
"""Characters of a line that texts side by side have at least."""


class RowPrinter:
    """Rows on the terminal, or as plain text."""

    def __init__(self, borders: bool):
        self.borders = borders
        self.coloured = console.is_terminal(sys.stdout)

    def print(self, rows: Sequence[ShownRow]) -> None:
        """Print rows, after a legend of the marks in them."""
        if has_targets(rows):
            self._legend(has_labels(rows))
        for row in rows:
            console.out(f"=== {row.place} ({row.title}){f': {row.size}' if row.size else ''}")
            for parts in side_by_side(row.shown.parts):
                self._group(parts)
            if row.missing:
                lost = f", {row.lost:,} of them trained" if row.lost else ""
                console.out(f"--- cut here: {row.missing:,} {row.unit} are missing{lost} ---")
            console.out()

    def _legend(self, labelled: bool) -> None:
        if labelled:
            console.out(
                "the label of a text stands at its end\n" if self.coloured else "[[...|NAME]] has the label NAME\n"
            )
            return
        if not self.coloured:
            console.out("[[...]] is trained, the rest is prompt\n")
            return
        from rich.text import Text as Drawn

        parts = [("trained", (True, False)), ("prompt", (False, False)), ("special token", (False, True))]
        styled = [part for text, kind in parts for part in ((text, _STYLES[kind]), "  ")]
        console.rich_console().print(Drawn.assemble(*styled))
        console.out()

    def _group(self, parts: Sequence[Part]) -> None:
        """Parts in columns, or one after another: one alone, no terminal, or one too narrow for columns."""
        if len(parts) == 1 or not self.coloured or console.rich_console().width < len(parts) * _COLUMN:
            for part in parts:
                self._part(part)
            return
        from rich.console import Group
        from rich.table import Column, Table

        texts = [part for part in parts if isinstance(part, Text)]
        columns = (Column(f"{text.title}:", ratio=1, overflow="fold") for text in texts)
        table = Table(*columns, box=None, expand=True, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
        table.add_row(*(Group(*self._lines(text)) for text in texts))
        console.rich_console().print(table)

    def _part(self, part: Part) -> None:
        if isinstance(part, Label):
            part = Text([TokenText(part.text, trained=True)], part.title)
        if isinstance(part, Text):
            if part.title:
                console.out(f"{part.title}:")
            for line in self._lines(part):
                if self.coloured:
                    console.rich_console().print(line, soft_wrap=True)
                else:
                    console.out(line)
        elif isinstance(part, Image):
            console.out(f"{part.title}: {part.source}, {part.width:,} x {part.height:,}, {part.mode}")
        else:
            for name, value in part.values.items():
                console.out(f"{name}: {value}")

    def _lines(self, text: Text) -> list[Any]:
        """A text, or its beginning, how much is left out, and its end: of rich on a terminal, else strings."""
        first, between, last = shortened(text.tokens, _MAX_TOKENS)
        draw = self._draw_coloured if self.coloured else self._draw_plain
        if not between:
            return [draw(text, first)]
        left_out = f"--- {between:,} tokens are not shown; a page shows more: --html FILE ---"
        return [draw(text, first), left_out, draw(text, last)]

    def _draw_coloured(self, text: Text, tokens: Sequence[TokenText]) -> Any:
        from rich.text import Text as Drawn

        drawn = Drawn()
        for label, run in groupby(tokens, key=lambda token: token.label):
            for token in run:
                style = colour(text, label) if label else _STYLES[token.trained, token.special]
                drawn.append(self._bordered(token), style)
            if label:
                drawn.append(f" {console.escape(label)} ", f"{colour(text, label)} reverse")
        if drawn.plain.endswith("\n"):
            drawn.right_crop()
        return drawn

    def _draw_plain(self, _: Text, tokens: Sequence[TokenText]) -> str:
        parts = []
        for (trained, label), run in groupby(tokens, key=lambda token: (token.trained, token.label)):
            # what the data holds is not taken for our marks
            marked = "".join(map(self._bordered, run)).replace("[[", "\\[[").replace("]]", "\\]]")
            name = f"|{console.escape(label)}" if label else ""
            parts.append(f"[[{marked}{name}]]" if trained else marked)
        return "".join(parts).removesuffix("\n")

    def _bordered(self, token: TokenText) -> str:
        text = console.escape(token.text).replace("\n", _NEWLINE)
        if not self.borders:
            return text
        return text.removesuffix("\n") + _BORDER + ("\n" if text.endswith("\n") else "")


def print_audit(inspection: Inspection) -> None:
    """Print the audit's tables, and the histogram of the rows' sizes."""
    train, unit = inspection.audit["train"], inspection.task.unit
    for title, (columns, *rows) in inspection.tables().items():
        console.table([title, *columns[1:]], rows)
        console.out()
    if not has_sizes(inspection.audit):
        return
    counted, mark = bars(train), "\u2588" if console.is_terminal(sys.stdout) else "#"
    width, most = max(len(label) for label, _ in counted), max(count for _, count in counted)
    console.out(f"{unit} of the training rows, before any cut")
    for label, count in counted:
        # a bar of few rows is shown, too
        console.out(f"  {label.rjust(width)}  {mark * -(-count * _BAR // max(most, 1))} {count:,}")
    longest = ", ".join(f"{each['row']} ({each['tokens']:,})" for each in train["longest"][:3])
    console.out(f"  the longest: {longest}\n")


def print_findings(inspection: Inspection) -> None:
    """Print each finding with its first rows and its advice."""
    count = len(inspection.findings)
    console.out(f"{count or 'no'} {'finding' if count == 1 else 'findings'}")
    for each in inspection.findings:
        allowed = each.level == "error" and each.name in inspection.recipe.dataset.allow
        console.paragraph(f"{each.level}{' (allowed)' if allowed else ''}: {each.name}: {each.message}")
        more = ", ..." if each.count > len(each.rows) else ""
        if each.rows:  # a finding may be about all of them together
            console.paragraph(f"{console.folder_once(each.rows)}{more}", "  ")
        for line in _details(each, inspection.audit[each.split]):
            console.paragraph(line, "  ")
        console.paragraph(each.advice, "  ")


def _details(finding: Finding, facts: dict[str, Any]) -> list[str]:
    """The first of the rows, with what is known of each."""
    if finding.name == "bad_rows":
        return [f"{bad['row']}: {what_is_wrong(bad)}" for bad in facts["bad_rows"][:_DETAILS]]
    if finding.name == "near_duplicates":
        pairs = facts["duplicates"]["pairs"][:_DETAILS]
        return [f"{pair['row']} is like {pair['like']} ({pair['alike']:.0%})" for pair in pairs]
    return []
