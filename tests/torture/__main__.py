"""Runs the campaigns and writes docs/reliability.md: ``python tests/torture [NAME ...]``.

Without names, all campaigns and comparisons run, two at a time. With names, only those; the page keeps the rows of the
others from the last run. ``--write`` runs nothing and writes the page anew.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
sys.path[:0] = [str(_HERE.parent), str(_HERE)]

import conftest  # noqa: E402, F401 - no network, no user's cache or token
from campaigns import campaigns, results  # noqa: E402
from report import page  # noqa: E402

_RESULTS = _ROOT / "build/torture.json"
_PAGE = _ROOT / "docs/reliability.md"
COMPARISONS: dict[str, tuple[str, str]] = {
    "compare: a naive saver": ("naive_saver", "naive_failures"),
    "compare: Trainer, killed while it saves": ("peers_trainer", "trainer_kills"),
    "compare: Trainer, damaged checkpoints": ("peers_trainer", "trainer_damage"),
    "compare: PEFT, bad adapters": ("peft_adapters", "peft_accepts"),
    "compare: datasets, bad data files": ("peers_data", "datasets_accepts"),
}
"""What runs the same on other tools, and on a saver that is known to be bad: module and function."""


def _run(name: str) -> dict[str, Any]:
    """One campaign or comparison, in this process."""
    started = time.perf_counter()
    if name in COMPARISONS:
        module, function = COMPARISONS[name]
        compare: Callable[[], dict[str, Any]] = getattr(importlib.import_module(module), function)
        found: dict[str, Any] = {"counts": compare()}
    else:
        campaign = next(each for each in campaigns() if each.name == name)
        trials, failures, told = campaign.trials(), [], started
        for number, result in enumerate(results(trials), 1):
            if result.failure is not None:
                failures.append({"trial": result.trial.name, "failure": result.failure[-2000:]})
                print(f"{name}: NOT AS PROMISED: {result.trial.name}: {result.failure[-300:]}", file=sys.stderr)
            if time.perf_counter() - told > 20:
                told = time.perf_counter()
                print(f"{name}: {number} of {len(trials)}", file=sys.stderr, flush=True)
        found = {"trials": len(trials), "failures": failures}
    return {**found, "seconds": round(time.perf_counter() - started), "when": _now()}


def _run_apart(name: str) -> tuple[str, dict[str, Any] | None]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(_HERE), "--one", name], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False
    )
    lines = done.stdout.decode().splitlines()
    if done.returncode or not lines:
        print(f"{name}: the harness failed with {done.returncode}", file=sys.stderr)
        return name, None
    return name, json.loads(lines[-1])


def _machine() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface-hub", "peft")
    return {
        "system": f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def main(words: list[str]) -> int:
    """Gives 1 where a promise was broken or a harness failed."""
    if words[:1] == ["--one"]:
        print(json.dumps(_run(words[1])))
        return 0
    known = [campaign.name for campaign in campaigns()] + list(COMPARISONS)
    if words == ["--list"]:
        print("\n".join(known))
        return 0
    if strange := [name for name in words if name not in known and name != "--write"]:
        print(f"no campaign is called {strange[0]!r}; known:\n  " + "\n  ".join(known), file=sys.stderr)
        return 2
    kept: dict[str, Any] = json.loads(_RESULTS.read_text()) if _RESULTS.exists() and words else {}
    failed = False
    if words != ["--write"]:
        with ThreadPoolExecutor(2) as pool:
            for done in as_completed([pool.submit(_run_apart, name) for name in words or known]):
                name, found = done.result()
                failed |= found is None or bool(found.get("failures"))
                if found is not None:
                    kept[name] = found
                    shown = found.get("counts") or f"{found['trials'] - len(found['failures'])} of {found['trials']}"
                    print(f"{name}: {shown} in {found['seconds']} s", flush=True)
                    _RESULTS.parent.mkdir(exist_ok=True)
                    _RESULTS.write_text(json.dumps(kept, indent=1))
    _PAGE.write_text(page(kept, campaigns(), _machine(), _PAGE.read_text() if words and _PAGE.exists() else ""))
    print(f"written: {_PAGE.relative_to(_ROOT)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
