"""``peftcli explain``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json

if TYPE_CHECKING:
    from peftcli.recipe import Explanation


def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A setting, section, method or task: training.seed, lora.")],
    as_json: Json = False,
) -> None:
    """Explain a setting, a section, a method or a task."""
    from peftcli.recipe import explain as find_explanation

    found = find_explanation(key)
    if as_json:
        console.print_json(_as_dict(found))
    else:
        _print(found)


def _as_dict(found: Explanation) -> dict[str, Any]:
    settings = [dict(zip(("name", "default", "help"), row, strict=True)) for row in found.settings]
    return {**asdict(found), "settings": settings}


def _print(found: Explanation) -> None:
    console.out(f"{found.key} ({found.kind})")
    console.out(f"  {found.help}")
    facts = [
        ("type", found.type),
        ("default", found.default),
        ("allowed", ", ".join(found.allowed)),
        ("paper", found.link),
    ]
    for name, value in facts:
        if value:
            console.out(f"  {name}: {value}")
    if found.example:
        console.out("\n  " + found.example.replace("\n", "\n  "))
    if found.settings:
        console.out()
        console.table(("setting", "default", "what it does"), found.settings)
