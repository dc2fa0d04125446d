"""Train what ``peftcli init`` wrote, for at most 60 steps, and compare with the base model and with a constant answer.

    python tests/layouts/learn.py [LAYOUT ...]
    python tests/layouts/learn.py --page docs/layouts.md

Each result is a line of layouts.jsonl in the working directory, as those of score.py are; layouts that were trained
are left out. ``--page`` writes the table of them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bases import NAMES, trainable
from layouts import ASKS, LAYOUTS, REFUSES
from score import LEAST, RESULTS, draft, failure, judge, keep, run

from peftcli.tasks import TASKS

STEPS = 60
"""At most."""
LEARNT = 50
"""Layouts on which training must beat both."""
SETTINGS = ("training.save_strategy=no", "training.verify=false", "training.bf16=false", "training.eval_strategy=steps")
_OF_BASE = {
    "encoder": (30, "training.per_device_train_batch_size=8", "dataset.max_length=64"),
    "chat": (10, "training.per_device_train_batch_size=4", "dataset.max_length=96"),
    "whisper": (20, "training.per_device_train_batch_size=4"),
    "seq2seq": (60, "training.learning_rate=1e-2", "dataset.max_length=128"),
    "pictures": (40,),
    "masks": (60, "training.learning_rate=1e-2"),
    "pipeline": (60,),
}
"""Kind of base -> steps; less of what takes long on two cores; a larger rate for models with random weights, which have
all to learn."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a layout."""

    name: str
    verdict: str
    said: str
    task: str = ""
    base: str = ""
    metric: str = ""
    before: float | None = None
    after: float | None = None
    learnt: bool = False
    """Better than the base model before the first step, and than a constant answer."""
    problem: str = ""
    seconds: float = 0.0


def learn(name: str, folder: Path, settings: Sequence[str] = SETTINGS) -> Result:
    """Draft and train in a folder."""
    layout, started = LAYOUTS[name], time.perf_counter()
    base = trainable(layout.base)
    answer = draft(layout, folder, base, run)
    verdict = judge(layout, answer)
    known: dict[str, Any] = {"name": name, "verdict": verdict.verdict, "said": verdict.said}
    if answer[0]:
        return Result(**known)
    known |= {"task": json.loads(answer[1])["task"], "base": NAMES[layout.base]}
    recipe, output = folder / "recipe.yaml", folder / "out"
    steps, *own = _OF_BASE[layout.base]
    settings = [*settings, *own, f"training.max_steps={steps}", f"training.eval_steps={steps}"]
    code, out, err = run("train", recipe, *settings, f"training.output_dir={output}", "--json")
    known["seconds"] = round(time.perf_counter() - started, 1)
    if code:
        return Result(**known, problem=f"exit {code}: {failure(out, err)[:300]}")
    return Result(**known, **compare(json.loads(out), recipe, settings))


def compare(record: dict[str, Any], recipe: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Of a complete run: the metric that matters before and after."""
    measured = record["eval"]
    metric = measured.get("main", "eval_loss")
    first, kept = measured["first"], measured["kept"] or measured["last"]
    if metric not in first:
        code, out, _ = run("evaluate", recipe, *settings, "--json")
        first = json.loads(out)["eval"]["last"] if code == 0 else {}
    if first.get(metric) == 1.0:
        metric = "eval_loss"  # there is nothing to add to a metric that was perfect before
    before, after = first.get(metric), kept.get(metric)
    doubts = [each for each in map(str, record.get("warnings", ())) if "no sign of learning" in each]
    lower = metric.endswith(("loss", "mse", "wer", "cer", "perplexity"))
    better = None not in (before, after) and (after < before if lower else after > before)
    problem = doubts[0] if doubts else "" if better else "no better than the base model"
    return {"metric": metric, "before": before, "after": after, "learnt": better and not doubts, "problem": problem}


def page(results: Sequence[Result]) -> str:
    """The table, as a page of the documentation."""
    scored = [each for each in results if each.name in LAYOUTS]
    counts = Counter(each.verdict for each in scored)
    trained = [each for each in scored if each.base]
    learnt = sum(each.learnt for each in trained)
    rows = [
        f"| {each.name} | {LAYOUTS[each.name].after} | {each.verdict} | {_task(each)} | {each.metric or '-'} | "
        f"{_number(each.before)} | {_number(each.after)} |"
        for each in scored
    ]
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    bases = "; ".join(f"{kind}: {name}" for kind, name in NAMES.items())
    return f"""\
# Layouts that `peftcli init` reads

Each row is a small set of files, laid out as a public data set or a program has them, with other contents:
`python tests/layouts/write.py FOLDER` writes them. *Right* means that `init` named the task and the columns that a
person would, or asked or refused where a person would; *asked* that it printed a command line for each reading;
*refused* that it said what is missing.

`python tests/layouts/score.py` prints the results of `init`. `python tests/layouts/learn.py` trains what it wrote for
at most {STEPS} steps and measures the metric of the task on the rows held out, before the first step and at the end.

Of {len(scored)} layouts: {told}. Of the {len(trained)} that were trained on, {learnt} became better than the base model
and than a constant answer. A row without a metric was not trained on. Base models: {bases}.

| layout | as | init | task | metric | before | after |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _task(result: Result) -> str:
    """The task that ``init`` named."""
    named = result.said.split(" (")[0]
    return named if named in TASKS else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def read_results() -> dict[str, Result]:
    """The results of the file; of what is there twice the last."""
    found: dict[str, dict[str, Any]] = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []:
        result = json.loads(line)
        found.setdefault(result["name"], {}).update(result)
    return {name: Result(**each) for name, each in found.items()}


def main() -> None:
    """Learn those that are named, or all that have no result, or write the page."""
    if sys.argv[1:2] == ["--page"]:
        found = read_results()
        Path(sys.argv[2]).write_text(page([found[name] for name in LAYOUTS if name in found]), encoding="utf-8")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    names = sys.argv[1:] or [name for name in LAYOUTS if not getattr(read_results().get(name), "base", "")]
    for name in names:
        with tempfile.TemporaryDirectory(prefix="peftcli-layouts-") as scratch:
            result = learn(name, Path(scratch) / name)
        keep(asdict(result))
        change = f"{result.metric} {_number(result.before)} -> {_number(result.after)}"
        print(f"{result.verdict:<8} {name:<24} {change} {result.problem}", flush=True)
    results = read_results().values()
    told = sum(each.learnt for each in results)
    trained = [each for each in results if LAYOUTS[each.name].tasks[0] not in (ASKS, REFUSES)]
    print(f"{told} of {len(trained)} layouts to train on were learnt")
    sys.exit(told < min(LEARNT, LEAST * len(trained)))


if __name__ == "__main__":
    main()
