"""What ``peftcli evaluate --lm-eval`` runs and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.cli import console
from peftcli.cli.options import progress_log
from peftcli.errors import UsageError


def evaluate_tasks(
    target: Path,
    tasks: str,
    *,
    adapter: str | None,
    base: str | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure an adapter, or that of ``--adapter`` on a recipe's base model, on tasks of lm-eval; print the answer."""
    tell = progress_log(quiet)
    from peftcli.adapters.proof.benchmark import run_benchmark
    from peftcli.recipe import load_recipe

    name = str(target)
    if target.is_file():
        if adapter is None:
            message = "is a recipe; give the adapter to measure"
            raise UsageError(
                message, file=name, hint="peftcli evaluate ADAPTER --lm-eval ..., or RECIPE --adapter ADAPTER"
            )
        base, name = base or load_recipe(target, []).base_model.name, adapter
    elif adapter is not None:
        raise UsageError("is given twice", key="--adapter")
    warn = tell if not quiet else lambda text: console.log(text) if text.startswith("warning: ") else None
    result = run_benchmark(name, tasks, base, limit=limit, batch_size=batch_size, tell=warn)
    if as_json:
        return console.print_json(result)
    rows = [
        (task, metric, *_cells(values))
        for task, each in result["tasks"].items()
        for metric, values in each["metrics"].items()
    ]
    console.table(("task", "metric", "base", "adapter", "difference"), rows)
    return None


def _cells(values: dict[str, Any]) -> tuple[str, str, str]:
    base, adapter, difference = (
        _number(values[name], values[f"{name}_stderr"]) for name in ("base", "adapter", "difference")
    )
    return base, adapter, difference if difference.startswith("-") else f"+{difference}"


def _number(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
