"""The sections of one run's report. A section stands only where run.json has its data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from peftcli.adapters.card import how_to_use
from peftcli.data.rows import count_of
from peftcli.errors import PeftcliError
from peftcli.guard.adapter_folder import CONFIG_FILE
from peftcli.guard.files import command_word
from peftcli.methods import METHODS
from peftcli.recipe import why_failed
from peftcli.recipe.rates import usual_rate_of
from peftcli.reporting.blocks import (
    Block,
    Chart,
    Code,
    Note,
    Outputs,
    Section,
    Series,
    Table,
    Tone,
    clock,
    gib,
    in_order,
    number,
)
from peftcli.reporting.samples import sample_pictures
from peftcli.schema import BaseModel, Dataset, Launch, Training

_MAX_TEXT = 2000
"""Characters of an input or output that are shown."""
_MAX_SETTING = 300
"""Characters of a setting; recipe.yaml has it whole."""
_VERDICTS = {"better": "better", "worse": "worse", "no_difference": "no difference beyond chance"}
_THREADS = {"environment": "as the environment says", "cores": "one for each usable core", "resumed": "as it began"}
_SECTIONS: dict[str, Any] = {"base_model": BaseModel, "dataset": Dataset, "training": Training, "launch": Launch}
_COUNTS = ("rows", "used", "examples", "skipped", "truncated", "split", "targets_cut", "tokens", "targets")
"""Of the account of some rows, in this order; those that are 0 are left out, except the first three."""


@dataclass(frozen=True)
class RunFiles:
    """What the folder of a run says of it."""

    folder: Path
    values: Mapping[str, Any]
    """The content of run.json, checked."""
    metrics: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    recipe: str = ""
    """The text of recipe.yaml."""
    moves_to: Path | None = None
    """The folder that this one becomes, of a run that replaces another; None: it stays."""

    @property
    def home(self) -> Path:
        """The folder as its user names it."""
        return self.moves_to or self.folder

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.home.resolve().name

    @property
    def main(self) -> str:
        """The main metric, as eval_accuracy."""
        compared = self.values.get("comparison", {}).get("main")
        return str(compared or self.values.get("eval", {}).get("main") or "eval_loss")

    @property
    def base(self) -> str:
        """The base model's name, without the folder it is in."""
        name = str(self.values["base_model"]["name"])
        return name.rstrip("/").rpartition("/")[2] or name

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.values["recipe"]["method"]["type"])

    @property
    def task(self) -> str:
        """The task's name."""
        return str(task_type(self.values) or "unknown task")

    def points(self, key: str) -> list[tuple[float, float]]:
        """The curve of a key of metrics.jsonl: step and value, where that is finite."""
        return [(entry["step"], float(entry[key])) for entry in self.metrics if _is_finite(entry.get(key))]

    def chart(self, title: str, *keys: tuple[str, str]) -> Chart | None:
        """The chart of some keys, each with its name in the legend; None where there are no values."""
        series = [Series(name, self.points(key), dots=key.startswith("eval_")) for key, name in keys]
        series = [each for each in series if each.points]
        return Chart(title, series) if series else None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def task_type(values: Mapping[str, Any]) -> str | None:
    """Return the name of the task of a run.json."""
    task = values.get("task") or values["recipe"].get("task")
    return task.get("type") if isinstance(task, dict) else task


def about(run: RunFiles) -> str:
    """Return what was trained, in a line."""
    name = METHODS[run.method].title if run.method in METHODS else run.method
    return f"{name} on {run.base}, task {run.task}, {run.values['day']}"


def sections(run: RunFiles) -> list[Section]:
    """Return the report of a run."""
    made = {
        "Verdict": _verdict(run),
        "Results": _results(run),
        "Curves": _curves(run),
        "Samples": sample_pictures(run.folder),
        "Before and after": _outputs(run),
        "Forgetting": _forgetting(run),
        "Data": _data(run),
        "Recipe": _recipe(run),
        "Memory and time": _memory_and_time(run),
        "Environment": _environment(run),
        "How to use it": _use(run),
    }
    brief = ("Verdict", "Results", "Forgetting")
    return [Section(title, blocks, title in brief) for title, blocks in made.items() if blocks]


