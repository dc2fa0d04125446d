"""The runs of a sweep: in one process over one copy of the base model's weights, a step each in turn.

Unlike ``train.together`` each run computes its own rows, so that it ends with the very bits that it ends with alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

from peftcli.errors import Diverged, Interrupted, PeftcliError
from peftcli.models.open import LoadedModel
from peftcli.recipe import parse_duration, to_yaml
from peftcli.schema import Recipe
from peftcli.system.disk import write_file
from peftcli.system.outputs import expand_user
from peftcli.system.signals import Stop
from peftcli.tasks.base import Task
from peftcli.train import evaluate_adapter
from peftcli.train.data import RunData
from peftcli.train.devices.accelerator import start_accelerator
from peftcli.train.evaluate import best_metric, evaluate, main_metric
from peftcli.train.events import Event, Message, OnEvent
from peftcli.train.loop import LESS_LEARNING, Gradients
from peftcli.train.run import complete_recipe, steps_of
from peftcli.train.runs.checkpoint import State, random_state, restore_random
from peftcli.train.runs.folder import DEFAULTS
from peftcli.train.runs.record import ErrorRecord
from peftcli.train.runs.resume import Run
from peftcli.train.setup import RunResources
from peftcli.train.sweep.halving import END, LABELS, TimeUp
from peftcli.train.sweep.record import Measurement, SweepRecord, TrialRecord
from peftcli.train.sweep.space import Settings
from peftcli.train.together import Group

_REPORT_SECONDS = 15.0
"""Between two lines of progress."""
_SPARE = 1.1
"""How much longer than measured the steps of the run that is to end may take."""


class TrialRun(RunResources):
    """One run, from its start or its newest checkpoint on."""

    def __init__(self, recipe: Recipe, group: Group, stop: Stop, tell: OnEvent):
        self.recipe, self.group, self.stop = recipe, group, stop
        self.random = random_state()
        self.outcome: dict[str, Any] | PeftcliError | None = None
        self.own: tuple[Run, RunData, State] | None = None
        """The run, its data and its state, from the first step on."""
        self.paces: list[float] = []
        """Seconds of each step."""
        self.steps = steps_of(recipe, DEFAULTS, group.accelerator, stop, tell, self)

    def load(self, recipe: Recipe, task: Task[Any]) -> LoadedModel:
        return self.group.load(recipe, task)

    def gradients_of(self, run: Run, data: RunData, state: State) -> Gradients:
        self.own = run, data, state
        return super().gradients_of(run, data, state)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.own[2].progress.step if self.own else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole run, once it is known."""
        return self.own[1].plan.total_steps if self.own else None

    def target(self, share: float) -> int:
        """The step at a share of them all."""
        return max(1, math.ceil((self.total or 0) * share))

    def is_at(self, share: float) -> bool:
        """Whether it need not train on to be measured at a share of its steps."""
        return self.outcome is not None or (share < END and self.own is not None and self.step >= self.target(share))

    def take_turn(self, share: float, *, save: bool = False) -> None:
        """Train until the next pause, with a checkpoint at the share of the steps."""
        before, start = self.step, time.monotonic()
        self.stop.save |= save or (share < END and self.own is not None and self.step == self.target(share) - 1)
        try:
            with self._random():
                next(self.steps)
        except StopIteration as end:
            self.outcome = end.value
        except PeftcliError as error:
            self.outcome = error
        if self.step > before > 0:  # the first one is slower
            self.paces.append(time.monotonic() - start)

    def end(self, error: PeftcliError) -> None:
        """End the run with an error, unless it has ended; give back its memory."""
        if self.outcome is None:
            try:
                self.steps.throw(error)
            except PeftcliError as ended:
                self.outcome = ended
        self.own = None

    def measure(self) -> dict[str, float]:
        """The metrics of the evaluation rows now; of a complete run, those of its adapter."""
        if isinstance(self.outcome, dict) and (self.own is None or self.outcome["eval"]["kept"]):
            ended = self.outcome
            if not ended["eval"]["kept"]:  # killed before this was measured, and the recipe does not
                ended = evaluate_adapter.measure(self.recipe, str(expand_user(Path(self.recipe.training.output_dir))))
            kept: dict[str, float] = ended["eval"]["kept"]
            return kept
        assert self.own is not None
        run, data, state = self.own
        assert data.examples.eval is not None
        outside = random_state()
        size = run.recipe.training.per_device_eval_batch_size
        found = evaluate(state.prepared.model, data.task, data.examples.eval, size, run.accelerator)
        restore_random(outside)
        return {name: value for name, value in (found or {}).items() if math.isfinite(value)}

    @contextmanager
    def _random(self) -> Iterator[None]:
        """Inside, random numbers are those of this run alone."""
        outside = random_state()
        restore_random(self.random)
        try:
            yield
        finally:
            self.random = random_state()
            restore_random(outside)


