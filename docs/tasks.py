"""Write docs/tasks.md: what the recipes of the tasks make of their base models, here and with PEFT and Trainer.

    pip install trl sentence-transformers
    python docs/tasks.py          # all recipes, three seeds each; takes many hours on 2 cores
    python docs/tasks.py spam     # one of them; the others keep their lines

Run in the repository, where the recipes' models and data are: each recipe says on its first lines how to get them. What
was measured is kept in docs/tasks.json, each seed as soon as it is there, and not measured again.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import jiwer
import numpy as np
import soundfile

ROOT = Path(__file__).parents[1]
RECIPES = {
    "spam": "eval_macro_f1",
    "verses": "eval_f1",
    "code_questions": "eval_f1",
    "asterisk": "eval_wer",
    "fashion_mnist": "eval_accuracy",
    "garments": "eval_mean_iou",
    "garment_boxes": "eval_map",
    "docstring_dpo": "eval_reward_accuracy",
    "docstring_reward": "eval_reward_accuracy",
    "docstring_context": "eval_kl",
    "code_search": "eval_mrr",
    "code_ranking": "eval_mrr",
    "translation": "eval_bleu",
    "pronunciation": "eval_exact_match",
    "bags": "eval_loss",
    "garment_words": "eval_exact_match",
    "docstring_masks": "eval_perplexity",
    "docstring_choices": "eval_accuracy",
    "spoken_languages": "eval_accuracy",
    "spelled_prompts": "eval_cer",
}
"""Recipes of configs/tasks, and the metric that is shown of each."""
LOWER_IS_BETTER = ("eval_wer", "eval_cer", "eval_loss", "eval_kl", "eval_perplexity")
SEEDS = (0, 1, 2)
RESAMPLES = 10_000
LONGEST = 30
"""Seconds of a clip that Whisper hears at once; recipes leave out longer ones."""
RESULTS, PAGE = ROOT / "docs/tasks.json", ROOT / "docs/tasks.md"

HEAD = f"""\
# What the tasks reach

Each line is a recipe of `configs/tasks/`, trained with {len(SEEDS)} seeds and measured on held-out rows: before the
first step (a new head answers by chance), after `peftcli train`, and after the same training with PEFT and Trainer.

Written by `python docs/tasks.py`, with the models and data that the recipes name on their first lines, the developer
tools (`make setup`), and `pip install trl sentence-transformers`. `python docs/tasks.py spam` measures one recipe.

| recipe | held-out rows | metric | before | after: mean | each seed | Trainer: mean | each seed | our mean |
| --- | ---: | --- | ---: | ---: | --- | ---: | --- | --- |"""
TRAINER = """
*Within*: the two means are no further apart than the seeds of one side are. Otherwise ours is *better* or *worse*.

`configs/tasks/train_with_trainer.py` is Trainer's side; for preferences, rewards, teachers and pictures in
conversations it is TRL's, for embeddings and rerankers sentence-transformers', and to make pictures the loss of
diffusers' scripts. Base model, rows, method, batches, learning rate, warm-up, schedule, clipping and number formats
are the recipe's. Both sides make equally many steps and train equally many parameters, or else the script stops. What
Trainer wrote is measured by `peftcli evaluate`. Each side has its own order of the rows and its own dropout. Known
differences:

- code_questions: the loss of transformers takes padding for a possible answer, that of peftcli does not.
- code_search: peftcli does not count a text as wrong that is right for an equal anchor in the batch.
- bags: peftcli draws a picture of the class prompt for each picture and step; diffusers' script has fixed pairs.
- spelled_prompts: transformers divides the loss of each clip by its letters, and then by the clips of the batch;
  peftcli divides the sum of all losses by all letters.
- garment_words: TRL also trains the line break that the chat template writes after the end of an answer.
"""
INTERVALS = f"""\
## Word error rates

The answers are those of `peftcli predict --dtype float32`; the evaluation above computes in the recipe's number format.
Of {RESAMPLES:,} resamples of the held-out clips, 95 % lie in the ranges in brackets.

