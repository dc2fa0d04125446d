"""The first line of recipes that peftcli writes: where an editor finds the JSON Schema."""

from __future__ import annotations

from importlib.resources import files


def schema_header() -> str:
    """Return the comment that editors with a YAML language server read: the schema of this installation."""
    return f"# yaml-language-server: $schema={files('peftcli') / 'recipe.schema.json'}"
