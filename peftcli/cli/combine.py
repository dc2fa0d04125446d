"""``peftcli combine``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, Quiet, path, progress_log
from peftcli.data.rows import count_of
from peftcli.errors import UsageError
from peftcli.guard.files import command_word

_MAX_WEIGHT = 3.4e38
"""The largest float32, the format of the result."""

Method = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="Folders or hub ids.")],
    output: Annotated[Path, typer.Option(parser=path, help="Folder for the new adapter; must be new or empty.")],
    method: Annotated[
        Method, typer.Option(help="cat: exact, its r is the sum of all r; svd: the nearest adapter of the given r.")
    ] = "cat",
    density: Annotated[
        float | None, typer.Option(help="Fraction of the values that ties, dare and magnitude_prune keep.")
    ] = None,
    r: Annotated[
        int | None, typer.Option("--r", help="r of the result, for svd; by default the largest r of the adapters.")
    ] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="Seed of the values that dare drops.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Combine several LoRA adapters into one, their weighted sum. Adapters of text_to_image need their base model."""
    parsed = [_parse_adapter(entry) for entry in adapters]
    progress_log(quiet)  # for the progress bars of downloads
    from peftcli.adapters.combine import combine_adapters
    from peftcli.adapters.load import find_adapter
    from peftcli.tasks import TASKS

    names, weights = [name for name, _ in parsed], [weight for _, weight in parsed]
    combined = combine_adapters(names, weights, output, method=method, density=density, r=r, seed=seed)
    if as_json:
        return console.print_json(combined)
    worst = combined["worst_module"]
    if combined["error"] == 0:
        console.out("equals the weighted sum exactly")
    else:
        console.out(f"relative error of the weighted sum {combined['error']:.3g}")
        console.out(f"worst module: {worst['error']:.3g} in {worst['module']}")
    modules, size = count_of(combined["modules"], "module"), console.format_size(combined["bytes"])
    console.out(f"{output}: r {combined['r']}, {modules}, {size}")
    source = find_adapter(combined["output"])
    if source.task:
        row = TASKS[source.task].filled(source.task_values.get("settings", {}))
        console.out(f"next:\n  {row.command(command_word(combined['output']))}")
    return None


def _parse_adapter(entry: str) -> tuple[str, float]:
    adapter, _, text = entry.rpartition("=")
    weight = None
    with suppress(ValueError):
        weight = float(text)
    if not adapter or weight is None:
        raise UsageError(f"{entry!r} must have the form ADAPTER=WEIGHT, such as outputs/a=0.7")
    if not abs(weight) <= _MAX_WEIGHT:
        raise UsageError(f"{entry!r}: the weight must be finite, and at most {_MAX_WEIGHT:g}", key="ADAPTER=WEIGHT")
    return adapter, weight
