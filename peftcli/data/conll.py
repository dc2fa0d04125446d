"""Read CoNLL files: a word a line with its tags in columns, an empty line after each sentence.

The last column of a ``.conll`` file is the tag that counts (https://aclanthology.org/W03-0419/). The ten columns of
``.conllu`` have names of their own (https://universaldependencies.org/format.html).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from peftcli.data.rows import Place, Row
from peftcli.data.text_rows import MAX_ROW, TextFile, decode, quote
from peftcli.errors import DataError

_UNIVERSAL = (None, "tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_DOCUMENT = ("-DOCSTART-", "#begin document", "#end document")
"""Lines between documents begin with one of these."""
_IOB = re.compile(r"O|[BIESLUM]-.+")
"""A tag of IOB, or of BILOU, IOBES or BMES."""
_Line = tuple[int, list[str]]
"""Its number and its columns."""


def read_conll(text: TextFile, *, universal: bool) -> Iterator[Row | DataError]:
    """Yield a row for each sentence: ``tokens``, ``tags`` and the columns between; for a bad one, the error about it.

    ``universal``: it is a ``.conllu`` file.
    """
    sentence, size, fault, width = list[_Line](), 0, None, 0
    for raw in chain(text.lines(), [b"\n"]):
        size += MAX_ROW + 1 if raw is None else len(raw)
        try:
            line = decode(raw or b"?").rstrip("\r\n")
        except ValueError as error:
            line, fault = "?", fault or text.error(str(error))
        if size > MAX_ROW:
            fault, sentence = fault or text.error("a sentence that is too long, perhaps without an empty line"), []
        if line.strip() and not line.startswith(_DOCUMENT):
            # A word may contain other blanks, as 10\u00a0000.
            sentence.append((text.line, line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))))
            continue
        if fault or (sentence and (universal or not width or not _are_comments(sentence, width))):
            yield _row(text, sentence, fault, universal)
            width = len(sentence[-1][1]) if sentence else width
        sentence, size, fault = [], 0, None


def _row(text: TextFile, lines: list[_Line], fault: DataError | None, universal: bool) -> Row | DataError:
    text.number += 1
    if fault is not None:
        return fault
    place, width = Place(text.source, text.number, lines[0][0]), len(lines[-1][1])
    while lines[0][1][0].startswith("#") and (universal or len(lines[0][1]) != width or _is_comment(lines)):
        lines = lines[1:]
        if not lines:
            return place.error("a sentence without words")
    for number, columns in lines:
        if len(columns) != width or (universal and width != len(_UNIVERSAL)):
            expected = len(_UNIVERSAL) if universal else width
            message = f"expected {expected} columns, found {len(columns)}: {quote(' '.join(columns))}"
            return DataError(message, file=text.source, line=number)
    if universal:  # 1-2 is a word that two others make up, 1.1 one that was left out
        lines = [line for line in lines if line[1][0].isdigit()] or lines
    values: dict[str, Any] = {}
    names = _UNIVERSAL if universal else ("tokens", *(f"column_{at}" for at in range(2, width)), "tags")
    for at, name in enumerate(names[:width]):
        if name:
            values[name] = [columns[at] for _, columns in lines]
    return Row(values, place)


def _are_comments(lines: list[_Line], width: int) -> bool:
    """Whether lines between empty ones are comments: none has the ``width`` of the sentence before."""
    return all(columns[0].startswith("#") and len(columns) != width for _, columns in lines)


def _is_comment(lines: list[_Line]) -> bool:
    """Whether the first line, of as many columns as the words, is a comment: it ends in no tag, and all words do.

    Of two columns it is a word: ``# PER`` may be one, in a file whose tags have no prefix.
    """
    (_, first), words = lines[0], [columns for _, columns in lines if columns[0] != "#"]
    tagged = bool(words) and all(_IOB.fullmatch(columns[-1]) for columns in words)
    return first[0] == "#" and len(first) > 2 and tagged and not _IOB.fullmatch(first[-1])