| recipe | seed | before | after | before - after |
| --- | ---: | --- | --- | --- |"""


def main() -> None:
    """Measure the recipes that are named, as far as they are not measured yet, and write the page of all."""
    names = sys.argv[1:] or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        sys.exit(
            f"no recipe of configs/tasks that is measured: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}"
        )
    for name in names:
        for seed in SEEDS:
            for side, measure in (("peftcli", with_peftcli), ("Trainer", with_trainer)):
                if side not in results().get(name, {}).get(str(seed), {}):
                    record(name, seed, side, measure(name, seed) | {"machine": machine()})
    PAGE.write_text("\n".join(page(results())) + "\n")


def results() -> dict[str, Any]:
    """Return what was measured: recipe -> seed -> side -> figures."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def record(name: str, seed: int, side: str, figures: dict[str, Any]) -> None:
    """Keep what was measured, and write the page."""
    found = results()
    found.setdefault(name, {}).setdefault(str(seed), {})[side] = figures
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text("\n".join(page(found)) + "\n")
    print(f"{name}, seed {seed}, {side}: {figures}", flush=True)


def with_peftcli(name: str, seed: int) -> dict[str, Any]:
    """Train a recipe with a seed, by its command, and return the metric before and after, among others."""
    started = "training.eval_on_start=true"
    run = output("-m", "peftcli", "train", *arguments(name, seed), started, "--json", "--overwrite")
    metric = RECIPES[name]
    found = {
        "rows": run["data"]["eval"]["used"],
        "steps": run["steps"]["total"],
        "trainable": run["parameters"]["trainable"],
        "before": run["eval"]["first"][metric],
        "after": run["eval"]["kept"][metric],
    }
    return found | ({"intervals": wer_intervals(name, seed)} if metric == "eval_wer" else {})


def with_trainer(name: str, seed: int) -> dict[str, Any]:
    """Train a recipe with a seed with PEFT and Trainer, and return the metric after it, among others."""
    ours, theirs = results()[name][str(seed)]["peftcli"], f"{folder(name, seed)}-trainer"
    recipe, *settings = arguments(name, seed)
    found = output("configs/tasks/train_with_trainer.py", recipe, theirs, *settings)
    if different := {key: (ours[key], value) for key, value in found.items() if ours[key] != value}:
        sys.exit(f"{name}, seed {seed}: not the same training in peftcli and Trainer: {different}")
    task = ROOT / folder(name, seed) / "task.json"
    if task.exists():  # the names of labels, which Trainer does not write
        (ROOT / theirs / "task.json").write_bytes(task.read_bytes())
    run = output("-m", "peftcli", "evaluate", recipe, *settings, "--adapter", theirs, "--json")
    return found | {"after": run["eval"]["last"][RECIPES[name]]}


def folder(name: str, seed: int) -> str:
    """Return the run folder of a recipe and seed."""
    return f"outputs/measured/{name}-{seed}"


def arguments(name: str, seed: int) -> list[str]:
    """Return the recipe and its settings for a seed."""
    settings = [f"training.seed={seed}", f"training.output_dir={folder(name, seed)}", "gates={}"]
    return [f"configs/tasks/{name}.yaml", *settings]


def output(*command: str) -> dict[str, Any]:
    """Run Python with arguments, and return the JSON object that it prints last."""
    print("+", *command, flush=True)
    text = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(text if text.startswith("{\n") else text.splitlines()[-1])
    return found


