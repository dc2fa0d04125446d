"""``peftcli report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, path

_Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", parser=path, help="Run folders.")]
_Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", parser=path, help="Page (.html) or Markdown (.md); by default both, in the run folder."
    ),
]


def report(runs: _Runs, output: _Output = None, as_json: Json = False) -> None:
    """Write the report of a run again, or compare several on one page."""
    from peftcli.train.runs.listing import write_report

    files = [str(each) for each in write_report(runs, output)]
    if as_json:
        console.print_json({"files": files})
        return
    for file in files:
        console.out(file)
