"""``peftcli import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, output_path, path
from peftcli.errors import UsageError
from peftcli.system.outputs import expand_user, is_stream, write_output

_TOOLS = "axolotl, llama-factory, trl, ms-swift, unsloth, torchtune or mlx-lm"


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", parser=path, help="Recipe, script or notebook of another tool.")
    ],
    output: Annotated[
        Path | None, typer.Option(parser=output_path, help="File for the recipe, instead of standard output.")
    ] = None,
    tool: Annotated[
        str | None, typer.Option("--from", metavar="TOOL", help=f"The tool, if the keys do not tell: {_TOOLS}.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn another tool's recipe into a recipe of peftcli."""
    from peftcli.drafting.importing import import_recipe

    target = output and expand_user(output)
    if target and not is_stream(target) and target.exists():
        raise UsageError("exists already", file=str(output), key="--output", hint="Name another file, or remove it.")
    found = import_recipe(file, tool)
    if target:
        write_output(target, found.recipe.encode())
    if as_json:
        console.print_json(found.as_dict())
    elif not target:
        console.out(found.recipe.rstrip("\n"))
    for line in found.report():
        console.log(line)
    if target and not is_stream(target):
        console.log(f"next: peftcli check --deep {output}")
