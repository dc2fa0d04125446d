"""A source of a recipe -> its examples on disk, made once for the same content and settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from peftcli.data.cache import cached
from peftcli.data.rows import BAD, Place, Reader, Row, Table, of_all_rows, truth_columns
from peftcli.data.sources import ResolvedSource, open_source
from peftcli.data.store import Column, Outcome, Store, Writer
from peftcli.errors import DataError
from peftcli.schema import FILE_SETTINGS, Source
from peftcli.system.workers import compute_ahead


class Encodes(Protocol):
    """The part of a task that encodes rows."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The arrays of an example."""
        ...

    @property
    def reads_files(self) -> bool:
        """Whether rows may name files, which are looked for beside the source."""
        ...

    def read(self, table: Table) -> Reader:
        """Find the columns that it reads."""
        ...

    def encode(self, rows: Sequence[Row], reader: Reader) -> list[Outcome | DataError]:
        """Turn rows into examples."""
        ...

    def survey(self, reader: Reader, rows: Callable[[], Iterator[Row]], on_rows: Callable[[int, bool], None]) -> Reader:
        """Look at all rows before the first one is encoded."""
        ...

    def shared(self, row: Row, reader: Reader) -> Any:
        """The part of a row's input that other rows may have too, with another answer; empty: none."""
        ...


OnRows = Callable[[str, int, bool, str], None]
"""Is told a source's name, how many of its rows are done, whether that is all, and what is done: read, looked at."""

_FIRST = 20
"""Rows of a source: where all of them have errors, the rows are not to blame."""
_KEY = ("split", "name", "format", "columns", "limit", "group_by", *FILE_SETTINGS)
"""Settings of a source that decide what its store holds."""
_BATCH = 512
"""Rows encoded at once, at most."""
_BATCH_SIZE = 4_000_000
"""Characters and bytes of the rows encoded at once, about: a token takes far more memory than its text while it is
encoded."""
_NO_LETTERS = re.compile(r"\W+")
"""Characters that do not count in comparing texts."""
_LARGEST = 10_000_000
"""Characters that a row may hold: while they are encoded they take 3 to 4 GB."""


def prepare(
    source: Source,
    task: Encodes,
    encoding: Mapping[str, Any],
    *,
    stop_at_bad: bool,
    num_workers: int = 0,
    on_rows: OnRows = lambda name, count, done, what: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Store:
    """The examples of a source: from the cache where the same content was encoded the same way before.

    ``encoding`` is all that decides how, as JSON takes it: a part of the cache's key. With ``stop_at_bad`` a row that
    cannot be used is an error; else it is kept in the store's list of bad rows. ``on_rows`` is told how far it is, and
    ``on_note`` what the user should know of the cache.

    Raises:
        DataError: the source cannot be read, holds no rows, or a row that cannot be used.
    """
    opened = open_source(source)
    for note in opened.notes():
        on_note(note)
    fingerprint, times = state = opened.state()
    key = {
        "content": fingerprint,
        "times": times,
        "source": {name: getattr(source, name) for name in _KEY},
        "media": [asdict(rule) for rule in opened.rules],
        **({"path": [opened.path, str(Path.cwd())]} if task.reads_files else {}),  # rows name files from either
        **encoding,
    }

    def build(folder: Path) -> None:
        with Writer(folder, task.columns) as writer:
            about = _RowEncoder(opened, source, task, writer, stop_at_bad, on_rows).write(num_workers)
            opened.check_unchanged(state)
            writer.finish(source=opened.name, fingerprint=fingerprint, **about)

    store = cached(key, build, on_wait=on_note)
    if implied := store.about.get("implied"):
        on_note(f"{opened.name}: reads {implied}; dataset.columns can say otherwise")
    bad = next(store.bad_rows(), None)
    names_files = task.reads_files and opened.path and not times  # whose state is no part of the key
    if bad and stop_at_bad and not names_files:
        raise _stopping(bad[1], store.rows["outcome"][:_FIRST] == store.outcomes.index(BAD))
    if bad and stop_at_bad:  # what is wrong may have been mended: read again, and stop where it has not
        return cached({**key, "bad_rows": 0}, build, on_wait=on_note)
    if bad and names_files:
        on_note(f"{opened.name}: bad rows are cached: once a file that they name is mended, run peftcli cache clear")
    return store


class _RowEncoder:
    """Encodes the rows of a source, batch by batch, and writes what became of each."""

    def __init__(
        self, opened: ResolvedSource, source: Source, task: Encodes, writer: Writer, stop_at_bad: bool, on_rows: OnRows
    ):
        self.opened, self.source, self.task, self.writer = opened, source, task, writer
        self.stop_at_bad, self.on_rows = stop_at_bad, on_rows
        self._batches, self._taken = _batches(opened.rows()), deque[list[Row | DataError]]()
        self._columns, self._last = list[str](), Place(opened.name, 0)

    def write(self, num_workers: int) -> dict[str, Any]:
        """Write all rows. Return their format, None where no row is good, and the columns that are not read."""
        try:
            reader = self._write(num_workers)
        except DataError as error:
            file = error.file or self.opened.name
            raise DataError(error.message, file=file, line=error.line, key=error.key, hint=error.hint) from error
        self.on_rows(self.opened.name, self.writer.num_rows, True, "read")
        names = [*(reader.names.values() if reader else ()), self.source.group_by or ""]
        read = {part for name in names for part in (name, name.partition(".")[0])}
        return {
            "format": reader.name if reader else None,
            "implied": reader.implied if reader else "",
            "columns": {key: name for key, name in reader.names.items() if key != name} if reader else {},
            "columns_not_read": [name for name in self._columns if name not in read],
        }

    def _write(self, num_workers: int) -> Reader | None:
        for batch in self._batches:
            if not (good := _good(batch)):
                self._keep(batch, [])
                continue
            self._columns += _column_names(good)
            first, truths = good[0].values, truth_columns(good)
            table = Table(self.source, self.opened.name, tuple(self._columns), self.opened.class_names, first, truths)
            reader = self.task.read(table)
            if self.source.group_by is not None:
                table.refuse_missing(self.source.group_by, "dataset.group_by")
            reader = self.task.survey(
                reader,
                lambda: (row for row in self.opened.rows() if isinstance(row, Row)),
                lambda count, done: self.on_rows(self.opened.name, count, done, "compared"),
            )
            encode = partial(_encode, self.task, reader=reader, group_by=self.source.group_by)
            with closing(compute_ahead(encode, self._good_rows(batch, table, reader), num_workers)) as encoded:
                for results in encoded:
                    self._keep(self._taken.popleft(), results)
            return reader
        return None

    def _good_rows(self, first: list[Row | DataError], table: Table, reader: Reader) -> Iterator[list[Row]]:
        """Yield the rows to encode. One with a value in a column that the task reads and the first rows lack is bad."""
        late = list[str]()
        for batch in chain([first], self._batches):
            if later := [name for name in _column_names(_good(batch)) if name not in self._columns]:
                self._columns += later
                late += _read_of(later, replace(table, columns=tuple(self._columns)), self.task, reader)
            self._taken.append([_refuse_late(row, late) if isinstance(row, Row) else row for row in batch])
            yield _good(self._taken[-1])

    def _keep(self, batch: Sequence[Row | DataError], results: Sequence[Outcome | DataError]) -> None:
        places, outcomes = _in_order(batch, iter(results), self._last)
        self._last = places[-1]
        if self.stop_at_bad:
            for outcome in outcomes:
                if isinstance(outcome, DataError):
                    first = outcomes[:_FIRST] if not self.writer.num_rows else ()
                    raise _stopping(outcome, [isinstance(each, DataError) for each in first])
        self.writer.add(places, outcomes)
        self.on_rows(self.opened.name, self.writer.num_rows, False, "read")


def _encode(task: Encodes, rows: Sequence[Row], reader: Reader, group_by: str | None) -> list[Outcome | DataError]:
    """Encode rows; set the hashes by which rows that belong together are found."""
    outcomes = task.encode(rows, reader)
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, DataError) or not outcome.examples:
            continue
        if shared := task.shared(row, reader):
            outcome.shared = _hash(_NO_LETTERS.sub(" ", _as_json(shared).casefold()))
        if group_by is not None and (value := row.values.get(group_by)) is not None:
            outcome.group = _hash(_as_json(value))
    return outcomes


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()) or 1


