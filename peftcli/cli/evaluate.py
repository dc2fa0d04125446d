"""``peftcli evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli import completion, console
from peftcli.cli.junit import Junit, junit_report
from peftcli.cli.lm_eval import evaluate_tasks
from peftcli.cli.options import Json, Overrides, Quiet, path, progress_log
from peftcli.cli.progress import Progress, in_order
from peftcli.errors import UsageError
from peftcli.system.outputs import expand_user, require_writable
from peftcli.train.devices.launch import is_main_process, leave_group_on_exit

_Target = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE|ADAPTER", parser=path, autocompletion=completion.recipes, help="YAML recipe, or an adapter."
    ),
]
_LmEval = Annotated[
    str | None,
    typer.Option(
        "--lm-eval",
        metavar="TASKS",
        help="Measure tasks of lm-eval instead: names with commas, a task file (.yaml), or rows (.jsonl).",
    ),
]


def evaluate(
    recipe: _Target,
    overrides: Overrides = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder or hub id; by default the base model alone is evaluated.")
    ] = None,
    lm_eval: _LmEval = None,
    base: Annotated[str | None, typer.Option(help="--lm-eval: base model to use instead of the adapter's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="--lm-eval: use only the first N rows of a task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="--lm-eval: rows per batch.")] = 8,
    as_json: Json = False,
    junit: Junit = None,
    quiet: Quiet = False,
) -> None:
    """Measure a recipe's metrics on its evaluation rows.

    Fails if a gate of the recipe does not hold. For a run's folder, its own recipe.yaml is the recipe.
    With --lm-eval, an adapter and its base model are measured on tasks of lm-eval instead.
    """
    if lm_eval is not None:
        return evaluate_tasks(
            recipe,
            lm_eval,
            adapter=adapter,
            base=base,
            limit=limit,
            batch_size=batch_size,
            as_json=as_json,
            quiet=quiet,
        )
    if base is not None or limit is not None:
        raise UsageError("is for --lm-eval", key="--limit" if base is None else "--base")
    recipe, adapter = _of_run(recipe, adapter)
    return _measure_recipe(recipe, overrides or [], adapter, as_json=as_json, junit=junit, quiet=quiet)


def _measure_recipe(
    recipe: Path, overrides: list[str], adapter: str | None, *, as_json: bool, junit: Path | None, quiet: bool
) -> None:
    """Measure an adapter, or the base model alone, on a recipe's evaluation rows; print the answer."""
    from peftcli.recipe import load_recipe

    is_main = is_main_process()
    progress_log(quiet or not is_main)
    with junit_report(junit if is_main else None, recipe) as result:
        settings = load_recipe(recipe, overrides)
        if junit is not None and is_main:
            require_writable(junit)

        from peftcli.train.evaluate_adapter import measure
        from peftcli.train.gates import raise_failed_gates

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


def _of_run(target: Path, adapter: str | None) -> tuple[Path, str | None]:
    """Return the recipe and the adapter of a run's folder; those given for a recipe."""
    folder = expand_user(target)
    if not folder.is_dir():
        return target, adapter
    if not (folder / "recipe.yaml").is_file():
        hint = f"peftcli evaluate RECIPE --adapter {target}"
        raise UsageError("has no recipe.yaml, whose evaluation rows would be measured", file=str(target), hint=hint)
    return folder / "recipe.yaml", adapter or str(target)
