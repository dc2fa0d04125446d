"""``peftcli export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peftcli.adapters.export.programs import FORMS, PROGRAMS, Form
from peftcli.cli import console
from peftcli.cli.options import Adapter, Base, Json, Quiet, path, progress_log


def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(parser=path, help="Folder for what is written; must be new or empty.")],
    program: Annotated[
        str | None, typer.Option("--for", metavar="|".join(PROGRAMS), help="The program that is to read it.")
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(metavar="|".join(FORMS), help="What to write; by default what the program reads best."),
    ] = None,
    base: Base = None,
    r: Annotated[
        int | None,
        typer.Option(
            "--r", help="r of a LoRA; by default the smallest of 8, 16, 32, 64, 128, 256 that holds the update."
        ),
    ] = None,
    max_error: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of the update that a LoRA may lose.")
    ] = 0.01,
    dtype: Annotated[
        Literal["f32", "f16", "q8_0", "q4_0"], typer.Option(help="Number format of a merged model's .gguf file.")
    ] = "f16",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in a form that another program reads."""
    tell = progress_log(quiet)
    from peftcli.adapters.export.write import export_adapter

    written = export_adapter(
        adapter, output, program=program, form=form, base=base, r=r, max_error=max_error, numbers=dtype, tell=tell
    )
    if as_json:
        return console.print_json(written)
    console.table(["part", "became", ""], [list(part.values()) for part in written["parts"]])
    for name, size in written["files"].items():
        console.out(f"{output / name}: {console.format_size(size)}")
    return None
