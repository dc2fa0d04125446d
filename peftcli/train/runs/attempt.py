"""An attempt of a run in its run.json: how it starts, and how it ends."""

from __future__ import annotations

import contextlib
import os
import platform
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone

from peftcli.core.protocols import needs_base_weights
from peftcli.errors import FolderBusy, Interrupted, PeftcliError, StorageError, UsageError, to_peftcli_error
from peftcli.system.addresses import notice_lost_machines, on_several_machines
from peftcli.tasks import task_record
from peftcli.train.data import RunData
from peftcli.train.devices.launch import TRAINING, report
from peftcli.train.events import Ready
from peftcli.train.memory.out_of_memory import peak_memory_bytes
from peftcli.train.runs.checkpoint import State, set_newer_aside
from peftcli.train.runs.record import AttemptRecord, DataRecord, ErrorRecord, MemoryRecord, StepsRecord, ThreadsRecord
from peftcli.train.runs.resume import Run, commit_of
from peftcli.train.runs.typed_json import ABSENT, from_json
from peftcli.train.setup import BuiltModel


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
