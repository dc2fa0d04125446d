"""A source of a recipe -> its features on disk, made once for the same content and settings."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peftcli.data.cache import cached
from peftcli.data.rows import Place, Row
from peftcli.data.sources import Opened, open_source
from peftcli.data.store import Outcome, Store, Writer
from peftcli.errors import DataError
from peftcli.schema import Dataset, Source
from peftcli.system import date

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reader(Protocol):
    """Reads the columns of a row."""

    name: str
    """The format of the rows."""
    names: Mapping[str, str]
    """The columns that it reads, under the names that the format has for them."""


class Encoder(Protocol):
    """Turns rows of one source into features."""

    reader: Reader

    def __call__(self, rows: Sequence[Row]) -> list[Outcome | DataError]:
        """What became of each row: features, a reason why there are none, or the error that it is.

        Raises:
            DataError: no row of the source can be encoded.
            ModelError: the chat template does not come to an end.
        """
        ...


MakeEncoder = Callable[[Sequence[str], Source, str], Encoder]
"""Columns of the first rows, the source and its name -> what encodes its rows."""
OnRows = Callable[[str, int, bool], None]
"""Is told a source's name, how many of its rows are encoded, and whether that is all."""

_BATCH = 512
"""Rows encoded at once, at most."""
_BATCH_SIZE = 4_000_000
"""Characters of the rows encoded at once, about: a token takes far more memory than its text while it is encoded."""
_LARGEST = 10_000_000
"""Characters that a row may hold: while they are encoded they take 3 to 4 GB."""


def prepare(
    source: Source,
    task: str,
    columns: Sequence[str],
    make_encoder: MakeEncoder,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    stop_at_bad: bool,
    on_rows: OnRows = lambda name, count, done: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Store:
    """The features of a source: from the cache where the same content was encoded the same way before.

    Args:
        source: Where the rows are.
        task: Whose features they are.
        columns: What a feature holds.
        make_encoder: Gives what encodes the rows, once their columns are known.
        tokenizer: The base model's.
        dataset: Settings of the encoding.
        stop_at_bad: Whether a row that cannot be used is an error. Else it is kept in the store's list of bad rows.
        on_rows: Is told how far it is.
        on_note: Is told what the user should know of the cache.

    Raises:
        DataError: the source cannot be read, holds no rows, or a row that cannot be used.
    """
    opened = open_source(source)
    if opened.left_out:
        first = ", ".join(opened.left_out[:3]) + (", ..." if len(opened.left_out) > 3 else "")
        on_note(f"{opened.described}: {len(opened.left_out)} files of other kinds are left out: {first}")
    fingerprint = opened.fingerprint()
    key = {
        "content": fingerprint,
        "source": {name: getattr(source, name) for name in ("split", "name", "format", "columns", "limit")},
        "task": task,
        "settings": {name: getattr(dataset, name) for name in ("max_length", "overlong", "train_on")},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }

    def build(folder: Path) -> None:
        with Writer(folder, columns) as writer:
            about = _write(opened, source, make_encoder, writer, stop_at_bad, on_rows)
            opened.check_unchanged(fingerprint)
            writer.finish(source=opened.described, fingerprint=fingerprint, **about)

    store = cached(key, build, on_wait=on_note)
    if stop_at_bad:
        for _, error in store.bad_rows():
            raise error
    return store


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets. A template that writes the date gives another one each day."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "tokenizer": _model_of(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "settings": {name: getattr(tokenizer, name, None) for name in ("split_special_tokens", "truncation_side")},
        "template": tokenizer.chat_template,
        "date": date.today().isoformat() if date.writes_date(tokenizer.chat_template) else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _model_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What a tokenizer is made of, without what its last call has set."""
    if tokenizer.is_fast:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        return {name: value for name, value in described.items() if name not in ("truncation", "padding")}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_vocabulary(scratch)
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return [hashes, tokenizer.get_vocab(), tokenizer.init_kwargs]


def _write(
    opened: Opened,
    source: Source,
    make_encoder: MakeEncoder,
    writer: Writer,
    stop_at_bad: bool,
    on_rows: OnRows,
) -> dict[str, Any]:
    """Encodes every row. Gives the rows' format, None where no row is good, and the columns that it does not read.

    Raises:
        DataError: with the source's name, where it is about no row.
    """
    encoder: Encoder | None = None
    columns: tuple[str, ...] = ()
    for batch in _batches(opened.rows()):
        good = [row for row in batch if isinstance(row, Row)]
        try:
            if encoder is None and good:
                columns = tuple(dict.fromkeys(key for row in good for key in row.values))
                encoder = make_encoder(columns, source, opened.described)
            results = iter(encoder(good) if encoder else [])
        except DataError as error:
            file = error.file or opened.described
            raise DataError(error.message, file=file, line=error.line, key=error.key, hint=error.hint) from error
        places, outcomes = _in_order(batch, results, opened.described, writer.num_rows)
        if stop_at_bad:
            for outcome in outcomes:
                if isinstance(outcome, DataError):
                    raise outcome
        writer.add(places, outcomes)
        on_rows(opened.described, writer.num_rows, False)
    on_rows(opened.described, writer.num_rows, True)
    read = encoder.reader.names.values() if encoder else ()
    return {
        "format": encoder.reader.name if encoder else None,
        "columns_not_read": [name for name in columns if name not in read],
    }


def _batches(rows: Iterator[Row | DataError]) -> Iterator[list[Row | DataError]]:
    """The rows in batches that are encoded at once."""
    batch, size = list[Row | DataError](), 0
    for row in rows:
        own = _size(row.values) if isinstance(row, Row) else 0
        if own > _LARGEST and isinstance(row, Row):
            message = f"holds {own:,} characters of text, more than {_LARGEST:,}"
            batch.append(row.place.error(message, hint="Split it into several rows."))
            continue
        batch.append(row)
        size += own
        if len(batch) >= _BATCH or size > _BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _in_order(
    batch: Sequence[Row | DataError], results: Iterator[Outcome | DataError], described: str, before: int
) -> tuple[list[Place], list[Outcome | DataError]]:
    """Place and outcome of every row of a batch, those that could not be read among them."""
    places, outcomes = list[Place](), list[Outcome | DataError]()
    for index, row in enumerate(batch):
        if isinstance(row, DataError):
            places.append(Place(row.file or described, before + index + 1, row.line))
            outcomes.append(row)
        else:
            places.append(row.place)
            outcomes.append(next(results))
    return places, outcomes