def _stopping(error: DataError, failed: Sequence[bool]) -> DataError:
    """The error about a row that stops the command, with what to do; ``failed`` are the first rows of the source."""
    if len(failed) > 1 and all(failed):
        return of_all_rows(error, f"all of the first {len(failed)} rows")
    error.hint = error.hint or "Correct the row, or leave such rows out: dataset: {on_bad_row: skip}."
    return error


def _column_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _read_of(later: Sequence[str], table: Table, task: Encodes, reader: Reader) -> list[str]:
    """Return the columns of ``later`` that the task would read if the first rows had them."""
    try:
        names = task.read(table).names
    except DataError:  # together they are of no form, or of several: those of the first rows decide
        return []
    return [name for role, name in names.items() if role not in reader.names and name in later]


def _refuse_late(row: Row, late: Sequence[str]) -> Row | DataError:
    """The row; an error about it where it has a value in one of these columns, which would not be read."""
    for name in late:
        if row.values.get(name) is not None:
            hint = f"Give the first row a {name!r} too: null, where it has none."
            return row.place.error("the first rows lack it, so it would not be read", key=name, hint=hint)
    return row


def _good(batch: Sequence[Row | DataError]) -> list[Row]:
    return [row for row in batch if isinstance(row, Row)]


def _batches(rows: Iterator[Row | DataError]) -> Iterator[list[Row | DataError]]:
    """The rows in batches that are encoded at once."""
    batch, size = list[Row | DataError](), 0
    for row in rows:
        own = _size(row.values, str) if isinstance(row, Row) else 0
        if own > _LARGEST and isinstance(row, Row):
            message = f"holds {own:,} characters of text, more than {_LARGEST:,}"
            batch.append(row.place.error(message, hint="Split it into several rows."))
            continue
        batch.append(row)
        size += own + (_size(row.values, bytes) if isinstance(row, Row) else 0)
        if len(batch) >= _BATCH or size > _BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: Any, kind: type[str] | type[bytes]) -> int:
    """Characters of all texts in a value, or bytes of all files in it."""
    if isinstance(value, kind):
        return len(value)
    if isinstance(value, (dict, list)):
        return sum(_size(each, kind) for each in (value.values() if isinstance(value, dict) else value))
    return 0


def _in_order(
    batch: Sequence[Row | DataError], results: Iterator[Outcome | DataError], last: Place
) -> tuple[list[Place], list[Outcome | DataError]]:
    """Place and outcome of every row of a batch, those that could not be read among them.

    ``last`` is the place of the row before, by which a row that could not be read is numbered.
    """
    places, outcomes = list[Place](), list[Outcome | DataError]()
    for row in batch:
        if isinstance(row, DataError):
            file = row.file or last.source
            last = Place(file, last.number + 1 if file == last.source else 1, row.line)
            outcomes.append(row)
        else:
            last = row.place
            outcomes.append(next(results))
        places.append(last)
    return places, outcomes
