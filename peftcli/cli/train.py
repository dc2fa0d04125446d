"""``peftcli train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftcli.cli import console
from peftcli.cli.junit_report import Junit, junit_report
from peftcli.cli.progress import Progress, summary
from peftcli.cli.quiet import Quiet, teller

if TYPE_CHECKING:
    from peftcli.schema import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|must|CHECKPOINT",
            help="auto: go on where a run of this recipe stopped; never: refuse to; must: refuse to begin anew.",
        ),
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Go on with a run that differs in this key, as the refusal names it."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Take the place of another run in the folder, which is moved aside at the end."
        ),
    ] = False,
    junit: Junit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead of a summary.")] = False,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open data and model config, show what would train, and stop.")
    ] = False,
) -> None:
    """Fine-tune the model that a recipe names; run it again to go on after a stop."""
    from peftcli.recipe import load_recipe
    from peftcli.train import launch

    teller(quiet)
    with junit_report(junit if launch.is_main_process() else None, recipe) as report:
        settings = load_recipe(recipe, overrides or [])
        if dry_run:
            from peftcli.train.preview import preview

            console.print_json(preview(settings))
            raise typer.Exit
        _note_what_is_saved(settings)
        launch.follow_parent()
        if not launch.launched():
            count = launch.process_count(settings.launch)
            if count > 1 or settings.launch.num_machines > 1:
                raise typer.Exit(_launch(settings, count, quiet=quiet, overwrite=overwrite))

        from peftcli.train.run import raise_failed_gates
        from peftcli.train.run import train as run

        with launch.left_in_the_end(), Progress(quiet=quiet or not launch.is_main_process()) as progress:
            result = run(
                settings, resume=resume, allow_change=allow_change or (), overwrite=overwrite, on_event=progress.show
            )
        if launch.is_main_process():
            report |= result
            if not progress.trained:
                console.log(f"{settings.training.output_dir} is complete already; nothing was done")
            console.print_json(result) if as_json else console.out(summary(result))
            raise_failed_gates(result["gates"])


def _note_what_is_saved(settings: Recipe) -> None:
    """A signal that comes while torch is loaded ends a run that can be gone on with, or not."""
    from peftcli.errors import PeftcliError
    from peftcli.system import signals
    from peftcli.train.runs.folder import RunFolder

    try:
        run = RunFolder(Path(settings.training.output_dir)).read()
    except PeftcliError:  # said later, with all that is wrong
        return
    signals.current().saved = run is not None and run["resumable"]


def _launch(settings: Recipe, count: int, *, quiet: bool, overwrite: bool) -> int:
    """Hold the run folder, encode the data once, and start a process for each device."""
    from peftcli.errors import PeftcliError
    from peftcli.train import launch
    from peftcli.train.data import prepare_data
    from peftcli.train.runs.folder import RunFolder, accounts, mark_ended

    folder, first = RunFolder(Path(settings.training.output_dir)), settings.launch.machine_rank == 0
    run = folder.read()
    if first:  # the others may share the folder
        folder.lock()
    before = accounts(folder)
    try:
        if overwrite or run is None or run["status"] != "complete":
            with Progress(quiet=quiet) as progress:
                prepare_data(settings, run.get("day") if run else None, progress.show)
        lock = folder.give_lock() if first else None
        return launch.run_processes(sys.argv[1:], count, settings.launch, lock, settings.training.save_on_signal)
    except PeftcliError as error:
        if first:
            mark_ended(folder, error, before)
        raise
    finally:
        folder.close()
