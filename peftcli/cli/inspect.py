"""``peftcli inspect``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, Overrides, Quiet, RecipeFile, path, progress_log
from peftcli.cli.progress import Progress
from peftcli.data.findings import refuse
from peftcli.system.outputs import expand_user

_ROWS = 3
_ROWS_OF_A_PAGE = 200

_Rows = Annotated[int | None, typer.Option(min=0, metavar="N", help="How many rows to show: 3; on a page 200.")]
_Row = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE:LINE|N", help="Show this row, or the example of this number; may be repeated."),
]
_Adapter = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Finished run of this data: add findings from the gradients of its rows."),
]
_Html = Annotated[Path | None, typer.Option(metavar="FILE", parser=path, help="Write a page with rows and audit.")]


def inspect(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: _Rows = None,
    row: _Row = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show where each token ends.")] = False,
    html: _Html = None,
    adapter: _Adapter = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which tokens a recipe trains, and audit its whole dataset."""
    from peftcli.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    tell = progress_log(quiet)
    from peftcli.cli.inspect_output import RowPrinter, print_audit, print_findings
    from peftcli.inspection.page import refuse_name, write_page
    from peftcli.inspection.report import inspect as look
    from peftcli.inspection.report import refuse_place

    if html is not None:
        html = expand_user(html)
        refuse_name(html)
    for place in row or ():
        refuse_place(place)
    with Progress(quiet=quiet) as progress:
        inspection = look(settings, progress.show, adapter)
    asked = [found for place in row or () for found in inspection.find(place)]
    shown = asked or inspection.sample(_ROWS if rows is None else rows)
    if html is not None:
        sample = inspection.sample(_ROWS_OF_A_PAGE if rows is None else rows)
        write_page(html, inspection, asked or [*inspection.of_findings(), *sample], tokens)
        tell(f"page: {html}")
    if as_json:
        console.print_json(
            {
                "rows": [each.as_dict() for each in shown],
                "audit": inspection.audit,
                "findings": [finding.as_dict() for finding in inspection.findings],
            }
        )
    else:
        RowPrinter(tokens).print(shown)
        print_audit(inspection)
        print_findings(inspection)
    refuse(inspection.findings, settings.dataset.allow)
    if not as_json:
        words = " ".join(map(shlex.quote, [str(recipe), *(overrides or [])]))
        console.out(f"next:\n  peftcli train {words}")
