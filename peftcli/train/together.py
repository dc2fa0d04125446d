"""Several runs in one process over one copy of their base model.

The runs take turns, a step each. The first one to need gradients gets those of all computed, in joined rows
(``tasks.text.fast.joined``); in all else, each does as if it were alone, with random numbers of its own.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError, Interrupted, PeftcliError, UsageError
from peftcli.models.open import LoadedModel
from peftcli.recipe import parse_duration
from peftcli.schema import Recipe
from peftcli.system.outputs import expand_user
from peftcli.system.signals import STARTED, Stop, handle_signals
from peftcli.tasks.base import Task
from peftcli.tasks.text.fast.joined import JoinedModel, JoinedModels
from peftcli.tasks.text.fast.shared_base import Randomness, sharing_copy
from peftcli.train import fresh_process
from peftcli.train.data import RunData
from peftcli.train.devices import launch
from peftcli.train.devices.accelerator import start_accelerator, uses_bf16
from peftcli.train.events import OnEvent
from peftcli.train.loop import Gradients
from peftcli.train.memory.fit import first_auto
from peftcli.train.run import complete_recipe, steps_of
from peftcli.train.runs.checkpoint import State
from peftcli.train.runs.folder import DEFAULTS, RESUME_MODES, RunFolder, StartOptions
from peftcli.train.runs.resume import Run
from peftcli.train.setup import RunResources, load_base

Outcome = dict[str, Any] | PeftcliError
"""The content of a complete run's run.json, or why the run ended earlier."""


def train_together(
    recipes: Mapping[str, Recipe],
    options: StartOptions = DEFAULTS,
    on_event: Callable[[str], OnEvent] = lambda name: lambda event: None,
    started: float | None = None,
) -> dict[str, Outcome]:
    """Train what several recipes describe, as ``peftcli.train.run.train`` does for one; return how each run ended.

    If one run cannot start, none does. A run that fails later, as one that diverges, ends alone. ``on_event`` returns
    what receives the events of the run of a name, as errors give it; the options are for each, and so is ``started``.

    Raises:
        PeftcliError: they cannot be trained together, or one of them cannot start.
    """
    tells = {name: on_event(name) for name in recipes}
    found = alike(recipes, options, tells)
    first = next(iter(found.values()))
    started = time.monotonic() if started is None else started
    save_on = signal.Signals[first.training.save_on_signal] if first.training.save_on_signal else None
    with handle_signals("stopped before the first step", save_on) as stop:
        accelerator = start_accelerator(first)
        group = Group(accelerator)
        for name, recipe in found.items():
            own = Stop(message=stop.message)
            if recipe.training.max_time is not None:
                own.deadline = started + parse_duration(recipe.training.max_time)
            stop.followers.append(own)
            member = Member(name, group)
            member.steps = steps_of(recipe, options, accelerator, own, tells[name], member)
            group.members.append(member)
        group.start()
        stop.at_once = False
        group.train()
    return {member.name: member.outcome for member in group.members if member.outcome is not None}


def start_together(
    recipes: Mapping[str, Recipe], options: StartOptions, on_event: Callable[[str], OnEvent]
) -> dict[str, Outcome]:
    """Train what several recipes describe, as ``train_together`` does, and verify what came of each."""
    outcomes = train_together(recipes, options, on_event, STARTED)
    fresh_process.release_gpu_memory()
    for name, outcome in outcomes.items():
        if recipes[name].training.verify and not isinstance(outcome, PeftcliError):
            try:
                fresh_process.verify_run(RunFolder(Path(recipes[name].training.output_dir)).path, on_event(name))
            except AdapterError as error:
                outcomes[name] = error
    return outcomes


_SHARED: dict[str, Callable[[Recipe], Any]] = {
    "base_model": lambda recipe: recipe.base_model,
    "task": lambda recipe: (recipe.task or {})["type"],
    "training.bf16": uses_bf16,
    "training.save_on_signal": lambda recipe: recipe.training.save_on_signal,
}


