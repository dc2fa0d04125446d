"""What the settings of a recipe's data mean together, and whether its paths exist."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from peftcli.core.prompts.config import SoftPromptConfig
from peftcli.data.source_names import is_path
from peftcli.methods import METHODS
from peftcli.recipe.names import near, near_file
from peftcli.recipe.settings import choices, settings
from peftcli.recipe.values import Report
from peftcli.schema import Dataset, Recipe, Source
from peftcli.tasks import TASKS
from peftcli.tasks.settings import UNDER_DATASET

_OF_THE_HUB = {"name": None, "revision": None, "split": "train", "streaming": False}
_OF_ONE_DATASET = {**_OF_THE_HUB, "limit": None}
_MAX_NEAR = 20
"""Missing files for which a near name is looked up: each reads a folder."""


def check_data(recipe: Recipe, report: Report) -> None:
    """Reports the problems of the section ``dataset``, and of what it wants of task and method."""
    for part in (_train_or_mix, _paths, _hub_settings, _limits, _weights, _repeats, _evaluation_rows, _allowed):
        part(recipe.dataset, report)
    _rows(recipe, report)


def check_task(recipe: Recipe, report: Report) -> None:
    """Reports settings under ``dataset`` that the recipe's task, where it is known, does not have."""
    dataset, name = recipe.dataset, (recipe.task or {}).get("type", "")
    if name not in TASKS:
        return
    own = settings(TASKS[name].settings)
    for key in UNDER_DATASET:
        value, keys = getattr(dataset, key), (f"dataset.{key}", "task")
        if value == getattr(Dataset, key) or (key in own and value in (choices(own[key].hint) or [value])):
            continue
        if key == "packing":
            report(keys, f"examples of the task {name} cannot share a row; set dataset.packing: false")
        elif key == "overlong" and value == "split":
            report(keys, f"examples of the task {name} cannot be split; choose truncate, drop or error")
        elif key in own:
            report(keys, f"the task {name} knows {', '.join(choices(own[key].hint))} only, not {value}")
        else:
            report(keys, f"is no setting of the task {name}; leave it out")


def exists(path: str) -> bool:
    """Whether there is a file or folder of that name."""
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):
        return False


def _entries(dataset: Dataset) -> list[tuple[str, Source]]:
    """What is trained on, each with the key that its settings stand under."""
    keys = [f"dataset.mix[{index}]" for index in range(len(dataset.mix))] or ["dataset"]
    return list(zip(keys, dataset.sources(), strict=True))


def _train_or_mix(dataset: Dataset, report: Report) -> None:
    keys = ("dataset.train", "dataset.mix")
    if dataset.train is None and not dataset.mix:
        report(keys, "is required, unless dataset.mix names several datasets")
    elif dataset.train is not None and dataset.mix:
        report(
            keys[::-1], "cannot be given together with dataset.train; where one of them is inherited, set it to null"
        )
    elif dataset.mix:
        for name, default in _OF_ONE_DATASET.items():
            if getattr(dataset, name) != default:
                report((f"dataset.{name}", *keys), "is a setting of one dataset; give it in the entries of dataset.mix")
        if dataset.eval_split is not None:
            report(
                ("dataset.eval_split", *keys),
                "is a split of dataset.train; with dataset.mix give dataset.eval or dataset.eval_fraction",
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
        elif is_path(path) and not exists(path):
            report((key,), f"no such file: {path[:200]}", near_file(path) if missing < _MAX_NEAR else None)
            missing += 1


def _hub_settings(dataset: Dataset, report: Report) -> None:
    for key, source in _entries(dataset):
        if not exists(source.train):
            continue
        for name, default in _OF_THE_HUB.items():
            if getattr(source, name) != default:
                more = "; local files are always streamed" if name == "streaming" else ""
                report((f"{key}.{name}", f"{key}.train"), f"is for datasets of the hub, and {key}.train is local{more}")
    if dataset.eval_split is not None and dataset.eval is None and exists(dataset.train or ""):
        report(("dataset.eval_split", "dataset.train"), "is for datasets of the hub, and dataset.train is local")


def _limits(dataset: Dataset, report: Report) -> None:
    for key, source in _entries(dataset):
        if source.limit is not None and source.limit < 1:
            report((f"{key}.limit",), f"must be at least 1, not {source.limit}")


def _weights(dataset: Dataset, report: Report) -> None:
    some = any(source.weight is not None for source in dataset.mix)
    for index, source in enumerate(dataset.mix):
        key = f"dataset.mix[{index}].weight"
        if source.weight is None and some:
            report((key,), "is missing: either every dataset of dataset.mix has a weight, or none has")
        elif source.weight is not None and source.weight <= 0:
            report((key,), f"must be above 0, not {source.weight}; leave out a dataset that is not wanted")


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
            report(keys, f"is dataset.mix[{before}] again; give it once, with a larger weight")


def _evaluation_rows(dataset: Dataset, report: Report) -> None:
    ways = [name for name in ("eval", "eval_split", "eval_fraction") if getattr(dataset, name) is not None]
    if len(ways) > 1:
        keys = [f"dataset.{name}" for name in reversed(ways)]
        report(keys, f"cannot be given together with {' and '.join(reversed(keys[1:]))}")
    if dataset.eval_fraction is not None and not 0 < dataset.eval_fraction < 1:
        report(("dataset.eval_fraction",), f"must be between 0 and 1, not {dataset.eval_fraction}")


def _allowed(dataset: Dataset, report: Report) -> None:
    if not dataset.allow:
        return
    from peftcli.tasks.findings import FINDINGS

    stops = [name for name, kind in FINDINGS.items() if kind.can_stop and name != "bad_rows"]
    for index, name in enumerate(dataset.allow):
        key = f"dataset.allow[{index}]"
        if name == "bad_rows":
            report((key,), "is no finding to allow: dataset.on_bad_row says what happens at bad rows")
        elif name not in FINDINGS:
            message = f"no finding is called {name[:60]!r}; those that stop a run: {', '.join(stops)}"
            report((key,), message, near(name, stops))
        elif name not in stops:
            report((key,), "never stops a run; leave it out")


def _rows(recipe: Recipe, report: Report) -> None:
    """What rows hold, against what the task and the method do with rows."""
    dataset, method = recipe.dataset, METHODS.get(recipe.method["type"])
    check_task(recipe, report)
    if not dataset.packing:
        return
    if method and issubclass(method.config_class(), SoftPromptConfig):
        report(
            ("dataset.packing", "method.type"),
            f"packed rows hold several examples, and {method.title} puts its virtual tokens once before each row; "
            "set dataset.packing: false",
        )
    if recipe.training.train_sampling_strategy == "group_by_length":
        report(
            ("training.train_sampling_strategy", "dataset.packing"),
            "group_by_length means nothing with dataset.packing, whose rows are all about equally long; choose random",
        )
