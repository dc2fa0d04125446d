"""Checks of the section ``dataset``: combinations of settings, and whether paths exist."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from peftcli.data.dialect import is_encoding
from peftcli.data.sources import is_path, saved_splits
from peftcli.guard.ranges import out_of_range
from peftcli.methods import METHODS
from peftcli.recipe.names import closest, closest_file
from peftcli.recipe.settings import choices, settings
from peftcli.recipe.values import Report
from peftcli.schema import Dataset, Recipe, Source
from peftcli.system.outputs import expand_user
from peftcli.tasks import TASKS
from peftcli.tasks.settings import UNDER_DATASET

_HUB_SETTINGS = {"name": None, "revision": None, "split": "train", "streaming": False}
_DATASET_SETTINGS = {**_HUB_SETTINGS, "limit": None}
_MAX_SUGGESTIONS = 20
"""Missing files for which a similar name is searched: each search reads a folder."""


def check_data(recipe: Recipe, report: Report) -> None:
    """Report the problems of the section ``dataset``, alone and with task and method."""
    for part in (_train_or_mix, _paths, _hub_settings, _file_settings, _mix, _repeats, _evaluation_rows, _allowed):
        part(recipe.dataset, report)
    _rows(recipe, report)


def check_task(recipe: Recipe, report: Report) -> None:
    """Report the task's settings that it does not take, here or under ``dataset``, or that are out of range."""
    dataset, name = recipe.dataset, (recipe.task or {}).get("type", "")
    if name not in TASKS:
        return
    own = settings(TASKS[name].settings)
    for key in UNDER_DATASET:
        value, keys = getattr(dataset, key), (f"dataset.{key}", "task")
        if value == getattr(Dataset, key) or (key in own and value in (choices(own[key].hint) or [value])):
            continue
        if key == "packing":
            report(keys, f"the task {name} cannot pack examples; set dataset.packing: false")
        elif key == "overlong" and value == "split":
            report(keys, f"the task {name} cannot split examples; choose truncate, drop or error")
        elif key in own:
            report(keys, f"the task {name} supports only {', '.join(choices(own[key].hint))}, not {value}")
        else:
            report(keys, f"is not a setting of the task {name}; leave it out")
    given = {key: value for key, value in (recipe.task or {}).items() if key != "type"}
    for key, value in given.items():  # of a task that was found, or else they have been read as its own
        allowed = choices(own[key].hint) if key in own else []
        if key not in own:
            report((f"task.{key}",), f"is not a setting of the task {name}; leave it out")
        elif isinstance(value, str) and allowed and value not in allowed:
            report((f"task.{key}",), f"the task {name} supports only {', '.join(allowed)}, not {value}")
    chosen = TASKS[name].settings(**{key: given[key] for key in given.keys() & own.keys()})
    for key, problem in [*out_of_range(chosen), *chosen.problems()]:
        report((f"task.{key}",), problem)


def exists(path: str) -> bool:
    """Return whether a file or folder has this name."""
    try:
        return bool(path) and expand_user(Path(path)).exists()
    except (OSError, ValueError):
        return False


def ways_to_evaluate(dataset: Dataset) -> list[str]:
    """Return the settings that name evaluation rows; none if there are no such rows."""
    return [name for name in ("eval", "eval_split", "eval_fraction") if getattr(dataset, name) is not None]


def _train_or_mix(dataset: Dataset, report: Report) -> None:
    keys = ("dataset.train", "dataset.mix")
    if dataset.train is None and not dataset.mix:
        report(keys, "is required, unless dataset.mix names several datasets")
    elif dataset.train is not None and dataset.mix:
        report(keys[::-1], "cannot be given together with dataset.train; if one of them is inherited, set it to null")
    elif dataset.mix:
        for name, default in _DATASET_SETTINGS.items():
            if getattr(dataset, name) != default:
                report((f"dataset.{name}", *keys), "applies to a single dataset; set it in the entries of dataset.mix")
        if dataset.eval_split is not None and dataset.eval is None:
            report(
                ("dataset.eval_split", *keys),
                "is a split of dataset.train; with dataset.mix, use dataset.eval or dataset.eval_fraction",
            )


def _paths(dataset: Dataset, report: Report) -> None:
    named = [("dataset.train", dataset.train), ("dataset.eval", dataset.eval)]
    named += [(f"dataset.mix[{index}].train", source.train) for index, source in enumerate(dataset.mix)]
    missing = 0
    for key, path in named:
        if path is None:
            continue
        if not path.strip():
            report((key,), "is empty")
        elif "://" in path:
            report((key,), "must be a path or a hub id, not a URL")
        elif {*"*?["} & {*path} and not exists(path):
            report((key,), "patterns are not expanded; name a folder or a file (dataset.mix takes several)")
        elif is_path(path) and not exists(path):
            report((key,), f"no such file: {path[:200]}", closest_file(path) if missing < _MAX_SUGGESTIONS else None)
            missing += 1


