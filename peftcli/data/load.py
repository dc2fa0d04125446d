"""Reads a dataset's rows: a local file, line by line and strictly, or a dataset of the hub."""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import json
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from peftcli.errors import DataError, HubError, NetworkError
from peftcli.schema import Dataset

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
"""Files that can be read."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FILE_ENDINGS = (*EXTENSIONS, ".txt", ".tsv", ".md", ".gz", ".zip", ".zst", ".bz2", ".xz", ".arrow", ".yaml", ".xlsx")
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Rows:
    """The rows of one dataset, and where each came from."""

    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    source: str
    """File or hub id, as the recipe gave it."""
    lines: list[int] | None = None
    """Line in the file that each row starts on, from 1."""
    sha256: str | None = None
    """Of the file's bytes."""

    def __len__(self) -> int:
        return len(self.rows)

    def error(self, index: int, message: str, *, key: str | None = None, hint: str | None = None) -> DataError:
        """A DataError about row ``index``, with its place."""
        if self.lines is not None:
            return DataError(message, file=self.source, line=self.lines[index], key=key, hint=hint)
        return DataError(f"row {index + 1}: {message}", file=self.source, key=key, hint=hint)

    def pick(self, indices: list[int]) -> Rows:
        """The rows at ``indices``."""
        lines = None if self.lines is None else [self.lines[index] for index in indices]
        return replace(self, rows=[self.rows[index] for index in indices], lines=lines)


