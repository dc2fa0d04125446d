"""The sections of a report as GitHub's Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peftcli.guard.files import escape_char, is_harmless
from peftcli.reporting.blocks import Block, Chart, Code, Note, Outputs, Pictures, Section, Table

_MAX_TEXT = 400
"""Characters of an output; the page has more."""


def report_text(title: str, about: str, sections: Sequence[Section]) -> str:
    """Return a report as Markdown: what a reviewer needs first, the rest folded.

    Curves and pictures are on the page alone.
    """
    parts = [f"# {_line(title)}\n\n{_line(about)}\n"]
    for section in sections:
        if text := "\n".join(filter(None, map(_block, section.blocks))):
            if section.brief:
                parts.append(f"## {_line(section.title)}\n\n{text}")
            else:
                parts.append(f"<details><summary>{_line(section.title)}</summary>\n\n{text}\n</details>\n")
    return "\n".join(parts)


def _block(block: Block) -> str:
    match block:
        case Note():
            return f"{_line(block.text)}\n"
        case Table():
            lines = [block.columns, ["---"] * len(block.columns), *block.rows]
            title = f"**{_line(block.title)}**\n\n" if block.title else ""
            return title + "".join(f"| {' | '.join(map(_line, line))} |\n" for line in lines)
        case Chart() | Pictures():
            return ""
        case Code():
            return "" if block.folded else _fenced(block.text)
        case Outputs():
            texts = [f"{_line(name)}:\n\n{_fenced(_cut(text))}" for name, text in block.texts.items()]
            return f"**{_line(block.title)}**\n\n" + "\n".join(texts)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."


def _line(text: str) -> str:
    """A text in one line that is no Markdown, no HTML and no mention of its own."""
    text = _harmless(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]|<>~#&])", r"\\\1", text).replace("@", "&#64;")


def _fenced(text: str) -> str:
    """A block of text as it is, which its own backticks do not end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{_harmless(text)}\n{fence}\n"


def _harmless(text: str) -> str:
    return "".join(char if char in "\n\t" or is_harmless(char) else escape_char(char) for char in text)