class Runs:
    """Trains the runs of a sweep: the ``Track`` of its ``Halving``."""

    def __init__(
        self,
        record: SweepRecord,
        folder: Path,
        recipe_of: Callable[[Settings, int | None, str], Recipe],
        stop: Stop,
        tell: OnEvent,
        deadline: float | None,
        started: float,
    ):
        """``recipe_of`` makes the recipe of settings, of a second seed, and of the run's name."""
        self.record, self.folder, self.recipe_of = record, folder, recipe_of
        self.stop, self.tell, self.deadline = stop, tell, deadline
        self.began, self.seconds_before = started, record.seconds
        self.group: Group | None = None
        self.live: dict[str, TrialRun] = {}
        self._warned: set[str] = set()
        self._said = time.monotonic()

    # --- runs ---------------------------------------------------------------------------------------------------------

    def trial(self, settings: Settings, second_seed_of: TrialRecord | None = None) -> TrialRecord:
        """Return the run with these settings, a new one where there is none."""
        first = second_seed_of.name if second_seed_of else None
        for each in self.record.runs:
            if each.settings == settings and each.second_seed_of == first:
                return each
        number = sum(each.second_seed_of is None for each in self.record.runs) + 1
        name = f"{first}-seed" if first else f"run-{number:02}"
        recipe = self.recipe_of(settings, second_seed_of.seed + 1 if second_seed_of else None, name)
        write_file(self.folder / f"{name}.yaml", to_yaml(recipe).encode())
        made = TrialRecord(name=name, settings=settings, seed=recipe.training.seed, second_seed_of=first)
        self.record.runs.append(made)
        return made

    def _start(self, trial: TrialRecord) -> TrialRun:
        """Return a run that is under way, started or resumed where it is not."""
        if (found := self.live.get(trial.name)) is not None:
            return found
        seed = trial.seed if trial.second_seed_of else None
        recipe = complete_recipe(self.recipe_of(trial.settings, seed, trial.name), self._teller(trial))
        if self.group is None:
            self.group = Group(start_accelerator(recipe))
        own = Stop(message=self.stop.message, at_once=False, signal=self.stop.signal)
        if recipe.training.max_time is not None:
            own.deadline = self.began + parse_duration(recipe.training.max_time)
        self.stop.followers.append(own)
        run = self.live[trial.name] = TrialRun(recipe, self.group, own, self._teller(trial))
        return run

    def _teller(self, trial: TrialRecord) -> OnEvent:
        """What receives the events of a run: each warning is told once, and what all runs do not at all."""

        def tell(event: Event) -> None:
            if isinstance(event, Message) and event.is_warning and event.text not in self._warned:
                self._warned.add(event.text)
                self.tell(replace(event, text=f"{trial.name}: {event.text}"))

        return tell

    # --- training -----------------------------------------------------------------------------------------------------

    def reach(self, trials: Sequence[TrialRecord], share: float, *, last: bool = False) -> None:
        """Train runs until a share of their steps, and measure them there, or note why they failed."""
        todo = [each for each in trials if not each.error and not each.at(share)]
        running = {each.name: each for each in todo}
        while running:
            for name, trial in [*running.items()]:
                run = self._turn(trial, share)
                if run.is_at(share):
                    del running[name]
                self._refuse_stop(last=last)
            if not last and running:
                self._look_at_time([self.live[name] for name in running])
            self._say(running, share)
        for trial in todo:
            self._measure(trial, share)

    def _turn(self, trial: TrialRecord, share: float) -> TrialRun:
        run, start = self._start(trial), time.monotonic()
        if not run.is_at(share):
            run.take_turn(share)
        trial.seconds += time.monotonic() - start
        trial.steps, trial.total = max(run.step, trial.steps), run.total or trial.total
        return run

    def _measure(self, trial: TrialRecord, share: float) -> None:
        """Measure a run, and record it."""
        run, start = self.live[trial.name], time.monotonic()
        if not isinstance(run.outcome, PeftcliError):
            metrics = run.measure()
            self._choose_metric(run, metrics)
            assert self.record.metric is not None
            if self.record.metric in metrics:
                value = metrics[self.record.metric]
                trial.measured.append(Measurement(share=share, step=trial.steps, value=value, metrics=metrics))
                trial.verdict = ""
                done = f"{trial.steps} of {trial.total} steps"
                self._log(f"{trial.name} ({trial.described}): {self.record.metric} {value:.4f} after {done}")
            else:
                message = f"the evaluation after step {trial.steps} has no finite {self.record.metric}"
                run.end(Diverged(message, hint=LESS_LEARNING))
        trial.seconds = round(trial.seconds + time.monotonic() - start, 3)
        trial.complete = isinstance(run.outcome, dict)
        if isinstance(run.outcome, PeftcliError):
            trial.error, trial.verdict = ErrorRecord.of(run.outcome), "failed"
            self._log(f"{trial.name} ({trial.described}) failed: {run.outcome.message}")
        if run.outcome is not None:
            run.own = None
        self.write()

    def _choose_metric(self, run: TrialRun, metrics: Mapping[str, float]) -> None:
        """Let the recipe's metric decide where it names another than the loss, else the task's main one."""
        if self.record.metric is not None or run.own is None:
            return
        own, data, _ = run.own
        training, task = own.recipe.training, data.task
        named = best_metric(training)
        metric = named if named != "eval_loss" else main_metric(task, metrics)
        lower = any(fnmatchcase(metric.removeprefix("eval_"), known) for known in task.lower_is_better)
        given = training.greater_is_better if metric == named else None
        self.record.metric, self.record.greater_is_better = metric, not lower if given is None else given

    def measure(self) -> None:
        """Measure all runs that are under way, where they are."""
        for trial in self.record.runs:
            run = self.live.get(trial.name)
            if run is not None and run.own is not None and run.step and run.outcome is None:
                self._measure(trial, round(run.step / (run.total or 1), 6))

    def drop(self, trial: TrialRecord, why: str) -> None:
        """End a run, with a checkpoint, and say why in its run.json."""
        trial.verdict = why
        run = self.live.pop(trial.name, None)
        if run is not None and run.outcome is None:
            if run.own is not None and run.step and not self._saved(run):
                run.take_turn(END, save=True)
                trial.steps = run.step
            hint = f"peftcli train {self.folder / trial.name}.yaml goes on with it"
            run.end(Interrupted(f"ended by the sweep: {why}", exit_code=75, hint=hint))
        self.write()

    @staticmethod
    def _saved(run: TrialRun) -> bool:
        """Whether a checkpoint holds the run as it is."""
        assert run.own is not None
        return bool(run.own[0].record.steps and run.own[0].record.steps.done == run.step)

    def close(self) -> None:
        """End the runs that an error of the sweep itself has left."""
        for run in self.live.values():
            run.end(Interrupted("the sweep has ended", exit_code=75))

    # --- time and signals ---------------------------------------------------------------------------------------------

    def _refuse_stop(self, *, last: bool) -> None:
        """End all runs, each with a checkpoint, where a signal came or the time is up; raise what ended them."""
        late = last and self.deadline is not None and time.monotonic() > self.deadline
        stopped = [run.outcome for run in self.live.values() if isinstance(run.outcome, Interrupted)]
        if not (late or stopped or self.stop.signal):
            return
        for run in self.live.values():
            if run.outcome is None and run.own is not None and run.step and not self._saved(run):
                run.take_turn(END, save=not self.stop.signal)  # a signal saves, and ends it, by itself
            run.end(Interrupted("stopped with the sweep", exit_code=75))
        self.record.status = "interrupted"
        self.write()
        hint = "run the same command again to go on"
        if late and not stopped:
            raise Interrupted("the sweep was stopped (--minutes)", exit_code=75, hint=hint)
        first = next((each for each in stopped if isinstance(each, Interrupted)), None)
        code = first.exit_code if first is not None and first.exit_code == 130 else 75
        raise Interrupted(
            f"the sweep was stopped: {first or self.stop.message}".split("\n")[0], exit_code=code, hint=hint
        )

    def _look_at_time(self, running: Sequence[TrialRun]) -> None:
        """Raise TimeUp if what is left of the time is needed to end one run."""
        if self.deadline is None:
            return
        needs = [(run.total - run.step) * fmean(run.paces) for run in running if run.total and run.paces]
        if time.monotonic() + max(needs, default=0.0) * _SPARE > self.deadline:
            self._log("what is left of --minutes is for the best run to end")
            raise TimeUp

    def _say(self, running: dict[str, TrialRecord], share: float) -> None:
        if running and time.monotonic() - self._said > _REPORT_SECONDS:
            steps = ", ".join(f"{name} {each.steps}" for name, each in running.items())
            total = next((each.total for each in running.values() if each.total), "?")
            self._log(f"to {LABELS.get(share, 'the end')} of {total} steps: {steps}")

    def _log(self, text: str) -> None:
        self._said = time.monotonic()
        self.tell(Message(text))

    def write(self) -> None:
        """Write sweep.json."""
        self.record.seconds = round(self.seconds_before + time.monotonic() - self.began, 3)
        self.record.write(self.folder)
