"""``peftcli sweep`` against a grid of 25 runs that are all trained to the end: the metric reached, and CPU time.

The sweep tries its own five settings and what follows from them; the grid is five times as many: the learning rate
at 1/9, 1/3, 1, 3 and 9 times the usual one, each with r a quarter, a half, one, two and four times the recipe's. The
grid's runs share one base model too, so its time has no start of 25 processes in it. Also checked: the winner's adapter
is, byte for byte, that of ``peftcli train`` on its recipe alone; with --kill, so is that of a sweep that was killed and
run again.

    python configs/tasks/fetch.py minilm models/MiniLM-L6; python configs/tasks/fetch.py spam data/spam
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/sweep.py digits thirds order --kill

These are tiny; ``chat`` and ``spam`` train real base models.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import rows

FACTORS, SIZES = (1 / 9, 1 / 3, 1, 3, 9), (0.25, 0.5, 1, 2, 4)
PEFTCLI = [sys.executable, "-W", "ignore", "-m", "peftcli"]


def write(folder: Path, rows_of: dict[str, list[Any]]) -> None:
    """Write the rows of each file."""
    for name, found in rows_of.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))


def chat(folder: Path) -> dict[str, Any]:
    """A chat model on a few short texts."""
    found = [each["row"] for each in rows("short", 0, 24)]
    write(folder, {"train": found[:18], "eval": found[18:24]})
    base = os.environ.get("SMOLLM2", "models/SmolLM2-135M-Instruct")
    return {"base_model": base, "task": "causal_lm", "r": 8, "max_length": 40, "batch": 1, "steps": 8}


def spam(folder: Path) -> dict[str, Any]:
    """An encoder with a new head on mails."""
    data = Path(os.environ.get("SPAM", "data/spam"))
    read = [json.loads(line) for line in (data / "train.jsonl").open()][:560]
    write(folder, {"train": read[:160], "eval": read[160:]})
    base = os.environ.get("MINILM", "models/MiniLM-L6")
    task = {"type": "sequence_classification", "max_length": 32}
    return {"base_model": base, "task": task, "r": 8, "batch": 4, "steps": 96}


def tiny(folder: Path) -> str:
    """A tiny language model without training before it."""
    sys.path.insert(0, "tests")
    import trainkit

    base = folder / "base"
    trainkit.build("llama").save_pretrained(base)
    trainkit.tokenizer().save_pretrained(base)
    return str(base)


def counting(first: int) -> list[str]:
    """Six numbers that count up."""
    return [str(first + step) for step in range(6)]


def digits(folder: Path) -> dict[str, Any]:
    """A tiny language model on numbers that count up."""
    texts = [{"text": " ".join(counting(first))} for first in range(10, 400, 5)]
    write(folder, {"train": texts[::2], "eval": texts[1:40:2]})
    return {"base_model": tiny(folder), "task": "causal_lm", "r": 8, "max_length": 64, "batch": 8, "steps": 40}


def thirds(folder: Path) -> dict[str, Any]:
    """A tiny classifier: is the last digit of two numbers small, middling or large?"""
    found = [
        {"text": f"{each} {each * 37 % 991}", "label": "abc"[each * 37 % 991 % 10 * 3 // 10]} for each in range(300)
    ]
    write(folder, {"train": found[:200], "eval": found[200:]})
    return {"base_model": tiny(folder), "task": "sequence_classification", "r": 8, "batch": 8, "steps": 60}


def order(folder: Path) -> dict[str, Any]:
    """A tiny language model that is to prefer counting up."""

    def pair(first: int) -> dict[str, str]:
        up = counting(first)
        return {"prompt": "count", "chosen": " " + " ".join(up), "rejected": " " + " ".join(up[::-1])}

    starts = [first for at, first in enumerate(range(10, 400, 5)) if at % 3]
    others = [first for first in range(10, 400) if first not in starts]  # so many that 2 % is more than one row
    write(folder, {"train": [*map(pair, starts)], "eval": [*map(pair, others)]})
    return {"base_model": tiny(folder), "task": "preference", "r": 8, "batch": 4, "steps": 24}


TASKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "digits": digits,
    "thirds": thirds,
    "order": order,
    "chat": chat,
    "spam": spam,
}


def write_recipe(folder: Path, name: str) -> Path:
    """Write the recipe of a task, and its data."""
    made = TASKS[name](folder)
    dataset = {"train": f"{folder}/train.jsonl", "eval": f"{folder}/eval.jsonl"}
    if "max_length" in made:
        dataset["max_length"] = made["max_length"]
    content = {
        "base_model": made["base_model"],
        "task": made["task"],
        "method": {"type": "lora", "r": made["r"], "lora_alpha": 2 * made["r"], "target_modules": "all-linear"},
        "dataset": dataset,
        "training": {
            "output_dir": f"{folder}/out",
            "max_steps": made["steps"],
            "per_device_train_batch_size": made["batch"],
            "bf16": False,
            "save_strategy": "no",
            "verify": False,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))  # which YAML reads
    return path


def run_grid(path: Path, folder: Path) -> None:
    """Train every run of the grid to its end, over one base model."""
    from peftcli.recipe import load_recipe
    from peftcli.recipe.rates import usual_rate
    from peftcli.train.sweep.halving import Halving
    from peftcli.train.sweep.start import SweepOptions, sweep

    recipe = load_recipe(path)
    rate, size = usual_rate(recipe), recipe.method["r"]
    rates = ",".join(f"{rate * factor:.3g}" for factor in FACTORS)
    sizes = ",".join(str(int(size * factor)) for factor in SIZES)
    Halving.grid = lambda self, settings: [self.track.trial(each) for each in settings]
    sweep(SweepOptions(path, (f"training.learning_rate={rates}", f"method.r={sizes}"), folder), lambda event: None)


def cpu(command: list[str]) -> float:
    """Run a command; return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def winner_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sweep.json in a folder, and its winner."""
    record = json.loads((folder / "sweep.json").read_text())
    return record, next(each for each in record["runs"] if each["name"] == record["winner"])


def adapter(folder: Path) -> bytes:
    """The bytes of an adapter's weights."""
    return (folder / "adapter_model.safetensors").read_bytes()


