"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path

import typer


def path(text: str) -> Path:
    """Return the path that a word names. Refuse an empty word: it would mean the current folder."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


def output_path(text: str) -> Path:
    """Return the path of an output file; ``-`` is standard output."""
    return Path("/dev/stdout") if text == "-" else path(text)
