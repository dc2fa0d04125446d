"""A self-contained HTML page: no network, no fonts, readable without JavaScript.

A content security policy with the hashes of its own style and script forbids everything that is not in the page: even
if foreign text got into it as markup, despite the escaping, it would load and run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from peftcli.guard.files import escape_char, is_harmless
from peftcli.reporting.blocks import Block, Chart, Code, Note, Outputs, Picture, Pictures, Section, Table
from peftcli.reporting.charts import MAX_SERIES, draw_chart

_MAX_WHOLE = 20
"""Characters of a cell that is kept on one line."""
_NUMBERS = re.compile(r"[-+]?[\d.,]+ to [-+]?[\d.,]+")


def document(title: str, body: str, script: str = "") -> str:
    """Return a page with a title, as text, and a body, as HTML."""
    style = files("peftcli.reporting").joinpath("page.css").read_text("utf-8")
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; {scripts}base-uri 'none'"
    end = f"<script>{script}</script>\n" if script else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<link rel="icon" href="data:,">
<title>{escape(ascii(title)[1:-1])}</title>
<style>{style}</style>
</head>
<body>
{body}
{end}</body>
</html>
"""


def report_page(title: str, about: str, sections: Sequence[Section]) -> str:
    """Return a report as a page."""
    names = [(f"part-{number}", section) for number, section in enumerate(sections)]
    links = " ".join(f'<a href="#{name}">{as_html(section.title)}</a>' for name, section in names)
    parts = "\n".join(_section(name, section) for name, section in names)
    head = f"<header>\n<h1>{as_html(title)}</h1>\n<p>{as_html(about)}</p>\n"
    return document(
        title, f'{head}<nav aria-label="Parts of this page">{links}</nav>\n</header>\n<main>\n{parts}\n</main>'
    )


def _section(name: str, section: Section) -> str:
    drawn = "\n".join(_block(block) for block in section.blocks)
    kind = ' class="charts"' if any(isinstance(block, Chart) for block in section.blocks) else ""
    return f'<section id="{name}"{kind}>\n<h2>{as_html(section.title)}</h2>\n{drawn}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Note():
            return f'<p class="{" ".join(["note", block.tone]).strip()}">{as_html(block.text)}</p>'
        case Table():
            return table(block.title, [block.columns, *block.rows])
        case Chart():
            return _figure(block)
        case Code():
            drawn = f'<pre tabindex="0" class="code">{as_html(block.text)}</pre>'
            title = as_html(block.title)
            if block.folded:
                return f"<details><summary>{title}</summary>\n{drawn}\n</details>"
            return (f"<h3>{title}</h3>\n" if title else "") + drawn
        case Outputs():
            parts = [
                f'<div><h4>{as_html(name)}</h4><pre tabindex="0">{visible(text)}</pre></div>'
                for name, text in block.texts.items()
            ]
            joined = "\n".join(parts)
            return f'<article><h3>{as_html(block.title)}</h3>\n<div class="outputs">{joined}</div></article>'
        case Pictures():
            drawn = "\n".join(_picture(block.title, each) for each in block.pictures)
            return f'<article><h3>{as_html(block.title)}</h3>\n<div class="grid">{drawn}</div></article>'


def _picture(title: str, picture: Picture) -> str:
    data, name = base64.b64encode(picture.content).decode(), as_html(picture.name)
    image = f'<img src="data:image/jpeg;base64,{data}" alt="{as_html(title)}, {name}">'
    return f'<figure class="picture">{image}<figcaption>{name}</figcaption></figure>'


def _figure(chart: Chart) -> str:
    keys = [
        f'<span class="key"><i class="swatch k{number % MAX_SERIES}"></i>{as_html(series.name)}</span>'
        for number, series in enumerate(chart.series)
        if series.name
    ]
    legend = f"<br>{' '.join(keys)}" if keys else ""
    return f"<figure><figcaption>{as_html(chart.title)}{legend}</figcaption>\n{draw_chart(chart)}</figure>"


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a table, whose first row is its head if it says anything."""
    head = "".join(f'<th scope="col">{as_html(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row"{_whole(first)}>{as_html(first)}</th>'
        f"{''.join(f'<td{_whole(cell)}>{as_html(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows[1:]
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(rows[0]) else ""
    caption = f"<caption>{as_html(capital(title))}</caption>" if title else ""
    return f'<div class="wide"><table>{caption}{top}<tbody>{body}</tbody></table></div>'


def _whole(cell: str) -> str:
    """The class of a cell that is not broken: a short word, or one or two numbers."""
    return ' class="whole"' if len(cell) <= _MAX_WHOLE and (" " not in cell or _NUMBERS.fullmatch(cell)) else ""


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def visible(text: str) -> str:
    """Escape a text, mark its newlines, and write out characters that could reorder or hide text."""
    return as_html(text).replace("\n", '<span class="n">\u23ce</span>\n')


def as_html(text: str) -> str:
    """Escape a text, and write out characters that could reorder or hide text."""
    if text.isascii() and text.isprintable():
        return escape(text)
    return "".join(escape(char) if char in "\n\t" or is_harmless(char) else _written_out(char) for char in text)


def _written_out(char: str) -> str:
    return f'<span class="e">{escape_char(char)}</span>'


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
