"""``peftcli evaluate``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.junit import Junit, junit_report
from peftcli.cli.options import Json, Overrides, Quiet, RecipeFile, progress_log
from peftcli.cli.progress import Progress
from peftcli.reporting.blocks import in_order
from peftcli.system.outputs import require_writable
from peftcli.train.devices.launch import is_main_process, leave_group_on_exit


def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder or hub id; by default the base model alone is evaluated.")
    ] = None,
    as_json: Json = False,
    junit: Junit = None,
    quiet: Quiet = False,
) -> None:
    """Measure a recipe's metrics on its evaluation rows.

    Fails if a gate of the recipe does not hold.
    """
    from peftcli.recipe import load_recipe

    is_main = is_main_process()
    progress_log(quiet or not is_main)
    with junit_report(junit if is_main else None, recipe) as result:
        settings = load_recipe(recipe, overrides or [])
        if junit is not None and is_main:
            require_writable(junit)

        from peftcli.train.evaluate_adapter import measure
        from peftcli.train.finish import raise_failed_gates

        with Progress(quiet=quiet) as progress, leave_group_on_exit():
            result |= measure(settings, adapter, progress.show if is_main else lambda event: None)
        if not is_main:
            raise typer.Exit  # the main process prints the answer, and writes the report
    try:
        if as_json:
            console.print_json(result)
        else:
            measured = result["eval"]["last"]
            names = in_order(measured, result["eval"]["main"])
            width = max(map(len, names)) if console.is_terminal(sys.stdout) else 0
            for name in names:
                console.out(f"{name:<{width}} {measured[name]:.6g}")
    finally:  # also where nobody reads the answer
        raise_failed_gates(result["gates"])
