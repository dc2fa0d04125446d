"""``peftcli verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Adapter, Base, Json, Quiet, progress_log
from peftcli.data.rows import count_of


def verify(
    adapter: Adapter,
    readers: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="peft|transformers|transformers-pipeline|sentence-transformers|diffusers|llama.cpp|mlx|mistralrs",
            help="Load it with this library too, and compare. Repeatable.",
        ),
    ] = None,
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Load an adapter, and compare it with the model that was trained."""
    tell = progress_log(quiet)
    from peftcli.adapters.proof.verify import verify_adapter

    verified = verify_adapter(adapter, base, readers or (), tell)
    if as_json:
        return console.print_json(verified)
    if verified["tensors"]:
        same = f"{count_of(verified['tensors'], 'tensor')} {'is' if verified['tensors'] == 1 else 'are'} the same"
        console.out(f"{adapter} is the trained model: {same}")
    if verified["difference"] is not None:
        of_rows = f"of {count_of(verified['rows'], 'row')} " if verified["rows"] else ""
        console.out(f"{of_rows}the outputs differ by {verified['difference']:.2g} of their deviation")
    for reader, difference in verified["readers"].items():
        console.out(f"{reader} loads the same model: its outputs differ by {difference:.2g} of their deviation")
    return None
