"""Write a draft as a commented recipe: each line says where its value is from; the end lists what is not carried."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftcli.drafting.peers.base import NO_VALUE, Draft, Setting
from peftcli.drafting.write import scalar, schema_header
from peftcli.guard.files import one_line, short_repr
from peftcli.system.secrets import redact

_SECTIONS = ("base_model", "task", "method", "dataset", "training", "launch", "gates")
_ORDER = ("name", "type", "train", "mix", "eval", "eval_fraction", "format", "columns", "output_dir")


def recipe_text(draft: Draft) -> str:
    """Return the recipe as YAML."""
    lines = [
        schema_header(),
        f"# Imported by `peftcli import` from {_comment(draft.file.name)}, a recipe of {draft.peer.label}.",
    ]
    for section in _SECTIONS:
        prefix = f"{section}."
        found = {key.removeprefix(prefix): each for key, each in draft.settings.items() if key.startswith(prefix)}
        if found:
            lines += ["", *_section(section, found)]
    lines += ["", *_left_out(draft)]
    return "\n".join(lines) + "\n"


def _section(section: str, settings: Mapping[str, Setting]) -> list[str]:
    only = next(iter(settings.values()))
    if [*settings] in (["name"], ["type"]) and section in ("base_model", "task"):
        return [f"{section}: {scalar(only.value)}  # {_comment(only.comment)}"]
    ordered = sorted(settings, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    lines = [f"{section}:"]
    for name in ordered:
        value, comment = settings[name].value, _comment(settings[name].comment)
        if name == "mix":
            lines += [f"  mix:  # {comment}", *(f"    - {scalar(entry)}" for entry in value)]
        else:
            lines.append(f"  {name}: {scalar(value)}  # {comment}")
    return lines


def _comment(text: str) -> str:
    return one_line(redact(text))


def _left_out(draft: Draft) -> list[str]:
    """The comment lines of keys that were not carried, first those that had a value."""
    given = {key: found for key, found in draft.not_carried.items() if not found[1].endswith(NO_VALUE)}
    empty = [key for key in draft.not_carried if key not in given]
    lines = [f"# {_comment(note)}" for note in draft.notes]
    lines = [*(["# To look at:", *lines, "#"] if lines else [])]
    lines.append("# Not carried:" if given else "# Every key that has a value was carried.")
    lines += [f"#   {_comment(key)}: {shown(value)}: {_comment(reason)}" for key, (value, reason) in given.items()]
    if empty:
        lines.append(f"# Without a value, and so without effect: {_comment(', '.join(empty))}")
    return lines


def shown(value: Any) -> str:
    """Return a value of another tool for a comment or a line of the log: short, on one line, without secrets."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value)
    return _comment(text if len(text) <= 80 and text.isprintable() else short_repr(text))