def load_splits(dataset: Dataset, seed: int) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to evaluate on if the recipe asks for any.

    Raises:
        DataError: a file or dataset that cannot be read, or settings that contradict each other.
        NetworkError: the hub cannot be reached.
    """
    ways = [name for name in ("eval", "eval_fraction") if getattr(dataset, name) is not None]
    if dataset.eval is None and dataset.eval_split is not None:
        ways.append("eval_split")
    if len(ways) > 1:
        raise DataError(f"two sources of evaluation rows: {' and '.join(ways)}", key=f"dataset.{ways[1]}")
    train = load_rows(
        dataset.train, split=dataset.split, name=dataset.name, revision=dataset.revision, limit=dataset.limit
    )
    if dataset.eval_fraction is not None:
        return _hold_out(train, dataset.eval_fraction, seed)
    if not ways:
        return train, None
    source = dataset.train if dataset.eval is None else dataset.eval
    local = Path(source).exists()
    if local and dataset.eval_split is not None:
        raise DataError(f"means nothing for a local file: {source}", key="dataset.eval_split")
    split = "train" if local else dataset.eval_split or dataset.split
    same = source == dataset.train
    return train, load_rows(
        source, split=split, name=dataset.name if same else None, revision=dataset.revision if same else None
    )


def _hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """``rows`` in two: the larger part, and ``fraction`` of them. Both keep the file's order.

    Which rows are held out depends on the seed and a row's position only, through SHA-256, so it is the same with
    every Python version.
    """
    if not 0 < fraction < 1:
        raise DataError(f"expected a number between 0 and 1, found {fraction}", key="dataset.eval_fraction")
    if len(rows) < 2:
        raise DataError("one row cannot be split into training and evaluation rows", file=rows.source)
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    order = sorted(range(len(rows)), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    return rows.pick(sorted(order[count:])), rows.pick(sorted(order[:count]))


def load_rows(
    source: str, *, split: str = "train", name: str | None = None, revision: str | None = None, limit: int | None = None
) -> Rows:
    """The rows of a local file, or of a dataset of the hub.

    Args:
        source: Path of a .jsonl, .json, .csv or .parquet file, or a hub dataset id.
        split: Split of a hub dataset.
        name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        limit: Read only so many rows.

    Raises:
        DataError: it does not exist, cannot be read, or holds no rows.
        NetworkError: the hub cannot be reached.
        HubError: the hub refuses access.
    """
    if "://" in source:
        raise DataError(
            f"{_cut(source)} is a URL", key="dataset", hint="Download the file and name it, or give a hub dataset id."
        )
    path = Path(source)
    if _exists(path, source):
        given = [key for key, value in (("split", split != "train"), ("name", name), ("revision", revision)) if value]
        if given:
            raise DataError(f"means nothing for a local file: {source}", key=f"dataset.{given[0]}")
        rows = _load_file(path, source, limit)
    elif _HUB_ID.fullmatch(source) and not source.lower().endswith(_FILE_ENDINGS) and not source.startswith("."):
        rows = _load_hub(source, split, name, revision, limit)
    else:
        raise DataError("no such file", file=source, hint=_near_files(path))
    if not rows.rows:
        raise DataError("holds no rows", file=source)
    return rows


def _exists(path: Path, source: str) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened: {_reason(error)}", file=_cut(source)) from error
    return True


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = [entry.name for entry in islice(folder.iterdir(), 1000)]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    near = near or sorted(name for name in names if name.lower().endswith(EXTENSIONS))[:3]
    return f"Near it in {folder}: {', '.join(near)}" if near else f"{folder} holds no file of that kind."


def _load_file(path: Path, source: str, limit: int | None) -> Rows:
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}.get(path.suffix.lower())
    accepted = f"Files that can be read: {', '.join(EXTENSIONS)}"
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError("is a folder", file=source, hint=f"Name one file in it. {accepted}")
        if not stat.S_ISREG(mode):
            raise DataError("is not a regular file", file=source)
        if path.suffix.lower() == ".parquet":
            return replace(_read_parquet(path, source, limit), sha256=_sha256(path))
        if reader is None:
            raise DataError(f"unknown kind of file {path.suffix!r}", file=source, hint=accepted)
        if not path.stat().st_size:
            raise DataError("is empty", file=source)
        pairs = list(islice(reader(path, source), limit))
        digest = _sha256(path)
    except OSError as error:
        raise DataError(f"cannot be read: {_reason(error)}", file=source) from error
    rows = [row for _, row in pairs]
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Rows(rows, columns, source, [line for line, _ in pairs], digest)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _text_lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, with their numbers and their line ends."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError("is not UTF-8 but UTF-16", file=source, line=1, hint="Convert the file to UTF-8.")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
                raise DataError(message, file=source, line=number, hint="Convert the file to UTF-8.") from error
            if "\0" in text:
                raise DataError("holds a NUL byte", file=source, line=number)
            yield number, text


def _read_jsonl(path: Path, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _text_lines(path, source):
        text = line.strip(" \t\r\n")
        if not text:
            continue
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            message = f"is not a JSON object: {_reason(error)}; the line begins {_cut(text)}"
            raise DataError(message, file=source, line=number, hint=_jsonl_hint(source, number, text)) from error
        yield number, _row(value, text, source, number)


def _jsonl_hint(source: str, number: int, text: str) -> str | None:
    if source.lower().endswith(".json"):
        return "A .json file holds a list of objects, or one object a line."
    if number == 1 and text in ("[", "{", "[{"):
        return "A .jsonl file holds one object a line. Rename a file that holds one list to .json."
    return None


def _read_json(path: Path, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A list of objects, or, as many .json files are, one object a line."""
    text = "".join(line for _, line in _text_lines(path, source))
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        yield from _read_jsonl(path, source)
        return
    line, counted = 1, 0
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", position)
            message = f"is not JSON: {_reason(error)}; near {_cut(text[at : at + 100])}"
            raise DataError(message, file=source, line=line + text.count("\n", counted, at)) from error
        yield line, _row(value, text[position:end], source, line)
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
            if text[position : position + 1] == "]":
                message = "is not JSON: a comma before the closing ']'"
                raise DataError(message, file=source, line=1 + text.count("\n", 0, position))
        elif text[position : position + 1] != "]":
            message = f"is not JSON: expected ',' or ']', found {_cut(text[position : position + 100])}"
            raise DataError(message, file=source, line=1 + text.count("\n", 0, position))
    rest = _skip(text, position + 1)
    if rest < len(text):
        message = f"text after the end of the list: {_cut(text[rest : rest + 100])}"
        raise DataError(message, file=source, line=1 + text.count("\n", 0, rest))


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position