def compare(name: str, *, kill: bool) -> None:
    """Measure a task, and print its row."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = write_recipe(folder, name)
        ours = cpu([*PEFTCLI, "sweep", str(path), "--quiet", "--output", f"{folder}/sweep"])
        record, best = winner_of(folder / "sweep")
        alone = f"training.output_dir={folder}/alone"
        cpu([*PEFTCLI, "train", f"{folder}/sweep/{best['name']}.yaml", alone, "--quiet"])
        same = adapter(folder / "sweep" / best["name"]) == adapter(folder / "alone")
        if kill:
            command = [*PEFTCLI, "sweep", str(path), "--quiet", "--output", f"{folder}/killed"]
            kill_and_resume(command, folder / "killed")
            _, again = winner_of(folder / "killed")
            same &= adapter(folder / "killed" / again["name"]) == adapter(folder / "alone")
        print(f"{name}: sweep done, {ours:.1f} CPU s", file=sys.stderr, flush=True)
        theirs = cpu([sys.executable, "-W", "ignore", __file__, "--grid", str(path), f"{folder}/grid"])
        _, grid_best = winner_of(folder / "grid")
        value, other = best["measured"][-1]["value"], grid_best["measured"][-1]["value"]
        settings = ", ".join(f"{key.rpartition('.')[2]} {each}" for key, each in best["settings"].items())
        cells = [name, record["metric"], f"{value:.4f}", settings, f"{other:.4f}", f"{ours:.0f}", f"{theirs:.0f}"]
        cells += [f"{ours / theirs:.0%}", "yes" if same else "NO", "yes" if record["seeds"]["within"] else "no"]
        print(f"| {' | '.join(cells)} |", flush=True)


def kill_and_resume(command: list[str], folder: Path) -> None:
    """Kill a sweep once three of its runs were measured; run it again."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        file = folder / "sweep.json"
        if file.exists() and file.read_text().count('"share"') >= 3:
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    if child.wait() != -signal.SIGKILL:
        raise SystemExit("the sweep ended before it could be killed")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Print a table of the tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=", ".join(TASKS))
    parser.add_argument("--kill", action="store_true", help="Also kill each sweep, and go on with it.")
    parser.add_argument("--grid", nargs=2, metavar=("RECIPE", "DIR"))
    options = parser.parse_args()
    if options.grid:
        run_grid(*map(Path, options.grid))
        return
    print(
        "| task | metric | sweep's winner | its settings | best of 25 | sweep, CPU s | grid, CPU s | share | "
        "bytes as alone | within a seed |\n|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in options.tasks or TASKS:
        compare(name, kill=options.kill)


if __name__ == "__main__":
    main()
