"""``peftcli explain``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Json


def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A setting, section, method or task: training.seed, lora.")],
    as_json: Json = False,
) -> None:
    """Explain a setting, method, task, metric, finding, code or error."""
    from peftcli.recipe import explain as find_explanation

    found = find_explanation(key)
    if as_json:
        settings = [dict(zip(("name", "default", "help"), row, strict=True)) for row in found.settings]
        console.print_json({**asdict(found), "settings": settings})
        return
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
