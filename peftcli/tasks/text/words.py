"""The words of rows and their tags: from lists of words, or from texts and the entities in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import regex

from peftcli.data.rows import Reader, Row, listed, shortened
from peftcli.tasks.labels import LabelReader
from peftcli.tasks.text.answers import UNSPACED
from peftcli.tasks.text.chat import IGNORED

OUTSIDE = "O"
"""The tag of a word that is in no entity."""
_IOB2 = {"L-": "I-", "E-": "I-", "M-": "I-", "U-": "B-", "S-": "B-"}
"""What the last, inner and only words of entities have in IOB2: from BILOU, IOBES and BMES."""
_NEEDED = ("start", "end", "label")
"""Keys of an entity; ``type`` is another name of ``label``."""
_LETTER = UNSPACED.pattern
_WORD = regex.compile(rf"{_LETTER}\p{{M}}*|(?:(?!{_LETTER})\w)+|[^\w\s]")
"""A word: letters with their marks, one punctuation mark, or one letter of a script without blanks between words."""


@dataclass(frozen=True)
class Words:
    """The words of a row, as places in its text."""

    text: str
    spans: list[tuple[int, int]]
    """First character and the one past the last of each word."""


def words_of(row: Row, reader: Reader) -> Words:
    """The words of a row: its tokens joined by blanks, or letters and marks of its text."""
    if "text" in reader.names:
        text = reader.text(row, "text")
        return Words(text, [match.span() for match in _WORD.finditer(text)])
    spans, start, tokens = list[tuple[int, int]](), 0, _tokens(row, reader)
    for token in tokens:
        spans.append((start, start + len(token)))
        start += len(token) + 1
    return Words(" ".join(tokens), spans)


def joined_words(words: Words, pieces: Iterable[tuple[int, int]]) -> Words:
    """Join the words of a text that share one of these pieces of a tokenizer: a piece has one tag.

    A punctuation mark before a word is left out, as no name begins with it: of the piece ``(T`` in ``(Turin)``.
    """
    owner, joined = owners(words), set[int]()
    for start, end in pieces:
        shared = {at for at in owner[start:end] if at >= 0}
        joined |= shared - {min(shared, default=-1)}
    spans = list[tuple[int, int]]()
    for at, (start, end) in enumerate(words.spans):
        if at in joined:
            before = spans.pop()
            start = before[0] if regex.search(r"\w", words.text[slice(*before)]) else start
        spans.append((start, end))
    return replace(words, spans=spans)


def owners(words: Words) -> list[int]:
    """The word of each character; -1: none, as of a blank."""
    owner = [-1] * len(words.text)
    for at, (start, end) in enumerate(words.spans):
        owner[start:end] = [at] * (end - start)
    return owner


def tags_of(words: Words, row: Row, reader: LabelReader) -> tuple[Sequence[str | None], bool]:
    """The tag of each word, and whether entities are whole words; None: the word has no tag (-100 in datasets).

    A word of which an entity is a part belongs to the entity, as a word has one answer.

    Raises:
        DataError: the row has other tags than words, or entities that are not in its text.
    """
    if "text" in reader.names:
        tags, whole = [OUTSIDE] * len(words.spans), True
        for start, end, name in _found_entities(row, reader):
            found = [at for at, (first, last) in enumerate(words.spans) if first < end and start < last]
            own = words.text[words.spans[found[0]][0] : words.spans[found[-1]][1]] if found else ""
            whole = whole and own == words.text[start:end].strip()
            inside = [at for at in found if tags[at] == OUTSIDE]
            for at in inside:
                tags[at] = f"{'I' if at != inside[0] else 'B'}-{name}"
        return tags, whole
    value, key = reader.value(row, "tags"), reader.names["tags"]
    if not isinstance(value, list) or len(value) != len(words.spans):
        found_tags = f"{len(value)}" if isinstance(value, list) else shortened(value)
        raise row.place.error(f"expected a tag for each of the {len(words.spans)} tokens, found {found_tags}", key=key)
    try:
        return [None if tag == IGNORED else reader.class_name(tag) for tag in value], True
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
        fields = _fields(each, row, key) if isinstance(each, dict) else each
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


def _fields(entity: dict[str, Any], row: Row, key: str) -> tuple[Any, Any, Any]:
    """Start, end and label of an entity."""
    named = {"label": entity["type"], **entity} if {"type", "start", "end"} <= entity.keys() else entity
    if missing := [name for name in _NEEDED if name not in named]:
        inner = {f"{name}.{own}": value for name, held in entity.items() for own, value in _items(held)}
        there = {**entity, **inner}
        last = {name: name.rpartition(".")[2] for name in there}
        like = {name: next((each for each in there if last[each].startswith(name)), "") for name in missing}
        renamed = ", ".join(f"{other} to {name}" for name, other in like.items() if other)
        hint = f"Rename these keys in the file: {renamed}." if renamed else ""
        if isinstance(there.get(like.get("label", "")), list):
            hint += " A label is one name, not a list."
        message = f"an entity needs {', '.join(_NEEDED)}; this one has {listed(there)}"
        raise row.place.error(message, key=key, hint=hint or None)
    return named["start"], named["end"], named["label"]


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _tokens(row: Row, reader: Reader) -> list[str]:
    value = reader.value(row, "tokens")
    if not isinstance(value, list) or not all(isinstance(token, str) for token in value):
        raise row.place.error(f"expected a list of words, found {shortened(value)}", key=reader.names["tokens"])
    return value
