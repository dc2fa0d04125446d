"""Look at a user's data: which files are for training and evaluation, and a sample of rows spread over all of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftcli.data.media import is_media
from peftcli.data.readers import kind_of
from peftcli.data.rows import Row, count_of
from peftcli.data.sources import exists_locally, open_source
from peftcli.drafting.facts import ColumnFacts, facts_of
from peftcli.errors import DataError, UsageError
from peftcli.schema import Source
from peftcli.system.hub_requests import is_repo_id

_SAMPLE = 1000
"""The sample of a longer source has at least this many rows, and at most twice as many."""
_MAX_ROWS = 1_000_000
"""Rows that are read of a source. Its beginning then stands for the rest, which is said."""
_HUB_ROWS = 2000
_SPLITS = {
    "train": {"train", "training"},
    "eval": {"validation", "valid", "val", "dev", "eval", "evaluation"},
    "test": {"test", "testing"},
}
_MAX_KEY, _MAX_KEYS = 100, 300_000


@dataclass
class Keys:
    """How the values of a column repeat over all rows."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    is_whole: bool = True

    def add(self, value: object) -> None:
        """Count a value. One that is long, or no scalar, is no key."""
        if not self.is_whole or value is None:
            return
        if (
            not isinstance(value, str | int)
            or (isinstance(value, str) and len(value) > _MAX_KEY)
            or len(self.counts) >= _MAX_KEYS
        ):
            self.is_whole = False
        else:
            self.rows += 1
            self.counts[str(value)] += 1


@dataclass
class Look:
    """What was found in the data."""

    train: list[str]
    """The sources to train on."""
    eval: str | None = None
    """The source for evaluation."""
    tests: list[str] = field(default_factory=list)
    """Sources of test rows, which training does not read."""
    rows: int = 0
    """Rows that can be read, and of them ``sample``."""
    bad: int = 0
    sample: list[Row] = field(default_factory=list)
    columns: dict[str, ColumnFacts] = field(default_factory=dict)
    keys: dict[str, Keys] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know."""
    limited: bool = False
    """Whether not all rows were read."""


def look_at(names: Sequence[str]) -> Look:
    """Find the files and read their rows.

    Raises:
        DataError: the data cannot be read, or has no rows.
        UsageError: nothing was named.
    """
    if not names:
        raise UsageError("names no data", hint="peftcli init FILE, a folder of files, or a hub dataset id")
    look = _sources(names)
    classes, first_error = dict[str, tuple[str, ...]](), None
    for name in look.train:
        is_hub = not exists_locally(name)
        most = _HUB_ROWS if is_hub else _MAX_ROWS
        source = open_source(Source(train=name, streaming=is_hub, limit=most))
        classes |= source.class_names()
        error = _read(source.rows(), look, most)
        look.notes += source.notes()
        first_error = first_error or error
    if not look.rows:
        raise first_error or DataError("contains no rows", file=look.train[0])
    if look.bad > look.rows:
        assert first_error is not None
        first_error.message += f"; {look.bad:,} of {look.bad + look.rows:,} rows have errors"
        raise first_error
    if look.bad and first_error is not None:
        look.notes.append(f"{count_of(look.bad, 'row')} cannot be read and will be skipped; the first: {first_error}")
    if look.limited:
        look.notes.append(f"only the first {look.rows:,} rows were looked at")
    counts = {name: keys.counts for name, keys in look.keys.items() if keys.is_whole and len(keys.counts) <= _SAMPLE}
    look.columns = facts_of(look.sample, look.rows, classes, counts)
    return look


def _read(rows: Iterator[Row | DataError], look: Look, most: int) -> DataError | None:
    """Take a sample that is spread evenly over a source's rows, and count its keys; return the first row's error."""
    kept, every, error, number = list[Row](), 1, None, 0
    for row in rows:
        if isinstance(row, DataError):
            look.bad, error = look.bad + 1, error or row
            continue
        if number % every == 0:
            kept.append(row)
            if len(kept) > 2 * _SAMPLE:
                kept, every = kept[::2], every * 2
        for name, value in row.values.items():
            if name not in look.keys:
                look.keys[name] = Keys()
            if look.keys[name].is_whole:
                look.keys[name].add(value)
        number += 1
    look.rows += number
    look.limited |= number + look.bad >= most
    look.sample += kept
    return error


def _sources(names: Sequence[str]) -> Look:
    """Group what was named, and what folders hold, by split."""
    found: dict[str, list[str]] = {"train": [], "eval": [], "test": [], "": []}
    for name in names:
        folder = Path(name).expanduser()
        if exists_locally(name) and folder.is_dir():
            for split, each in _folder(name, folder):
                found[split].append(each)
        elif exists_locally(name) or not is_repo_id(name):
            found[split_of(Path(name).name)].append(name)
        else:
            found[""].append(name)
    train = found["train"] or found[""]
    notes = [f"not used: {', '.join(found[''])}"] if found["train"] and found[""] else []
    if not train:
        train, found["test"] = (found["eval"], found["test"]) if found["eval"] else (found["test"], [])
        found["eval"] = []
    evaluation = [*found["eval"], *found["test"]][:1]
    tests = [name for name in [*found["eval"], *found["test"]] if name not in evaluation]
    return Look(train, evaluation[0] if evaluation else None, tests, notes=notes)


def _folder(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what a folder holds: a folder or file of each split, or the folder itself without one."""
    entries = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    folders = [each for each in entries if each.is_dir()]
    files = [each for each in entries if each.is_file() and kind_of(each.name) and each.name not in _NO_ROWS]
    splits = {each: split_of(each.name, whole=True) for each in folders}
    if any(splits.values()) and not files:
        yield from ((split, str(Path(name) / each.name)) for each, split in splits.items() if split)
        return
    if any(split_of(each.name) for each in files):
        yield from ((split_of(each.name), str(Path(name) / each.name)) for each in files)
        return
    if len(files) == 1 and not any(map(_has_rows, folders)) and not any(is_media(each.name) for each in entries):
        yield "", str(Path(name) / files[0].name)  # a file beside the media that it names
        return
    yield "", name


_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def _has_rows(folder: Path) -> bool:
    return any(kind_of(each.name) is not None for each in folder.iterdir())


def split_of(name: str, *, whole: bool = False) -> str:
    """Return the split that a file or folder is of, by a word of its name; empty: none.

    ``whole``: it must be the name's first word.
    """
    words = re.findall(r"[a-z]+", name.lower().split(".")[0])
    for split, known in _SPLITS.items():
        if known & set(words[:1] if whole else words):
            return split
    return ""
