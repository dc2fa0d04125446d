"""One training run, from recipe to run folder.

``_train`` is the whole of it; each of its steps is a function below, or a module beside this one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from peftcli.recipe import parse_duration
from peftcli.recipe.accelerate_config import with_accelerate_launch
from peftcli.recipe.rates import with_rate
from peftcli.schema import Recipe
from peftcli.system.signals import Stop, handle_signals
from peftcli.train.data import with_task
from peftcli.train.devices.accelerator import start_accelerator, use_threads
from peftcli.train.events import OnEvent
from peftcli.train.finish import finish, record_outcome, record_start
from peftcli.train.init_adapter import with_init_settings
from peftcli.train.memory.fit import with_chosen_settings
from peftcli.train.read_data import read_data
from peftcli.train.runs.folder import DEFAULTS, StartOptions
from peftcli.train.runs.identity import refuse_other_recipes
from peftcli.train.runs.resume import Run, open_run, resume_state
from peftcli.train.setup import RunResources, build
from peftcli.train.trackers import Trackers, require_packages
from peftcli.train.training_loop import TrainingLoop


def train(
    recipe: Recipe,
    options: StartOptions = DEFAULTS,
    on_event: OnEvent = lambda event: None,
    started: float | None = None,
) -> dict[str, Any]:
    """Train what a recipe describes and write its run folder; resume where an earlier run of it stopped.

    The adapter is not verified, whatever training.verify says: call ``peftcli.train.fresh_process.verify_run``.

    Args:
        recipe: What to train.
        options: What to do about a run that is in the folder already.
        on_event: Receives what happens; see ``peftcli.train.events``.
        started: From when training.max_time counts, on the monotonic clock; None: from this call.

    Returns:
        The content of run.json.

    Raises:
        PeftcliError: of the kind that its class says. run.json then records it too.
    """
    training = recipe.training
    save_on = signal.Signals[training.save_on_signal] if training.save_on_signal else None
    with handle_signals("stopped before the first step", save_on) as stop:
        if training.max_time is not None:
            stop.deadline = (time.monotonic() if started is None else started) + parse_duration(training.max_time)
        recipe = with_accelerate_launch(recipe, os.environ)
        accelerator = start_accelerator(recipe)
        refuse_other_recipes(recipe)
        tell: OnEvent = on_event if accelerator.is_main_process else lambda event: None
        recipe = complete_recipe(recipe, tell)
        recipe = with_chosen_settings(recipe, accelerator, options.overwrite, tell)
        training_run = steps_of(recipe, options, accelerator, stop, tell, RunResources())
        while True:
            try:
                next(training_run)
            except StopIteration as end:
                return end.value


def complete_recipe(recipe: Recipe, tell: OnEvent) -> Recipe:
    """The recipe with its task, its learning rate and the settings of an adapter that it begins from."""
    return with_rate(with_init_settings(with_task(recipe, tell)))


def steps_of(
    recipe: Recipe, options: StartOptions, accelerator: Accelerator, stop: Stop, tell: OnEvent, host: RunResources
) -> Generator[None, None, dict[str, Any]]:
    """Train, pausing when the model is built, before the first step and after each. Returns the content of run.json."""
    with open_run(recipe, options, accelerator, stop, tell) as run:
        if run.record.status != "complete":
            stop.saved = run.record.resumable
            with record_outcome(run):
                yield from _train(run, host)
        if run.replaces is not None and run.is_main:
            run.replaces.replace()
        (content,) = broadcast_object_list([run.record.as_dict()])  # the main process's, in all of them
        return content


def _train(run: Run, host: RunResources) -> Iterator[None]:
    require_packages(run.recipe)
    threads = use_threads(run)
    data = read_data(run)
    built = build(run, data, host)
    host.check(run.accelerator.unwrap_model(built.prepared.model), built.prepared.config)
    yield
    state = resume_state(run, built.prepared, data.plan.total_steps)
    gradients = host.gradients_of(run, data, state)
    record_start(run, data, built, state, threads)
    with Trackers(run) as trackers:
        yield from TrainingLoop(run, data, state, gradients, trackers).run()
        finish(run, data, state)
