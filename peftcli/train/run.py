"""One training run, from recipe to run folder.

``_train`` is the whole of it; each of its steps is a function below, or a module beside this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from peftcli.adapters.load import AdapterSource
from peftcli.core.config import AdapterConfig
from peftcli.core.protocols import AfterResume, layers_of, needs_base_weights, needs_batches
from peftcli.data.findings import refuse
from peftcli.errors import DataError, FolderBusy, Interrupted, PeftcliError, StorageError, UsageError, to_peftcli_error
from peftcli.models import hub_files
from peftcli.models.open import LoadedModel, open_base
from peftcli.recipe import method_config, parse_duration
from peftcli.recipe.accelerate_config import with_accelerate_launch
from peftcli.recipe.rates import rate_warning, with_rate
from peftcli.schema import Recipe
from peftcli.system import date
from peftcli.system.addresses import notice_lost_machines, on_several_machines
from peftcli.system.outputs import expand_user
from peftcli.system.signals import Stop, handle_signals
from peftcli.tasks import open_task, task_record
from peftcli.tasks.base import Begins, ChecksModel, Task
from peftcli.tasks.text.unpadded import unpad
from peftcli.train.batches import BatchForm
from peftcli.train.data import RunData, load_data, plan_of, refuse_few_rows, with_task
from peftcli.train.devices.kernels import compile_layers
from peftcli.train.devices.launch import TRAINING, report
from peftcli.train.devices.sharding import shard
from peftcli.train.devices.strategies import STAGES, is_dividing, refuse_strategy
from peftcli.train.devices.threads import use_threads
from peftcli.train.evaluate import import_packages, refuse_metrics
from peftcli.train.events import Message, OnEvent, Ready
from peftcli.train.finish import finish
from peftcli.train.init_adapter import find_init_adapter, refuse_other_base, with_init_settings
from peftcli.train.loop import Gradients, PreparedModel
from peftcli.train.memory.fit import check_disk, with_chosen_settings
from peftcli.train.noise import add_embedding_noise
from peftcli.train.optim import check_optimizer, unfinished_warmup
from peftcli.train.options import DEFAULTS, StartOptions
from peftcli.train.packing_check import refuse_contamination
from peftcli.train.report import peak_memory_bytes
from peftcli.train.runs.checkpoint import Misfit, Progress, State, load_checkpoint, set_newer_aside
from peftcli.train.runs.identity import Change, comparable_settings, is_allowed
from peftcli.train.runs.record import (
    AttemptRecord,
    DataRecord,
    ErrorRecord,
    MemoryRecord,
    ParametersRecord,
    StepsRecord,
    ThreadsRecord,
)
from peftcli.train.runs.resume import Run, checkpoint_to_resume, commit_of, open_run
from peftcli.train.runs.typed_json import ABSENT, flatten, from_json
from peftcli.train.setup import adapted_model, calibrate, load_base, prepare, start_accelerator
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
        _refuse_other_recipes(recipe)
        tell: OnEvent = on_event if accelerator.is_main_process else lambda event: None
        recipe = complete_recipe(recipe, tell)
        recipe = with_chosen_settings(recipe, accelerator, options.overwrite, tell)
        training_run = steps_of(recipe, options, accelerator, stop, tell, RunHost())
        while True:
            try:
                next(training_run)
            except StopIteration as end:
                return end.value


_FILES = ("base_model.name", "base_model.chat_template", "dataset.train", "dataset.eval", "training.init_adapter_from")
"""Settings that name files, which each machine may have elsewhere. What is in them is compared as they are read."""


def _refuse_other_recipes(recipe: Recipe) -> None:
    """Refuse recipes that differ between processes: each would take a step of its own."""
    settings = comparable_settings(recipe)
    settings["training"] |= {"save_strategy": recipe.training.save_strategy, "save_steps": recipe.training.save_steps}
    settings["dataset"]["mix"] = [{**source, "train": None} for source in settings["dataset"]["mix"]]
    own = {key: value for key, value in flatten(settings).items() if key not in _FILES}
    first, *others = gather_object([own])
    for number, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                message = f"is {first.get(key)!r} in process 0, and {other.get(key)!r} in process {number}"
                raise UsageError(message, key=key, hint="start each machine with the same recipe and overrides")


def complete_recipe(recipe: Recipe, tell: OnEvent) -> Recipe:
    """The recipe with its task, its learning rate and the settings of an adapter that it begins from."""
    return with_rate(with_init_settings(with_task(recipe, tell)))


class RunHost:
    """Provides a run's base model and gradients: its own, or those of a group (``together.Member``)."""

    def load(self, recipe: Recipe, task: Task[Any]) -> LoadedModel:
        """Load the base model."""
        return load_base(recipe, task)

    def check(self, model: nn.Module, config: AdapterConfig) -> None:
        """Check the model that was built, before run.json records the start."""

    def gradients_of(self, run: Run, data: RunData, state: State) -> Gradients:
        """Return what computes the gradients of the steps to come."""
        return Gradients(data, state.prepared, run.accelerator, state.progress.step)