def _hub_settings(dataset: Dataset, report: Report) -> None:
    keys = [f"dataset.mix[{index}]" for index in range(len(dataset.mix))] or ["dataset"]
    sources = list(zip(keys, dataset.sources(), strict=True))
    streamed = [(f"{key}.split", each.split) for key, each in sources if each.streaming]
    for key, split in [*streamed, *[("dataset.eval_split", dataset.eval_split or "")] * dataset.streaming]:
        if "[" in split:
            report((key,), "a part of a split cannot be streamed; leave streaming out, or take the first rows by limit")
    for key, source in sources:
        if not exists(source.train):
            continue
        for name, default in _HUB_SETTINGS.items():
            if name == "split" and saved_splits(source.train):
                continue
            if getattr(source, name) != default:
                more = "; local files are always streamed" if name == "streaming" else ""
                report((f"{key}.{name}", f"{key}.train"), f"applies to hub datasets, but {key}.train is local{more}")
    evaluated = "train" if dataset.eval is None else "eval"
    named_by = getattr(dataset, evaluated) or ""
    if dataset.eval_split is not None and exists(named_by) and not saved_splits(named_by):
        named = ("dataset.eval_split", f"dataset.{evaluated}")
        more = "; dataset.eval_fraction holds rows of it out" if evaluated == "train" else ""
        report(named, f"applies to hub datasets, but dataset.{evaluated} is local{more}")


def _file_settings(dataset: Dataset, report: Report) -> None:
    parts: list[tuple[str, Dataset | Source]] = [("dataset", dataset)]
    parts += [(f"dataset.mix[{at}]", source) for at, source in enumerate(dataset.mix)]
    for key, part in parts:
        if part.delimiter is not None and (len(part.delimiter) != 1 or part.delimiter in '"\r\n'):
            report((f"{key}.delimiter",), 'must be one character, as ";" or "\\t", and no quote')
        if part.encoding is not None and not is_encoding(part.encoding):
            report(
                (f"{key}.encoding",), f"unknown encoding: {part.encoding[:60]!r}; known are utf-8, cp1252, utf-16 ..."
            )
        if part.media_root is not None and not exists(part.media_root):
            report((f"{key}.media_root",), f"no such folder: {part.media_root[:200]}", closest_file(part.media_root))


def _mix(dataset: Dataset, report: Report) -> None:
    some = any(source.weight is not None for source in dataset.mix)
    for index, source in enumerate(dataset.mix):
        key = f"dataset.mix[{index}]"
        for name, problem in out_of_range(source):
            report((f"{key}.{name}",), problem)
        if source.weight is None and some:
            report((f"{key}.weight",), "is missing; give weights to all datasets of dataset.mix, or to none")
        elif source.weight is not None and source.weight <= 0:
            report((f"{key}.weight",), f"must be above 0, not {source.weight}; leave out a dataset instead")


def _repeats(dataset: Dataset, report: Report) -> None:
    first: dict[str, int] = {}
    names = [entry.name for entry in dataclasses.fields(Source)]
    for index, source in enumerate(dataset.sources() if dataset.mix else ()):
        same = dataclasses.replace(
            source,
            train=os.path.normpath(source.train),
            columns=dict(sorted(source.columns.items())),
            weight=None,
        )
        before = first.setdefault(repr(same), index)
        if before != index:
            keys = [f"dataset.mix[{at}].{name}" for at in (index, before) for name in names]
            report(keys, f"repeats dataset.mix[{before}]; give it once, with a larger weight")


def _evaluation_rows(dataset: Dataset, report: Report) -> None:
    ways = ways_to_evaluate(dataset)
    if dataset.eval_fraction is not None and len(ways) > 1:
        keys = [f"dataset.{name}" for name in reversed(ways)]
        report(keys, f"cannot be given together with {' and '.join(reversed(keys[1:]))}")
    if dataset.eval_fraction is None:
        grouped = [f"dataset.mix[{at}].group_by" for at, source in enumerate(dataset.mix) if source.group_by]
        for key in ["dataset.group_by"] * bool(dataset.group_by) + grouped:
            report((key,), "says which rows dataset.eval_fraction keeps together, and that is not set")
        if dataset.eval_seed is not None:
            report(("dataset.eval_seed",), "chooses the rows of dataset.eval_fraction, and that is not set")


def _allowed(dataset: Dataset, report: Report) -> None:
    if not dataset.allow:
        return
    from peftcli.tasks.findings import FINDINGS

    stops = [name for name, kind in FINDINGS.items() if kind.can_stop and name != "bad_rows"]
    for index, name in enumerate(dataset.allow):
        key = f"dataset.allow[{index}]"
        if name == "bad_rows":
            report((key,), "cannot be allowed; dataset.on_bad_row decides about bad rows")
        elif name not in FINDINGS:
            message = f"unknown finding: {name[:60]!r}; those that stop a run: {', '.join(stops)}"
            report((key,), message, closest(name, stops))
        elif name not in stops:
            report((key,), "never stops a run; leave it out")


def _rows(recipe: Recipe, report: Report) -> None:
    """Check packing with the method and with the order of examples."""
    dataset, method = recipe.dataset, METHODS.get(recipe.method["type"])
    check_task(recipe, report)
    if not dataset.packing:
        return
    settings = {key: value for key, value in recipe.method.items() if key != "type"}
    if method and (problem := method.config_class().unchecked(**settings).packing_problem()):
        report(
            ("dataset.packing", "method.type"),
            f"packed rows contain several examples, but {method.title} {problem}; set dataset.packing: false",
        )
    if recipe.training.train_sampling_strategy == "group_by_length":
        report(
            ("training.train_sampling_strategy", "dataset.packing"),
            "group_by_length has no effect with dataset.packing, whose rows have about equal lengths; choose random",
        )
