"""``peftcli schema``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.errors import UsageError
from peftcli.output_schemas import names, output_schema

_OUTPUTS = names()


def schema(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=lambda incomplete: [each for each in ("recipe", *_OUTPUTS) if each.startswith(incomplete)],
            help=f"recipe, run (run.json), or the JSON output of a command: {', '.join(_OUTPUTS)}.",
        ),
    ] = "recipe",
) -> None:
    """Print the JSON Schema of recipes, or of a command's output."""
    if name == "recipe":
        from peftcli.recipe.reference import json_schema

        console.print_json(json_schema())
    elif name in _OUTPUTS:
        console.print_json(output_schema(name))
    else:
        raise UsageError(f"unknown schema: {name[:60]!r}", hint=f"known: recipe, {', '.join(_OUTPUTS)}")
