"""``peftcli combine``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftcli.cli import console
from peftcli.cli.quiet import Quiet, teller
from peftcli.errors import UsageError

_LARGEST = 3.4e38
"""Of 32 bits, in which the result is written."""

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
    output: Annotated[Path, typer.Option(help="Folder for the new adapter; must be new or empty.")],
    method: Annotated[
        Method, typer.Option(help="cat is exact, at the sum of the r's; svd is the nearest of one r.")
    ] = "cat",
    density: Annotated[
        float | None, typer.Option(help="Share of the values that ties, dare and magnitude_prune keep.")
    ] = None,
    r: Annotated[
        int | None, typer.Option("--r", help="r of the result, for svd; by default the largest given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="Of what dare drops.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make one LoRA adapter of several: their weighted sum."""
    given = [_weighted(entry) for entry in adapters]
    teller(quiet)  # what it may draw is the bars of downloads
    from peftcli.adapters.combine import combine_adapters

    names, weights = [name for name, _ in given], [weight for _, weight in given]
    made = combine_adapters(names, weights, output, method=method, density=density, r=r, seed=seed)
    if as_json:
        return console.print_json(made)
    worst = made["worst_module"]
    if made["error"] == 0:
        console.out("the weighted sum, exactly")
    else:
        console.out(f"off the weighted sum by {made['error']:.3g} of it; in {worst['module']} by {worst['error']:.3g}")
    return console.out(f"{output}: r {made['r']}, {made['modules']} modules, {made['bytes'] / 1e6:,.1f} MB")


def _weighted(entry: str) -> tuple[str, float]:
    adapter, _, said = entry.rpartition("=")
    weight = None
    with suppress(ValueError):
        weight = float(said)
    if not adapter or weight is None:
        raise UsageError(f"{entry!r} is not of the form ADAPTER=WEIGHT, as outputs/a=0.7")
    if not abs(weight) <= _LARGEST:
        raise UsageError(f"{entry!r}: the weight must be finite, and at most {_LARGEST:g}", key="ADAPTER=WEIGHT")
    return adapter, weight