def wer_intervals(name: str, seed: int) -> dict[str, list[float]]:
    """Return the word error rate before, after, and what training takes away: each, and its 95 % interval.

    The clips are resampled (the bootstrap). An answer's errors are wrong, missing and superfluous words.
    """
    rows = f"data/{name}/eval.jsonl"
    clips = [soundfile.info(ROOT / "data" / name / json.loads(row)["audio"]) for row in (ROOT / rows).open()]
    heard = [at for at, clip in enumerate(clips) if clip.duration <= LONGEST]
    wanted = [texts(rows)[at] for at in heard]
    words, errors = np.array([len(text.split()) for text in wanted]), []
    for options in (["--no-adapter"], []):
        answers = f"{folder(name, 0)}-before.jsonl" if options else f"{folder(name, seed)}.jsonl"
        if not (options and (ROOT / answers).exists()):  # without an adapter all seeds answer the same
            (ROOT / answers).unlink(missing_ok=True)
            given = folder(name, seed), "--input", rows, "--output", answers
            output("-m", "peftcli", "predict", *given, "--json", "--dtype", "float32", *options)
        said = texts(answers)
        compared = (jiwer.process_words(text, said[at]) for text, at in zip(wanted, heard, strict=True))
        errors.append([each.substitutions + each.deletions + each.insertions for each in compared])
    resamples = np.random.default_rng(0).integers(len(wanted), size=(RESAMPLES, len(wanted)))
    chosen = np.concatenate([[np.arange(len(wanted))], resamples])  # all clips first
    before, after = (np.array(each)[chosen].sum(1) / words[chosen].sum(1) for each in errors)
    rates = {"before": before, "after": after, "difference": before - after}
    return {key: [each[0], *np.quantile(each[1:], [0.025, 0.975])] for key, each in rates.items()}


def texts(path: str) -> list[str]:
    """Return the texts of a file's rows, with single spaces."""
    return [" ".join(json.loads(row)["text"].split()) for row in (ROOT / path).open(encoding="utf-8")]


def machine() -> str:
    """Say what the figures were measured on."""
    packages = ("torch", "transformers", "peft", "trl", "sentence-transformers", "diffusers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.system()}, {platform.machine()}, Python {platform.python_version()}, {versions}"


def page(found: dict[str, Any]) -> Iterator[str]:
    """Return the lines of the page."""
    measured = {name: list(found[name].values()) for name in RECIPES if name in found}
    yield HEAD
    for name, seeds in measured.items():
        yield f"| {' | '.join(cells(name, seeds))} |"
    if missing := [name for name in RECIPES if name not in measured]:
        yield from ("", f"Not measured yet: {', '.join(missing)}.")
    yield TRAINER
    yield INTERVALS
    for name in measured:
        for seed, sides in found[name].items():
            rates = sides["peftcli"].get("intervals", {}).values()
            ranges = [f"{rate:.3f} ({low:.3f} to {high:.3f})" for rate, low, high in rates]
            if ranges:
                yield f"| {name} | {seed} | {' | '.join(ranges)} |"
    machines = {side["machine"] for seeds in measured.values() for sides in seeds for side in sides.values()}
    yield from ("", "Measured on:", "", *(f"- {each}" for each in sorted(machines)))


def cells(name: str, seeds: list[dict[str, Any]]) -> list[str]:
    """Return the line of a recipe, from the figures of its seeds."""
    metric, rows = RECIPES[name], seeds[0]["peftcli"]["rows"]
    before, ours = ([sides["peftcli"][when] for sides in seeds] for when in ("before", "after"))
    theirs = [sides["Trainer"]["after"] for sides in seeds if "Trainer" in sides]
    about = [f"[{name}](../configs/tasks/{name}.yaml)", f"{rows:,}", f"`{metric}`", f"{mean(before):.4f}"]
    compared = verdict(metric, ours, theirs) if min(len(ours), len(theirs)) == len(SEEDS) else "seeds are missing"
    return [*about, *both(ours), *(both(theirs) if theirs else ["", ""]), compared]


def both(values: list[float]) -> list[str]:
    """Return the mean of values, and each."""
    return [f"{mean(values):.4f}", ", ".join(f"{value:.4f}" for value in values)]


def verdict(metric: str, ours: list[float], theirs: list[float]) -> str:
    """Say how our mean compares with Trainer's."""
    spread = max(max(each) - min(each) for each in (ours, theirs))
    if abs(mean(ours) - mean(theirs)) <= spread:
        return "within"
    return "better" if (mean(ours) < mean(theirs)) == (metric in LOWER_IS_BETTER) else "worse"


if __name__ == "__main__":
    main()
