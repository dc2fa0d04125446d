"""The data of a run: read, checked, compared with what the run began with, and planned."""

from __future__ import annotations

import hashlib
from pathlib import Path

from accelerate.utils import gather_object

from peftcli.data.findings import refuse
from peftcli.errors import DataError, UsageError
from peftcli.models import hub_files
from peftcli.models.open import open_base
from peftcli.recipe import method_config
from peftcli.recipe.rates import rate_warning
from peftcli.system import date
from peftcli.system.outputs import expand_user
from peftcli.tasks import open_task
from peftcli.train.data import RunData, load_data, plan_of, refuse_few_rows
from peftcli.train.evaluate import import_packages, refuse_metrics
from peftcli.train.events import Message
from peftcli.train.optim import unfinished_warmup
from peftcli.train.runs.identity import Change
from peftcli.train.runs.resume import Run


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
