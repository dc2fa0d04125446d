"""The data of a run: what its recipe names, encoded for its task, and the account of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from peftcli.adapters.other_model import open_other
from peftcli.core.config import AdapterConfig
from peftcli.data.findings import Finding, Records, find_in_records, refuse, worst_first
from peftcli.data.prepare import prepare
from peftcli.data.rows import BAD, USED, Row, Table, is_true_or_false, truth_columns
from peftcli.data.sources import eval_source, open_source
from peftcli.data.split import split_parts
from peftcli.data.store import Selection, Store, View
from peftcli.data.used_rows import UsedRows
from peftcli.errors import DataError, UsageError
from peftcli.models.open import OpenBase, open_base
from peftcli.recipe.data_checks import check_task
from peftcli.schema import BaseModel, Dataset, Recipe, Source, Training
from peftcli.system import date
from peftcli.tasks import open_task, row_of
from peftcli.tasks.base import Task, encoding, require_extra
from peftcli.tasks.found import find_task
from peftcli.tasks.text.formats import implied_format
from peftcli.train.batches import num_workers
from peftcli.train.events import Message, OnEvent, RowsRead, warning
from peftcli.train.plan import Plan

_COUNTED = ("truncated", "split", "pieces_left_out")
"""Facts of rows that run.json counts for every task."""
_OFF = 0.25
"""How far the share that is held out may be from the one asked for, relative to it, before a note says so."""
_NO_EVALUATION_DATA = (
    "training.eval_strategy: there is no evaluation data: give dataset.eval, eval_split or eval_fraction"
)
_FIRST = 512
"""Rows whose columns are those of a source."""


@dataclass(frozen=True)
class Data:
    """Examples of the training and the evaluation rows."""

    task: Task[Any]
    """What they are encoded for, with the settings that the data has completed."""
    train: View
    """Without any where only evaluation data was asked for."""
    eval: View | None
    report: dict[str, Any]
    """The account of both for run.json."""
    findings: list[Finding]
    """What is odd or wrong with the rows."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know."""

    @property
    def warnings(self) -> list[str]:
        """Findings that stop nothing and notes, as lines."""
        found = [f"{each.name}: {each.message}" for each in self.findings if each.level != "info"]
        return list(dict.fromkeys([*self.notes, *found]))

    @property
    def names(self) -> list[str]:
        """The training sources, as the recipe calls them."""
        return [part.store.about["source"] for part in self.train.parts]

    def refuse_size(self) -> None:
        """Check that the base model can read the largest example, and the largest target where that is apart.

        Raises:
            DataError: it cannot.
        """
        views = [view for view in (self.train, self.eval) if view]
        self.task.refuse_size(max(int(view.sizes.max()) for view in views))
        if not self.task.targets_in_size:
            self.task.refuse_size(max(int(view.targets.max()) for view in views), of_target=True)

    def skipped(self) -> Iterable[dict[str, Any]]:
        """The rows that could not be used: where each stands, and what is wrong with it."""
        for name, view in (("train", self.train), ("eval", self.eval)):
            for part in view.parts if view else ():
                yield from ({"rows": name, **error.as_dict()} for _, error in part.bad_rows())


@dataclass(frozen=True)
class RunData:
    """What a run trains on."""

    examples: Data
    plan: Plan
    """Which examples each step sees."""

    @property
    def task(self) -> Task[Any]:
        """What the examples are for."""
        return self.examples.task


def prepare_config(config: AdapterConfig, base: OpenBase) -> None:
    """Let an adapter's config turn what it holds as text into ids: with the processor it names, or the base model's."""
    config.prepare(lambda name: (open_base(BaseModel(name=name)) if name else base).processor())


def prepare_method(task: Task[Any]) -> Task[Any]:
    """Let the task's method turn text into virtual tokens, which leave fewer positions to a row; return the task."""
    if task.method is not None:
        prepare_config(task.method, task.base)
        task.virtual_tokens = getattr(task.method, "num_virtual_tokens", 0)
    return task


