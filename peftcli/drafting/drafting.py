"""Draft a recipe from a user's data: look, find the reading, choose the rest, write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftcli.data.rows import count_of, listed
from peftcli.drafting import choices
from peftcli.drafting.bases import Base, Proposal, propose, read_base
from peftcli.drafting.convert import converted, converted_rows
from peftcli.drafting.look import Look, look_at
from peftcli.drafting.readings import Found, find_readings, rivals_of
from peftcli.drafting.write import Line, recipe_text
from peftcli.errors import DataError, PeftcliError, UsageError
from peftcli.guard.files import command_word
from peftcli.recipe import read
from peftcli.system.outputs import expand_user, require_writable, write_output
from peftcli.tasks import LABELS, TASKS

_MAX_RIVALS = 4
Ask = Callable[[Sequence[str]], int]
"""Lets the user choose one of several readings; returns its place."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user gave."""

    data: list[str]
    base: str | None = None
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    output: Path = Path("recipe.yaml")
    overwrite: bool = False

    def command(self, found: Found) -> str:
        """The command line that decides for a reading."""
        words = ["peftcli", "init", *map(command_word, self.data), "--task", found.reading.task]
        for role, name in found.columns.items():
            if isinstance(name, str):
                words += ["--column", command_word(f"{role}={name}")]
        words += ["--base", command_word(self.base)] if self.base else []
        return " ".join([*words, "--output", command_word(self.output)])


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A recipe that was written, and what decided."""

    recipe: Path
    task: str
    columns: dict[str, str | list[str]]
    train: list[str]
    eval: str | None
    base_model: str
    rows: int
    memory: str | None
    reasons: dict[str, str]
    notes: list[str]
    proposals: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "recipe": str(self.recipe),
            "task": self.task,
            "columns": self.columns,
            "train": self.train,
            "eval": self.eval,
            "base_model": self.base_model,
            "rows": self.rows,
            "memory": self.memory,
            "reasons": self.reasons,
            "notes": self.notes,
            "proposals": self.proposals,
        }


def draft(request: Request, ask: Ask | None = None) -> Draft:
    """Write a recipe for the user's data. ``ask``: lets them choose where two readings are as likely.

    Raises:
        UsageError: the recipe exists, or several readings fit and nobody can be asked.
        DataError: the data cannot be read, or are for no task that is known.
        ModelError: there is no such base model.
    """
    output = expand_user(request.output)
    if output.exists() and not request.overwrite:
        hint = "Give another file with --output, or --overwrite."
        raise UsageError("exists, and is not overwritten", file=str(output), hint=hint)
    if request.task is not None and request.task not in TASKS:
        raise UsageError(f"no task {request.task!r}", key="--task", hint=f"known: {', '.join(TASKS)}")
    require_writable(output)
    made = converted(request.data, output, request.task)
    base = read_base(request.base) if request.base else None
    if base and base.problem:
        made.notes.append(f"the config of {base.name} cannot be read ({base.problem}); the data alone decide")
    look = look_at(made.names)
    if conversion := converted_rows(look, output):
        look = _look_again(look, *conversion)
    found = _decide(look, base, request, ask)
    if made.labels:
        found = replace(found, settings={**found.settings, "labels": made.labels})
    return _write(found, look, base, output, [*made.notes, *look.notes])


def _look_again(look: Look, made: list[str], note: str) -> Look:
    """Look at the files that were made of the data."""
    found = look_at(made[: len(look.train)])
    found.train, found.eval = made[: len(look.train)], made[-1] if look.eval else None
    found.notes = [*look.notes, note, *found.notes]
    return found


# --- the reading ------------------------------------------------------------------------------------------------------


def _decide(look: Look, base: Base | None, request: Request, ask: Ask | None) -> Found:
    for role, name in request.columns.items():
        if name not in look.columns:
            message = f"no column {name!r}; the rows have: {listed(look.columns)}"
            raise UsageError(message, key=f"--column {role}")
    found = find_readings(look, request.task, base.family if base else None, request.columns)
    found = [each for each in found if not {*request.columns} - {*each.columns}]
    unfit = _unfit_label(look, LABELS)
    if request.task is None and unfit and not any(set(LABELS) & {*each.names()} for each in found[:1]):
        raise unfit
    if not found:
        raise _no_reading(look, base, request)
    rivals = rivals_of(found)
    if len(rivals) == 1:
        return rivals[0]
    rivals = rivals[:_MAX_RIVALS]
    if ask is not None:
        return rivals[ask([_described(each) for each in rivals])]
    what = "; or ".join(_described(each) for each in rivals[:2])
    hint = "\n".join(request.command(each) for each in rivals)
    raise UsageError(f"the rows may be for {what}. Choose:", file=look.train[0], hint=hint)


def _described(found: Found) -> str:
    columns = ", ".join(
        f"{role}: {name if isinstance(name, str) else len(name)}" for role, name in found.columns.items()
    )
    return f"{found.reading.task} ({columns})"


def _no_reading(look: Look, base: Base | None, request: Request) -> DataError:
    """The error about data that are for no task: what they lack."""
    facts, file = look.columns, look.train[0]
    if unfit := _unfit_label(look, (*LABELS, "class", "category", "target")):
        return unfit
    if base and base.family and (others := find_readings(look, request.task, None, request.columns)):
        hint = f"Leave --base out, or give one for {others[0].reading.task}."
        return DataError(
            f"the rows are for {_described(others[0])}, and {base.name} is {_an(base.family)}", file=file, hint=hint
        )
    if request.task and (others := find_readings(look, None, None, request.columns)):
        row = " or ".join(" and ".join(each) for each in TASKS[request.task].reads[:2])
        hint = f"It reads columns such as {row}; name yours with --column NAME=COLUMN."
        return DataError(f"no columns for {request.task}; the rows have: {listed(facts)}", file=file, hint=hint)
    shown = "; ".join(f"{each.name}: {_kind(each)}" for each in list(facts.values())[:6])
    hint = "Texts, pictures or sounds are needed, mostly with what is to be learnt of them: see docs/tasks.md."
    return DataError(f"the rows are for no task that is known. {shown}", file=file, hint=hint)


def _unfit_label(look: Look, names: Sequence[str]) -> DataError | None:
    """The error about a column of labels that has one class, or a class a row; None: there is no such column."""
    file = look.train[0]
    for facts in look.columns.values():
        if facts.name.lower() not in names or not facts.given or facts.media or facts.is_free:
            continue
        if facts.is_constant and isinstance(facts.given[0], str | int | float):
            one = f"{str(facts.given[0])[:40]!r}; two classes are needed"
            message = f"all {len(facts.given):,} values of {facts.name} are {one}"
            return DataError(
                message, file=file, hint="Add rows of another class, or name a task that needs none: --task."
            )
        if len(facts.counts) == len(facts.given) > 3 and not facts.is_fractional:
            message = f"each value of {facts.name} is there once; a class needs several rows"
            return DataError(message, file=file, hint="Name the column of the label: --column label=COLUMN.")
    return None


def _an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _kind(facts: Any) -> str:
    if not facts.given:
        return "empty"
    if facts.numbers:
        return facts.described_numbers()
    if facts.is_classes:
        return f"{len(facts.counts)} values"
    return "texts" if facts.is_free else f"{len(facts.counts):,} distinct values"


# --- the recipe -------------------------------------------------------------------------------------------------------


def _write(found: Found, look: Look, base: Base | None, output: Path, notes: list[str]) -> Draft:
    task = found.reading.task
    language = choices.language_in(found, look)
    models = propose(task, many_languages=language not in ("en", None))
    model = (base.as_proposal() if base else None) or (None if base else models[0])
    if model and base:
        model = replace(model, tasks=(task,))
    positions = base.positions if base else (models[0].positions if not base else None)
    length = choices.tokens_of(found, look, language, positions)
    tokens = length[0] if length else 10**6
    most = choices.stride_of(found, tokens)
    settings = choices.task_settings(found, look, base, language) | most
    fraction = None if look.eval else choices.fraction_of(look.rows)
    batch = choices.batch_of(found, tokens)[0]
    usual = length[2] if length else tokens
    memory = choices.memory_text(model, found, usual, batch) if model else None
    lines = [_base_line(base, models, memory), *_task_lines(task, settings, found), *choices.method_lines(found, base)]
    lines += _data_lines(found, look, fraction, length, notes)
    rows = choices.rows_of(look, fraction[0] if fraction else None)
    run = f"outputs/{output.stem if output.stem != 'recipe' else _stem(look.train[0])}"
    lines += choices.training_lines(found, look, tokens, rows, run, has_eval=True)
    proposed = [] if base else [_proposed(each, found, usual, batch) for each in models[1:4]]
    text = recipe_text(lines, _comments(output, look, notes), [f"or: {each}" for each in proposed])
    write_output(output, text.encode())
    _check(output)
    return Draft(
        recipe=output,
        task=task,
        columns=dict(found.columns),
        train=look.train,
        eval=look.eval,
        base_model=base.name if base else models[0].name,
        rows=look.rows,
        memory=memory,
        reasons={line.key: line.reason for line in lines if line.reason},
        notes=notes,
        proposals=proposed,
    )


def _base_line(base: Base | None, models: Sequence[Proposal], memory: str | None) -> Line:
    if base is None:
        first = models[0]
        return Line("base_model", first.name, f"{first.license}, {first.millions:g} million parameters, {memory}")
    kind = base.family or "not read"
    return Line("base_model", base.name, ", ".join(filter(None, (f"as given: {_an(kind)}", base.architecture, memory))))


def _proposed(model: Proposal, found: Found, tokens: int, batch: int) -> str:
    memory = choices.memory_text(model, found, tokens, batch)
    return f"{model.name} ({model.license}, {model.millions:g} million parameters, {memory})"


def _task_lines(task: str, settings: Mapping[str, tuple[Any, str]], found: Found) -> list[Line]:
    plain = [f"{name}: {found.reasons[role]}" for role, name in found.columns.items() if name == role]
    line = Line("task.type" if settings else "task", task, "; ".join(plain) or "by the columns below")
    return [line, *(Line(f"task.{name}", value, reason) for name, (value, reason) in settings.items())]


def _data_lines(
    found: Found, look: Look, fraction: tuple[float, str] | None, length: tuple[int, str, int] | None, notes: list[str]
) -> list[Line]:
    sampled = f", of which {len(look.sample):,} were looked at" if look.rows > len(look.sample) else ""
    if len(look.train) == 1:
        lines = [Line("dataset.train", look.train[0], f"{count_of(look.rows, 'row')}{sampled}")]
    else:
        lines = [
            Line("dataset.mix", [{"train": name} for name in look.train], f"{count_of(look.rows, 'row')}{sampled}")
        ]
    if look.eval:
        lines.append(Line("dataset.eval", look.eval, "by its name"))
    if fraction:
        lines.append(Line("dataset.eval_fraction", *fraction))
        if group := choices.group_of(found, look):
            lines.append(Line("dataset.group_by", *group))
    if found.reading.format:
        lines.append(Line("dataset.format", found.reading.format, "by the columns"))
    for role, name in found.columns.items():
        if name != role:
            lines.append(Line(f"dataset.columns.{role}", name, found.reasons[role]))
    if length:
        lines.append(Line("dataset.max_length", *length[:2]))
    if look.bad:
        lines.append(Line("dataset.on_bad_row", "skip", f"{count_of(look.bad, 'row')} cannot be read; they are listed"))
    if look.tests:
        notes.append(f"not read in training: {listed(look.tests)}")
    return lines


def _comments(output: Path, look: Look, notes: Sequence[str]) -> list[str]:
    command = command_word(output)
    read = "the trailing comments say what decided"
    return [
        f"Drafted by `peftcli init` from {listed(look.train)}: {read}.",
        f"  peftcli check --deep {command}    peftcli inspect {command}    peftcli train {command}",
        *(f"Note: {each}" for each in notes),
    ]


def _stem(name: str) -> str:
    stem = Path(name).name.split(".")[0] or "data"
    if stem.lower() in ("train", "data", "training") and Path(name).absolute().parent.name:
        stem = Path(name).absolute().parent.name
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "data"


def _check(output: Path) -> None:
    """Read the recipe that was written: a problem in it is a bug of this command."""
    if problems := read(output).problems:
        raise PeftcliError(f"the drafted recipe has a problem: {problems[0]}", file=str(output))
