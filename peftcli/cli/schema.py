"""``peftcli schema``."""

from __future__ import annotations

from peftcli.cli import console


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from peftcli.recipe.reference import json_schema

    console.print_json(json_schema())
