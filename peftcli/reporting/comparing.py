"""Several runs: the settings in which they differ, and the report that compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftcli.reporting.blocks import (
    Block,
    Chart,
    Note,
    Section,
    Series,
    Table,
    clock,
    gib,
    in_order,
    number,
    setting_text,
)
from peftcli.reporting.run import RunFiles

_NO_SETTINGS = (
    "training.output_dir",
    "training.run_name",
    "launch.main_process_port",
    "base_model.name",
    "method.type",
)
"""Of every run its own, or named beside the settings."""
_MOST_CURVES = 16
_INTERVAL = ("low", "high")


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each recipe, the settings in which they are not all the same: dotted key -> value.

    A setting that a recipe does not have is missing there.
    """
    flat = [_leaves(recipe) for recipe in recipes]
    keys = sorted({key for each in flat for key in each if key not in _NO_SETTINGS})
    differ = [key for key in keys if len({json.dumps(each.get(key), sort_keys=True, default=str) for each in flat}) > 1]
    return [{key: each[key] for key in differ if key in each} for each in flat]


def _leaves(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe by dotted key; a setting that is an object itself stays one."""
    found: dict[str, Any] = {}
    for section, value in recipe.items():
        if section in ("base_model", "method", "dataset", "training", "launch", "gates") and isinstance(value, dict):
            found |= {f"{section}.{key}": inner for key, inner in value.items()}
        else:
            found[section] = value
    return found


def metrics_of(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of a run.json: value, and where it was compared with the base model that of the base and more.

    ``low`` and ``high`` bound the difference from the base model.
    """
    kept = (values.get("eval") or {}).get("kept") or {}
    compared = (values.get("comparison") or {}).get("metrics") or {}
    found = {name: {"value": value} for name, value in kept.items()}
    for name, each in compared.items():
        facts = {key: each[key] for key in ("base", "difference", *_INTERVAL)}
        found[name] = {"value": kept.get(name, each["adapter"]), **facts}
    return found


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return short names of runs that tell them apart: the ends of their folders' paths."""
    paths = [run.folder.resolve().parts for run in runs]
    longest = max(map(len, paths), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def compared_sections(runs: Sequence[RunFiles]) -> list[Section]:
    """Return the report that compares runs."""
    names = names_of(runs)
    made = {
        "Verdict": _verdict(runs, names),
        "Settings that differ": _settings(runs, names),
        "Metrics": _metrics(runs, names),
        "Forgetting": _forgetting(runs, names),
        "Curves": _curves(runs, names),
        "Memory and time": _cost(runs, names),
    }
    return [Section(title, blocks, brief=title != "Memory and time") for title, blocks in made.items() if blocks]


def _verdict(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Block]:
    blocks = list[Block]()
    main = runs[0].main
    measured = [(name, metrics_of(run.values).get(main, {})) for run, name in zip(runs, names, strict=True)]
    gains = {name: found for name, found in measured if "difference" in found}
    if len({run.main for run in runs}) > 1 or len({run.task for run in runs}) > 1:
        blocks.append(Note("These runs have different tasks or main metrics, so none is called the best.", "plain"))
    elif len(gains) == len(runs):
        verdicts = {
            name: run.values["comparison"]["metrics"][main]["verdict"] for run, name in zip(runs, names, strict=True)
        }
        better = [name for name, verdict in verdicts.items() if verdict == "better"]
        text = f"{len(better)} of {len(runs)} runs are better than their base model in {main}"
        blocks.append(Note(f"{text}{': ' if better else ''}{', '.join(better)}.", "good" if better else "plain"))
    else:
        blocks.append(Note(f"Not every run was compared with its base model in {main}.", "plain"))
    hashes = [
        json.dumps(((run.values.get("data") or {}).get("eval") or {}).get("sha256"), sort_keys=True) for run in runs
    ]
    if len({_contents(each) for each in hashes}) > 1:
        blocks.append(
            Note("Their evaluation data differ, so their metrics cannot be compared with one another.", "bad")
        )
    for run, name in zip(runs, names, strict=True):
        if run.values["status"] != "complete":
            blocks.append(Note(f"{name} is not complete: {run.values['status']}.", "bad"))
    return blocks


def _contents(hashes: str) -> tuple[str, ...]:
    """The hashes of files, whatever the files are called."""
    return tuple(sorted((json.loads(hashes) or {}).values()))


def _settings(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Block]:
    own = [{"base model": run.base, "method": run.method, "task": run.task} for run in runs]
    rows = [(key, [each[key] for each in own]) for key in own[0] if len({each[key] for each in own}) > 1]
    found = differing([run.values["identity"]["recipe"] for run in runs])
    keys = list(dict.fromkeys(key for each in found for key in each if key != "task"))
    rows += [(key, [setting_text(each[key]) if key in each else "" for each in found]) for key in keys]
    if not rows:
        return [Note("None: the recipes are the same.")]
    return [Table(("setting", *names), [(key, *cells) for key, cells in rows])]


def _metrics(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Block]:
    found = [metrics_of(run.values) for run in runs]
    keys = in_order({key for each in found for key in each}, runs[0].main)
    tables: list[Block] = []
    for key in keys:
        rows = [
            (name, number(each[key]["value"]), *_against_base(each[key]))
            for name, each in zip(names, found, strict=True)
            if key in each
        ]
        tables.append(Table(("run", "adapter", "base", "difference", "95 % interval"), rows, f"metric {key}"))
    return tables


def _against_base(found: Mapping[str, float]) -> tuple[str, str, str]:
    if "difference" not in found:
        return "", "", ""
    low, high = (number(found[key], "+") for key in _INTERVAL)
    return number(found["base"]), number(found["difference"], "+"), f"{low} to {high}"


def _forgetting(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Block]:
    found = [(name, run.values.get("forgetting") or {}) for run, name in zip(runs, names, strict=True)]
    rows = [
        (name, number(each["loss"], "+"), f"{number(each['low'], '+')} to {number(each['high'], '+')}")
        for name, each in found
        if "loss" in each
    ]
    columns = ("run", "change of the loss on other texts", "95 % interval")
    return [Table(columns, rows)] if rows else []


def _curves(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Block]:
    charts = [overlaid(runs, names, key) for key in dict.fromkeys(["loss", "eval_loss", *(run.main for run in runs)])]
    blocks: list[Block] = [chart for chart in charts if chart is not None]
    if len(runs) > _MOST_CURVES:
        blocks.insert(0, Note(f"Of the first {_MOST_CURVES} runs."))
    return blocks


def overlaid(runs: Sequence[RunFiles], names: Sequence[str], key: str) -> Chart | None:
    """Return one key of metrics.jsonl of several runs as one chart; None where none has it."""
    named = zip(names, runs, strict=True)
    series = [Series(name, run.points(key), dots=key != "loss") for name, run in [*named][:_MOST_CURVES]]
    series = [each for each in series if each.points]
    return Chart("Training loss" if key == "loss" else key, series) if series else None


def _cost(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Block]:
    rows = []
    for run, name in zip(runs, names, strict=True):
        seconds, peak = run.values.get("wall_seconds"), run.values.get("peak_memory_bytes") or {}
        steps = (run.values.get("steps") or {}).get("done", 0)
        most = gib(peak.get("cuda", peak["rss"])) if peak else ""
        rows.append((name, run.values["status"], f"{steps:,}", "" if seconds is None else clock(seconds), most))
    return [Table(("run", "status", "steps", "training", "most memory"), rows)]
