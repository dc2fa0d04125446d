"""``peftcli explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peftcli.cli import console

if TYPE_CHECKING:
    from peftcli.recipe import Explanation


def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A setting, section, method or task: training.seed, lora.")],
) -> None:
    """Explain a setting, a section, a method or a task."""
    from peftcli.recipe import explain as find

    _print(find(key))


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
