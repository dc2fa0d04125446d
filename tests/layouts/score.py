"""Run ``peftcli init`` on every layout and compare what it says with what a person would.

    python tests/layouts/score.py [--plain] [LAYOUT ...]

``--plain`` measures what there is without ``init``: a recipe of base, method and file alone, given to ``check --deep``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bases import trainable, write_config
from layouts import ASKS, LAYOUTS, REFUSES, Columns, Layout

RIGHT, ASKED, REFUSED, WRONG, BROKEN = "right", "asked", "refused", "wrong", "broken"
LEAST = 57 / 60
"""Share of the layouts that must be right; of the others, none may be wrong."""
_ROLES = {
    name: role
    for role, names in {
        "text": "sentence sentence1 premise question1",
        "second": "text_pair sentence2 hypothesis question2 passage",
        "prompt": "instruction",
        "completion": "output response",
        "answers": "answer",
        "label": "labels tags ner_tags",
        "anchor": "query",
        "image": "file_name img image_file_name",
        "audio": "path audio_file_name",
    }.items()
    for name in names.split()
}
"""A task's name of a column -> one of the names that mean the same."""
_WRITTEN = ("transcript", "caption")
_IMPORTED = ("torch", "transformers", "accelerate", "sklearn.metrics", "matplotlib.pyplot", "peftcli.train.run")
RESULTS = Path(os.environ.get("PEFTCLI_LAYOUTS", "layouts.jsonl"))
"""Each run adds a line for each layout."""
Answer = tuple[int, str, str]
"""Exit code, stdout and stderr."""


@dataclass(frozen=True)
class Verdict:
    """What became of a layout."""

    name: str
    verdict: str
    said: str
    """Task and columns, or the first line of the error."""


def run(*arguments: Any) -> Answer:
    """Run peftcli in a fork of this process, which has imported everything: in a fraction of the time."""
    from peftcli.cli.app import main

    for name in _IMPORTED:
        importlib.import_module(name)

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = main([str(each) for each in arguments])
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    return code, said[0], said[1]


def draft(layout: Layout, folder: Path, base: Path, run: Callable[..., Answer] = run) -> Answer:
    """Write the layout's files and run ``init`` on them; the recipe is recipe.yaml in the folder."""
    data = layout.write(folder / "data")
    return run("init", *data, "--base", base, "--output", folder / "recipe.yaml", "--json")


def judge(layout: Layout, answer: Answer) -> Verdict:
    """Compare with what a person would say."""
    code, out, err = answer
    if code == 0:
        drafted = json.loads(out)
        told = ", ".join(f"{ours}: {theirs}" for ours, theirs in drafted["columns"].items())
        same = not layout.columns or any(_same(each, drafted["columns"]) for each in layout.columns)
        fine = drafted["task"] in layout.tasks and same
        return Verdict(layout.name, RIGHT if fine else WRONG, f"{drafted['task']} ({told})")
    message = failure(out, err)
    if code not in (2, 3, 4):
        return Verdict(layout.name, BROKEN, f"exit {code}: {message}")
    asks = code == 2 and (out + err).count("peftcli init ") >= 2
    met = ASKS in layout.tasks if asks else REFUSES in layout.tasks and code == 3
    return Verdict(layout.name, RIGHT if met else ASKED if asks else REFUSED, message)


def failure(out: str, err: str) -> str:
    """The message of an error: of the JSON object, or the last line of the log."""
    try:
        error = json.loads(out)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError):
        return next(iter(err.strip().splitlines()[-1:]), "")


def _same(wanted: Columns, found: Columns) -> bool:
    """Whether each column that a person would name has its role. A text to write may be called by any name."""
    roles = {_ROLES.get(role, role): name for role, name in found.items()}
    return all(
        name in roles.values() if role in _WRITTEN else roles.get(_ROLES.get(role, role)) == name
        for role, name in wanted.items()
    )


def score(names: Sequence[str], base: Callable[[str, Path], Path] = write_config) -> list[Verdict]:
    """Judge these layouts, one after the other, and print each verdict."""
    verdicts = list[Verdict]()
    with tempfile.TemporaryDirectory(prefix="peftcli-layouts-") as scratch:
        for name in names:
            folder = Path(scratch) / name
            layout = LAYOUTS[name]
            answer = draft(layout, folder, base(layout.base, Path(scratch) / "bases" / layout.base))
            verdicts.append(judge(layout, answer))
            print(f"{verdicts[-1].verdict:<8} {name:<24} {verdicts[-1].said}", flush=True)
    return verdicts


def plain(names: Sequence[str]) -> Counter[str]:
    """Give ``check --deep`` a recipe of base, method and file alone, and count its exit codes."""
    counts = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="peftcli-layouts-") as scratch:
        for name in names:
            folder, layout = Path(scratch) / name, LAYOUTS[name]
            data = layout.write(folder / "data")
            recipe = folder / "recipe.yaml"
            recipe.write_text(
                f"base_model: {trainable(layout.base, real=False)}\nmethod: {{type: lora}}\n"
                f"dataset: {{train: {data[0]}}}\ntraining: {{output_dir: {folder / 'out'}, max_steps: 2}}\n"
            )
            code, out, err = run("check", "--deep", recipe)
            counts["trains" if code == 0 else "does not"] += 1
            print(f"{code} {name:<24} {(err or out).strip().splitlines()[0][:150]}", flush=True)
    return counts


def keep(result: dict[str, Any]) -> None:
    """Add a line to the results."""
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def main() -> None:
    """Score those that are named, or all, and print the totals."""
    names = [name for name in sys.argv[1:] if name != "--plain"] or list(LAYOUTS)
    if "--plain" in sys.argv:
        print(dict(plain([name for name in names if LAYOUTS[name].tasks[0] not in (ASKS, REFUSES)])))
        return
    verdicts = score(names)
    for verdict in verdicts:
        keep(asdict(verdict))
    totals = Counter(verdict.verdict for verdict in verdicts)
    print(f"{len(names)} layouts: " + ", ".join(f"{count} {each}" for each, count in totals.most_common()))
    sys.exit(totals[RIGHT] < LEAST * len(names) or bool(totals[WRONG] + totals[BROKEN]))


if __name__ == "__main__":
    main()
