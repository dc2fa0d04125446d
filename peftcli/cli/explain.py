"""``peftcli explain``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from peftcli.cli import completion, console
from peftcli.cli.options import Json

_TYPES = {"finding": "level", "metric": "values"}
_LINKS = {"message": "page"}
"""Kind of what is explained -> what its type, or its link, is called; else type and paper."""


def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            autocompletion=completion.names,
            help="training.seed, lora, bad_rows, eval_f1, 75, or the text of an error, in quotes.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Explain a setting, method, task, metric, finding, code or error."""
    from peftcli.recipe import explain as find_explanation

    found = find_explanation(" ".join(words))
    if as_json:
        settings = [dict(zip(("name", "default", "help"), row, strict=True)) for row in found.settings]
        console.print_json({**asdict(found), "settings": settings})
        return
    console.out(f"{found.key} ({found.kind})")
    console.paragraph(found.help, "  ")
    facts = [
        (_TYPES.get(found.kind, "type"), found.type),
        ("default", found.default),
        ("allowed", ", ".join(found.allowed)),
        (_LINKS.get(found.kind, "paper"), found.link),
    ]
    for name, value in facts:
        if value:
            console.paragraph(f"{name}: {value}", "  ")
    if found.example:
        console.out("\n  " + found.example.replace("\n", "\n  "))
    if found.settings:
        console.out()
        console.table(("setting", "default", "what it does"), found.settings)