def load_data(
    recipe: Recipe,
    task: Task[Any],
    *,
    only_eval: bool = False,
    keep_bad_rows: bool = False,
    tell: OnEvent = lambda event: None,
) -> Data:
    """Read, check and encode the recipe's data, or take it from the cache.

    ``only_eval`` leaves out the training rows. With ``keep_bad_rows`` a row that cannot be used is a finding, whatever
    the recipe says. ``tell`` receives how far it is, and what the user should know meanwhile: that another process is
    waited for, of a damaged cache.

    Raises:
        DataError: a row that cannot be used, or none that can.
    """
    dataset, notes = recipe.dataset, list(task.notes)
    task = _completed_task(recipe, task, tell)
    assert recipe.task is not None
    task_name = recipe.task["type"]

    def store_of(source: Source, task: Task[Any]) -> Store:
        return prepare(
            source,
            task,
            encoding(task_name, task),
            stop_at_bad=not keep_bad_rows and dataset.on_bad_row == "error",
            num_workers=num_workers(recipe.training, task),
            on_rows=lambda *read: tell(RowsRead(*read)),
            on_note=lambda text: tell(warning(text)),
        )

    from_eval = eval_source(dataset)
    if only_eval and from_eval is None and dataset.eval_fraction is None:
        raise DataError("the recipe names no evaluation data", key="dataset.eval")
    parts = [Selection(store_of(source, task)) for source in dataset.sources()] if not (only_eval and from_eval) else []
    try:
        held = [Selection(store_of(from_eval, task.evaluation_task()))] if from_eval else []
    except DataError as error:
        error.key = "dataset.eval_split" if error.key == "dataset.split" else error.key
        raise
    if dataset.eval_fraction is not None:
        parts, held = split_parts(parts, dataset.eval_fraction, _held_seed(recipe), task.identity, task.label_columns)
        notes += _uneven_split(parts, held, dataset.eval_fraction)
    if not held and recipe.training.eval_strategy == "steps":  # not the default, so it is meant
        notes.append(_NO_EVALUATION_DATA)
    data = _account_for(View([] if only_eval else parts), View(held) if held else None, task, dataset, notes)
    data.report["content"] = [part.content for part in (*parts, *held)]
    return data


def _held_seed(recipe: Recipe) -> int:
    """Return the seed that chooses the rows that are held out."""
    return recipe.training.seed if recipe.dataset.eval_seed is None else recipe.dataset.eval_seed


def _completed_task(recipe: Recipe, task: Task[Any], tell: OnEvent) -> Task[Any]:
    """Return the task with the settings that the data completes, after a check that its packages are installed."""
    prepare_method(task)
    if task.needs_scan:
        task = row_of(recipe).open(task.scan(map(_table, recipe.dataset.sources())), task.base, task.method)
        tell(Message(task.found))
    for package, extra in task.packages.items():
        require_extra(package, extra)
    task.ask_others(open_other)
    return task


def _uneven_split(parts: Sequence[Selection], held: Sequence[Selection], fraction: float) -> list[str]:
    """Return a note if the rows that are held out are not about the fraction that was asked for."""
    count, total = (len(UsedRows(View(some))) for some in (held, [*parts, *held]))
    wanted = total * fraction
    if abs(count - wanted) <= max(1, _OFF * wanted):
        return []
    held_out = f"{count:,} of {total:,} rows are held out"
    return [f"dataset.eval_fraction: {held_out}, because rows that belong together stay on one side"]


def _account_for(train: View, evaluation: View | None, task: Task[Any], dataset: Dataset, notes: list[str]) -> Data:
    """Return the data with its account and its findings; let the task see what it is trained on."""
    report = _report(train, evaluation, task, dataset.packing)
    if train.parts:
        task.trained_on(report["format"], _common(train.parts, report["format"]))
    records = [Records(train.parts)] if train.parts else []
    if evaluation is not None:
        records.append(Records(evaluation.parts, "eval"))
    skips = dataset.on_bad_row == "skip"
    found = [find_in_records(some, task.record_findings, skip_bad_rows=skips) for some in records]
    findings = worst_first([each for some in found for each in some])
    report |= {"findings": [each.as_dict() for each in findings], "unit": task.unit}
    return Data(task, train, evaluation, report, findings, notes)


