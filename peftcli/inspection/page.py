"""An inspection as one self-contained HTML page, readable without JavaScript."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from peftcli.data.findings import Finding
from peftcli.errors import UsageError
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
from peftcli.reporting.html import as_html, capital, document, table, visible
from peftcli.system.outputs import storage_errors, write_output
from peftcli.system.secrets import redact
from peftcli.tasks.shown import Image, Label, Part, Text, TokenText, side_by_side

_MAX_TOKENS = 4000
"""Of a longer row, the beginning and the end are shown."""
_MAX_CHARACTERS = 4_000_000
"""Rows beyond this amount of HTML are left out, and counted."""
_TRAINED = '<mark>trained, underlined</mark>, <span class="p">prompt</span>'
_LABELLED = "text in the colour of its label, which stands at its end"
_LABEL, _LINE, _WIDTH = 96, 18, 360
"""The histogram's layout, in its own units: the start of bars, the height of one, and the total width."""
_COUNTED_BY_NAME = ("classes", "tags")
"""Parts of the audit that count rows by name; the page draws each as a chart."""
_MAX_BARS = 30
"""A chart shows the largest counts, at most this many."""
_Ids = dict[tuple[str, str], str]
"""The split and the place of a row -> the id of its element."""


def write_page(path: Path, inspection: Inspection, rows: Sequence[ShownRow], borders: bool) -> None:
    """Write the page, whole or not at all.

    ``path`` is one that ``refuse_name`` lets pass; ``borders``: show where each token ends.

    Raises:
        StorageError: the file cannot be written.
    """
    write_output(path, redact(page(inspection, rows, borders)).encode())


def refuse_name(path: Path) -> None:
    """Raise UsageError if ``path`` does not name a page."""
    with storage_errors(path):
        fits = path.suffix.lower() in (".html", ".htm") and (path.is_file() or not path.exists())
    if not fits:
        raise UsageError("does not name a page", file=str(path), key="--html", hint="name a file that ends in .html")


def page(inspection: Inspection, rows: Sequence[ShownRow], borders: bool) -> str:
    """Return the page's text."""
    script = files("peftcli.inspection").joinpath("page.js").read_text("utf-8")
    named = {f"{row.split}-{row.index}": row for row in rows}
    shown, ids = _rows(named, borders)
    dataset = inspection.recipe.dataset
    data = ", ".join(source.train for source in dataset.sources())
    measured = "" if inspection.data.eval is None else f" and {len(inspection.data.eval):,} that are evaluated"
    left_out = len(named) - len(shown)
    more = f" {left_out} more are left out, so that the page stays small." if left_out else ""
    joined = "\n".join(shown)
    body = f"""<header>
<h1>What this recipe trains</h1>
<p>{as_html(data)}, as {as_html(inspection.task_name)} for {as_html(inspection.recipe.base_model.name)}</p>
<nav aria-label="Parts of this page"><a href="#rows">Rows</a>
<a href="#findings">Findings: {_counted(inspection.findings)}</a> <a href="#audit">Audit</a></nav>
</header>
<main>
<section id="rows">
<h2>Rows</h2>
<p>Examples here: {len(shown)}, of {len(inspection.data.train):,} that are trained{measured}.{more}
{_legend(rows)}</p>
<div id="controls" hidden>
<label>Only rows with <input id="filter" type="search"></label>
<button id="back" type="button">Back</button> <button id="on" type="button">Next</button>
<span id="where" role="status"></span>
</div>
<div{' class="grid"' if _are_pictures(rows) else ""}>
{joined}
</div>
</section>
<section id="findings">
<h2>Findings</h2>
{_findings(inspection, ids)}
</section>
<section id="audit">
<h2>Audit of the whole dataset</h2>
{_audit(inspection)}
</section>
</main>"""
    return document(f"peftcli inspect: {data}", body, script)


def _counted(findings: Sequence[Finding]) -> str:
    """How many findings there are of each level: ``1 error, 2 warnings``."""
    levels = Counter(finding.level for finding in findings)
    named = [f"{count} {level}{'s' * (count > 1 and level != 'info')}" for level, count in levels.items()]
    return ", ".join(named) or "none"


