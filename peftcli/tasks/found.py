"""The task of a recipe that names none: found from the base model's architecture and the columns of its data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from peftcli.data.rows import listed
from peftcli.errors import UsageError
from peftcli.tasks import TASKS, TaskRow

_HEADLESS = "AutoModel"
"""Its architectures are those of every task: a model that was saved without a head says nothing."""


Found = tuple[str, str, Mapping[str, Any]]
"""The name of a task, what it was found from, and settings that it needs."""


def find_task(
    config: Any, columns: Collection[str], truths: Collection[str] = (), perhaps: Collection[str] = ()
) -> Found:
    """Find the one task that fits the base model and the data.

    A task whose columns are part of another fitting task's is left out: rows of text and label are for classification,
    though text alone would be enough for a language model. ``columns`` are those of the training rows, and the names
    that ``dataset.columns`` gives them; ``truths`` are those of them that hold true or false, ``perhaps`` also those of
    0 and 1, which may be something else.

    Raises:
        UsageError: no task fits, or several do.
    """
    found = other = _find(config, columns, truths)
    with suppress(UsageError):
        other = _find(config, columns, perhaps or truths)
    if other[0] == found[0]:
        return found
    settings = "".join(f", {key}: {value}" for key, value in other[2].items())
    hint = f"set task: {{type: {other[0]}{settings}}} if 1 marks the good answers, else task: {found[0]}"
    raise UsageError("is left out, and a label of 0 or 1 may say which answers are good", key="task", hint=hint)


def _find(config: Any, columns: Collection[str], truths: Collection[str]) -> Found:
    architecture = (config.architectures or [type(config).__name__])[0]
    classes = {name: _classes(row, config) for name, row in TASKS.items()}
    exact = [name for name, known in classes.items() if architecture in known and TASKS[name].auto_class != _HEADLESS]
    every = [name for name, known in classes.items() if known]
    matches = {name: match for name, row in TASKS.items() if (match := _match(row, columns, truths))}
    by_columns = [name for name, match in matches.items() if not any(match < other for other in matches.values())]
    by_model = exact
    if not {*exact} & {*by_columns} and all(TASKS[name].precedes_tasks for name in exact):
        by_model = every
    fitting = [name for name in by_model if name in by_columns]
    if len(fitting) == 1:
        name, match = fitting[0], matches[fitting[0]]
        return name, f"{architecture} and the columns {', '.join(sorted(match))}", TASKS[name].needs.get(match, {})
    candidates = fitting or list(dict.fromkeys([*by_model, *by_columns]))
    models, given, tasks = (listed(sorted(names)) for names in (by_model, columns, by_columns))
    facts = f"{architecture} ({models}) and the columns {given} ({tasks})"
    raise UsageError(
        f"{'is left out, and ' if fitting else 'is left out, and no one task fits '}"
        + (f"several tasks fit {facts}" if fitting else facts),
        key="task",
        hint=f"set task to one of {', '.join(candidates or TASKS)}",
    )


def task_of_class(name: str) -> str | None:
    """The first task whose auto class builds the transformers class of this name; None: a model without a head."""
    import transformers

    for task, auto_class in ((task, each) for task, row in TASKS.items() for each in row.auto_classes):
        mapping = getattr(getattr(transformers, auto_class, None), "_model_mapping", None)
        known = mapping._model_mapping.values() if mapping is not None and auto_class != _HEADLESS else ()
        if any(name in each if isinstance(each, (list, tuple)) else name == each for each in known):
            return task
    return None


def _classes(row: TaskRow, config: Any) -> Collection[str]:
    """The classes of transformers that the task's auto classes build for this kind of model."""
    import transformers

    row = row.of(config)
    if row.auto_class in (config.architectures or ()):  # of a pipeline, which has no architecture of transformers
        return {row.auto_class}
    mapping = getattr(getattr(transformers, row.auto_class, None), "_model_mapping", None)
    try:
        known = mapping[type(config)] if mapping is not None else ()
    except KeyError:
        return ()
    return {each.__name__ for each in (known if isinstance(known, (list, tuple)) else [known])}


def _match(row: TaskRow, columns: Collection[str], truths: Collection[str]) -> frozenset[str]:
    """The largest set of the task's columns that is there."""
    there = {*columns} - ({*row.truths} - {*truths})
    return max((frozenset(each) for each in row.reads if set(each) <= there), key=len, default=frozenset())
