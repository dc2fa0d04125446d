"""The arguments and options that several commands have, and what ``--quiet`` does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftcli.cli import completion, console


def not_empty(text: str) -> str:
    """Return a word that may name a path. Refuse an empty one: it would mean the current folder."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return text


def path(text: str) -> Path:
    """Return the path that a word names. Refuse an empty word."""
    return Path(not_empty(text))


def output_path(text: str) -> Path:
    """Return the path of an output file; ``-`` is standard output."""
    return Path("/dev/stdout") if text == "-" else path(text)


RecipeFile = Annotated[Path, typer.Argument(parser=path, autocompletion=completion.recipes, help="YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", autocompletion=completion.overrides, help="Settings to override."),
]
Adapter = Annotated[str, typer.Argument(help="Adapter folder or hub id.")]
Base = Annotated[str | None, typer.Option(help="Base model to use instead of the adapter's.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Number format to compute in; predict: by default that of the evaluations of training."),
]
NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="Use the base model alone.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress, only warnings, errors and the answer.")]


def progress_log(quiet: bool) -> Callable[[str], None]:
    """Return the function that logs progress. For a quiet command it does nothing, and other libraries draw no bars.

    Call it before these libraries are imported: they read the environment only then.
    """
    if not quiet:
        return console.log
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    return lambda text: None
