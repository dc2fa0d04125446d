"""The end of a run: its product, and its gates."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from peftcli.adapters.card import write_card
from peftcli.adapters.diff import analyse
from peftcli.adapters.proof.verify import record_model, sample_rows, trained_outputs
from peftcli.core.protocols import needs_base_weights
from peftcli.core.weights import adapter_state
from peftcli.data.sources import eval_source
from peftcli.errors import FolderBusy, GateFailed, Interrupted, PeftcliError, StorageError, UsageError, to_peftcli_error
from peftcli.recipe import to_yaml
from peftcli.reporting.write import REPORT_FILES, render, run_files
from peftcli.system.addresses import notice_lost_machines, on_several_machines
from peftcli.system.disk import write_file
from peftcli.tasks import task_record
from peftcli.train.compare import compare_run
from peftcli.train.data import RunData
from peftcli.train.devices.accelerator import base_dtype, uses_bf16
from peftcli.train.devices.launch import TRAINING, report
from peftcli.train.devices.sharding import is_sharded
from peftcli.train.evaluate import find_doubts, main_metric, no_learning
from peftcli.train.events import Ready
from peftcli.train.forgetting import forgetting_of, forgotten
from peftcli.train.gates import check_gates
from peftcli.train.memory.fit import peak_memory_bytes
from peftcli.train.runs.checkpoint import State, prune, set_newer_aside, write_finite
from peftcli.train.runs.record import (
    ArtefactRecord,
    AttemptRecord,
    DataRecord,
    ErrorRecord,
    EvaluationRecord,
    MemoryRecord,
    RunRecord,
    StepsRecord,
    ThreadsRecord,
)
from peftcli.train.runs.resume import Run, commit_of
from peftcli.train.runs.typed_json import ABSENT, from_json
from peftcli.train.setup import BuiltModel


def finish(run: Run, data: RunData, state: State) -> None:
    """Write the product (adapter, what the task keeps beside it, card, curve, recipe) and what the gates say.

    The main process does; where the model is divided among the processes, all help to ask it what it says.
    """
    recipe, folder, record, progress = run.recipe, run.folder, run.record, state.progress
    drawing = ThreadPoolExecutor(1)  # beside what the model says, since matplotlib takes long to import
    what = f"{recipe.method['type']}, {(recipe.task or {})['type']}"
    curve = drawing.submit(loss_curve, folder.metrics(), what, data.task.main_metric) if run.is_main else None
    drawing.shutdown(wait=False)
    verify = recipe.training.verify and not recipe.base_model.trust_remote_code  # which only a recipe may ask for
    is_kept = state.take_kept()
    asked = verify and is_kept and (run.is_main or is_sharded(state.model))
    said = _said(run, data, state) if asked else {}
    state.prepared.gather_parameters()
    best, own = state.best_adapter, list[str]()
    tensors, kept = (adapter_state(state.model), progress.last_eval) if best is None else (best, progress.best_eval)
    if curve is not None:
        (run.replaces or folder).keep_lock()
        own = _write_adapter(run, data, state, tensors, said if verify else None)
    comparison = compare_run(run, data, state.model, is_kept=is_kept)  # with the adapter written, which a kill keeps
    record.forgetting = forgetting_of(run, data, state.model, is_kept=is_kept)
    if curve is None:
        return
    if comparison is not None:
        record.comparison = comparison.record
        own += comparison.save(folder.path)
    if recipe.training.load_best_model_at_end and progress.last_eval and best is None:
        run.warn(f"no evaluation gave a finite {recipe.training.metric_for_best_model}: the last adapter is written")
    if doubts := _doubts(run, data, state, kept):
        record.warnings = [no_learning(doubts)]
        run.warn(no_learning(doubts))
    write_file(folder.path / "recipe.yaml", to_yaml(recipe).encode())
    write_file(folder.path / "loss.png", curve.result())
    record.steps.done = progress.step
    record.train_loss = progress.loss_sum / progress.num_targets if progress.num_targets else None
    record.eval = _evaluation_record(data, state, kept)
    record.peak_memory_bytes = MemoryRecord(**peak_memory_bytes())
    lost = forgotten(record.forgetting, comparison)
    record.gates = check_gates(recipe.gates, kept, doubts, data.task, comparison, lost)
    if stops := data.task.stops(state.model):
        record.eos_token_id = stops
    _complete(run, state, own)


def _complete(run: Run, state: State, own: list[str]) -> None:
    """Write what is made of run.json, and that the run is complete. ``own``: files of the task and of the proof."""
    folder, record = run.folder, run.record
    run.write_record()
    write_card(folder.path)  # from run.json
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "recipe.yaml", *own)
    artefacts = [ArtefactRecord.of(folder.path, name) for name in names]
    prune(folder.checkpoints, run.recipe.training.save_total_limit)  # those that could not be deleted at their time
    record.attempts[-1].end_step, record.attempts[-1].reason = state.progress.step, "complete"
    exit_code = 0 if all(gate.passed for gate in record.gates) else GateFailed.exit_code
    ended = replace(record, status="complete", resumable=False, error=None, exit_code=exit_code, artefacts=artefacts)
    artefacts += [ArtefactRecord.of(folder.path, name) for name in _write_report(run, ended)]
    record.status, record.resumable, record.error = "complete", False, None
    record.exit_code, record.artefacts = exit_code, artefacts
    run.write_record()


def _write_report(run: Run, ended: RunRecord) -> Sequence[str]:
    """Write the report of the run as it will be recorded. Returns the files' names; if it fails, warns of it."""
    path, moves_to = run.folder.path, run.replaces.path if run.replaces else None
    try:
        made = render([run_files(path, ended.as_dict(), run.folder.metrics(), moves_to)])
        for name in REPORT_FILES:
            write_file(path / name, made[Path(name).suffix])
    except Exception as error:
        run.warn(f"no report was written ({type(error).__name__}: {error}); `peftcli report` makes it again")
        return ()
    return REPORT_FILES