def _are_pictures(rows: Sequence[ShownRow]) -> bool:
    """Whether each row is one picture and short facts about it, so that rows stand in a grid."""
    return bool(rows) and all(
        sum(isinstance(part, Image) for part in row.shown.parts) == 1
        and not any(isinstance(part, Text) for part in row.shown.parts)
        for row in rows
    )


def _legend(rows: Sequence[ShownRow]) -> str:
    """How texts are marked, where a row has any."""
    if not has_targets(rows):
        return ""
    marks = _LABELLED if has_labels(rows) else _TRAINED
    return f"""In them: {marks},
<span class="s">special token</span>, and <span class="n">\u23ce</span> for a newline."""


def _rows(rows: dict[str, ShownRow], borders: bool) -> tuple[list[str], _Ids]:
    """The rows that fit on the page, and the id of the first row of each place."""
    parts: list[str] = []
    ids: _Ids = {}
    size = 0
    for name, row in rows.items():
        part = _row(row, name, borders)
        size += len(part)
        if size > _MAX_CHARACTERS and parts:
            break
        parts.append(part)
        ids.setdefault((row.split, row.place), name)
    return parts, ids


def _row(row: ShownRow, name: str, borders: bool) -> str:
    pictures = [part for part in row.shown.parts if isinstance(part, Image)]
    beside = pictures if any(isinstance(part, Text) for part in row.shown.parts) else []
    parts = [_group(group, borders) for group in side_by_side([p for p in row.shown.parts if p not in beside])]
    if beside:
        drawn = "".join(_part(each, borders) for each in beside)
        parts = [f'<div class="seen"><div>{drawn}</div><div>{"".join(parts)}</div></div>']
    if row.missing:
        lost = f", {row.lost:,} of them trained" if row.lost else ""
        parts.append(f'<p class="cut">Cut here: {row.missing:,} {row.unit} are missing{lost}.</p>')
    return (
        f'<article class="row" id="{name}"><h3>{as_html(row.place)}</h3>\n'
        f"<p>{capital(row.title)}{as_html(f': {row.size}' if row.size else '')}.</p>\n{''.join(parts)}</article>"
    )


def _group(parts: Sequence[Part], borders: bool) -> str:
    """Parts that stand side by side where the window is wide enough, or one alone."""
    drawn = [_part(part, borders) for part in parts]
    return drawn[0] if len(drawn) == 1 else f'<div class="beside"><div>{"</div><div>".join(drawn)}</div></div>'


def _part(part: Part, borders: bool) -> str:
    if isinstance(part, Text):
        heading = f"<h4>{as_html(capital(part.title))}</h4>" if part.title else ""
        return heading + _text(part, borders)
    if isinstance(part, Label):
        return f"<p>{as_html(capital(part.title))}: <mark>{as_html(part.text)}</mark></p>"
    if isinstance(part, Image):
        data = base64.b64encode(part.thumbnail).decode()
        caption = f"{as_html(part.source)}, {part.width:,} x {part.height:,}, {as_html(part.mode)}"
        picture = f'<img src="data:image/png;base64,{data}" alt="{as_html(part.title)}">'
        return f'<figure class="picture">{picture}<figcaption>{caption}</figcaption></figure>'
    return table("", [["", ""], *map(list, part.values.items())])


def _text(text: Text, borders: bool) -> str:
    first, between, last = shortened(text.tokens, _MAX_TOKENS)
    gap = f'<p class="cut">{between:,} tokens are not shown here.</p>' if between else ""
    parts = [f'<pre tabindex="0">{"".join(_spans(text, some, borders))}</pre>' for some in (first, last) if some]
    return gap.join(parts)


def _spans(text: Text, tokens: Sequence[TokenText], borders: bool) -> Iterable[str]:
    """Draw some tokens of a text: those of one kind as one element, unless single tokens must be seen."""
    for (trained, special, label), run in groupby(
        tokens, key=lambda token: (token.trained, token.special, token.label)
    ):
        tag = "mark" if trained else "span"
        hue = colour(text, label) if label else ""
        kinds = ((hue, hue), ("s", special), ("p", not trained), ("b", borders))
        kind = " ".join(name for name, wanted in kinds if wanted)
        classes = f' class="{kind}"' if kind else ""
        if borders or special:
            for token in run:
                numbers = " ".join(map(str, token.ids))
                yield f'<{tag}{classes} title="{numbers}">{visible(token.text)}</{tag}>'
        else:
            yield f"<{tag}{classes}>{visible(''.join(token.text for token in run))}</{tag}>"
        if label:
            yield f'<sub class="{hue}">{as_html(label)}</sub>'


