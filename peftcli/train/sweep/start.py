"""A whole sweep: what is tried, the runs, the winner and its proof."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peftcli.errors import PeftcliError, UsageError
from peftcli.recipe import load_recipe, to_yaml
from peftcli.recipe.data_checks import ways_to_evaluate
from peftcli.recipe.rates import usual_rate
from peftcli.schema import Recipe
from peftcli.system.disk import write_file
from peftcli.system.outputs import expand_user
from peftcli.system.signals import STARTED, handle_signals
from peftcli.train import fresh_process
from peftcli.train.data import with_task
from peftcli.train.devices.schedulers import with_schedulers_place
from peftcli.train.events import Message, OnEvent
from peftcli.train.gates import raise_failed_gates
from peftcli.train.runs.folder import RunFolder
from peftcli.train.runs.status import status
from peftcli.train.sweep.halving import Halving
from peftcli.train.sweep.picture import draw
from peftcli.train.sweep.proposals import TpeProposals, require_optuna
from peftcli.train.sweep.record import SweepRecord, TrialRecord, error_of, read_sweep
from peftcli.train.sweep.runs import Runs
from peftcli.train.sweep.space import LARGEST_GRID, Settings, Space, read_space
from peftcli.train.together import alike

RATE, RANK = "training.learning_rate", "method.r"
_FACTORS = (1 / 3, 1, 3)
_NOT_SHARED = ("torch_compile", "use_liger_kernel", "report_to")
"""Settings that change more than a run's own modules, or report one run a process."""
_FINAL = ("Diverged",)
"""Kinds of failures that the same run would meet again."""


@dataclass(frozen=True)
class SweepOptions:
    """What to sweep, and where."""

    recipe: Path
    words: Sequence[str] = ()
    """``KEY=VALUE`` for all runs, ``KEY=A,B,C`` and ``KEY=LOW..HIGH`` to try."""
    output: Path | None = None
    """The sweep's folder; None: beside the recipe's output_dir."""
    minutes: float | None = None
    trials: int = LARGEST_GRID
    """How many settings are proposed where not all are tried."""


def sweep(options: SweepOptions, tell: OnEvent) -> tuple[SweepRecord, Path]:
    """Try settings of a recipe, and end the best run. Returns the content of sweep.json, and the sweep's folder.

    The record names the runs that failed; ``raise_failures`` raises them.

    Raises:
        PeftcliError: the recipe cannot be swept; or all runs have failed, or a signal came.
    """
    space = read_space(options.words)
    recipe = load_recipe(options.recipe, space.fixed)
    _refuse(recipe, options)
    require_optuna(space)
    folder = expand_user(options.output or Path(f"{recipe.training.output_dir.rstrip('/')}-sweep"))
    save_on = signal.Signals[recipe.training.save_on_signal] if recipe.training.save_on_signal else None
    with handle_signals("stopped before the first step", save_on) as stop:
        _open(folder, recipe, options)  # refuses before anything is written
        lock = RunFolder(folder)
        lock.lock()
        try:
            record = _open(folder, recipe, options)
            if record.status == "complete" or (record.status == "failed" and record.winner):
                tell(Message(f"{folder} is complete already; nothing was done"))
                return record, folder
            stop.at_once = False
            recipe_of = partial(_recipe_of, options, space, folder)
            deadline = None if options.minutes is None else STARTED + 60 * options.minutes
            runs = Runs(record, folder, recipe_of, stop, tell, deadline, time.monotonic())
            try:
                _run(runs, recipe, space, options, tell)
            finally:
                runs.close()
        finally:
            lock.close()
    if record.winner:
        trained = folder / record.winner
        fresh_process.release_gpu_memory()
        if recipe.training.verify:
            fresh_process.verify_run(trained, tell)
    return record, folder


def _refuse(recipe: Recipe, options: SweepOptions) -> None:
    """Refuse what cannot be swept."""
    if not ways_to_evaluate(recipe.dataset):
        hint = "dataset.eval_fraction=0.1 holds out a tenth of the training rows; dataset.eval names other rows"
        raise UsageError(
            "a sweep compares runs by evaluation rows, and the recipe names none",
            file=str(options.recipe),
            key="dataset.eval_fraction",
            hint=hint,
        )
    if options.minutes is not None and not options.minutes > 0:
        raise UsageError("takes a number of minutes above 0", key="--minutes")
    if options.trials < 2:
        raise UsageError("takes a number of at least 2", key="--trials")


def _open(folder: Path, recipe: Recipe, options: SweepOptions) -> SweepRecord:
    """Return the record of the sweep in a folder, a new one where there is none.

    Raises:
        UsageError: the folder holds another sweep, or other files.
    """
    digest = hashlib.sha256(to_yaml(recipe).encode()).hexdigest()
    keys = sorted(options.words)
    record = read_sweep(folder)
    if record is None:
        if folder.exists() and (not folder.is_dir() or any(each.name != ".lock" for each in folder.iterdir())):
            hint = "choose an empty or new folder"
            raise UsageError("holds other files and no sweep", file=str(folder), key="--output", hint=hint)
        return SweepRecord(status="running", recipe=str(options.recipe), recipe_sha256=digest, keys=keys)
    if record.recipe_sha256 != digest or record.keys != keys:
        what = "of another recipe" if record.recipe_sha256 != digest else f"of {' '.join(record.keys) or 'no keys'}"
        hint = "choose another --output; or delete that folder"
        raise UsageError(f"holds a sweep {what}; nothing was changed", file=str(folder), key="--output", hint=hint)
    for each in record.runs:
        if each.error is not None and each.error.kind not in _FINAL:
            each.error = None
    return record