_NOT_JOINED = ("gradient_checkpointing", "torch_compile", "use_liger_kernel", "neftune_noise_alpha", "report_to")
"""Settings of training that do not work where the rows of several recipes are joined."""


def alike(
    recipes: Mapping[str, Recipe],
    options: StartOptions = DEFAULTS,
    tells: Mapping[str, OnEvent] | None = None,
    without: Sequence[str] = _NOT_JOINED,
) -> dict[str, Recipe]:
    """Complete recipes that are trained together, and check what they must share, and must not: settings ``without``.

    Raises:
        UsageError: names the recipe and the setting.
    """
    if options.resume not in RESUME_MODES:
        raise UsageError("names a checkpoint of one run; --together takes auto, must or never", key="--resume")
    for name, recipe in recipes.items():
        if launch.is_launched() or recipe.launch.num_machines > 1 or launch.process_count(recipe.launch) > 1:
            hint = "launch: {num_processes: 1}"
            raise UsageError("--together trains in one process", file=name, key="launch.num_processes", hint=hint)
    tells = tells or dict.fromkeys(recipes, lambda event: None)
    names, found = list(recipes), {name: complete_recipe(recipe, tells[name]) for name, recipe in recipes.items()}
    folders = dict[Path, str]()
    for name, recipe in found.items():
        for key, value in _SHARED.items():
            if value(recipe) != value(found[names[0]]):
                raise UsageError(f"is not that of {names[0]}, so they cannot be trained together", file=name, key=key)
        for key in without:
            if getattr(recipe.training, key):
                message = "does not work for recipes that are trained together"
                raise UsageError(message, file=name, key=f"training.{key}")
        if (auto := first_auto(recipe)) is not None:
            raise UsageError("auto is not for recipes that are trained together", file=name, key=auto)
        folder = expand_user(Path(recipe.training.output_dir)).resolve()
        if folder in folders:
            raise UsageError(f"is also that of {folders[folder]}", file=name, key="training.output_dir")
        for other, owner in folders.items():
            if folder in other.parents or other in folder.parents:
                raise UsageError(f"and that of {owner} are inside each other", file=name, key="training.output_dir")
        folders[folder] = name
    return found


