"""Answer the rows of a file into another one. After a stop, the same call resumes after the last batch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from peftcli.adapters.load import SHARED_FILES
from peftcli.system.disk import sha256
from peftcli.system.outputs import expand_user, is_stream, partial_file, write_output
from peftcli.system.secrets import redact_values
from peftcli.system.signals import current

T = TypeVar("T")
_DOCUMENTATION = ("README.md", "loss.png")
"""Files of an adapter that no answer depends on."""


def _batches(
    rows: Sequence[T],
    order: Sequence[int],
    answer: Callable[[Sequence[T]], Sequence[dict[str, Any]]],
    batch_size: int,
    start: int = 0,
) -> Iterator[list[bytes]]:
    """Yield the lines of one batch after another, from the ``start``-th row of the order."""
    for at in range(start, len(rows), batch_size):
        answers = answer([rows[each] for each in order[at : at + batch_size]])
        yield [f"{json.dumps(redact_values(each), ensure_ascii=False)}\n".encode() for each in answers]


def _in_order(lines: Sequence[bytes], order: Sequence[int]) -> bytes:
    """Return lines that were written in ``order`` in the order of the rows."""
    return b"".join(line for _, line in sorted(zip(order, lines, strict=True)))


def write_answers(
    rows: Sequence[T],
    target: Path,
    answer: Callable[[Sequence[T]], Sequence[dict[str, Any]]],
    *,
    key: Any,
    batch_size: int,
    progress: Callable[[int, int], None],
    order: list[int] | None = None,
) -> int:
    """Write one JSON object per row, in the order of the rows; return how many. The target appears when all are there.

    A target that ends in ``.csv`` gets a table instead: see ``csv_table``.

    ``key`` is everything that the answers follow from, as JSON: an unfinished file is resumed under the same key only.
    Rows are answered in ``order``, or else in their own; ``progress`` is told how many of how many are done.

    Raises:
        FolderBusy: another process is answering into the same target.
        StorageError: the target cannot be written.
    """
    order = order or list(range(len(rows)))
    is_sorted, target = order == sorted(order), expand_user(target)
    batches = partial(_batches, rows, order, answer, batch_size)
    if is_stream(target):
        lines: list[bytes] = []
        for batch in batches():
            lines += batch
            progress(len(lines), len(rows))
        write_output(target, _in_order(lines, order))
        return len(lines)
    is_table = target.suffix.lower() == ".csv"
    key = [key, batch_size, [] if is_sorted else order]
    with partial_file(target, json.dumps(key, sort_keys=True, default=str)) as file:
        kept = list(takewhile(_is_json, file.lines()))  # a crash of the machine may have damaged the rest
        done = min(len(kept), len(rows)) // batch_size * batch_size
        file.truncate(kept[:done])
        if done:
            progress(done, len(rows))
        for batch in batches(done):
            file.append(b"".join(batch))
            done += len(batch)
            stop = current()
            stop.saved, stop.message = True, f"stopped after {done} of {len(rows)} answers"
            progress(done, len(rows))
        if is_table or not is_sorted:
            whole = _in_order(file.lines(), order)
            write_output(target, csv_table(whole.splitlines()) if is_table else whole)
            file.discard()
    return done


def csv_table(lines: Sequence[bytes]) -> bytes:
    """Return JSON objects as a CSV table; what is inside an object has a column such as ``scores.good``."""
    rows = [dict(_cells(json.loads(line))) for line in lines]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _cells(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the columns of an object; a list is one cell, as JSON."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _cells(value, f"{before}{name}.")
        else:
            yield before + name, json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def content_key(loaded_from: dict[str, Any]) -> list[Any]:
    """Return what identifies a loaded model, but for the content of a base model that is a folder."""
    adapter = loaded_from.get("adapter")
    files = [Path(adapter) / name for name in SHARED_FILES if name not in _DOCUMENTATION] if adapter else []
    return [loaded_from, [(str(path), sha256(path)) for path in files if path.is_file()]]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
