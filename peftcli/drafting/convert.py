"""Convert what no reader takes as it is into a file beside the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftcli.drafting.look import Look
from peftcli.drafting.readings import Found


def converted(names: Sequence[str], output: Path) -> tuple[list[str], list[str]]:
    """Return the names of the data, where some were converted those of the new files, and notes about them."""
    return list(names), []


def converted_rows(look: Look, found: Found, output: Path) -> tuple[Look, str] | None:
    """Write rows whose values a task does not read into a new file; return a look at it and a note."""
    return None