def _report(train: View, evaluation: View | None, task: Task[Any], packing: bool) -> dict[str, Any]:
    """Account for what each source gave, and refuse one of which nothing is left."""
    parts = train.parts or (evaluation.parts if evaluation else [])
    # a model is asked in the first form that asks: texts alone do not
    asks = next((each for each in parts if each.store.about["format"] != "text"), parts[0]).store.about
    report: dict[str, Any] = {"format": asks["format"]}
    if asks.get("implied"):
        report["columns"] = asks["columns"]
    if train.parts:
        report |= _account(train.parts, task) | {"packing": packing}
        if len(train.parts) > 1:
            report["sources"] = [
                {"train": part.store.about["source"], **_account([part], task)} for part in train.parts
            ]
            for part, account in zip(train.parts, report["sources"], strict=True):
                _refuse_none(View([part]), account, task)
        _refuse_none(train, report, task)
    if evaluation is not None:
        report["eval"] = _account(evaluation.parts, task)
        _refuse_none(evaluation, report["eval"], task)
    return report


def _common(parts: Sequence[Selection], format: str) -> dict[str, str]:
    """The texts that all training rows have, but for texts alone, where they are of one format."""
    asking = [part.store.about for part in parts if part.store.about["format"] not in ("text", None)]
    if any(each["format"] != format for each in asking) or not asking:
        return {}
    first, *others = [each["common"] for each in asking]
    return {name: text for name, text in first.items() if all(each.get(name) == text for each in others)}


def with_task(recipe: Recipe, tell: OnEvent = lambda event: None) -> Recipe:
    """The recipe with its task, whose type is found from base model and data where the recipe leaves it out.

    ``tell`` receives which task was found, and from what.

    Raises:
        UsageError: not one task fits, or the one that fits lacks a setting that the recipe gives.
        DataError: the training data cannot be read.
        ModelError: the base model's config cannot be read.
    """
    if "type" in (given := recipe.task or {}):
        return recipe
    table, _ = _table(recipe.dataset.sources()[0])
    columns, renamed = {*table.columns, *table.source.columns}, dict(table.source.renamed())
    if not renamed and (implied := implied_format(table)):
        columns |= implied[1].keys()
    truths = [each for each in columns if renamed.get(each, each) in table.truths]
    sure = [each for each in truths if is_true_or_false(table.first.get(renamed.get(each, each)))]
    name, reason, needed = find_task(open_base(recipe.base_model).config, columns, sure, truths)
    settings = "".join(f", {key}: {value}" for key, value in needed.items())
    tell(warning(f"task: {f'{{type: {name}{settings}}}' if needed else name}, found from {reason}"))
    found = replace(recipe, task={"type": name, **needed, **given})

    def refuse_setting(keys: Sequence[str], message: str, suggestion: str | None = None) -> None:
        raise UsageError(message, key=keys[0])

    check_task(found, refuse_setting)
    return found


def prepare_data(recipe: Recipe, as_on: str | None, tell: OnEvent) -> None:
    """Encode the recipe's data into the cache, before processes are started that would wait for it.

    ``as_on`` is the day that chat templates write, as 2026-01-31; None: today.

    Raises:
        DataError: a row that cannot be used, or data with a finding that stops a run.
    """
    recipe = with_task(recipe, tell)
    tell(Message("reading the data"))
    with date.fixed_date(as_on):
        data = load_data(recipe, open_task(recipe, open_base(recipe.base_model)), tell=tell)
    refuse(data.findings, recipe.dataset.allow)