def _findings(inspection: Inspection, ids: _Ids) -> str:
    if not inspection.findings:
        return "<p>None.</p>"
    allow = inspection.recipe.dataset.allow
    return "\n".join(_finding(each, number, ids, allow) for number, each in enumerate(inspection.findings))


def _finding(finding: Finding, number: int, ids: _Ids, allow: Sequence[str]) -> str:
    links = [(ids.get((finding.split, place)), as_html(place)) for place in finding.rows]
    places = [f'<a href="#{name}">{place}</a>' if name else f"<span>{place}</span>" for name, place in links]
    more = ", ..." if finding.count > len(places) > 0 else ""
    allowed = " (allowed)" if finding.level == "error" and finding.name in allow else ""
    return (
        f'<article class="finding {finding.level}" id="finding-{number}-{finding.name}">'
        f'<h3><span class="level">{finding.level}{allowed}</span> {finding.name}</h3>\n'
        f"<p>{as_html(finding.message)}. {as_html(finding.advice)}</p>\n"
        f'<p class="places">{", ".join(places)}{more}</p></article>'
    )


def _audit(inspection: Inspection) -> str:
    train, unit = inspection.audit["train"], inspection.task.unit
    parts = [table(title, rows) for title, rows in inspection.tables().items()]
    parts += [_chart(name, train[name]) for name in _COUNTED_BY_NAME if train.get(name)]
    if has_sizes(inspection.audit):
        caption = f"<figcaption>{capital(unit)} of the training rows, before any cut</figcaption>"
        parts.append(f"<figure>{caption}\n{_histogram(bars(train), unit)}</figure>")
        longest = [[each["row"], f"{each['tokens']:,}", each["outcome"]] for each in train["longest"]]
        parts.append(table("longest rows", [["", unit, "outcome"], *longest]))
    for kind, facts in (("", train), ("evaluation ", inspection.audit["eval"] or {})):
        if pairs := facts.get("duplicates", {}).get("pairs"):
            listed = [[each["row"], each["like"], f"{each['alike']:.0%}"] for each in pairs]
            parts.append(table(f"{kind}rows that are near duplicates", [["row", "is like", "overlap"], *listed]))
        if bad := facts.get("bad_rows"):
            listed = [[each["row"], what_is_wrong(each)] for each in bad]
            parts.append(table(f"{kind}rows that cannot be used", [["", "why"], *listed]))
    return "\n".join(parts)


def _chart(name: str, counts: Mapping[str, int]) -> str:
    """The largest counts as bars, such as those of classes."""
    largest = sorted(counts.items(), key=lambda each: -each[1])[:_MAX_BARS]
    more = f", the {_MAX_BARS} largest of {len(counts):,}" if len(counts) > _MAX_BARS else ""
    short = [(label if len(label) <= 15 else f"{label[:14]}\u2026", count) for label, count in largest]
    drawn = _histogram([(as_html(label), count) for label, count in short], name)
    return f"<figure><figcaption>{capital(name)} of the training rows{more}</figcaption>\n{drawn}</figure>"


def _histogram(counted: list[tuple[str, int]], unit: str) -> str:
    most = max(1, *(count for _, count in counted))
    room = _WIDTH - _LABEL - 64
    drawn = []
    for number, (label, count) in enumerate(counted):
        y, width = number * _LINE, count / most * room
        drawn.append(
            f'<text x="{_LABEL - 6}" y="{y + 13}" text-anchor="end">{label}</text>'
            f'<rect x="{_LABEL}" y="{y + 2}" width="{max(width, 1 if count else 0):.1f}" height="{_LINE - 4}"/>'
            f'<text x="{_LABEL + width + 5:.1f}" y="{y + 13}">{count:,}</text>'
        )
    height = len(counted) * _LINE
    label = f"{capital(unit)}, and the number of each"
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
