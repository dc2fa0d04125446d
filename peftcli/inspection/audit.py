"""The audit of a whole dataset, whatever its task: sizes, outcomes, duplicates, evaluation rows that are trained on.

Reads the examples once, a chunk at a time, and holds some 400 bytes a row. What speaks of tokens, answers or classes
comes from the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from peftcli.data.duplicates import Pairs, find_duplicates
from peftcli.data.findings import FINDINGS, Finding
from peftcli.data.rows import BAD, USED
from peftcli.data.store import View
from peftcli.data.used_rows import UsedRows, repeats
from peftcli.tasks.base import Task
from peftcli.tasks.shown import Description

_LISTED = 10
_LISTED_BAD = 20
_BARS = 20
_QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
_COMMON = 0.05
"""What a larger share of the training rows have in common, such as a prompt, says nothing about the evaluation rows."""


@dataclass(frozen=True)
class Audit:
    """What was found in the training data, or in the evaluation data."""

    facts: dict[str, Any]
    """Numbers, as ``inspect --json`` prints them."""
    findings: list[Finding]
    rows: UsedRows
    hashes: np.ndarray | None
    """Of each used row's input; None: the task does not say when two are equal."""
    description: Description
    """What the task knows of the rows."""


def audit(view: View, task: Task[Any], *, split: str = "train") -> Audit:
    """Examine every row.

    ``split``, ``train`` or ``eval``, is how findings name the rows.
    """
    rows = UsedRows(view)
    description = task.describe(view)
    facts, hashes = _facts(view, rows, task), None
    findings = task.findings(view)
    if task.identity:
        hashes, pairs = find_duplicates(rows, task.identity)
        labelled = rows.hashes(*task.identity, *task.label_columns) if task.label_columns else hashes
        again = repeats(labelled)
        first = hashes[~again]  # a row for each label of an input
        masks = {
            "exact_duplicates": again,
            "labels_differ": np.isin(hashes, first[repeats(first)]),
            "near_duplicates": np.isin(np.arange(len(rows)), pairs.later),
        }
        cut = rows.records("flags") & task.flags.get("truncated", 0) > 0
        for name, mask in masks.items():
            more = (
                f"; cut at max_length, after which they may differ: {(mask & cut).sum()} of them"
                if (mask & cut).any()
                else ""
            )
            findings += [replace(each, more=more) for each in rows.findings([(FINDINGS[name], mask)])]
        facts["duplicates"] = {
            "exact": int(again.sum()),
            "near": len(pairs.later),
            "compared": pairs.compared,
            "pairs": _listed(pairs, rows),
        }
    findings = [replace(finding, split=split) for finding in findings]
    return Audit({**facts, **description.facts}, findings, rows, hashes, description)


def leaks(train: Audit, evaluation: Audit) -> tuple[dict[str, int] | None, list[Finding]]:
    """The evaluation rows that are trained on, and those of which a part is."""
    if train.hashes is None or evaluation.hashes is None:
        return None, []
    trained = np.isin(evaluation.hashes, train.hashes)
    counts, masks = {"rows": int(trained.sum())}, [(FINDINGS["train_in_eval"], trained)]
    for one, other in zip(train.description.shared, evaluation.description.shared, strict=True):
        values, times = np.unique(one.hashes, return_counts=True)
        telling = values[(values != 0) & (times <= max(2, _COMMON * len(train.rows)))]
        mask = np.isin(other.hashes, telling) & ~trained
        counts[one.name] = int(mask.sum())
        masks.append((one.kind, mask))
    return counts, evaluation.rows.findings(masks, split="eval")


