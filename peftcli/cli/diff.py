"""``peftcli diff``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json

_MAX_VALUE = 60


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Adapter folder or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other adapter.")],
    as_json: Json = False,
) -> None:
    """Show how two adapters differ: settings, modules and weights."""
    from peftcli.adapters.diff import compare

    found = compare(a, b)
    if as_json:
        return console.print_json(found)
    if found["equal"]:
        return console.out("the adapters are equal")
    if found["config"]:
        settings = [[console.shorten(_format(value), _MAX_VALUE) for value in row.values()] for row in found["config"]]
        console.table(["setting", "A", "B"], settings)
        console.out()
    for name, side in (("only_a", "A"), ("only_b", "B")):
        for entry in found[name]:
            console.out(f"only in {side}: {entry}")
    if found["reason"]:
        console.log(f"stored values are compared, not updates: {found['reason']}")
    rows = [*found["modules"], *found["tensors"]]
    if rows:
        total = {"name": "all", "difference": found["difference"], "cosine": found["cosine"]}
        console.table(
            ["module", "difference", "cosine"], [[_format(value) for value in row.values()] for row in [*rows, total]]
        )
    return None


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value)
