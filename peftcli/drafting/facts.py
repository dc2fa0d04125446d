"""The facts of a column, from a sample of its values: what it may be, and the counts that say so."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peftcli.data.media import is_media
from peftcli.data.rows import Row, count_of, truth_in
from peftcli.tasks.text.formats import PICTURE_PARTS

MOST = 0.9
"""Share of a column's values that must be of a kind."""
_MAX_CLASSES, _CLASS_WORDS, _ROWS_A_CLASS = 500, 6, 3
_FREE_WORDS, _FREE_DISTINCT = 3, 0.5
_TAG = re.compile(r"O|[BIESLUM]-\S+")
_SEPARATORS = ("|", ";", ",")
_NO_WORDS = re.compile(r"https?://\S+|[\w.+-]+@[\w.-]+|\d{1,4}[-/.:]\d{1,2}[-/.:T\d\sZ+]*|[0-9a-fA-F-]{16,}")
"""A text that is one address, date or identifier."""
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]")
"""Letters of scripts that are written without blanks, or with few."""
_SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class ColumnFacts:
    """A column's values in the sample, and what they are."""

    name: str
    values: Sequence[Any] = field(repr=False)
    """Those of the sampled rows; None where a row has none."""
    folders: Sequence[Path] = field(default=(), repr=False)
    """The folder of each value's file."""
    class_names: Sequence[str] = ()
    """What its numbers stand for, where the source says so."""
    total: int = 0
    """Rows of the data."""
    all_counts: Counter[str] | None = field(default=None, repr=False)
    """How often there is each value in all rows, where they are short."""

    @cached_property
    def given(self) -> list[Any]:
        """The values that are there: no null, no blank text."""
        return [each for each in self.values if each is not None and not (isinstance(each, str) and not each.strip())]

    @cached_property
    def texts(self) -> list[str]:
        """Its texts."""
        return [each for each in self.given if isinstance(each, str)]

    @cached_property
    def words(self) -> float:
        """The median number of words of its texts; letters of scripts without blanks count as half a word."""
        counts = sorted(map(count_words, self.texts))
        return counts[len(counts) // 2] if counts else 0

    @cached_property
    def long_words(self) -> int:
        """The number of words that 99 of 100 texts do not exceed."""
        counts = sorted(map(count_words, self.texts))
        return counts[min(len(counts) - 1, int(len(counts) * 0.99))] if counts else 0

    @cached_property
    def counts(self) -> Counter[str]:
        """How often there is each scalar."""
        return Counter(str(each).strip() for each in self.given if isinstance(each, str | int | float))

    @property
    def is_text(self) -> bool:
        """Whether its values are texts."""
        return bool(self.given) and len(self.texts) >= MOST * len(self.given)

    @cached_property
    def is_free(self) -> bool:
        """Whether its values are texts of several words that hardly repeat: sentences, not names or places."""
        if not self.is_text or self.media or self.parsed_list is not None:
            return False
        odd = sum(bool(_NO_WORDS.fullmatch(each.strip())) for each in self.texts)
        distinct = len(set(self.texts)) / len(self.texts)
        wordy = self.words >= _FREE_WORDS or sum(" " in each.strip() for each in self.texts) >= 0.5 * len(self.texts)
        return wordy and odd < 0.5 * len(self.texts) and (distinct >= _FREE_DISTINCT or not self.is_classes)

    @cached_property
    def numbers(self) -> list[float]:
        """Its numbers, also those that are written as text; empty unless nearly all values are numbers."""
        found = [number for each in self.given if (number := number_in(each)) is not None]
        return found if self.given and len(found) == len(self.given) else []

    @property
    def is_fractional(self) -> bool:
        """Whether its values are numbers of which some have a fraction."""
        return any(each % 1 for each in self.numbers)

    @cached_property
    def is_classes(self) -> bool:
        """Whether its values are few names or whole numbers, each of several rows."""
        if not self.given or len(self.counts) < 2 or self.media or self.is_fractional:
            return False
        if sum(self.counts.values()) < MOST * len(self.given):
            return False
        kinds, count = len(self.counts), len(self.given)
        short = not self.texts or sum(count_words(each) for each in self.counts) <= _CLASS_WORDS * kinds
        few = kinds <= min(_MAX_CLASSES, max(2, count / _ROWS_A_CLASS))
        if self.numbers and kinds > 20:
            known = sorted(self.numbers)
            few = few and known[0] in (0, 1) and known[-1] - known[0] < 1.5 * kinds and kinds <= count / 10
        return short and few and not _is_sparse(self.counts)

    @cached_property
    def is_constant(self) -> bool:
        """Whether it holds one value, or none."""
        return len({json.dumps(each, default=str, sort_keys=True) for each in self.given}) < 2

    @cached_property
    def is_zero_one(self) -> bool:
        """Whether each value is true or false, 0 or 1."""
        return bool(self.given) and all(truth_in(each) is not None for each in self.given)

    @cached_property
    def separator(self) -> str | None:
        """What stands between several labels in one text, where the parts are few and repeat."""
        if not self.is_text:
            return None
        for mark in _SEPARATORS:
            joined = [each for each in self.texts if mark in each]
            parts = Counter(part.strip() for each in self.texts for part in each.split(mark) if part.strip())
            short = all(len(part.split()) <= _CLASS_WORDS // 2 for part in parts)
            mean = sum(parts.values()) / max(1, len(parts))
            whole = len({each.strip() for each in self.texts})
            if len(joined) >= 0.05 * len(self.texts) and short and len(parts) >= 2 and mean >= 5 and whole > len(parts):
                return mark
        return None

    @cached_property
    def parts(self) -> Counter[str]:
        """How often there is each part of its joined labels, or each item of its lists."""
        lists = self.parsed_list or [each.split(self.separator) for each in self.texts] if self._joins else []
        return Counter(str(part).strip() for each in lists for part in each if str(part).strip())

    @property
    def _joins(self) -> bool:
        return self.parsed_list is not None or self.separator is not None

    @cached_property
    def media(self) -> str | None:
        """``image`` or ``audio``, where its values are files of that kind that exist, or hold their bytes."""
        some = [(value, folder) for value, folder in zip(self.values, self.folders, strict=False) if value is not None]
        kinds = Counter(_media_kind(value, folder) for value, folder in some[:200])
        best, count = max(kinds.items(), key=lambda item: item[1], default=(None, 0))
        return best if best and count >= MOST * min(len(some), 200) else None

    @cached_property
    def parsed_list(self) -> list[list[Any]] | None:
        """Its lists, also those that are written as text; None where it does not hold lists."""
        found = [each if isinstance(each, list) else parse_list(each) for each in self.given]
        lists = [each for each in found if each is not None]
        return lists if self.given and len(lists) >= MOST * len(self.given) else None

    @property
    def is_list_in_text(self) -> bool:
        """Whether its lists are written as text, as pandas writes them into CSV."""
        return self.parsed_list is not None and bool(self.texts)

    @cached_property
    def items(self) -> list[Any]:
        """The items of its lists."""
        return [item for each in self.parsed_list or () for item in each][:20_000]

    @cached_property
    def is_words(self) -> bool:
        """Whether it holds lists of words: of texts, many of them distinct."""
        texts = [item for item in self.items if isinstance(item, str)]
        tagged = sum(bool(_TAG.fullmatch(item)) for item in texts)
        return bool(texts) and len(texts) >= MOST * len(self.items) and tagged < 0.5 * len(texts)

    @cached_property
    def is_tags(self) -> bool:
        """Whether it holds lists of tags: few names or numbers that repeat."""
        plain = [item for item in self.items if isinstance(item, str | int) and not isinstance(item, bool)]
        kinds = len(set(plain))
        if not plain or len(plain) < MOST * len(self.items) or not 2 <= kinds <= 200:
            return False
        tagged = _share(plain, lambda item: isinstance(item, str) and bool(_TAG.fullmatch(item)))
        return tagged >= MOST or (kinds <= len(plain) / 10 and all(len(str(each)) < 30 for each in set(plain)))

    @cached_property
    def is_names(self) -> bool:
        """Whether it holds lists of a few names, none or several in a row: labels."""
        lists = self.parsed_list
        if not lists or not self.items or not all(isinstance(item, str | int) for item in self.items):
            return False
        sizes = [len(each) for each in lists]
        kinds = len(set(self.items))
        short = sum(sizes) / len(sizes) < 8 and all(len(str(each).split()) <= 5 for each in set(self.items))
        return short and kinds <= max(2, len(self.items) / 4) and all(len(set(each)) == len(each) for each in lists)

    @cached_property
    def is_spans(self) -> bool:
        """Whether it holds lists of spans: a start, an end and a label each."""
        return _share(self.items, _is_span) >= MOST

    @cached_property
    def turns(self) -> str | None:
        """``messages`` or ``sharegpt``, where it holds lists of turns, by the keys of the turns."""
        for name, wanted in (("messages", {"role", "content"}), ("sharegpt", {"from", "value"})):
            if _share([isinstance(item, dict) and wanted <= item.keys() for item in self.items], bool) >= MOST:
                return name
        return None

    @cached_property
    def pictured_turns(self) -> int:
        """How many of its conversations have a part that is a picture."""
        return sum(any(map(_pictures_of_turn, each)) for each in self.parsed_list or ())

    @cached_property
    def most_pictures(self) -> int:
        """Pictures of a value, at most: of a file one, of a list its files, of a conversation its parts."""
        if self.media == "image":
            return 1
        if self.turns:
            return max((sum(map(_pictures_of_turn, each)) for each in self.parsed_list or ()), default=0)
        return max(map(len, self.parsed_list or ()), default=0) if self.has_pictures else 0

    @cached_property
    def has_pictures(self) -> bool:
        """Whether its values are pictures, or lists of pictures, of which some may be empty."""
        if self.media is not None or self.turns or not self.items:
            return self.media == "image"
        folders = [folder for value, folder in zip(self.values, self.folders, strict=False) if value is not None]
        pairs = zip(self.parsed_list or (), folders, strict=False)
        some = [(item, folder) for value, folder in pairs for item in value][:200]
        return _share(some, lambda pair: _media_kind(*pair) == "image") >= MOST

    @cached_property
    def keys(self) -> list[str]:
        """The keys of its objects that hold texts, where it holds objects."""
        objects = [each for each in self.given if isinstance(each, dict)]
        if not self.given or len(objects) < MOST * len(self.given):
            return []
        held = {key: [isinstance(each.get(key), str) for each in objects] for key in objects[0]}
        return [key for key, texts in held.items() if _share(texts, bool) > 0.5]

    # --- in words -----------------------------------------------------------------------------------------------------

    def of(self) -> str:
        """``of 5,000``: what its counts are of."""
        return f"of {count_of(len(self.values), 'value')}" + (" sampled" if self.total > len(self.values) else "")

    def described_classes(self) -> str:
        """How many values are one of how many names."""
        counts = self.all_counts or self.counts
        word = "number" if self.numbers else "name"
        shown = ", ".join(each[:24] for each in (self.class_names or [each for each, _ in counts.most_common(3)])[:3])
        more = ", ..." if len(counts) > 3 else ""
        of = f"of {count_of(self.total, 'value')}" if self.all_counts else self.of()
        return f"{counts.total():,} {of} are one of {count_of(len(counts), word)}: {shown}{more}"

    def described_texts(self) -> str:
        """How many values are texts, of how many words."""
        distinct = len(set(self.texts)) / max(1, len(self.texts))
        return f"{len(self.texts):,} {self.of()} are texts, {self.words:g} words each, {distinct:.0%} distinct"

    def described_numbers(self) -> str:
        """The range of its numbers."""
        return f"{len(self.numbers):,} {self.of()} are numbers, {min(self.numbers):g} to {max(self.numbers):g}"


def facts_of(
    rows: Sequence[Row], total: int, class_names: Mapping[str, Sequence[str]], all_counts: Mapping[str, Counter[str]]
) -> dict[str, ColumnFacts]:
    """Return the facts of each column of the rows; keys of objects with texts are columns too, as translation.en."""
    folders = [row.folder for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    found = dict[str, ColumnFacts]()
    for name in names:
        values = [row.values.get(name) for row in rows]
        facts = ColumnFacts(name, values, folders, class_names.get(name, ()), total, all_counts.get(name))
        found[name] = facts
        for key in facts.keys:
            inner = [each.get(key) if isinstance(each, dict) else None for each in values]
            found[f"{name}.{key}"] = ColumnFacts(f"{name}.{key}", inner, folders, (), total)
    return found


def count_words(text: str) -> int:
    """Count the words of a text; letters of scripts without blanks count as half a word."""
    return len(text.split()) + len(_UNSPACED.findall(text)) // 2


def _share(values: Sequence[Any], holds: Callable[[Any], bool]) -> float:
    return sum(map(holds, values)) / len(values) if values else 0


def number_in(value: Any) -> float | None:
    """Return a value as a number, also if it is written as text; None if it is no finite number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
            return number if math.isfinite(number) else None
    return None


def _is_sparse(counts: Counter[str]) -> bool:
    """Whether most values are of one row alone: identifiers, of which a few repeat."""
    alone = sum(number for number in counts.values() if number == 1)
    return alone > 0.5 * sum(counts.values()) and len(counts) > 2


def parse_list(value: Any) -> list[Any] | None:
    """Parse a list that is written as text, in JSON or as Python writes it; None if it is something else."""
    if not isinstance(value, str) or not (text := value.strip()).startswith("[") or not text.endswith("]"):
        return None
    if len(text) > 1_000_000:
        return None
    for parse in (json.loads, ast.literal_eval, _array):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = parse(text)
            return found if isinstance(found, list) else None
    return None


def _array(text: str) -> list[Any]:
    """The list that numpy writes, without commas."""
    return [ast.literal_eval(each) for each in re.findall(r"'[^']*'|\"[^\"]*\"|[^\s\[\],]+", text)]


def is_tag(text: str) -> bool:
    """Return whether a text is a tag of IOB or a like scheme."""
    return bool(_TAG.fullmatch(text.strip()))


def _is_span(item: Any) -> bool:
    if isinstance(item, list | tuple):
        return len(item) == 3 and isinstance(item[0], int) and isinstance(item[1], int) and isinstance(item[2], str)
    if not isinstance(item, dict):
        return False
    starts = any(isinstance(item.get(key), int) for key in ("start", "start_offset", "begin"))
    return starts and any(isinstance(item.get(key), str | list) for key in ("label", "type", "labels", "entity"))


def _pictures_of_turn(turn: Any) -> int:
    """How many parts of a turn's content are pictures."""
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    parts = content if isinstance(content, list) else []
    return sum(isinstance(part, dict) and part.get("type") in PICTURE_PARTS for part in parts)


def _media_kind(value: Any, folder: Path) -> str | None:
    """Whether a value is an image or a sound that is there."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return _kind_of_bytes(value["bytes"], str(value.get("path") or ""))
        if "array" in value and "sampling_rate" in value:
            return "audio"
        value = value.get("path")
    if isinstance(value, bytes):
        return _kind_of_bytes(value, "")
    if not isinstance(value, str) or len(value) > 500 or not is_media(value):
        return None
    path = Path(value)
    there = (folder / path).is_file() if not path.is_absolute() else path.is_file()
    return ("audio" if path.suffix.lower() in _SOUNDS else "image") if there else None


def _kind_of_bytes(content: bytes, name: str) -> str | None:
    heads = {b"RIFF": "audio", b"fLaC": "audio", b"OggS": "audio", b"ID3": "audio", b"\xff\xfb": "audio"}
    if content[8:12] == b"WEBP":
        return "image"
    sound = next((kind for head, kind in heads.items() if content.startswith(head)), None)
    if sound or name.lower().endswith(_SOUNDS):
        return "audio"
    return (
        "image"
        if content[:4] in (b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*") or content[:2] in (b"\xff\xd8", b"BM")
        else None
    )
