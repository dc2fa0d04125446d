"""``peftcli train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli import console


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    resume: Annotated[str, typer.Option(metavar="auto|CHECKPOINT", help="Where to go on from.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json instead of a summary.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the summary.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open data and model config, show what would train, and stop.")
    ] = False,
) -> None:
    """Fine-tune the model that a recipe names; run it again to go on after a stop."""
    from peftcli.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    if dry_run:
        from peftcli.train.deep import preview

        console.print_json(preview(settings))
        return

    from peftcli.train import launch

    launch.follow_parent()
    from peftcli.cli.progress import Progress, summary

    if not launch.launched() and (count := launch.process_count(settings.launch)) > 1:
        from peftcli.train.data import prepare_data
        from peftcli.train.folder import is_complete
        from peftcli.train.signals import handled

        if not is_complete(settings):
            with handled(), Progress(quiet=quiet) as progress:
                prepare_data(settings, progress.show)
        raise typer.Exit(launch.run_processes(sys.argv[1:], count, settings.launch))

    from peftcli.train.run import raise_failed_gates
    from peftcli.train.run import train as run

    with launch.left_in_the_end(), Progress(quiet=quiet or not launch.is_main_process()) as progress:
        result = run(settings, resume=resume, on_event=progress.show)
    if launch.is_main_process():
        if not progress.trained:
            console.log(f"{settings.training.output_dir} is complete already; nothing was done")
        console.print_json(result) if as_json else console.out(summary(result))
        raise_failed_gates(result["gates"])
