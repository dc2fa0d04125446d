"""Answer rows with an adapter, whatever its task: rows as in training, less the label."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from peftcli.adapters.answer_file import content_key, write_answers
from peftcli.adapters.generate import describe, first_batch, load_for_task, load_generator, longest_first, ready
from peftcli.adapters.load import AdapterSource, find_adapter
from peftcli.adapters.merged import load_merged
from peftcli.adapters.number_format import NumberFormat, number_format
from peftcli.data.readers import kind_of
from peftcli.data.rows import Place, Row, add_keys, listed
from peftcli.data.sources import read_rows
from peftcli.errors import AdapterError, UsageError
from peftcli.models.open import OpenBase, open_base
from peftcli.recipe.data_checks import exists
from peftcli.system.outputs import expand_user, is_stream
from peftcli.tasks.base import PredictOptions, Predicts
from peftcli.tasks.text.fast.norms import fuse_norms
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.prompts import Prompt, prompt_of

BATCHES = 8
"""Batches that are answered together, so that rows of similar size can share one."""
_WORTH_MERGING = 32
"""Batches after which a merged model has made up for the time that merging takes."""


@dataclass(frozen=True)
class Predictor:
    """A model with an adapter, and the task that answers rows with it."""

    answer: Callable[..., list[dict[str, Any]]]
    """Takes rows, and may take ``beside`` and ``first`` of ``PredictOptions``; one JSON object a row, in order."""
    arguments: Sequence[str]
    """The columns that texts or files of the command line fill, row after row."""
    rows_at_once: int
    loaded_from: dict[str, Any]
    model: Any
    """The model with the adapter."""
    ask: Callable[[Row], Prompt] | None = None
    """Returns the prompt of a row, by whose length a file's rows are answered: ``answer`` does not sort them itself."""

    def rows(self, given: Sequence[str]) -> list[Row]:
        """Make rows of texts or files of the command line.

        Raises:
            UsageError: the last row is not whole.
        """
        count = len(self.arguments)
        if len(given) % count:
            raise UsageError(f"give {' and '.join(self.arguments)} of each row")
        parts = [given[start : start + count] for start in range(0, len(given), count)]
        values = [dict(zip(self.arguments, part, strict=True)) for part in parts]
        return [Row(each, Place("the command line", number)) for number, each in enumerate(values, start=1)]

    def answers(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Answer rows in their order, ``rows_at_once`` at a time: one JSON object a row."""
        for start in range(0, len(rows), self.rows_at_once):
            yield from self.answer(rows[start : start + self.rows_at_once], first=start + 1)


def keep_columns(
    answer: Callable[..., list[dict[str, Any]]], rows: Sequence[Row], kept: Sequence[dict[str, Any]]
) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that answers like ``answer``, and begins each answer with what is kept of its row."""
    beginnings = {id(row): columns for row, columns in zip(rows, kept, strict=True)}

    def with_columns(some: Sequence[Row], **files: Any) -> list[dict[str, Any]]:
        return [beginnings[id(row)] | found for row, found in zip(some, answer(some, **files), strict=True)]

    return with_columns


def kept_of(rows: Sequence[Row], id_column: str | None, keep: bool) -> list[dict[str, Any]]:
    """Return what answers keep of their rows: ``id``, and with ``keep`` all columns under ``input``.

    ``id_column`` names the column of the id; None: ``id``, in rows that have it.

    Raises:
        UsageError: a row lacks the column that is named.
    """
    name = id_column or "id"
    for row in rows:
        if id_column is not None and id_column not in row.values:
            place, there = str(row.place), listed(row.values)
            raise UsageError(f"no column {id_column!r}; the row has: {there}", file=place, key="--id")
    ids = [{"id": _plain(row.values[name])} if name in row.values else {} for row in rows]
    if not keep:
        return ids
    return [one | {"input": _plain(dict(row.values))} for one, row in zip(ids, rows, strict=True)]


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: bytes and numbers that are not finite become texts."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    is_json = value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and isfinite(value))
    return value if is_json else str(value)


def read_input(source: Path | None, texts: Sequence[str] = ()) -> Sequence[Row]:
    """Return the rows of a file or folder; none without one.

    Raises:
        UsageError: one of the texts to answer is the name of a file of rows.
    """
    for text in texts:
        if kind_of(text) and exists(text):
            raise UsageError("is a file of rows", file=text, hint="give it as --input")
    return [] if source is None else read_rows(source)


def load_predictor(
    adapter: str,
    base: str | None = None,
    *,
    with_adapter: bool = True,
    batch_size: int = 8,
    dtype: str | None = None,
    merge_for: Sequence[Row] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Predictor:
    """Load the base model that an adapter names, with the adapter in it.

    ``dtype`` is a number format to compute in; None: that of the evaluations of training. The rows of ``merge_for``,
    those of a file, are refused if the model has too few positions for one. If they are many, the adapter is merged in
    memory for them, if that changes nothing of what the model says; ``tell`` is told whether it is.

    Raises:
        AdapterError: the adapter cannot be read, does not fit, or its task answers no rows.
        ModelError: the base model cannot be loaded.
    """
    source = find_adapter(adapter, base)
    with open_base(source.base, processors=source.folder) as opened:
        task = source.open_task(opened)
        if not isinstance(task, Predicts):
            ask = partial(prompt_of, columns=source.trained_columns, trained_on=source.trained_format)
            settings = GenerationSettings(**source.answer_limits)  # those of the evaluations of training
            prompts = list(map(ask, merge_for))
            generator = load_generator(
                str(source.folder),
                source.base_name,
                with_adapter=with_adapter,
                dtype=dtype,
                as_evaluated=True,
                merge_for=first_batch(prompts, settings, batch_size),
                check=lambda loaded: loaded.refuse_long(prompts, [row.place for row in merge_for], settings),
                tell=tell,
            )
            return text_predictor(generator, ask, settings, batch_size)
        load = partial(_load, source, opened, task, number_format(source, dtype), with_adapter, batch_size)
        first = merge_for[:batch_size] if len(merge_for) >= _WORTH_MERGING * batch_size else ()
        if not first or not with_adapter or opened.is_pipeline:
            return load()
        return load_merged(load, source.config, lambda loaded: loaded.answer(first), tell)


def _load(
    source: AdapterSource, opened: OpenBase, task: Any, numbers: NumberFormat, with_adapter: bool, batch_size: int
) -> Predictor:
    """Load a base model with the adapter beside its weights, for a task that answers rows."""
    loaded = load_for_task(source, opened, task, numbers.weights, with_adapter=with_adapter)
    if not with_adapter and loaded.initialised:
        message = f"has no head for {source.task}: without the adapter, answers would be random"
        raise AdapterError(message, file=source.base.name, key="--no-adapter")
    model = ready(loaded)
    fuse_norms(model)  # as in training
    unpad(model, source.config if with_adapter else None, probe=task.padded_probe(model))
    columns = source.trained_columns

    def answer(rows: Sequence[Row], **files: Any) -> list[dict[str, Any]]:
        for row in rows:
            add_keys(row.values, columns.values())
        there = {name for row in rows for name in row.values}
        renamed = {name: column for name, column in columns.items() if column in there}
        with numbers.autocast(model):
            return list(task.predict(model, rows, PredictOptions(batch_size=batch_size, columns=renamed, **files)))

    loaded_from = describe(source, source.base, model, numbers, with_adapter)
    return Predictor(answer, task.arguments, batch_size * BATCHES, loaded_from, model)


def predict_file(
    predictor: Predictor,
    rows: Sequence[Row],
    target: Path,
    progress: Callable[[int, int], None],
    kept: Sequence[dict[str, Any]] = (),
) -> int:
    """Answer rows into a .jsonl or .csv file; return how many. After a stop, the same call resumes.

    ``kept`` is what the answers begin with, where ``keep_columns`` has added it.

    Raises:
        DataError: a row that cannot be answered.
        FolderBusy: another process is answering into the same target.
        StorageError: the target cannot be written.
    """
    files = {} if is_stream(target) else {"beside": expand_user(target)}
    asked = [row.values if predictor.ask is None else predictor.ask(row) for row in rows]
    return write_answers(
        list(enumerate(rows, start=1)),
        target,
        lambda part: predictor.answer([row for _, row in part], first=part[0][0], **files),
        key=[*content_key(predictor.loaded_from), asked, *([list(kept)] if any(kept) else [])],
        batch_size=predictor.rows_at_once,
        progress=progress,
        order=longest_first(asked) if predictor.ask else None,
    )


def text_predictor(
    generator: TextGenerator, ask: Callable[[Row], Prompt], settings: GenerationSettings, batch_size: int
) -> Predictor:
    """Return a predictor whose answers are the texts that a model says; ``ask`` returns the prompt of a row."""

    def answer(rows: Sequence[Row], first: int = 1, **_: Any) -> list[dict[str, Any]]:
        seed = settings.seed
        if first > 1:  # with one seed for all, each batch would draw the same numbers
            seed = int.from_bytes(hashlib.sha256(f"{seed}:{first}".encode()).digest()[:4], "big")
        return [asdict(each) for each in generator.generate(list(map(ask, rows)), replace(settings, seed=seed))]

    loaded_from = {**generator.loaded_from, "settings": asdict(settings)}
    return Predictor(answer, ("prompt",), batch_size, loaded_from, generator.model, ask)