class Group:
    """The runs, and what they share."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.members: list[Member] = []
        self._loaded: tuple[LoadedModel, dict[str, Any]] | None = None
        self._models: JoinedModels | None = None

    def start(self) -> None:
        """Let each run build its model, then begin.

        Raises:
            PeftcliError: one of them cannot; the others are ended.
        """
        for _ in range(2):
            for member in self.members:
                if member.outcome is None:
                    member.take_turn()
                if isinstance(member.outcome, PeftcliError):
                    for other in self.members:
                        other.end(Interrupted(f"not started, since {member.name} cannot be", exit_code=143))
                    raise member.outcome

    def train(self) -> None:
        """Let the runs take turns until all have ended."""
        while running := [member for member in self.members if member.outcome is None]:
            for member in running:
                member.take_turn()

    def load(self, recipe: Recipe, task: Task[Any]) -> LoadedModel:
        """Return a base model over the weights that all share."""
        options = task.model_options()
        is_first = self._loaded is None
        if self._loaded is None:
            self._loaded = load_base(recipe, task), options
        loaded, first_options = self._loaded
        if is_first or (not loaded.initialised and options == first_options):
            return replace(loaded, model=sharing_copy(loaded.model))
        own = load_base(recipe, task)  # a new head, drawn by the recipe's seed
        known = dict(loaded.model.named_parameters(remove_duplicate=False))
        for name, module in own.model.named_modules():
            for leaf, value in module._parameters.items():
                same = known.get(f"{name}.{leaf}".lstrip("."))
                if value is not None and same is not None and torch.equal(value.to(same.device), same):
                    module._parameters[leaf] = same
        return own

    def join(self, model: nn.Module, config: AdapterConfig, random: Randomness) -> JoinedModel:
        """Take a run's model for the joined rows.

        Raises:
            ModelError: the base model cannot compute joined rows.
            AdapterError: the adapter cannot.
        """
        assert self._loaded is not None
        with self.accelerator.autocast():
            if self._models is None:
                base = sharing_copy(self._loaded[0].model).to(self.accelerator.device)
                self._models = JoinedModels(base)
            return self._models.add(model, config, random)

    def compute(self) -> None:
        """Compute the gradients of the next step of all runs.

        In each round one micro-batch of each run goes through the base model, as long as the run has any.
        """
        live = [member.gradients for member in self.members if member.outcome is None and member.gradients]
        running = [each for each in live if each.next_step < each.plan.total_steps]
        try:
            self._backward(running)
        except Exception as error:
            for each in running:
                each.failure = error
            raise
        for each in running:
            each.ready = True

    def _backward(self, running: Sequence[JoinedGradients]) -> None:
        assert self._models is not None
        shares = [each.begin_step() for each in running]
        for number in range(max(len(parts) for parts, _ in shares)):
            turn = [(each, *share) for each, share in zip(running, shares, strict=True) if number < len(share[0])]
            losses = self._models.call([(each.joined, partial(each.loss, next(each.ahead))) for each, *_ in turn])
            added = list[torch.Tensor]()
            for (each, parts, num_targets), loss in zip(turn, losses, strict=True):
                added.append(loss * (1 / num_targets))
                each.total += loss.detach()
                with each.joined.guest.random():
                    penalty = each.penalty() if number + 1 == len(parts) else None
                added += [] if penalty is None else [penalty]
            self.accelerator.backward(sum(added))


class Member(RunResources):
    """One of the runs."""

    steps: Any
    """Of ``steps_of``."""

    def __init__(self, name: str, group: Group):
        self.name, self.group = name, group
        self.random = Randomness(group.accelerator.device)
        self.outcome: Outcome | None = None
        self.gradients: JoinedGradients | None = None
        self._joined: JoinedModel | None = None

    def load(self, recipe: Recipe, task: Task[Any]) -> LoadedModel:
        return self.group.load(recipe, task)

    def check(self, model: nn.Module, config: AdapterConfig) -> None:
        self._joined = self.group.join(model, config, self.random)

    def gradients_of(self, run: Run, data: RunData, state: State) -> Gradients:
        assert self._joined is not None
        own = data, state.prepared, run.accelerator, state.progress.step
        self.gradients = JoinedGradients(self.group, self._joined, *own)
        return self.gradients

    def take_turn(self) -> None:
        """Train until the next pause."""
        try:
            with self.random():
                next(self.steps)
        except StopIteration as end:
            self.outcome = end.value
        except PeftcliError as error:
            error.file = error.file or self.name
            self.outcome = error

    def end(self, error: PeftcliError) -> None:
        """End the run with an error, unless it has ended."""
        if self.outcome is None:
            try:
                self.steps.throw(error)
            except PeftcliError as ended:
                self.outcome = ended


class JoinedGradients(Gradients):
    """Gradients that are computed for all runs at once."""

    ready = False
    """Whether those of a step have been computed before the run came to it; ``total`` is then its loss."""
    failure: Exception | None = None
    """Why they could not be, of any run: what the runs computed is then of no step."""

    def __init__(self, group: Group, joined: JoinedModel, *own: Any):
        super().__init__(*own)
        self.group, self.joined, self.total, self.next_step = group, joined, self.zero(), self.start

    def begin_step(self) -> tuple[list[Any], int]:
        """Begin the next step: return its micro-batches, and its number of targets."""
        step, self.next_step = self.next_step, self.next_step + 1
        self.prepared.model.train()
        self.total = self.zero()
        return self.micro_batches(step), int(self.examples.targets[self.plan.global_batch(step)].sum())

    def of(self, step: int, num_targets: int) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        if not self.ready:
            random = self.joined.guest.random
            random.state = random.now()  # it is this run's turn
            self.group.compute()
            random.set(random.state)
        self.ready = False
        return self.total