def steps_of(
    recipe: Recipe, options: StartOptions, accelerator: Accelerator, stop: Stop, tell: OnEvent, host: RunHost
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


def _train(run: Run, host: RunHost) -> Iterator[None]:
    require_packages(run.recipe)
    threads = use_threads(run)
    data = read_data(run)
    built = build(run, data, host)
    host.check(run.accelerator.unwrap_model(built.prepared.model), built.prepared.config)
    yield
    state = resume_state(run, data, built)
    gradients = host.gradients_of(run, data, state)
    record_start(run, data, built, state, threads)
    with Trackers(run) as trackers:
        yield from TrainingLoop(run, data, state, gradients, trackers).run()
        finish(run, data, state)


@contextlib.contextmanager
def record_outcome(run: Run) -> Iterator[None]:
    """Mark run.json as running on entry and record the outcome on exit; one refused to resume stays as it was."""
    record, before, attempts_before = run.record, replace(run.record), len(run.record.attempts)
    record.status, record.exit_code, record.error = "running", None, None
    record.pid, record.host = os.getpid(), platform.node()
    run.write_record()
    try:
        yield
    except BaseException as error:
        ours = run.stop.as_interrupted(error) or to_peftcli_error(error)
        if ours is None:
            log = f"the traceback is in {run.folder.path / 'train.log'}"
            hint = log if run.is_main else "run with --debug for the traceback"
            ours = PeftcliError(f"{type(error).__name__}: {error}", hint=hint)
        record.status = "interrupted" if isinstance(ours, Interrupted) else "failed"
        record.exit_code, record.error = ours.exit_code, ErrorRecord.of(ours)
        record.peak_memory_bytes = MemoryRecord(**peak_memory_bytes())
        if len(record.attempts) > attempts_before:
            record.attempts[-1].end_step, record.attempts[-1].reason = record.steps.done, record.status
        if run.is_main and not isinstance(ours, FolderBusy):  # or else it is another run's
            with contextlib.suppress(StorageError, OSError):
                if ours.exit_code == PeftcliError.exit_code:
                    run.folder.note_bug(traceback.format_exc())
                refused = isinstance(ours, UsageError) and 0 < attempts_before == len(record.attempts)
                run.folder.write(before if refused else record)
        if ours is error:
            raise
        raise ours from error


# --- the data ---------------------------------------------------------------------------------------------------------


def read_data(run: Run) -> RunData:
    """Encode the data or take it from the cache, and plan which examples each step sees.

    Raises:
        DataError: it cannot be trained on.
        UsageError: the run was started with other data.
    """
    recipe = run.pinned
    base = open_base(recipe.base_model)
    _ = base.quantization  # a missing package is named before the data is read
    _refuse_other_base(run)
    run.tell(Message("reading the data"))
    with date.fixed_date(run.record.day):
        task = open_task(recipe, base)
        examples = load_data(recipe, task, tell=run.tell)
    if unread := examples.report.get("columns_not_read"):
        run.tell(Message(f"columns that are not read: {', '.join(unread)}"))
    _refuse_other_content(run, examples.report["content"])
    if run.is_main:
        run.folder.write_skipped(examples.skipped())
    refuse(examples.findings, recipe.dataset.allow)
    refuse_metrics(recipe, examples)
    examples.refuse_size()
    import_packages(examples, recipe.training)
    plan = plan_of(recipe, examples, run.accelerator.num_processes)
    refuse_few_rows(examples, plan)
    method_config(recipe).check_steps(plan.total_steps)
    unfinished = unfinished_warmup(recipe.training, plan.total_steps)
    odd_rate = [f"training.learning_rate: {text}" for text in [rate_warning(recipe)] if text]
    for text in (*examples.warnings, *plan.repeated(examples.names), *unfinished, *odd_rate):
        run.warn(text)
    return RunData(examples, plan)


def _refuse_other_base(run: Run) -> None:
    """Refuse a base model whose files, or commit of the hub, differ between processes."""
    base, own = run.pinned.base_model, run.identity.base_model
    if (folder := hub_files.snapshot(base)) is not None:
        own = folder.name
    elif not run.is_main:
        own = hub_files.base_hash(expand_user(Path(base.name)))
    if len({*gather_object([own])}) > 1:
        hint = "each machine needs the same; a model of the hub can be fixed by base_model.revision"
        raise UsageError("its files are not the same for all processes", key="base_model.name", hint=hint)


def _refuse_other_content(run: Run, content: list[str]) -> None:
    """Refuse rows whose encoding differs from the one that the run began with, or between processes."""
    before = run.record.data.content if run.record.data else content
    sections = {change.key.partition(".")[0] for change in run.changes}
    expected = sections & {"data", "dataset", "base_model", "task", "recipe"}
    if before != content and not expected:
        if "data" not in run.options.allow_change:
            holds, file, key = "holds", str(run.folder.path), "training.output_dir"
            hint = "choose another training.output_dir, or --overwrite; to resume it anyway: --allow-change data"
            if not run.record.attempts:
                holds, file, key = "is of", run.options.resume, "--resume"
                hint = "to resume it anyway: --allow-change data"
            raise UsageError(
                f"{holds} a run whose rows were encoded otherwise: the tokenizer, its chat template, the hub's "
                "dataset, transformers or peftcli has changed; nothing was changed",
                file=file,
                key=key,
                hint=hint,
            )
        run.changes.append(
            Change("data", *(hashlib.sha256(repr(each).encode()).hexdigest() for each in (before, content)))
        )
    if any(other != content for other in gather_object([content])):
        hint = "it changed while they read it, or the machines have different files"
        raise DataError("its rows are not the same for all processes", key="dataset", hint=hint)


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltModel:
    """The model, ready to train, and what run.json records of it."""

    prepared: PreparedModel
    parameters: ParametersRecord
    efficiency: float
    """Share of a batch that is not padding."""
    source: AdapterSource | None
    """The adapter that training begins from."""


def build(run: Run, data: RunData, host: RunHost) -> BuiltModel:
    """Load the base model, inject the adapter, calibrate it where the method needs data, and place all on the devices.

    Raises:
        ModelError: the base model cannot be loaded.
        AdapterError: the method's settings do not fit it.
    """
    recipe, config, plan = run.pinned, method_config(run.recipe), data.plan
    refuse_strategy(recipe, data.task, config, run.accelerator.num_processes)
    check_optimizer(recipe.training)
    if recipe.launch.strategy in ("fsdp", *STAGES) and run.accelerator.num_processes == 1:
        run.warn(f"launch.strategy: {recipe.launch.strategy} divides nothing, since there is one process")
    if recipe.launch.cpu_ram_efficient_loading and needs_batches(config):
        run.warn("each process reads the base model, to start the adapter from data")
        recipe = replace(recipe, launch=replace(recipe.launch, cpu_ram_efficient_loading=False))
    if run.is_main:
        check_disk(recipe, data.task.base, data.examples, plan)
    run.tell(Message(f"loading {recipe.base_model.name}"))
    source = find_init_adapter(recipe)
    model, injection, notes = adapted_model(recipe, config, data.task, source, host.load)
    config.revision = run.recipe.base_model.revision
    if source is not None:
        base_hash = run.identity.base_model or commit_of(recipe.base_model).get("sha256")
        refuse_other_base(source, recipe, base_hash)
    for note in notes:
        run.warn(note)
    if config.modules_to_save:
        run.tell(Message(f"training in full: {', '.join(config.modules_to_save)}"))
    if needs_batches(config):
        run.tell(Message("calibrating the adapter on the training data"))
        injection = calibrate(model, injection, config, data.examples, run.accelerator)
    if recipe.launch.strategy == "fsdp" and is_dividing(recipe):
        run.tell(Message(f"dividing the base model's layers among {run.accelerator.num_processes} processes"))
        shard(model, run.accelerator.device, recipe.launch)
    prepared = prepare(model, config, recipe, plan, run.accelerator)
    if isinstance(data.task, ChecksModel):
        data.task.check_model(model)
    if isinstance(data.task, Begins):
        data.task.begin(model, from_adapter=source is not None)
    # of a module that DeepSpeed divides, each call is one of all processes, whatever their rows
    may_unpad = not (recipe.launch.strategy == "zero3" and is_dividing(recipe))
    # what a GPU computes in half precision is tried out in it
    with run.accelerator.autocast() if run.accelerator.device.type == "cuda" else contextlib.nullcontext():
        unpadded = may_unpad and unpad(model, config)
    if plan.packs and not unpadded:
        refuse_contamination(model, data.task, run.accelerator)
    if recipe.training.neftune_noise_alpha is not None:
        add_embedding_noise(model, recipe.training.neftune_noise_alpha)
    if recipe.training.torch_compile:
        compile_layers(model)
    form = BatchForm.of(model, data.task, config, plan, in_step=prepared.in_step)
    parameters = ParametersRecord(trainable=injection.trainable, all=injection.total)
    return BuiltModel(prepared, parameters, form.efficiency(plan, data.examples.train), source)


# --- where training starts --------------------------------------------------------------------------------------------


def resume_state(run: Run, data: RunData, built: BuiltModel) -> State:
    """The state of training: from the newest whole checkpoint, or from the start.

    Raises:
        UsageError: the run has more steps done than the recipe wants.
        StorageError: the checkpoint does not fit.
    """
    prepared, total = built.prepared, data.plan.total_steps
    state = State(prepared, run.accelerator.unwrap_model(prepared.model), Progress())
    with checkpoint_to_resume(run) as checkpoint:
        if checkpoint is None:
            return state
        prepared.make_whole()
        try:
            load_checkpoint(checkpoint, state, run.accelerator)
        except Misfit as error:
            if not any(is_allowed(change, run.options.allow_change) for change in run.changes):
                raise
            hint = "undo the changes that were allowed; or choose another training.output_dir"
            raise UsageError(error.message, file=error.file, key="--allow-change", hint=hint) from None
    _drop_outdated(run, state)
    progress = state.progress
    if progress.step > total:
        message = f"the run has done {progress.step} steps, and the recipe now wants {total}"
        raise UsageError(message, key="training.max_steps")
    if isinstance(method := layers_of(prepared.config), AfterResume):
        method.after_resume(state.model, prepared.config, progress.step, total)
    if progress.step == total and progress.pending is None:
        # before, an earlier step than the last one
        progress.pending = next((line for line in run.folder.metrics() if line["step"] == total), {})
    return state


_MEASURED = ("base_model", "task", "method", "dataset", "data", "recipe")
"""Keys and sections on which the metrics of an adapter depend."""
_CHOOSING = ("training.metric_for_best_model", "training.greater_is_better")
"""Keys on which it depends which of two adapters is better."""


def _drop_outdated(run: Run, state: State) -> None:
    """Drop what a change has made outdated: the metrics before training, and the best adapter so far.

    The best adapter is also dropped where the recipe does not keep it, or compares by another metric now.
    """
    progress, wanted = state.progress, run.recipe.training.load_best_model_at_end
    if not wanted:
        state.best_adapter = None
    # changes after the checkpoint, also those of an attempt that was killed before it saved one
    recorded = [each for each in run.record.changes if each.step >= progress.step]
    differing = [*run.changes, *(Change(each.key, each.before, each.now) for each in recorded)]
    if any(is_allowed(each, _MEASURED) for each in differing):
        progress.first_eval = {}
    keys = [each.key for each in differing if is_allowed(each, (*_MEASURED, *_CHOOSING))]
    if wanted and state.best_adapter is None:
        keys.append("training.load_best_model_at_end")
    if keys and progress.best_eval:
        best = f"the best evaluation so far, after step {progress.best_step}"
        run.warn(f"{keys[0]} has changed: {best}, no longer counts")
        state.best_adapter, progress.best_eval, progress.best_step, progress.no_better = None, {}, -1, 0


def record_start(run: Run, data: RunData, built: BuiltModel, state: State, threads: ThreadsRecord | None) -> None:
    """Record in run.json that training starts, and bring the folder to the step that it starts from."""
    record, progress, config, total = run.record, state.progress, state.prepared.config, data.plan.total_steps
    run.apply_changes(progress.step)
    record.base_model.quantization = data.task.base.quantization
    for name, value in commit_of(run.pinned.base_model).items():
        setattr(record.base_model, name, value)
    measured = {"efficiency": built.efficiency, "passes_per_epoch": data.plan.passes}
    record.task = task_record(data.task, run.recipe)
    record.data = from_json(DataRecord, data.examples.report | measured)
    record.parameters = built.parameters
    record.mergeable = config.merge_problem() is None and not run.recipe.base_model.trust_remote_code
    began_so = built.source is not None and built.source.record.get("makes_up_for_quantization") is True
    record.makes_up_for_quantization = began_so or needs_base_weights(config)
    record.device, record.bf16 = run.accelerator.device.type, run.accelerator.mixed_precision == "bf16"
    record.threads = threads or ABSENT
    if record.attempts and not record.attempts[-1].reason:  # it could not be recorded
        saved = record.steps.done if record.steps else 0
        record.attempts[-1].end_step, record.attempts[-1].reason = max(saved, progress.step), "killed"
    record.steps = StepsRecord(done=progress.step, total=total)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record.attempts.append(AttemptRecord(start=now, from_step=progress.step))
    if run.is_main:
        if progress.step:
            set_newer_aside(run.folder.checkpoints, progress.step, run.warn)
        # the line of a pending evaluation is written once that is made
        run.folder.cut_metrics(progress.step - (progress.pending is not None) if progress.step else -1)
        run.write_record()
    if on_several_machines():
        notice_lost_machines(unanswered=record.device == "cpu")
    report(TRAINING)
    run.tell(Ready(record.as_dict(), progress.step, total))
