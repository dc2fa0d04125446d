"""``peftcli init``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, not_empty, path
from peftcli.errors import UsageError

if TYPE_CHECKING:
    from peftcli.drafting.drafting import Draft


def init(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", parser=not_empty, help="Files, folders, archives, or a hub dataset id."),
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model: hub id or folder. By default a small open one is proposed.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task, where the data leave a choice: `peftcli info tasks`.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="A column of the task and yours: label=category."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(parser=path, help="The recipe to write; by default recipe.yaml.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recipe for your data, each line with its reason."""
    from peftcli.drafting.drafting import Request, draft

    request = Request(
        data=data,
        base=base,
        task=task,
        columns=_columns(column or []),
        output=output or Path("recipe.yaml"),
        overwrite=overwrite,
    )
    asks = not as_json and sys.stdin.isatty() and sys.stderr.isatty()
    made = draft(request, _ask if asks else None)
    for note in made.notes:
        console.log(f"note: {note}")
    if as_json:
        console.print_json(made.as_dict())
    else:
        _print(made)


def _print(made: Draft) -> None:
    """Print what was decided, and the next commands."""
    columns = ", ".join(
        f"{ours}: {name if isinstance(name, str) else ' '.join(name)}" for ours, name in made.columns.items()
    )
    split = made.reasons.get("dataset.eval_fraction", made.eval or "")
    facts = {
        "task": made.task,
        "columns": columns,
        "rows": f"{made.rows:,} in {', '.join(made.train)}",
        "evaluation": split.partition(";")[0],
        "base model": made.base_model,
        "memory": made.memory or "see `peftcli check --deep`",
    }
    for name, value in facts.items():
        console.out(f"{name + ':':<12} {value}")
    for proposal in made.proposals:
        console.out(f"{'or:':<12} {proposal}")
    console.out(f"\nwrote {made.recipe}; next:")
    for command in ("check --deep", "inspect", "train"):
        console.out(f"  peftcli {command} {made.recipe}")


def _columns(given: Sequence[str]) -> dict[str, str]:
    found = dict[str, str]()
    for each in given:
        name, mark, value = each.partition("=")
        if not (mark and name and value):
            raise UsageError(f"expected NAME=COLUMN, found {each[:60]!r}", key="--column")
        found[name] = value
    return found


def _ask(readings: Sequence[str]) -> int:
    """Let the user choose between readings."""
    console.log("The rows may be for:")
    for number, each in enumerate(readings, start=1):
        console.log(f"  {number}  {each}")
    chosen: int = typer.prompt("Which one", type=int, err=True)
    if not 1 <= chosen <= len(readings):
        raise UsageError(f"expected a number from 1 to {len(readings)}, found {chosen}")
    return chosen - 1