def plan_of(recipe: Recipe, data: Data, num_processes: int) -> Plan:
    """Which examples each step sees."""
    weights = [source.weight for source in recipe.dataset.sources() if source.weight is not None]
    return Plan(
        data.train.sizes,
        recipe.training,
        num_processes,
        counts=data.train.counts,
        weights=weights or None,
        max_length=recipe.dataset.max_length if recipe.dataset.packing else None,
        divides=data.task.divides,
        groups=data.task.groups(data.train),
    )


def refuse_few_rows(data: Data, plan: Plan) -> None:
    """Refuse data or a batch size that leaves a task too few rows to compare with one another.

    Raises:
        DataError: something else would be learnt.
    """
    at_once = plan.rows_at_once if data.task.gathers else plan.training.rows_at_once
    data.task.refuse_rows(data.train, at_once, training=True)
    if plan.training.eval_strategy != "no":
        refuse_few_eval_rows(data, plan.training)


def refuse_few_eval_rows(data: Data, training: Training) -> None:
    """Refuse the same of the evaluation rows.

    Raises:
        DataError: something else would be measured.
    """
    if data.eval is not None:
        data.task.refuse_rows(data.eval, training.per_device_eval_batch_size, training=False)


def _table(source: Source) -> tuple[Table, Iterator[Row]]:
    """The rows of a source that can be read."""
    opened, bad = open_source(source), list[DataError]()

    def good() -> Iterator[Row]:
        for row in opened.rows():
            if isinstance(row, Row):
                yield row
            elif not bad:
                bad.append(row)

    rows = good()
    first = list(islice(rows, _FIRST))
    if bad and not first:
        raise bad[0]
    columns = tuple(dict.fromkeys(name for row in first for name in row.values))
    values = first[0].values if first else {}
    table = Table(source, opened.name, columns, opened.class_names, values, truth_columns(first))
    return table, chain(first, rows)


def _account(parts: Sequence[Selection], task: Task[Any]) -> dict[str, Any]:
    """What became of the rows."""
    outcomes, flags = Counter[str](), Counter(dict.fromkeys(_COUNTED, 0))
    sha256: dict[str, str] = {}
    lost = 0
    for part in parts:
        records = part.records
        for index, name in enumerate(part.store.outcomes):
            outcomes[name] += int((records["outcome"] == index).sum())
        used = records[records["outcome"] == part.store.outcomes.index(USED)]
        for name, flag in task.flags.items():
            flags[name] += int((used["flags"] & flag != 0).sum())
        lost += int(used["lost"].sum())
        sha256 |= part.store.about["fingerprint"]
    view = View(parts)
    return {
        "files": list(sha256),
        "sha256": sha256,
        "columns_not_read": sorted({name for part in parts for name in part.columns_not_read}),
        "rows": sum(outcomes.values()),
        "used": outcomes[USED],
        "examples": len(view),
        "skipped": outcomes[BAD],
        "dropped": {name: count for name, count in outcomes.items() if count and name not in (USED, BAD)},
        **flags,
        "targets_cut": lost,
        "tokens": int(task.sizes_with_targets(view).sum()),
        "targets": int(view.targets.sum()),
    }


def _refuse_none(view: View, account: dict[str, Any], task: Task[Any]) -> None:
    """Raise DataError when no row is left."""
    if len(view):
        return
    if not account["rows"]:
        held = "all of its rows are held out for evaluation"
        raise DataError(held, file=view.parts[0].store.about["source"], key="dataset.eval_fraction")
    if account["skipped"] == account["rows"]:
        error = next(error for part in view.parts for _, error in part.bad_rows())
        message = f"none of the {account['rows']} rows can be used; the first: {error.message}"
        raise DataError(message, file=error.file, line=error.line, key=error.key, hint=error.hint)
    dropped = account["dropped"]
    reasons = {**dropped, BAD: account["skipped"]}
    shown = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    raise DataError(
        f"zero trained {task.unit}: all {account['rows']} rows are left out ({shown})",
        file=view.parts[0].store.about["source"],
        hint=next((task.advice[reason] for reason in dropped if reason in task.advice), None),
    )
