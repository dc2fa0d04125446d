"""What a recipe would train: its rows, the audit of all of its data, and what is wrong with it.

The rows are read from where ``peftcli train`` reads them, so what is shown is what is trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np

from peftcli.data.duplicates import spread
from peftcli.data.findings import Finding, worst_first
from peftcli.data.rows import BAD, USED, count_of
from peftcli.data.store import View
from peftcli.errors import UsageError
from peftcli.inspection.audit import audit, leaks
from peftcli.inspection.influence import influence_findings
from peftcli.models.open import open_base
from peftcli.schema import Recipe
from peftcli.system.secrets import secret_spans
from peftcli.tasks import open_task
from peftcli.tasks.base import Packs
from peftcli.tasks.shown import Label, Part, Shown, Text, TokenText
from peftcli.train.data import Data, load_data, plan_of, with_task
from peftcli.train.devices.launch import total_processes
from peftcli.train.events import Message, OnEvent, warning
from peftcli.train.memory.fit import smallest
from peftcli.train.plan import Plan
from peftcli.train.trace import open_run

_PLACE = re.compile(r"(.+?)(:| row )([0-9]{1,18})")
_NUMBER = re.compile(r"\d{1,18}")
COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")
"""The colours that a label may have: names that terminals know, and classes in page.css."""


@dataclass(frozen=True)
class ShownRow:
    """One example, as it is trained."""

    index: int
    """Its number among the examples, from 0."""
    split: str
    """``train`` or ``eval``."""
    place: str
    shown: Shown
    size: str
    """``40 tokens, 12 trained``; may be empty."""
    unit: str
    """What sizes count: tokens, frames."""
    missing: int
    """How much was cut from its end, in this unit."""
    lost: int
    """Targets among it."""
    part: tuple[int, int]
    """Which of how many examples of its row it is, from 1."""

    @property
    def title(self) -> str:
        """``example 3, part 2 of 4 of the row``."""
        kind = "example" if self.split == "train" else "evaluation example"
        part = f", part {self.part[0]} of {self.part[1]} of the row" if self.part[1] > 1 else ""
        return f"{kind} {self.index}{part}"

    def as_dict(self) -> dict[str, Any]:
        """The row as ``inspect --json`` prints it."""
        return {"index": self.index, **self.shown.as_dict()}


class Inspection:
    """The data of a recipe: its rows, the audit of all of it, and the findings."""

    def __init__(self, recipe: Recipe, data: Data, processes: int):
        self.recipe, self.data, self.task = smallest(recipe), data, data.task
        self.task_name = str((recipe.task or {})["type"])
        self.plan = plan_of(self.recipe, data, processes)
        train = audit(data.train, self.task)
        findings = [*data.findings, *train.findings]
        self.audit: dict[str, Any] = {
            "train": train.facts,
            "eval": None,
            "train_in_eval": None,
            "batches": _batches(self.recipe, data, self.plan),
        }
        self._lines = {"train": train.description.lines}
        if data.eval is not None:
            evaluation = audit(data.eval, self.task, split="eval")
            shared, leaked = leaks(train, evaluation)
            findings += [*evaluation.findings, *leaked]
            self.audit |= {"eval": evaluation.facts, "train_in_eval": shared}
            self._lines["eval"] = evaluation.description.lines
        self.findings: list[Finding] = worst_first(findings)

    def sample(self, count: int) -> list[ShownRow]:
        """At most ``count`` training examples, spread evenly: the first, the last, and others between."""
        return [self.row(int(index)) for index in spread(len(self.data.train), count)]

    def row(self, index: int, split: str = "train") -> ShownRow:
        """An example by its number, from 0."""
        store, position = self._views[split].locate(index)
        example, row = store[position], int(store.row_of[position])
        first, last = np.searchsorted(store.row_of, [row, row + 1]).tolist()
        record, task = store.rows[row], self.task
        shown = task.show(example)
        size = example.size + (0 if task.targets_in_size else example.num_targets)
        return ShownRow(
            index=index,
            split=split,
            place=str(store.place(row)),
            shown=replace(shown, parts=[_without_secrets(part) for part in shown.parts]),
            size=", ".join(filter(None, [f"{size:,} {task.unit}" if size > 1 else "", shown.summary])),
            unit=task.unit,
            missing=int(record["size"]) - size if record["flags"] & task.flags.get("truncated", 0) else 0,
            lost=int(record["lost"]),
            part=(position - first + 1, last - first),
        )

    def of_findings(self) -> list[ShownRow]:
        """The rows that findings name, except those that are left out."""
        rows: dict[tuple[str, int], ShownRow] = {}
        for split, place in dict.fromkeys(
            (finding.split, place) for finding in self.findings for place in finding.rows
        ):
            with suppress(UsageError):
                rows |= {(row.split, row.index): row for row in self.find(place, split)}
        return list(rows.values())

    def find(self, place: str, split: str | None = None) -> list[ShownRow]:
        """Find the examples of one row, of all splits or of one.

        ``place`` is ``FILE:LINE`` or ``FILE row N``, as findings name it, or with the end of the file's path; or the
        number of a training example, from 0.

        Raises:
            UsageError: there is no such row, or it is not used.
        """
        refuse_place(place)
        if _NUMBER.fullmatch(place):
            if int(place) >= len(self.data.train):
                raise UsageError(f"no example {place}: there are {len(self.data.train)}, counted from 0")
            return [self.row(int(place))]
        named = _PLACE.fullmatch(place)
        assert named is not None
        views = {name: view for name, view in self._views.items() if split in (None, name)}
        names = sorted({name for view in views.values() for part in view.parts for name in part.store.files})
        files = [named[1]] if named[1] in names else [name for name in names if name.endswith(f"/{named[1]}")]
        found = [
            (file, name, at, int(row))
            for file in files
            for name, view in views.items()
            for at, part in enumerate(view.parts)
            for row in part.rows_at(file, int(named[3]), is_line=named[2] == ":")[:1]
        ]
        if not found:
            raise UsageError(f"no row {place[:200]}", hint=f"The files are: {', '.join(names[:5])}")
        if others := list(dict.fromkeys(file for file, *_ in found))[1:]:
            listed = ", ".join([found[0][0], *others][:5])
            raise UsageError(f"{place[:200]} may be of {listed}", hint="Give more of the file's path")
        return self._examples(*found[0][1:])

    def tables(self) -> dict[str, list[list[str]]]:
        """The audit in words: title -> rows, the first of which names the columns."""
        audit, lines, unit = self.audit, self._lines, self.task.unit
        splits = {name: audit[name] for name in ("train", "eval") if audit[name]}
        facts = list(splits.values())
        rows = [["", *splits]]

        def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
            rows.append([name, *map(cell, facts)])

        row("rows", lambda each: f"{each['rows']:,}")
        row("used", lambda each: f"{each['used']:,}")
        for outcome in dict.fromkeys(outcome for each in facts for outcome in each["left_out"]):
            rows.append([f"left out: {outcome}", *(f"{each['left_out'].get(outcome, 0):,}" for each in facts)])
        if any(each["columns_not_read"] for each in facts):
            row("columns that are not read", lambda each: ", ".join(each["columns_not_read"][:8]) or "none")
        row("examples", lambda each: f"{each['examples']:,}")
        if has_sizes(audit):
            row(unit, lambda each: f"{each['tokens']:,}")
            row(f"{unit} of a row: median", lambda each: f"{each['lengths']['rows']['median']:,}")
            row("95 % have at most", lambda each: f"{each['lengths']['rows']['p95']:,}")
            row("longest", lambda each: f"{each['lengths']['rows']['max']:,}")
        for name in dict.fromkeys(name for each in lines.values() for name in each):
            rows.append([name, *(lines[split].get(name, "") for split in splits)])
        if any("duplicates" in each for each in facts):
            row("exact duplicates", lambda each: f"{each['duplicates']['exact']:,}")
            row("near duplicates", lambda each: f"{each['duplicates']['near']:,}")
        if audit["train_in_eval"]:
            rows.append(["evaluation rows that are trained too", "", f"{audit['train_in_eval']['rows']:,}"])
        found = {"data": rows}
        if len(sources := audit["train"]["sources"]) > 1:
            names = {"rows": "rows", "used": "used", "tokens": unit, "targets": "targets"}
            passes = audit["batches"]["passes_per_epoch"]
            listed = [
                [each["source"], *(f"{each[name]:,}" for name in names), f"{passes[each['dataset']]:.2f}"]
                for each in sources
            ]
            found["sources"] = [["", *names.values(), "passes an epoch"], *listed]
        batches = _batch_rows(audit["batches"], unit if has_sizes(audit) else None)
        return found | {"batches": [["", "one epoch"], *batches]}

    @cached_property
    def _views(self) -> dict[str, View]:
        return {"train": self.data.train} | ({"eval": self.data.eval} if self.data.eval is not None else {})

    def _examples(self, split: str, part: int, row: int) -> list[ShownRow]:
        """The examples of a row by its position in the store of a part.

        Raises:
            UsageError: it is not used.
        """
        view = self._views[split]
        store, before = view.parts[part].store, sum(view.counts[:part])
        if (outcome := store.outcomes[store.rows[row]["outcome"]]) != USED:
            error = next((str(error) for at, error in store.bad_rows() if at == row), "")
            raise UsageError(error if outcome == BAD else f"{store.place(row)} is left out: {outcome}")
        examples = np.flatnonzero(store.row_of[view.parts[part].examples] == row) + before
        return [self.row(int(index), split) for index in examples]


def refuse_place(place: str) -> None:
    """Raise UsageError unless ``place`` has a form that ``Inspection.find`` accepts."""
    if not _NUMBER.fullmatch(place) and not _PLACE.fullmatch(place):
        raise UsageError(f"{place[:200]!r} is neither the number of an example nor FILE:LINE", key="--row")


def inspect(recipe: Recipe, tell: OnEvent = lambda event: None, adapter: str | None = None) -> Inspection:
    """Read and encode a recipe's data as training does, and audit all of it.

    With ``adapter``, the folder of a finished run of the data, the gradients of the rows are looked at too.

    Raises:
        UsageError: the run was trained on other data.
        DataError: the data cannot be read, or contains nothing to train on.
        ModelError: the base model's processor cannot be loaded.
        NetworkError: the hub cannot be reached.
    """
    tell(Message("reading the data"))
    recipe = with_task(recipe, tell)
    task = open_task(recipe, open_base(recipe.base_model))
    data = load_data(recipe, task, keep_bad_rows=True, tell=tell)
    tell(Message(f"looking at {count_of(len(data.train), 'example')}"))
    inspection = Inspection(recipe, data, total_processes(recipe.launch))
    if adapter is not None:
        run = open_run(adapter, tell)
        if run.data.report["content"] != data.report["content"]:
            raise UsageError(f"{adapter} was trained on other data than this recipe's", key="--adapter")
        inspection.findings = worst_first([*inspection.findings, *influence_findings(run)])
    for text in (*data.notes, *inspection.plan.repeated(data.names)):
        tell(warning(text))
    return inspection


def _batches(recipe: Recipe, data: Data, plan: Plan) -> dict[str, Any]:
    """The contents of a step and an epoch, and the share of a batch that is not padding, with and without packing."""
    efficiency: dict[str, float | None] = {"padded": None, "packed": None}
    tokens = int(data.task.sizes_with_targets(data.train)[plan.epoch_examples].sum())
    for name, packing in {"padded": False, "packed": True}.items():
        if not packing or isinstance(data.task, Packs):
            other = replace(recipe, dataset=replace(recipe.dataset, packing=packing))
            efficiency[name] = round(plan_of(other, data, plan.num_processes).efficiency, 4)
    return {
        "processes": plan.num_processes,
        "per_device_train_batch_size": recipe.training.per_device_train_batch_size,
        "gradient_accumulation_steps": recipe.training.gradient_accumulation_steps,
        "global_batch_size": plan.global_batch_size,
        "packing": plan.packs,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": plan.total_steps,
        "epochs": round(plan.epoch(plan.total_steps), 4),
        "passes_per_epoch": [round(passes, 4) for passes in plan.passes],
        "tokens_per_epoch": tokens,
        "tokens_per_step": round(tokens / plan.steps_per_epoch, 1),
        "efficiency": efficiency,
    }


def _batch_rows(batches: dict[str, Any], unit: str | None) -> list[list[str]]:
    size, accumulated = batches["per_device_train_batch_size"], batches["gradient_accumulation_steps"]
    packed = batches["efficiency"]["packed"]
    rows = [
        [f"{'packed rows' if batches['packing'] else 'examples'} of a step", f"{batches['global_batch_size']:,}"],
        ["  batch size x micro-batches x processes", f"{size:,} x {accumulated:,} x {batches['processes']:,}"],
        ["steps", f"{batches['steps_per_epoch']:,}"],
        ["steps in all", f"{batches['steps']:,} ({batches['epochs']:g} epoch{'s' * (batches['epochs'] != 1)})"],
    ]
    if unit is not None:
        rows += [
            [unit, f"{batches['tokens_per_epoch']:,}"],
            [f"{unit} of a step", f"{batches['tokens_per_step']:,.0f}"],
            [f"{unit} of a padded batch that are no padding", f"{batches['efficiency']['padded']:.1%}"],
        ]
    return rows if packed is None else [*rows, ["  the same with packing", f"{packed:.1%}"]]


def has_sizes(audit: dict[str, Any]) -> bool:
    """Whether examples have sizes: pictures count 1 each."""
    return bool(audit["train"]["lengths"]["rows"]["max"] > 1)


def has_targets(rows: Sequence[ShownRow]) -> bool:
    """Whether a legend is needed: beside texts there is something trained, a part of them or a label."""
    labelled = any(isinstance(part, Label) for row in rows for part in row.shown.parts)
    return any(labelled or token.trained or token.label for token in _tokens(rows))


def has_labels(rows: Sequence[ShownRow]) -> bool:
    """Whether the legend of labelled texts is needed."""
    return any(token.label for token in _tokens(rows))


def _tokens(rows: Sequence[ShownRow]) -> Iterator[TokenText]:
    return (token for row in rows for part in row.shown.parts if isinstance(part, Text) for token in part.tokens)


def colour(text: Text, label: str) -> str:
    """The colour of a label: those of a task take turns in ``COLOURS``."""
    return COLOURS[text.label_names.index(label) % len(COLOURS)]


def what_is_wrong(bad: dict[str, Any]) -> str:
    """The problem of a bad row in the audit, after its key."""
    return ": ".join(filter(None, [bad["key"], bad["message"]]))


def bars(facts: dict[str, Any]) -> list[tuple[str, int]]:
    """The histogram of row sizes before any cut: a label and a count for each bar."""
    histogram = facts["lengths"]["rows"]["histogram"]
    return [
        (f"{start:,} - {end - 1:,}", count)
        for (start, end), count in zip(pairwise(histogram["edges"]), histogram["counts"], strict=True)
    ]


def shortened(tokens: Sequence[TokenText], most: int) -> tuple[Sequence[TokenText], int, Sequence[TokenText]]:
    """The beginning and the end of a text of more than ``most`` tokens, and how many are left out between."""
    if len(tokens) <= most:
        return tokens, 0, []
    half = most // 2
    return tokens[:half], len(tokens) - 2 * half, tokens[-half:]


def _without_secrets(part: Part) -> Part:
    """A text without the secrets that its tokens spell together. Whatever is printed is redacted as a whole, too."""
    if not isinstance(part, Text):
        return part
    letters = list("".join(token.text for token in part.tokens))
    for start, end in secret_spans("".join(letters)):
        letters[start:end] = ["***", *[""] * (end - start - 1)]
    rest = iter(letters)
    tokens = [replace(token, text="".join(islice(rest, len(token.text)))) for token in part.tokens]
    return replace(part, tokens=tokens)
