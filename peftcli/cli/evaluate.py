"""``peftcli evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import completion, console
from peftcli.cli.junit import Junit, junit_report
from peftcli.cli.lm_eval import evaluate_tasks
from peftcli.cli.options import Json, Overrides, Quiet, path, progress_log
from peftcli.cli.progress import Progress, comparison_lines, table_of_adapters
from peftcli.errors import UsageError
from peftcli.reporting.blocks import in_order
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
        list[str] | None,
        typer.Option(
            help="Adapter folder or hub id, compared with the base model; several are compared with one another too. "
            "By default the base model alone is evaluated."
        ),
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
    adapters = adapter or []
    if lm_eval is not None:
        if len(adapters) > 1:
            raise UsageError("--lm-eval measures one adapter at a time", key="--adapter")
        return evaluate_tasks(
            recipe,
            lm_eval,
            adapter=next(iter(adapters), None),
            base=base,
            limit=limit,
            batch_size=batch_size,
            as_json=as_json,
            quiet=quiet,
        )
    if base is not None or limit is not None:
        raise UsageError("is for --lm-eval", key="--limit" if base is None else "--base")
    recipe, adapters = _of_run(recipe, adapters)
    return _measure_recipe(recipe, overrides or [], adapters, as_json=as_json, junit=junit, quiet=quiet)


def _measure_recipe(
    recipe: Path, overrides: list[str], adapters: list[str], *, as_json: bool, junit: Path | None, quiet: bool
) -> None:
    """Measure an adapter, or the base model alone, on a recipe's evaluation rows; print the answer."""
    from peftcli.recipe import load_recipe

    is_main = is_main_process()
    progress_log(quiet or not is_main)
    with junit_report(junit if is_main else None, recipe) as result:
        settings = load_recipe(recipe, overrides)
        if junit is not None and is_main:
            require_writable(junit)

        from peftcli.train.evaluate_adapter import measure, measure_several
        from peftcli.train.gates import raise_failed_gates

        with Progress(quiet=quiet) as progress, leave_group_on_exit():
            tell = progress.show if is_main else lambda event: None
            one = next(iter(adapters), None)
            result |= measure_several(settings, adapters, tell) if len(adapters) > 1 else measure(settings, one, tell)
        if not is_main:
            raise typer.Exit  # the main process prints the answer, and writes the report
    try:
        console.print_json(result) if as_json else _print_metrics(result)
    finally:  # also where nobody reads the answer
        raise_failed_gates(result["gates"])


def _of_run(target: Path, adapters: list[str]) -> tuple[Path, list[str]]:
    """Return the recipe and the adapters of a run's folder; those given for a recipe."""
    folder = expand_user(target)
    if not folder.is_dir():
        return target, adapters
    if not (folder / "recipe.yaml").is_file():
        hint = f"peftcli evaluate RECIPE --adapter {target}"
        raise UsageError("has no recipe.yaml, whose evaluation rows would be measured", file=str(target), hint=hint)
    return folder / "recipe.yaml", adapters or [str(target)]


def _print_metrics(result: dict[str, Any]) -> None:
    """Print an adapter's metrics, or a table of several; on stderr what they are against the base model."""
    if "adapters" in result:
        for line in table_of_adapters(result):
            console.out(line)
        return
    measured = result["eval"]["last"]
    names = in_order(measured, result["eval"]["main"])
    width = max(map(len, names)) if console.is_terminal(sys.stdout) else 0
    for name in names:
        console.out(f"{name:<{width}} {measured[name]:.6g}")
    for line in comparison_lines(result.get("comparison", {})):
        console.log(line)