def _row(value: Any, text: str, source: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        message = f"expected a JSON object, found {_kind(value)}: {_cut(text)}"
        raise DataError(message, file=source, line=line)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("holds half of a surrogate pair (\\ud800-\\udfff)", file=source, line=line) from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"the key {_cut(twice)} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _read_csv(path: Path, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    text = "".join(line for _, line in _text_lines(path, source))
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        start = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(f"is not CSV: {_reason(error)}; the row starts here", file=source, line=start) from error
        if record is None:
            return
        if not record:
            continue
        if header is None:
            header = _check_header(record, source, start)
        elif len(record) != len(header):
            message = f"{len(record)} fields, but the header has {len(header)}: {_cut(','.join(record))}"
            raise DataError(message, file=source, line=start, hint="Put fields that hold commas in double quotes.")
        else:
            yield start, dict(zip(header, record, strict=True))


def _check_header(header: list[str], source: str, line: int) -> list[str]:
    names = [name.strip() for name in header]
    if "" in names:
        raise DataError(f"column {names.index('') + 1} of the header has no name", file=source, line=line)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"the header names {_cut(twice[0])} twice", file=source, line=line)
    if len(names) == 1 and (separator := next((mark for mark in ";\t" if mark in names[0]), None)):
        message = f"one column, {_cut(names[0])}: fields are separated by commas, not by {separator!r}"
        raise DataError(message, file=source, line=line)
    return names


def _read_parquet(path: Path, source: str, limit: int | None) -> Rows:
    import pyarrow.parquet  # comes with datasets

    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            for batch in file.iter_batches():
                rows += batch.to_pylist()
                if limit is not None and len(rows) >= limit:
                    break
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"is not a readable parquet file: {_reason(error)}", file=source) from error
    if len(set(columns)) < len(columns):
        raise DataError("two columns have one name", file=source)
    return Rows(rows[:limit], columns, source)


def _load_hub(source: str, split: str, name: str | None, revision: str | None, limit: int | None) -> Rows:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(source, name, split=split, revision=revision)
    except Exception as error:  # every builder raises its own kinds
        raise _hub_error(error, source, split) from error
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"the split {_cut(split)} is not one table of rows", file=source, key="dataset.split")
    if limit is not None:
        found = found.select(range(min(limit, len(found))))
    return Rows(found.to_list(), tuple(found.column_names), source)


def _hub_error(error: Exception, source: str, split: str) -> DataError | HubError | NetworkError:
    from datasets.exceptions import DatasetNotFoundError

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    message = str(error)
    if isinstance(error, DatasetNotFoundError):
        if "gated" in message:
            return HubError(f"{_reason(error)}", hint="Ask for access on its page, then log in: hf auth login.")
        hint = "Check the name and the revision, or name a local file. A private dataset needs: hf auth login."
        return DataError("no such dataset on the hub, and no such file", file=source, hint=hint)
    status = next((code for each in causes if (code := _status(each))), None)
    if status in (401, 403):
        return HubError(f"{source}: the hub refuses access ({status})", hint="Log in with: hf auth login.")
    if any(isinstance(each, (ConnectionError, TimeoutError)) for each in causes) or (status or 0) >= 429:
        hint = "A local .jsonl, .json, .csv or .parquet file needs no network; HF_HUB_OFFLINE=1 uses what is cached."
        return NetworkError(f"dataset {source}: no file of that name, and the hub cannot be reached", hint=hint)
    if "Unknown split" in message or "Bad split" in message:
        return DataError(f"no split {_cut(split)}: {_reason(error, 300)}", file=source, key="dataset.split")
    if "Config name is missing" in message or "BuilderConfig" in message:
        return DataError(_reason(" ".join(message.split()), 300), file=source, key="dataset.name")
    return DataError(f"cannot be loaded: {_reason(error)}", file=source)


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else "an object")


def _cut(text: str, length: int = 60) -> str:
    """At most ``length`` characters of foreign text, escaped."""
    return repr(text if len(text) <= length else text[:length] + "...")


def _reason(error: BaseException | str, length: int = 160) -> str:
    """The first line of what another library says, without control characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().split("\n")[0]
    text = "".join(mark if mark.isprintable() else "?" for mark in text)
    return text if len(text) <= length else text[:length] + "..."
