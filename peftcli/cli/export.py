"""``peftcli export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

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
    replay: Annotated[
        bool,
        typer.Option("--replay/--no-replay", help="Ask the program, where it is installed, whether it says the same."),
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter in a form that another program reads."""
    tell = progress_log(quiet)
    from peftcli.adapters.export.write import export_adapter

    written = export_adapter(
        adapter,
        output,
        program=program,
        form=form,
        base=base,
        r=r,
        max_error=max_error,
        numbers=dtype,
        ask=replay,
        tell=tell,
    )
    return console.print_json(written) if as_json else _print(written, output)


def _print(written: dict[str, Any], output: Path) -> None:
    console.table(["part", "became", ""], [list(part.values()) for part in written["parts"]])
    for name, size in written["files"].items():
        console.out(f"{output / name}: {console.format_size(size)}")
    console.paragraph(_replayed(written))


def _replayed(written: dict[str, Any]) -> str:
    """Say what the program made of it, or that it was not asked."""
    found, program = written["replayed"], written["program"]
    if found is None:
        return f"not replayed: {written['not_replayed']}"
    prompts = f"the tokens of {found['same_prompts']} of {found['prompts']} prompts"
    words = f"{prompts} and {found['same_answers']} of {found['answers']} greedy answers are the same"
    words += (
        f"; {found['normalised']} have letters of several signs that it reads as such" if found["normalised"] else ""
    )
    others = f"; {program} itself was not asked" if program not in (None, found["program"]) else ""
    return f"replayed by {found['program']} {found['version']}: {words}{others}"