def _recipe_of(
    options: SweepOptions, space: Space, folder: Path, settings: Settings, seed: int | None, name: str
) -> Recipe:
    """The recipe of a run: with a second seed, on the same evaluation rows."""
    values = [f"{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(options.recipe, [*space.fixed, *values, f"training.output_dir={folder / name}"])
    recipe = replace(recipe, launch=with_schedulers_place(recipe.launch))
    if seed is None:
        return recipe
    dataset, training = recipe.dataset, replace(recipe.training, seed=seed % 2**32)
    if dataset.eval_fraction is not None and dataset.eval_seed is None:
        dataset = replace(dataset, eval_seed=recipe.training.seed)
    return replace(recipe, dataset=dataset, training=training)


def _run(runs: Runs, recipe: Recipe, space: Space, options: SweepOptions, tell: OnEvent) -> None:
    """Search, name the winner, and draw the picture."""
    record, halving = runs.record, Halving(runs)
    record.status, record.not_tried = "running", []
    search: Callable[[], list[TrialRecord]]
    if not space.keys:
        search = partial(halving.one_after_another, _usual_stages(runs, recipe, tell))
    elif space.size > LARGEST_GRID:
        _refuse_unalike(runs, [*space.alone()])
        proposals = TpeProposals(space, recipe.training.seed, lambda: record.greater_is_better)
        search = partial(halving.proposed, proposals, options.trials)
    else:
        settings = list(space.grid())
        _refuse_unalike(runs, settings)
        tell(Message(f"{len(settings)} settings of {', '.join(space.keys)}"))
        search = partial(halving.grid, settings)
    winner = halving.name_winner(search)
    failed = any(each.error for each in record.runs)
    record.status = "failed" if failed else "complete"
    write_file(runs.folder / "sweep.png", draw(record))
    runs.write()
    if winner is None:
        raise_failures(record)


def _refuse_unalike(runs: Runs, settings: Sequence[Settings]) -> None:
    """Refuse settings with which runs cannot share the base model, before anything is trained."""
    named = {" ".join(f"{key}={value}" for key, value in each.items()): each for each in settings}
    recipes = {name: runs.recipe_of(each, None, f"{at}") for at, (name, each) in enumerate(named.items())}
    alike(recipes, without=_NOT_SHARED)


def _usual_stages(runs: Runs, recipe: Recipe, tell: OnEvent) -> dict[str, Callable[[Settings], list[Settings]]]:
    """What is tried where no keys are given: the learning rate, then r at the best one."""
    recipe = with_task(recipe, tell)
    given = recipe.training.learning_rate
    rate = usual_rate(recipe) if given == "auto" else given
    rank: Any = recipe.method.get("r")
    sized = isinstance(rank, int) and recipe.training.init_adapter_from is None
    also = {RANK: str(rank)} if sized else {}
    rates = [{RATE: f"{rate * factor:.3g}", **also} for factor in _FACTORS]
    _refuse_unalike(runs, rates)
    stages: dict[str, Callable[[Settings], list[Settings]]] = {RATE: lambda best: rates}

    def beyond(best: Settings) -> list[Settings]:
        """One rate more where the best is the smallest or the largest."""
        further = {rates[0][RATE]: rate / 9, rates[-1][RATE]: rate * 9}.get(best[RATE])
        return [] if further is None else [{**best, RATE: f"{further:.3g}"}]

    stages["a smaller or larger " + RATE] = beyond
    whose = "the usual one of the method" if given == "auto" else "the recipe's"
    text = f"{RATE} at 1/3, 1 and 3 times {rate:g}, {whose}, and further if the best is at an end"
    if sized:
        ranks = dict.fromkeys(str(each) for each in (math.ceil(rank / 2), 2 * rank) if each != rank)
        stages[f"other values of {RANK}"] = lambda best: [{**best, RANK: each} for each in ranks]
        text += f"; then {RANK} {' and '.join(ranks)} besides {rank} at the best"
    tell(Message(text))
    return stages


def raise_failures(record: SweepRecord, folder: Path | None = None) -> None:
    """Raise the first failure of a run, with the names of all that failed; else what gates say of the winner.

    Raises:
        PeftcliError: a run has failed.
        GateFailed: the winner misses a gate of the recipe.
    """
    failed = [each for each in record.runs if each.error]
    if failed:
        error: PeftcliError = error_of(failed[0])
        if others := ", ".join(each.name for each in failed[1:]):
            error.message += f"; so did {others}"
        raise error
    if folder is not None and record.winner is not None:
        raise_failed_gates(status(folder / record.winner)["gates"])
