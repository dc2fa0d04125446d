"""``peftcli diff``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftcli.cli import console

_LONGEST = 60


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Adapter folder or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what differs between two adapters: settings, modules, and what they do to each weight."""
    from peftcli.adapters.diff import compare

    found = compare(a, b)
    if as_json:
        return console.print_json(found)
    if found["equal"]:
        return console.out("the adapters are equal")
    if found["config"]:
        settings = [[_cut(_shown(value)) for value in row.values()] for row in found["config"]]
        console.table(["setting", "A", "B"], settings)
        console.out()
    for name, side in (("only_a", "A"), ("only_b", "B")):
        for entry in found[name]:
            console.out(f"only in {side}: {entry}")
    if found["reason"]:
        console.log(f"compared value by value: {found['reason']}")
    rows = [*found["modules"], *found["tensors"]]
    if rows:
        total = {"name": "all", "difference": found["difference"], "cosine": found["cosine"]}
        console.table(
            ["module", "difference", "cosine"], [[_shown(value) for value in row.values()] for row in [*rows, total]]
        )
    return None


def _cut(text: str) -> str:
    """A value that fits on a line; ``--json`` has all of it."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value)
