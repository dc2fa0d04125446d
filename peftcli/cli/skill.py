"""``peftcli skill``."""

from __future__ import annotations

from importlib.resources import files

from peftcli.cli import console


def skill() -> None:
    """Print SKILL.md: how a coding agent uses peftcli."""
    console.out(files("peftcli").joinpath("SKILL.md").read_text("utf-8").rstrip("\n"))
