"""The words of rows and their tags: from lists of words, or from texts and the entities in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from peftcli.data.rows import Reader, Row, shortened
from peftcli.tasks.classification import LabelReader, class_name
from peftcli.tasks.text.chat import IGNORED

OUTSIDE = "O"
"""The tag of a word that is in no entity."""
_IOB2 = {"L-": "I-", "E-": "I-", "M-": "I-", "U-": "B-", "S-": "B-"}
"""What the last, inner and only words of entities have in IOB2: from BILOU, IOBES and BMES."""
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Words:
    """The words of a row, as places in its text."""

    text: str
    spans: list[tuple[int, int]]
    """First character and the one past the last of each word."""


def words_of(row: Row, reader: Reader, spans: list[tuple[int, int]]) -> Words:
    """The text of a row, with the places of its words."""
    return Words(reader.text(row, "text") if "text" in reader.names else " ".join(_tokens(row, reader)), spans)


def word_spans(row: Row, reader: Reader, edges: Iterable[int] = ()) -> list[tuple[int, int]]:
    """The places of a row's words: its tokens joined by blanks, or letters and marks of its text.

    A word of a text also ends at ``edges``, where entities begin and end.
    """
    if "text" not in reader.names:
        spans, start = list[tuple[int, int]](), 0
        for token in _tokens(row, reader):
            spans.append((start, start + len(token)))
            start += len(token) + 1
        return spans
    cuts, spans = sorted(set(edges)), []
    for match in _WORD.finditer(reader.text(row, "text")):
        inside = [edge for edge in cuts if match.start() < edge < match.end()]
        spans += zip([match.start(), *inside], [*inside, match.end()], strict=True)
    return spans


def tagged_words(row: Row, reader: LabelReader) -> list[tuple[tuple[int, int], str | None]]:
    """The place and the tag of each word; None: the word has no tag (-100 in datasets).

    Raises:
        DataError: the row has no words, or other tags than words.
    """
    if "text" in reader.names:
        entities = _found_entities(row, reader)
        spans = word_spans(row, reader, [edge for start, end, _ in entities for edge in (start, end)])
        tags = [OUTSIDE] * len(spans)
        for start, end, name in entities:
            inside = [at for at, span in enumerate(spans) if start <= span[0] and span[1] <= end]
            for at in inside:
                tags[at] = f"{'I' if at != inside[0] else 'B'}-{name}"
        return list(zip(spans, tags, strict=True))
    value, key = reader.value(row, "tags"), reader.names["tags"]
    spans = word_spans(row, reader)
    if not isinstance(value, list) or len(value) != len(spans):
        found = f"{len(value)}" if isinstance(value, list) else shortened(value)
        raise row.place.error(f"expected a tag for each of the {len(spans)} tokens, found {found}", key=key)
    try:
        return [(at, None if tag == IGNORED else class_name(tag, reader)) for at, tag in zip(spans, value, strict=True)]
    except ValueError as error:
        raise row.place.error(str(error), key=key) from None


def as_iob2(tag: str) -> str:
    """The tag of IOB2 for one of BILOU, IOBES or BMES; other tags stay as they are."""
    return _IOB2.get(tag[:2], tag[:2]) + tag[2:]


def _found_entities(row: Row, reader: Reader) -> list[tuple[int, int, str]]:
    """First character, the one past the last, and type of each entity of a row's text, in order."""
    text, value, key = reader.text(row, "text"), reader.value(row, "entities"), reader.names["entities"]
    found = list[tuple[int, int, str]]()
    for each in value if isinstance(value, list) else [value]:
        name = each.get("label", each.get("type")) if isinstance(each, dict) else None
        fields = (each.get("start"), each.get("end"), name) if isinstance(each, dict) else each
        if not isinstance(fields, (list, tuple)) or len(fields) != 3 or not isinstance(fields[2], str) or not fields[2]:
            message = f"expected {{start, end, label}} or [start, end, label], found {shortened(each)}"
            raise row.place.error(message, key=key)
        start, end, name = fields
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
            message = f"{start} to {end} lies outside of the text, which has {len(text)} characters"
            raise row.place.error(message, key=key)
        if not _WORD.search(text[start:end]):
            raise row.place.error(f"{start} to {end} holds no word", key=key)
        found.append((start, end, name))
    found.sort()
    for (_, end, _), (start, _, _) in pairwise(found):
        if start < end:
            raise row.place.error(f"two entities share the character {start}", key=key)
    return found


def _tokens(row: Row, reader: Reader) -> list[str]:
    value = reader.value(row, "tokens")
    if not isinstance(value, list) or not all(isinstance(token, str) for token in value):
        raise row.place.error(f"expected a list of words, found {shortened(value)}", key=reader.names["tokens"])
    return value