def _write_adapter(
    run: Run, data: RunData, state: State, tensors: Mapping[str, torch.Tensor], said: dict[str, Any] | None
) -> list[str]:
    """Write the adapter, and what ``verify_adapter`` compares it with unless ``said`` is None.

    Returns the names of the files that the task keeps beside it.
    """
    recipe, folder = run.recipe, run.folder
    write_finite(tensors, state.prepared.config, folder.path)
    data.task.number_format = {"bf16": uses_bf16(run.pinned), "dtype": recipe.base_model.dtype}
    own = data.task.save(folder.path)
    if said is not None:
        record_model(
            folder.path,
            state.model,
            state.prepared.config,
            tensors,
            data.task,
            task_record(data.task, run.pinned),
            said,
            files=own,
            dtype=base_dtype(run.pinned),
            bf16=uses_bf16(run.pinned),
            base_sha256=run.record.base_model.sha256,
        )
    return own


def warn_of_unchanged(run: Run) -> list[str]:
    """Warn of modules that the adapter does not change, as far as that can be told from its file.

    Where it changes none, return that instead.
    """
    with contextlib.suppress(PeftcliError, RuntimeError, MemoryError):  # a hint is not worth a run
        found = analyse(str(run.folder.path))
        dead, count = found.get("dead", ()), len(found.get("modules", ()))
        if dead and len(dead) == count:
            return ["training has left the updates of all adapted modules at zero"]
        if dead:
            run.warn(f"{len(dead)} of {count} adapted modules have learnt nothing, the first of them {dead[0]}")
    return []


def _doubts(run: Run, data: RunData, state: State, kept: dict[str, float]) -> list[str]:
    """Why the adapter that is kept seems to have learnt nothing; empty where it has, or where too little is known."""
    progress, examples = state.progress, data.examples
    if unchanged := warn_of_unchanged(run):
        return unchanged
    if state.best_adapter is not None and progress.best_step == 0:
        return ["no evaluation was better than that before training, whose adapter is kept"]
    view = examples.train if examples.eval is None else examples.eval
    return find_doubts(data.task, view, progress.first_eval, kept, run.folder.metrics(), progress.step)


def _evaluation_record(data: RunData, state: State, kept: dict[str, float]) -> EvaluationRecord:
    progress = state.progress
    return EvaluationRecord(
        main=main_metric(data.task, kept) if kept else ABSENT,
        first=progress.first_eval,
        last=progress.last_eval,
        best=progress.best_eval,
        best_step=progress.best_step if progress.best_eval else None,
        kept=kept,
    )


def _said(run: Run, data: RunData, state: State) -> dict[str, Any]:
    """What the trained model says of a few rows."""
    recipe, task = run.pinned, data.task
    source = eval_source(recipe.dataset) or recipe.dataset.sources()[0]
    return trained_outputs(state.model, task, sample_rows(task, source, run.record.day), bf16=uses_bf16(recipe))


def loss_curve(metrics: list[dict[str, Any]], title: str = "", main_metric: str = "loss") -> bytes:
    """Draw the loss over the steps, and beside it the main metric where evaluations give one. Returns the PNG."""
    # where matplotlib cannot write a cache into the home folder, it warns, and writes a temporary one
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    loss = (("loss", "training", "-"), ("eval_loss", "evaluation", "o"))
    panels = {"loss per target": loss, main_metric.replace("_", " "): ((f"eval_{main_metric}", "evaluation", "o"),)}
    if main_metric == "loss" or not any(f"eval_{main_metric}" in entry for entry in metrics):
        panels = {"loss per target": loss}
    figure = Figure(figsize=(7 if len(panels) == 1 else 11, 4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for axes, (name, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key, label, style in series:
            points = [(entry["step"], entry[key]) for entry in metrics if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, color="C0" if label == "training" else "C1")
        axes.set(xlabel="step", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    return image.getvalue()


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
    now = datetime.now(UTC).isoformat(timespec="seconds")
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