# --- verdict and results ----------------------------------------------------------------------------------------------


def _verdict(run: RunFiles) -> list[Block]:
    values = run.values
    if values["status"] != "complete":
        steps, error = values.get("steps") or {"done": 0, "total": "?"}, values.get("error") or {}
        why = f": {error['message']}" if error else ""
        ended = f"This run is not complete: {values['status']} after step {steps['done']} of {steps['total']}{why}."
        more = " It can be resumed with the same command." if values["resumable"] else ""
        return [Note(ended + more, "bad")]
    learnt, tone = _gain(run)
    failed = [gate for gate in values.get("gates", []) if not gate["passed"]]
    if failed or values.get("warnings"):
        tone = "bad"
    lost = _lost(values)
    second = _gates_in_words(values.get("gates", []), failed) + (f", and {lost}" if lost else "")
    return [Note(f"{learnt} {second}.", tone)]


def _gain(run: RunFiles) -> tuple[str, Tone]:
    """The sentence on what was learnt, and its tone."""
    values, main = run.values, run.main
    if warnings := values.get("warnings"):
        return f"{warnings[0][:1].upper()}{warnings[0][1:]}.", "bad"
    compared = values.get("comparison") or {}
    if (found := compared.get("metrics", {}).get(main)) is not None:
        verdicts: dict[str, tuple[str, Tone]] = {
            "better": ("The adapter is better than the base model", "good"),
            "worse": ("The adapter is worse than the base model", "bad"),
            "no_difference": ("The adapter is not better than the base model by more than chance", "plain"),
        }
        start, tone = verdicts[found["verdict"]]
        guess = ", which has no trained head and guesses" if compared.get("base_head_is_new") else ""
        drawn = f"{compared['units']:,} {compared.get('unit', 'rows')}"
        span = f"95 % interval {number(found['low'], '+')} to {number(found['high'], '+')}"
        figures = f"{main} is {number(found['adapter'])}, and {number(found['base'])} without it{guess}"
        return f"{start}: {figures} (difference {number(found['difference'], '+')}, {span}, {drawn}).", tone
    kept, first = (values.get("eval", {}).get(name) or {} for name in ("kept", "first"))
    reason = f" ({compared['skipped'].partition(';')[0]})" if compared.get("skipped") else ""
    unknown = f"it was not compared with the base model{reason}"
    if main in kept and main in first:
        return f"{main} went from {number(first[main])} to {number(kept[main])} in training; {unknown}.", "plain"
    if main in kept:
        return f"{main} is {number(kept[main])} after training; {unknown}.", "plain"
    loss = run.points("loss")
    course = f" from {number(loss[0][1])} to {number(loss[-1][1])}" if loss else ""
    return f"It was not evaluated, so only the training loss is known{course and ': it went'}{course}.", "plain"


def _because(part: Mapping[str, Any]) -> str:
    return f" ({part['skipped'].rstrip('.')})" if part.get("skipped") else ""


def _gates_in_words(gates: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]) -> str:
    if failed:
        return f"{len(failed)} of {len(gates)} gates failed ({'; '.join(map(why_failed, failed))})"
    if gates:
        return "Its gate holds" if len(gates) == 1 else f"All {len(gates)} gates hold"
    return "The recipe sets no gates"


