"""Write the table of docs/import.md: what `peftcli import` does with the recipes of tests/drafting/recipes.

``python docs/importing.py`` writes the page, with ``--check`` it fails if the page is stale.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from peftcli.drafting.importing import Imported, import_recipe
from peftcli.drafting.peers import PEERS
from peftcli.drafting.peers.base import NO_VALUE, By, To

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/import.md"
RECIPES = ROOT / "tests/drafting/recipes"
SUFFIXES = (".yml", ".yaml", ".sh", ".py", ".ipynb")
BEGIN = "<!-- below: written by `python docs/importing.py` -->"


def main() -> None:
    """Write the page, or compare it."""
    os.chdir(RECIPES)
    text = PAGE.read_text("utf-8").partition(BEGIN)[0] + f"{BEGIN}\n\n" + "\n".join([*_keys(), *_imported()]) + "\n"
    if "--check" not in sys.argv:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        sys.exit("docs/import.md is stale: run python docs/importing.py")


def _keys() -> list[str]:
    lines = [
        "## How many keys each importer knows",
        "",
        "| `--from` | keys | carried or translated | not carried, with a reason |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, peer in PEERS.items():
        found = {key.rpartition(".")[2] if name == "unsloth" else key: rule for key, rule in peer.table.items()}
        carried = sum(isinstance(rule, (To, By)) for rule in found.values())
        lines.append(f"| `{name}` | {len(found)} | {carried} | {len(found) - carried} |")
    return [*lines, ""]


def _imported() -> list[str]:
    files = sorted(path for path in RECIPES.glob("*/*") if path.suffix in SUFFIXES)
    found = {path.relative_to(RECIPES).as_posix(): import_recipe(path.relative_to(RECIPES)) for path in files}
    lines = [
        f"## {len(found)} recipes",
        "",
        "The files in `tests/drafting/recipes` have the keys and the usual values of each tool's public examples.",
        "`peftcli check` accepts each of the new recipes.",
        "",
        "| recipe | carried | not carried | without a value |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, each in found.items():
        empty = sum(reason.endswith(NO_VALUE) for _, reason in each.not_carried.values())
        lines.append(f"| `{name}` | {len(each.carried)} | {len(each.not_carried) - empty} | {empty} |")
    return [*lines, "", "## What was not carried", "", *_left_out(found)]


def _left_out(found: dict[str, Imported]) -> list[str]:
    lines = ["| tool | key | why, or what to do |", "| --- | --- | --- |"]
    rows = {
        (each.tool, key, reason)
        for each in found.values()
        for key, (_, reason) in each.not_carried.items()
        if not reason.endswith(NO_VALUE)
    }
    return lines + [f"| {tool} | `{key}` | {reason} |" for tool, key, reason in sorted(rows)]


if __name__ == "__main__":
    main()
