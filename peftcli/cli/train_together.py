"""``peftcli train A.yaml B.yaml --together``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.cli import console
from peftcli.cli.preview_output import MEMORY_UNKNOWN, print_preview
from peftcli.cli.progress import Progress, summary
from peftcli.errors import Interrupted, PeftcliError, UsageError
from peftcli.train.devices.schedulers import with_schedulers_place
from peftcli.train.events import OnEvent
from peftcli.train.runs.folder import RunFolder, StartOptions

if TYPE_CHECKING:
    from peftcli.schema import Recipe


def train_together(
    words: Sequence[str], options: StartOptions, *, as_json: bool, quiet: bool, dry_run: bool, junit: Path | None
) -> None:
    """Train several recipes at once, and print what became of each.

    Raises:
        PeftcliError: the recipes cannot be trained together, or the first that failed.
    """
    from peftcli.recipe import load_recipe, recipes_and_overrides

    if junit is not None:
        raise UsageError("is for one recipe", key="--junit")
    paths, overrides = recipes_and_overrides(words)
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError("is named twice", file=str(path), hint="each recipe has a training.output_dir of its own")
    loaded = {str(path): load_recipe(path, overrides) for path in paths}
    recipes = {name: replace(each, launch=with_schedulers_place(each.launch)) for name, each in loaded.items()}
    from peftcli.train.start import note_resumable

    for recipe in recipes.values():
        note_resumable(RunFolder(Path(recipe.training.output_dir)))

    from peftcli.train.together import alike, start_together  # torch loads here

    if dry_run:
        alike(recipes, options)
        return _show_previews(recipes, overrides, as_json)
    with ExitStack() as stack:
        stems = [path.stem for path in paths]
        labels = stems if len(set(stems)) == len(stems) else list(loaded)  # where some are equal, all of the path
        bars = (stack.enter_context(Progress(quiet=quiet, label=label)) for label in labels)
        shown = dict(zip(loaded, bars, strict=True))
        on_event: dict[str, OnEvent] = {name: progress.show for name, progress in shown.items()}
        outcomes = start_together(recipes, options, on_event.__getitem__)
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, PeftcliError)]
    runs = [outcome for outcome in outcomes.values() if not isinstance(outcome, PeftcliError)]
    if not (as_json and errors):  # stdout is the error's object
        _print_runs(recipes, shown, outcomes, as_json=as_json)
    if errors:
        raised = min(errors, key=lambda error: isinstance(error, Interrupted))
        for error in errors:
            if error is not raised:
                console.log(f"error: {error}")
        raise raised

    from peftcli.train.gates import raise_failed_gates

    raise_failed_gates([gate for run in runs for gate in run["gates"]])
    return None


def _show_previews(recipes: dict[str, Recipe], overrides: Sequence[str], as_json: bool) -> None:
    """Print what would train."""
    from peftcli.train.preview import preview

    runs = [preview(recipe) for recipe in recipes.values()]
    for name, run in zip(recipes, runs, strict=True):
        if run["memory"] is None:
            console.log(f"{name}: {MEMORY_UNKNOWN}")
    if as_json:
        return console.print_json({"runs": runs})
    for (name, recipe), run in zip(recipes.items(), runs, strict=True):
        console.out(f"{name}:")
        print_preview(recipe, run, [name, *overrides])
    return None


def _print_runs(
    recipes: dict[str, Recipe], shown: dict[str, Progress], outcomes: dict[str, Any], *, as_json: bool
) -> None:
    complete = {name: run for name, run in outcomes.items() if not isinstance(run, PeftcliError)}
    for name in complete:
        if not shown[name].trained:
            console.log(f"{recipes[name].training.output_dir} is complete already; nothing was done")
    if as_json:
        console.print_json({"runs": list(complete.values())})
        return
    for name, run in complete.items():
        console.out(f"{name}: {summary(run, recipes[name].training.output_dir)}")
