"""Write docs/tasks.md: what the recipes of the tasks make of their base models, on rows that are not trained on.

    python docs/tasks.py          # all of them, three seeds each; takes hours on 2 cores
    python docs/tasks.py spam     # one of them; the others keep their lines

Run in the repository, where the recipes' models and data are: each recipe says on its first lines how to get them. What
was measured is kept in docs/tasks.json.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = {
    "spam": "eval_macro_f1",
    "verses": "eval_f1",
    "code_questions": "eval_f1",
    "asterisk": "eval_wer",
    "fashion_mnist": "eval_accuracy",
    "garments": "eval_mean_iou",
    "docstring_dpo": "eval_reward_accuracy",
    "docstring_reward": "eval_reward_accuracy",
    "code_search": "eval_mrr",
    "translation": "eval_bleu",
    "bags": "eval_loss",
}
"""Recipes of configs/tasks, and the metric that is shown of each."""
SEEDS = (0, 1, 2)
RESULTS, PAGE = ROOT / "docs/tasks.json", ROOT / "docs/tasks.md"


def main() -> None:
    """Measure the recipes that are named, and write the page of all."""
    names = sys.argv[1:] or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        sys.exit(
            f"no recipe of configs/tasks that is measured: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}"
        )
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        found[name] = {"machine": machine(), "runs": [measured(name, seed) for seed in SEEDS]}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text("\n".join(page(found)) + "\n")


def measured(name: str, seed: int) -> dict[str, Any]:
    """Train a recipe with a seed, by its command, and return its rows, its seconds and the metric before and after."""
    settings = [
        f"training.seed={seed}",
        "training.eval_on_start=true",
        f"training.output_dir=outputs/measured/{name}-{seed}",
    ]
    command = [sys.executable, "-m", "peftcli", "train", f"configs/tasks/{name}.yaml", *settings, "gates={}", "--json"]
    print("+", " ".join(command[1:]), flush=True)
    answer = subprocess.run([*command, "--overwrite"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    run, metric = json.loads(answer), RECIPES[name]
    before, after = run["eval"]["first"][metric], run["eval"]["kept"][metric]
    print(f"{name}, seed {seed}: {metric} {before:.4f} -> {after:.4f}", flush=True)
    return {"seed": seed, "before": before, "after": after, "rows": run["data"]["eval"]["used"]}


def machine() -> str:
    """Say what the figures were measured on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{platform.system()}, {platform.machine()}, Python {platform.python_version()}, {packages}"


def page(found: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    lines = [
        "# What the tasks reach",
        "",
        "Written by `python docs/tasks.py`: change that, and run it. Each line is a recipe of `configs/tasks/`,",
        f"trained with {len(SEEDS)} seeds and measured on rows that it does not train on, before the first step and",
        "after the last. Before the first step, a new head answers by chance.",
        "",
        "| recipe | held-out rows | metric | before | after: mean | each seed |",
        "| --- | ---: | --- | ---: | ---: | --- |",
    ]
    for name, metric in RECIPES.items():
        if name in found:
            runs = found[name]["runs"]
            before, after = ([run[when] for run in runs] for when in ("before", "after"))
            each = ", ".join(f"{value:.4f}" for value in after)
            recipe = f"[{name}](../configs/tasks/{name}.yaml)"
            lines.append(
                f"| {recipe} | {runs[0]['rows']:,} | `{metric}` | {mean(before):.4f} | {mean(after):.4f} | {each} |"
            )
    return [*lines, "", "Measured on:", "", *sorted({f"- {each['machine']}" for each in found.values()})]


if __name__ == "__main__":
    main()
