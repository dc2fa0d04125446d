"""The JSON Schemas of what the commands print with ``--json``, and of run.json: one file each.

A file may refer to another one. ``output_schema`` gives it with all that it refers to, as one document.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

_ENDING = ".schema.json"


def names() -> list[str]:
    """Return the names of the schemas: commands, ``run`` (run.json) and ``error``."""
    found = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(_ENDING) for name in found if name.endswith(_ENDING))


def output_schema(name: str) -> dict[str, Any]:
    """Return the schema called ``name``, without references to other files."""
    definitions: dict[str, Any] = {}

    def resolve(node: Any, file: str) -> Any:
        """Return ``node`` of ``file`` with its references turned into references to the definitions."""
        if isinstance(node, list):
            return [resolve(item, file) for item in node]
        if not isinstance(node, dict):
            return node
        out = {key: resolve(value, file) for key, value in node.items() if key != "$defs"}
        if "$ref" in node:
            place, _, inner = node["$ref"].partition("#/$defs/")
            place = place.removesuffix(_ENDING) or file
            defined = inner or place
            if defined not in definitions:
                definitions[defined] = {}  # keeps its turn
                schema = _read(place)
                target = schema["$defs"][inner] if inner else {k: v for k, v in schema.items() if k != "$schema"}
                definitions[defined] = resolve(target, place)
            out["$ref"] = f"#/$defs/{defined}"
        return out

    whole: dict[str, Any] = resolve(_read(name), name)
    return {**whole, "$defs": definitions} if definitions else whole


def _read(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(files(__name__).joinpath(name + _ENDING).read_text("utf-8"))
    return schema
