"""``peftcli predict``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Adapter, Base, Dtype, Json, NoAdapter, Quiet, output_path, path, progress_log
from peftcli.data.rows import count_of
from peftcli.errors import UsageError
from peftcli.system.outputs import is_stdout, is_stream, refuse_input, require_writable

_Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TEXT|FILE]...",
        help="Texts, or files of pictures or sounds, to answer; question and context by turns.",
    ),
]
_Source = Annotated[
    Path | None,
    typer.Option(
        "--input", parser=path, help="Rows as in training, without the label: a file or folder; -: JSON lines on stdin."
    ),
]
_Target = Annotated[
    Path | None,
    typer.Option(
        "--output",
        parser=output_path,
        help="File for the answers to --input, .jsonl or .csv; -: stdout. After a stop, run it again to resume.",
    ),
]
_Id = Annotated[
    str | None,
    typer.Option(
        "--id", metavar="COLUMN", help="Column of --input that each answer begins with; by default id, if it is there."
    ),
]
_Keep = Annotated[bool, typer.Option("--keep", help="Keep the columns of --input, under input.")]


def predict(
    adapter: Adapter,
    inputs: _Inputs = None,
    source: _Source = None,
    target: _Target = None,
    id_column: _Id = None,
    keep: _Keep = False,
    base: Base = None,
    dtype: Dtype = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    no_adapter: NoAdapter = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer rows with an adapter, whatever its task.

    Prints one JSON object per row, in order.
    """
    _check(inputs, source, {"--output": target, "--id": id_column, "--keep": keep})
    tell = progress_log(quiet)
    if target is not None:
        check_target(target, source, as_json=as_json)
    from peftcli.adapters.predict import keep_columns, kept_of, load_predictor, predict_file, read_input

    rows = read_input(source, inputs or ())
    kept = kept_of(rows, id_column, keep)
    predictor = load_predictor(
        adapter,
        base,
        with_adapter=not no_adapter,
        batch_size=batch_size,
        dtype=dtype,
        merge_for=rows,
        tell=tell,
    )
    if any(kept):
        predictor = replace(predictor, answer=keep_columns(predictor.answer, rows, kept))
    if target is not None:
        count = predict_file(predictor, rows, target, lambda done, total: tell(f"{done}/{total}"), kept)
        return print_count(target, count, tell, as_json=as_json)
    answers = predictor.answers(rows or predictor.rows(inputs or ()))
    if as_json:
        return console.print_json({"rows": list(answers)})
    for answer in answers:
        console.out(console.json_text(answer))
    return None


def _check(inputs: Sequence[str] | None, source: Path | None, of_rows: Mapping[str, Any]) -> None:
    """Raise UsageError for options ``of_rows`` without ``source``, or where it is not clear what to answer."""
    if (source is None) == (not inputs):
        raise UsageError("give texts or files, or --input")
    for key, given in of_rows.items():
        if source is None and given:
            raise UsageError("is for the rows of --input", key=key)


def check_target(target: Path, source: Path | None, *, as_json: bool) -> None:
    """Raise UsageError or StorageError where the answers to ``source`` cannot be written to ``target``."""
    refuse_input(target, source)
    require_writable(target)
    if as_json and is_stdout(target):
        raise UsageError("is standard output, on which --json prints its object", file=str(target), key="--output")


def print_count(target: Path, count: int, tell: Callable[[str], None], *, as_json: bool) -> None:
    """Print how many answers were written to ``target``; as a line of the log where it may be standard output."""
    if as_json:
        console.print_json({"output": str(target), "rows": count})
    else:
        (tell if is_stream(target) else console.out)(f"{target}: {count_of(count, 'answer')}")
