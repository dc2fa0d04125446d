"""``peftcli sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, Quiet, RecipeFile, path, progress_log
from peftcli.guard.files import command_word
from peftcli.train.events import Event, Message

if TYPE_CHECKING:
    from peftcli.train.sweep.record import SweepRecord, TrialRecord

_Keys = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=A,B,C]...", help="Values to try, or a range: KEY=1e-5..1e-3. One value: for all runs."
    ),
]
_Minutes = Annotated[float | None, typer.Option(help="Bound of the whole sweep; the best run known then ends.")]
_Trials = Annotated[int, typer.Option(help="Settings to propose of a range, or of more than 30 (needs optuna).")]
_Output = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", parser=path, help="Folder of the sweep; by default the recipe's output_dir and -sweep."
    ),
]


def sweep(
    recipe: RecipeFile,
    keys: _Keys = None,
    minutes: _Minutes = None,
    trials: _Trials = 30,
    output: _Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try learning rates and other values, and keep the best."""
    progress_log(quiet)

    def show(event: Event) -> None:
        if isinstance(event, Message) and not (quiet and not event.is_warning):
            console.log(f"warning: {event.text}" if event.is_warning else event.text)

    from peftcli.train.sweep import start  # torch loads here

    record, folder = start.sweep(start.SweepOptions(recipe, keys or [], output, minutes, trials), show)
    failed = any(each.error for each in record.runs)
    if as_json and not failed:  # stdout is the error's object
        console.print_json(record.as_dict())
    elif not as_json:
        _print(record, folder)
    start.raise_failures(record, folder)


def _print(record: SweepRecord, folder: Path) -> None:
    metric = (record.metric or "").removeprefix("eval_")
    names = list(dict.fromkeys(key for each in record.runs for key in each.settings))
    columns = ["run", *(name.rpartition(".")[2] for name in names), "seed", "steps", metric, "time", "verdict"]
    rows = [_row(each, names) for each in record.runs]
    console.table(columns, rows)
    console.out()
    if (seeds := record.seeds) is not None:
        first, second = seeds.runs
        text = f"{first} and {second} differ by {seeds.difference:.4f} in {metric}; a second seed changes it by up to "
        text += f"{seeds.by_seed:.4f}"
        console.out(f"{text}: {'no more than chance' if seeds.within else 'more than chance'}")
    for each in record.not_tried:
        console.out(f"not tried, for lack of time: {each}")
    if record.winner is not None:
        winner = record.run(record.winner)
        console.out(f"winner: {winner.name} ({winner.described or 'as the recipe is'})")
        console.out(f"  adapter  {folder / winner.name}")
        console.out(f"  picture  {folder / 'sweep.png'}")
        console.out(f"  recipe   peftcli train {command_word(folder / f'{winner.name}.yaml')}")


def _row(trial: TrialRecord, names: list[str]) -> list[str]:
    last = trial.last
    values = [trial.settings.get(name, "") for name in names]
    value = f"{last.value:.4f}" if last else ""
    steps = f"{trial.steps}/{trial.total or '?'}"
    return [trial.name, *values, str(trial.seed), steps, value, f"{trial.seconds:.1f} s", trial.verdict]
