"""``peftcli convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, Quiet, path, progress_log
from peftcli.data.rows import count_of
from peftcli.guard.files import command_word

Format = Literal[
    "peft", "peft-0.18", "peft-0.19.0", "peft-0.19.1", "unsloth", "mlx", "gguf", "adapters", "loralib", "diffusers"
]


def convert(
    adapter: Annotated[
        Path, typer.Argument(parser=path, metavar="FILE|DIR", help="The other program's file, or its folder.")
    ],
    output: Annotated[Path, typer.Option(parser=path, help="Folder for the adapter; must be new or empty.")],
    base: Annotated[str | None, typer.Option(help="Base model; by default the one that the file names.")] = None,
    format: Annotated[
        Format | None, typer.Option("--from", help="What the file is; by default it is recognised.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, help="lora_alpha, for files that do not hold it (loralib).")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn an adapter of another program into an adapter folder.

    Each part of it is said to be carried over, translated or left out.
    """
    tell = progress_log(quiet)
    from peftcli.adapters.foreign.convert import convert_adapter

    made = convert_adapter(adapter, output, base=base, format=format, alpha=alpha, tell=tell)
    if as_json:
        return console.print_json(made)
    for step in made["steps"]:
        console.out(f"{step['how']}: {step['what']}, {step['note']}")
    modules, size = count_of(made["modules"], "module"), console.format_size(made["bytes"])
    console.out(f"{output}: {made['method']} over {made['base_model']}, {modules}, {size}")
    return console.out(f"next:\n  peftcli info {command_word(made['output'])}")
