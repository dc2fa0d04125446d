"""What the shell completes after Tab: recipes, settings with their values, names to explain. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

_ENDINGS = (".yaml", ".yml")
_MAX_ENTRIES = 1000


def recipes(incomplete: str) -> list[str]:
    """Return the recipes, and the folders, whose paths begin so; of an only folder its content too."""
    found = sorted(_entries(incomplete))
    while len(found) == 1 and found[0].endswith("/"):
        inner = sorted(_entries(found[0]))
        if not inner:
            break
        found = inner if len(inner) == 1 else [*found, *inner]
    return found


def _entries(incomplete: str) -> Iterator[str]:
    start = incomplete.rpartition("/")[2]
    before = incomplete[: len(incomplete) - len(start)]
    try:
        inside = list(zip(range(_MAX_ENTRIES), os.scandir(Path(before or ".").expanduser()), strict=False))
    except OSError:
        return
    for _, entry in inside:
        if entry.name.startswith(start) and (start.startswith(".") or not entry.name.startswith(".")):
            if entry.is_dir():
                yield f"{before}{entry.name}/"
            elif entry.name.endswith(_ENDINGS):
                yield before + entry.name


def overrides(ctx: typer.Context, incomplete: str) -> list[str | tuple[str, str]]:
    """Return the settings whose names begin so, or the values of the one that is named whole: ``KEY=VALUE``.

    Where one setting is left, it comes with its values, so that the shell goes on behind the equals sign.
    """
    key, is_whole, start = incomplete.partition("=")
    split = _key_before(ctx) if not is_whole else None
    if split is not None:  # bash takes an equals sign for the end of a word
        return [(value, "") for value in _values(split) if value.startswith(incomplete)]
    if is_whole:
        return [(f"{key}={value}", "") for value in _values(key) if value.startswith(start)]
    found = {name: text for name, text in _settings().items() if name.startswith(incomplete)}
    if len(found) == 1 or incomplete in found:
        [name] = [incomplete] if incomplete in found else found
        return [(f"{name}=", found[name]), *((f"{name}={value}", "") for value in _values(name))]
    return [(f"{name}=", text) for name, text in found.items()]


def _key_before(ctx: typer.Context) -> str | None:
    """Return the setting that stands before the word, where bash has split ``KEY=VALUE`` at the equals sign."""
    words = os.environ.get("COMP_WORDS", "").split("\n" if "\n" in os.environ.get("COMP_WORDS", "") else None)
    at = int(os.environ.get("COMP_CWORD", "0") or 0)
    before = words[:at]
    if words[at : at + 1] == ["="]:
        return before[-1] if before else None
    return before[-2] if before[-1:] == ["="] and len(before) > 1 else None


def _settings() -> dict[str, str]:
    """Return the settings that an override can name, each with the first sentence of its help."""
    from peftcli.recipe.reference import explained_settings

    sections = ("base_model.", "dataset.", "launch.", "method.", "task.", "training.")
    found = ((name, each.help) for name, each in explained_settings().items() if each.kind == "setting")
    return {name: text.partition(". ")[0] for name, text in found if name == "extends" or name.startswith(sections)}


def _values(key: str) -> Iterable[str]:
    """Return the values that a setting may have, or its default."""
    from peftcli.recipe.reference import explained_settings

    found = explained_settings().get(key)
    if found is None:
        return ()
    words = [word for word in (found.type or "").replace(" or ", ", ").split(", ") if word in ("true", "false", "null")]
    default = found.default if found.default not in (None, "(unset)", "(required)") else None
    return dict.fromkeys([*found.allowed, *words, *([default] if default else [])])


def names(incomplete: str) -> list[tuple[str, str]]:
    """Return what ``explain`` knows that begins so, each with what it is."""
    from peftcli.recipe.explain_names import explainable

    return [(name, each.kind) for name, each in explainable().items() if name.startswith(incomplete)]


def recipes_and_overrides(ctx: typer.Context, incomplete: str) -> list[Any]:
    """Return recipes and settings, for commands that take both in any order."""
    return [*recipes(incomplete), *overrides(ctx, incomplete)]