def _lost(values: Mapping[str, Any]) -> str:
    """What became of what the base model knew, as the end of a sentence; empty where it is not known."""
    forgetting = values.get("forgetting") or {}
    if "loss" in forgetting:
        span = f"{number(forgetting['low'], '+')} to {number(forgetting['high'], '+')}"
        change = number(forgetting["loss"], "+")
        return (
            f"on {forgetting['texts']:,} other texts its loss changed by {change} nats a token (95 % interval {span})"
        )
    if (right := _known(values)) is not None:
        return f"of {right['base']:,} rows that the base model had right it gets {right['lost']:,} wrong"
    return ""


def _known(values: Mapping[str, Any]) -> Mapping[str, int] | None:
    """What became of the rows that the base model had right; None where it had none, or only guessed."""
    compared = values.get("comparison") or {}
    right: Mapping[str, int] | None = compared.get("right")
    return right if right and right["base"] and not compared.get("base_head_is_new") else None


def _results(run: RunFiles) -> list[Block]:
    values, blocks = run.values, list[Block]()
    compared = values.get("comparison") or {}
    if found := compared.get("metrics"):
        rows = [_compared(name, found[name]) for name in in_order(found, run.main)]
        blocks.append(Table(("metric", "base", "adapter", "difference", "95 % interval", "verdict"), rows))
        drawn = f"{compared['draws']:,} draws over {compared['units']:,} {compared.get('unit', 'rows')}"
        blocks.append(Note(f"The same {compared['rows']:,} rows for both; paired bootstrap, {drawn}."))
    kept, first = (values.get("eval", {}).get(name) or {} for name in ("kept", "first"))
    if kept and not found:
        rows = [(name, number(first.get(name)), number(kept[name])) for name in in_order(kept, run.main)]
        blocks.append(Table(("metric", "first evaluation", "this adapter"), rows))
        if compared.get("skipped"):
            blocks.append(Note(f"Not compared with the base model{_because(compared)}."))
    if (right := _known(values)) is not None:
        names = {"base": "right without it", "kept": "still right", "lost": "now wrong", "gained": "newly right"}
        blocks.append(Table(("rows", "count"), [(text, f"{right[key]:,}") for key, text in names.items()]))
    if gates := values.get("gates"):
        rows = [_gate(gate) for gate in gates]
        blocks.append(Table(("gate", "bound", "measured", ""), rows))
    return blocks


