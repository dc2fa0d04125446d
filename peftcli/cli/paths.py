"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path

import typer


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