def histogram(values: np.ndarray) -> dict[str, list[int]]:
    """At most 20 bars of one round width, except that the last one holds the longest row in twenty, too.

    Returns:
        ``counts``, and in ``edges`` the start of each bar and, at the end, the largest value plus 1.
    """
    if not len(values):
        return {"edges": [0, 1], "counts": [0]}
    least, most = int(values.min()), int(np.quantile(values, 0.95, method="lower"))
    widths = (size * 10**zeros for zeros in range(18) for size in (1, 2, 5))
    width = next(width for width in widths if most // width - least // width < _BARS)
    bars = np.minimum(values // width, most // width) - least // width
    counts = np.bincount(bars)
    start = least // width * width
    return {
        "edges": [*range(start, start + len(counts) * width, width), int(values.max()) + 1],
        "counts": counts.tolist(),
    }


def _listed(pairs: Pairs, rows: UsedRows) -> list[dict[str, Any]]:
    """The pairs that are most alike."""
    best = np.argsort(-pairs.index, kind="stable")[:_LISTED]
    return [
        {
            "row": str(rows.place(int(pairs.later[at]))),
            "like": str(rows.place(int(pairs.earlier[at]))),
            "alike": round(float(pairs.index[at]), 3),
        }
        for at in best
    ]


def _facts(view: View, rows: UsedRows, task: Task[Any]) -> dict[str, Any]:
    """Sizes, and what became of the rows."""
    records = [part.records for part in view.parts]
    outcomes = Counter[str]()
    for part, mine in zip(view.parts, records, strict=True):
        for index, name in enumerate(part.store.outcomes):
            outcomes[name] += int((mine["outcome"] == index).sum())
    uncut = np.concatenate([np.zeros(0, np.int64), *(mine["size"] for mine in records)])
    sizes = task.sizes_with_targets(view)
    return {
        "rows": sum(map(len, records)),
        "used": len(rows),
        "left_out": {name: count for name, count in outcomes.items() if count and name != USED},
        "targets_cut": int(rows.records("lost").sum()),
        "examples": len(view),
        "unit": task.unit,
        "tokens": int(sizes.sum()),
        "targets": int(view.targets.sum()),
        "lengths": {"rows": _lengths(uncut[uncut > 0]), "examples": _lengths(sizes)},
        "sources": _sources(view, rows, sizes),
        "longest": _longest(view),
        "bad_rows": list(islice(_bad_rows(view), _LISTED_BAD)),
        "columns_not_read": sorted({name for part in view.parts for name in part.columns_not_read}),
    }


def _lengths(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {**dict.fromkeys(_QUANTILES, 0), "mean": 0.0, "histogram": histogram(values)}
    found_at = np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")
    quantiles = dict(zip(_QUANTILES, map(int, found_at), strict=True))
    return {**quantiles, "mean": round(float(values.mean()), 1), "histogram": histogram(values)}


def _sources(view: View, rows: UsedRows, sizes: np.ndarray) -> list[dict[str, Any]]:
    """What each file, or dataset of the hub, gives. A folder of pictures, each a file of its own, is one source."""
    of_row = {"tokens": rows.sums(sizes), "targets": rows.sums(view.targets)}
    out: list[dict[str, Any]] = []
    for at, part in enumerate(view.parts):
        store, mine = part.store, rows.part == at
        names, read, used = store.files, part.records["file"], store.rows["file"][rows.number[mine]]
        if len(names) == len(store.rows) > 1:
            names, read, used = [store.about["source"]], np.zeros_like(read), np.zeros_like(used)
        counts = {
            "rows": np.bincount(read, minlength=len(names)),
            "used": np.bincount(used, minlength=len(names)),
            **{key: np.bincount(used, values[mine], minlength=len(names)) for key, values in of_row.items()},
        }
        for index, name in enumerate(names):
            found = {key: int(values[index]) for key, values in counts.items()}
            out.append({"source": name, "dataset": at, **found})
    return out


def _longest(view: View) -> list[dict[str, Any]]:
    """The longest rows, before any cut."""
    rows: list[tuple[int, int, int]] = []
    for at, part in enumerate(view.parts):
        sizes = part.records["size"]
        for position in np.argsort(-sizes, kind="stable")[:_LISTED].tolist():
            rows.append((-int(sizes[position]), at, position))
    out = []
    for negative, at, position in sorted(rows)[:_LISTED]:
        chosen, store = view.parts[at].chosen, view.parts[at].store
        row = position if chosen is None else int(chosen[position])
        outcome = store.outcomes[store.rows[row]["outcome"]]
        if outcome != BAD:
            out.append({"row": str(store.place(row)), "tokens": -negative, "outcome": outcome})
    return out


def _bad_rows(view: View) -> Iterator[dict[str, Any]]:
    for part in view.parts:
        for row, error in part.bad_rows():
            yield {"row": str(part.store.place(row)), "message": error.message, "key": error.key}