def _compared(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    span = f"{number(found['low'], '+')} to {number(found['high'], '+')}"
    difference = number(found["difference"], "+")
    verdict = _VERDICTS.get(found["verdict"], found["verdict"])
    return name, number(found["base"]), number(found["adapter"]), difference, span, verdict


def _gate(gate: Mapping[str, Any]) -> tuple[str, ...]:
    return gate["metric"], gate["gate"], number(gate["value"]), "holds" if gate["passed"] else "FAILED"


# --- curves, outputs, forgetting --------------------------------------------------------------------------------------


def _curves(run: RunFiles) -> list[Block]:
    loss = run.chart("Loss per target", ("loss", "training"), ("eval_loss", "evaluation"))
    main = run.chart(run.main, (run.main, "")) if run.main != "eval_loss" else None
    rate = run.chart("Learning rate", ("learning_rate", ""))
    norm = run.chart("Gradient norm", ("grad_norm", ""))
    return [chart for chart in (loss, main, norm, rate) if chart is not None]


def _outputs(run: RunFiles) -> list[Block]:
    return [
        Outputs(
            f"{str(each['chosen']).replace('_', ' ').capitalize()}: {each['row']}",
            {name: _shortened(each[name]) for name in ("input", "wanted", "base", "adapter") if each.get(name)},
        )
        for each in (run.values.get("comparison") or {}).get("outputs", [])
    ]


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left_out = len(text) - _MAX_TEXT
    return text if left_out <= 0 else f"{text[:_MAX_TEXT]}\n... ({left_out:,} more characters)"


_GROUPS = ("chat", "code", "english", "other_languages")
"""Groups of texts that stand before the single languages."""


def _forgetting(run: RunFiles) -> list[Block]:
    found = run.values.get("forgetting") or {}
    if "loss" not in found:
        return [Note(f"Not measured{_because(found)}.")] if found else []
    columns = ("texts", "count", "change of the loss", "KL from the base", "same greedy tokens")
    parts = found.get("groups", {})
    groups = [("all", found), *sorted(parts.items(), key=lambda part: (part[0] not in _GROUPS, part[0]))]
    rows = [
        (name, f"{each['texts']:,}", number(each["loss"], "+"), number(each["kl"]), f"{each['kept_tokens']:.1%}")
        for name, each in groups
    ]
    span = f"{number(found['low'], '+')} to {number(found['high'], '+')}"
    losses = f"from {number(found['base_loss'])} to {number(found['adapter_loss'])}"
    text = f"On {found['tokens']:,} tokens that have nothing to do with the training data, the loss went {losses} nats "
    return [
        Note(f"{text}a token: by {number(found['loss'], '+')}, with a 95 % interval of {span}."),
        Table(columns, rows),
    ]


# --- data and recipe --------------------------------------------------------------------------------------------------


def _data(run: RunFiles) -> list[Block]:
    data = run.values.get("data") or {}
    if not data:
        return []
    accounts = [("training", data)] + ([("evaluation", data["eval"])] if data.get("eval") else [])
    counts = {name: [account[name] for _, account in accounts] for name in _COUNTS}
    shown = {name: each for name, each in counts.items() if any(each) or name in _COUNTS[:3]}
    reasons = sorted({reason for _, account in accounts for reason in account["dropped"]})
    shown |= {
        f"dropped: {reason}": [account["dropped"].get(reason, 0) for _, account in accounts] for reason in reasons
    }
    unit = data.get("unit", "tokens")
    rows = [
        (unit if name == "tokens" else name.replace("_", " "), *(f"{n:,}" for n in each))
        for name, each in shown.items()
    ]
    blocks: list[Block] = [Table(("", *(name for name, _ in accounts)), rows)]
    files = [(name, ", ".join(account["files"])) for name, account in accounts if account["files"]]
    blocks.append(Table(("", ""), [*files, ("format", data["format"])]))
    if found := data["findings"]:
        listed = [
            (each["name"], each["level"], f"{each['count']:,} {each['split']} rows", ", ".join(each["rows"][:3]))
            for each in found
        ]
        blocks.append(Table(("finding", "level", "count", "the first of them"), listed))
    else:
        blocks.append(Note("No findings."))
    return blocks


def _recipe(run: RunFiles) -> list[Block]:
    blocks: list[Block] = [
        Table(("chosen", "value", "why"), list(_chosen(run)), "what was chosen"),
        Table(("setting", "value"), list(_given(run.values["recipe"])), "settings that are not the default"),
    ]
    if run.recipe:
        blocks.append(Code(run.recipe, "recipe.yaml, with every setting", folded=True))
    return [block for block in blocks if not isinstance(block, Table) or block.rows]


def _chosen(run: RunFiles) -> Iterator[tuple[str, ...]]:
    values, recipe = run.values, run.values["recipe"]
    rate, usual = recipe["training"]["learning_rate"], usual_rate_of(recipe["method"], task_type(values) or "")
    if usual is not None:
        why = f"the usual one of {run.method} for {run.task}"
        yield "learning rate", f"{rate:g}", why if rate == usual else f"given; {why} is {usual:g}"
    data = values.get("data") or {}
    if data and recipe["dataset"].get("format") == "auto":
        yield "dataset.format", data["format"], "found from the columns of the rows"
    if columns := data.get("columns"):
        yield "dataset.columns", ", ".join(f"{key}: {name}" for key, name in columns.items()), "found by their names"
    if recipe.get("launch", {}).get("num_processes") == "auto":
        yield (
            "launch.num_processes",
            str(values["processes"]),
            f"for the device {values.get('device', 'that is there')}",
        )
    if threads := values.get("threads"):
        yield "threads", str(threads["count"]), _THREADS[threads["reason"]]
    if "bf16" in values:
        yield "computes in", "bfloat16" if values["bf16"] else "float32", "by training.bf16 and the device"


def _given(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings whose value is not the default."""
    for name, cls in _SECTIONS.items():
        yield from _not_default(name, cls, recipe.get(name) or {})
    method = recipe["method"]
    if method["type"] in METHODS:
        yield from _not_default("method", METHODS[method["type"]].config_class(), method)
    yield from ((f"gates.{name}", _as_text(bound)) for name, bound in (recipe.get("gates") or {}).items())


def _not_default(section: str, cls: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    defaults = {
        each.name: each.default_factory() if callable(each.default_factory) else each.default for each in fields(cls)
    }
    for key, value in given.items():
        default = defaults.get(key, MISSING)
        if key not in ("type", "output_dir", "learning_rate") and value != default and value not in (None, [], {}):
            yield f"{section}.{key}", _as_text(value)


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SETTING else f"{text[:_MAX_SETTING]} ..."


# --- memory, environment, use -----------------------------------------------------------------------------------------


def _memory_and_time(run: RunFiles) -> list[Block]:
    values, rows = run.values, list[tuple[str, str]]()
    if steps := values.get("steps"):
        rows.append(
            ("steps", f"{steps['done']:,} of {steps['total']:,}, in {count_of(len(values['attempts']), 'attempt')}")
        )
    if "wall_seconds" in values:
        rows.append(("training", clock(values["wall_seconds"])))
    if speed := values.get("tokens_per_second"):
        rows.append(("speed", f"{speed:,.0f} {(values.get('data') or {}).get('unit', 'tokens')} a second"))
    for key, text in (("comparison", "comparing with the base model"), ("forgetting", "measuring what was forgotten")):
        if "seconds" in (values.get(key) or {}):
            rows.append((text, f"{values[key]['seconds']:.1f} s"))
    peak = values.get("peak_memory_bytes") or {}
    rows += [(text, gib(peak[key])) for key, text in (("rss", "most memory"), ("cuda", "of the GPU")) if key in peak]
    if counts := values.get("parameters"):
        share = 100 * counts["trainable"] / counts["all"]
        rows.append(("trained parameters", f"{counts['trainable']:,} of {counts['all']:,} ({share:.3g} %)"))
    sizes = [each["bytes"] for each in values["artefacts"] if each["path"].startswith("adapter_model")]
    rows += [("adapter file", f"{size / 1e6:,.1f} MB") for size in sizes]
    return [Table(("", ""), rows)] if rows else []


def _environment(run: RunFiles) -> list[Block]:
    values = run.values
    base = values["base_model"]
    rows = [("base model", base["name"])]
    rows += [(key, str(base[key])) for key in ("revision", "sha256") if base.get(key)]
    rows += [("device", f"{values['processes']} x {values['device']}")] if "device" in values else []
    rows += [("seed", str(values["seeds"]["training"])), *sorted(values["versions"].items())]
    return [Table(("", ""), rows)]


def _use(run: RunFiles) -> list[Block]:
    """Commands and Python, as the card has them."""
    if not (run.folder / CONFIG_FILE).is_file():
        return []
    word = command_word(run.home)
    try:
        text = how_to_use(run.folder, str(run.home) if word == str(run.home) else None)
    except PeftcliError:
        return []
    blocks = list[Block]()
    for index, part in enumerate(text.split("```")):
        if index % 2:
            blocks.append(Code(part.partition("\n")[2].rstrip("\n")))
        elif part := part.replace("## How to use it", "").strip():
            blocks.append(Note(part))
    if run.values.get("mergeable"):
        blocks += [
            Note("As one model with its base:"),
            Code(f"peftcli merge {word} --output {command_word(f'{run.home}-merged')}"),
        ]
    return blocks
