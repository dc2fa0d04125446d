"""Write a drafted recipe: each line ends with the count, or the reason, that decided it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from peftcli.guard.files import one_line
from peftcli.recipe.values import read_scalar
from peftcli.system.secrets import redact

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@=+-]*")
_COLUMN = 52
"""Where comments begin, at most."""


@dataclass(frozen=True)
class Line:
    """A setting of the draft."""

    key: str
    """Its full name: ``dataset.columns.label``."""
    value: Any
    reason: str


def schema_header() -> str:
    """Return the comment that editors with a YAML language server read: the schema of this installation."""
    return f"# yaml-language-server: $schema={files('peftcli') / 'recipe.schema.json'}"


def recipe_text(lines: Sequence[Line], comments: Sequence[str] = (), bases: Sequence[str] = ()) -> str:
    """Return the recipe as YAML: header, ``comments``, settings; ``bases`` are comments below the base model."""
    out = [schema_header(), *(f"# {one_line(each)}".rstrip() for each in comments)]
    open_keys: list[str] = []
    for line in lines:
        parts = _parts(line.key)
        shared = 0
        while shared < min(len(open_keys), len(parts) - 1) and open_keys[shared] == parts[shared]:
            shared += 1
        if not shared:
            out.append("")
        for depth in range(shared, len(parts) - 1):
            out.append(f"{'  ' * depth}{scalar(parts[depth])}:")
        open_keys = parts[:-1]
        text = f"{'  ' * (len(parts) - 1)}{scalar(parts[-1])}: {scalar(line.value)}"
        out.append(f"{text.ljust(_COLUMN)}  # {one_line(line.reason)}" if line.reason else text)
        if line.key.startswith("base_model"):
            out += [f"# {one_line(each)}" for each in bases]
    return "\n".join(out) + "\n"


def _parts(key: str) -> list[str]:
    section, _, name = key.partition(".")
    if name.startswith("columns."):
        return [section, "columns", name.removeprefix("columns.")]
    return [section, name] if name else [section]


def scalar(value: Any) -> str:
    """Return a value in YAML's flow form."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(str(key))}: {scalar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # YAML 1.1 reads 1e-05 as a text
    text = redact(str(value))
    if _PLAIN.fullmatch(text) and isinstance(read_scalar(text), str) and text.lower() not in ("yes", "no", "on", "off"):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable()).replace("${", "$${")
