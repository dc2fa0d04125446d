"""``peftcli train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.junit import Junit, junit_report
from peftcli.cli.options import Overrides, Quiet, RecipeFile, not_empty, progress_log
from peftcli.cli.preview_output import MEMORY_UNKNOWN, print_preview
from peftcli.cli.progress import Progress, summary
from peftcli.cli.train_together import train_together
from peftcli.schema import Recipe
from peftcli.system.outputs import require_writable
from peftcli.train.devices import launch
from peftcli.train.devices.schedulers import with_schedulers_place
from peftcli.train.runs.folder import StartOptions

_Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|must|CHECKPOINT",
        parser=not_empty,
        help="auto: resume where a run of this recipe stopped; never: refuse to resume; must: resume or fail.",
    ),
]
_AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Resume a run that differs in this key, as the refusal names it."),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another run in the folder, which is moved aside at the end.")
]
_RunJson = Annotated[bool, typer.Option("--json", help="Print run.json, or all of a dry run, instead of a summary.")]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Open data and model config, show what would train, and stop.")
]
_Together = Annotated[
    bool, typer.Option("--together", help="Train several recipes at once on one base model: A.yaml B.yaml --together.")
]


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: _Resume = "auto",
    allow_change: _AllowChange = None,
    overwrite: _Overwrite = False,
    junit: Junit = None,
    as_json: _RunJson = False,
    quiet: Quiet = False,
    dry_run: _DryRun = False,
    together: _Together = False,
) -> None:
    """Fine-tune a model as a recipe says; run it again after a stop."""
    from peftcli.recipe import load_recipe

    progress_log(quiet)
    options = StartOptions(resume, allow_change or (), overwrite)
    if together:
        words = [str(recipe), *(overrides or [])]
        train_together(words, options, as_json=as_json, quiet=quiet, dry_run=dry_run, junit=junit)
        return
    is_main = launch.is_main_process()
    with junit_report(junit if is_main else None, recipe) as report:
        settings = load_recipe(recipe, overrides or [])
        settings = replace(settings, launch=with_schedulers_place(settings.launch))
        if dry_run:
            if is_main:
                _show_preview(settings, [str(recipe), *(overrides or [])], as_json)
            raise typer.Exit
        if junit is not None and is_main and settings.launch.machine_rank == 0:
            require_writable(junit)

        from peftcli.train.start import start

        with Progress(quiet=quiet or not is_main) as progress:
            run = start(settings, sys.argv[1:], options, progress.show)
        if run is None:
            raise typer.Exit  # the main process prints the answer, and writes the report
        report |= run
    if not progress.trained:
        console.log(f"{settings.training.output_dir} is complete already; nothing was done")

    from peftcli.train.gates import raise_failed_gates

    try:
        console.print_json(run) if as_json else console.out(summary(run, settings.training.output_dir))
    finally:  # also where nobody reads the answer
        raise_failed_gates(run["gates"])


def _show_preview(settings: Recipe, words: Sequence[str], as_json: bool) -> None:
    """Print what would train with the recipe and the overrides that ``words`` are."""
    from peftcli.train.preview import preview

    if launch.is_launched() and settings.launch.num_processes == "auto":
        started = replace(settings.launch, num_processes=launch.launched_processes(), num_machines=1)
        settings = replace(settings, launch=started)
    would = preview(settings)
    if would["memory"] is None:
        console.log(MEMORY_UNKNOWN)
    console.print_json(would) if as_json else print_preview(settings, would, words)
