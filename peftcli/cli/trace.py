"""``peftcli trace``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, Quiet, path, progress_log
from peftcli.cli.progress import Progress
from peftcli.data.rows import count_of

_Run = Annotated[str, typer.Argument(help="Run folder: the training.output_dir of a finished run.")]


def trace(
    adapter: _Run,
    prompt: Annotated[str | None, typer.Option(help="What the model is asked.")] = None,
    answer: Annotated[str | None, typer.Option(help="The answer to explain; by default what the model says.")] = None,
    row: Annotated[
        str | None, typer.Option(metavar="FILE:LINE", help="Explain this row, with its label or answer.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", parser=path, help="Explain the rows of this file, all together.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="How many rows to show of each sign.")] = 5,
    by: Annotated[Literal["datainf", "tracin"], typer.Option(help="How influence is computed.")] = "datainf",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rank the training rows by how much they taught an answer.

    The first time it computes the gradient of each training row, in about the time of an epoch, and keeps them in the
    run folder.
    """
    progress_log(quiet)
    from peftcli.train.trace_answer import Question, rank_rows

    question = Question(prompt, answer, row, source)
    question.check()
    with Progress(quiet=quiet) as progress:
        found = rank_rows(adapter, question, by, top, progress.show)
    if as_json:
        return console.print_json(found)
    asked = found["asked"]
    if "answer" in asked:
        said = "the answer" if asked["given"] else "the model says"
        console.paragraph(f"{said}: {asked['answer'].strip()}")
    for key, title in (("taught", "taught it"), ("against", "speak against it")):
        if found[key]:
            console.out()
            _print(title, found[key])
    console.out()
    console.paragraph(f"of {count_of(found['rows'], 'row')}, {found['clear']} stand out (4 deviations above the mean)")
    return None


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows: place, influence in standard deviations, and the start of the row, in the width of the terminal."""
    places = [each["row"] for each in rows]
    if len({place.rpartition("/")[0] for place in places}) == 1:
        places = [place.rpartition("/")[2] for place in places]
    width = max(map(len, [title, *places]))
    columns = max(shutil.get_terminal_size().columns, 40) - width - 13
    console.out(f"{title:<{width}}  influence  row")
    for place, each in zip(places, rows, strict=True):
        text = " | ".join(filter(None, [each["text"], each["label"]]))
        short = text if len(text) <= columns else f"{text[: columns - 3]}..."
        console.out(f"{place:<{width}}  {each['deviations']:>+9.1f}  {console.clean(short)}")
