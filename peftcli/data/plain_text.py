"""Read .txt files: FastText's lines, words with tags, lines with a label, or lines of text.

The first lines decide, all of which must be of the form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from peftcli.data.conll import read_conll
from peftcli.data.rows import Row
from peftcli.data.text_rows import MAX_ROW, TextFile, decode
from peftcli.errors import DataError

HEAD = 1 << 18
"""Bytes that decide."""
_LINES = 1000
_LABEL = "__label__"
_TAG = re.compile(r"\S+[ \t](?:.*[ \t])?(?:O|[BIESLU]-\S+)", re.ASCII)
"""A line with a word and, at its end, a tag of IOB2 or a like scheme."""
_MAX_LABELS = 50
LINES_OF_TEXT = ""
_FASTTEXT, _SEVERAL = "FastText's label and text a line", "FastText's classes and text a line"
_TAGS = "a word and its tags a line"
_FIRST, _LAST = "a label, a tab and a text a line", "a text, a tab and a label a line"


def form_of(head: bytes) -> str:
    """Return what a line of a .txt file is, by its first bytes; ``LINES_OF_TEXT``, which is empty, for a text."""
    lines = head.decode("utf-8-sig", "replace").splitlines()
    lines = lines[: max(1, min(_LINES, len(lines) - (len(head) >= HEAD)))]
    some = [line for line in lines if line.strip()]
    tagged = [line for line in some if not line.startswith(("-DOCSTART-", "#"))]
    if some and all(line.lstrip().startswith(_LABEL) for line in some):
        return _SEVERAL if any(len(_fasttext(line)[0]) > 1 for line in some) else _FASTTEXT
    if len(tagged) > 1 and all(map(_TAG.fullmatch, tagged)) and any(not line.endswith("O") for line in tagged):
        return _TAGS
    return _labelled(some) or LINES_OF_TEXT


def _labelled(lines: Sequence[str]) -> str | None:
    """Whether each line is a text and one of a few classes, with a tab between them."""
    if len(lines) < 10 or any(line.count("\t") != 1 for line in lines):
        return None
    for at, name in enumerate((_FIRST, _LAST)):
        classes, texts = ({line.split("\t")[side] for line in lines} for side in (at, 1 - at))
        if 1 < len(classes) <= min(_MAX_LABELS, len(lines) // 4) and len(texts) > 2 * len(classes):
            return name
    return None


def read_text(text: TextFile, form: str) -> Iterator[Row | DataError]:
    """Yield the rows of a .txt file of a form of ``form_of``. Empty lines are left out."""
    if form == _TAGS:
        yield from read_conll(text, universal=False)
        return
    for raw in text.lines():
        if raw is not None and not raw.strip():
            continue
        text.number += 1
        try:
            line = decode(raw).rstrip("\r\n") if raw is not None else ""
        except ValueError as error:
            yield text.error(str(error))
            continue
        yield text.error("a line that is too long") if raw is None else _row(line, form, text)


def read_document(text: TextFile) -> Iterator[Row | DataError]:
    """Yield the one row of a .txt file that is a document."""
    raw = text.stream.read(MAX_ROW + 1)
    text.number = text.line = 1
    try:
        content = decode(raw.removeprefix(b"\xef\xbb\xbf")).replace("\r\n", "\n")
    except ValueError as error:
        yield text.error(str(error))
        return
    yield text.error("a document that is too long") if len(raw) > MAX_ROW else text.row({"text": content.strip()})


def _row(line: str, form: str, text: TextFile) -> Row | DataError:
    if form in (_FASTTEXT, _SEVERAL):
        classes, content = _fasttext(line)
        if not classes:
            return text.error(f"does not begin with {_LABEL} and the name of a label")
        if form == _FASTTEXT and len(classes) > 1:
            return text.error(f"{len(classes)} classes, and the lines before have one")
        return text.row({"label": classes if form == _SEVERAL else classes[0], "text": content})
    if form == LINES_OF_TEXT:
        return text.row({"text": line})
    parts = line.split("\t")
    if len(parts) != 2:
        return text.error(f"expected {form}, found {len(parts)} parts")
    return text.row(dict(zip(("label", "text") if form == _FIRST else ("text", "label"), parts, strict=True)))


def _fasttext(line: str) -> tuple[list[str], str]:
    """The classes that a line begins with, and the text after them."""
    words = re.split(r"[ \t]", line.strip())
    count = next((at for at, word in enumerate(words) if word and not word.startswith(_LABEL)), len(words))
    return [name for word in words[:count] if (name := word[len(_LABEL) :])], " ".join(words[count:]).strip()
