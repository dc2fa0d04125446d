"""How the package hangs together: no import circles, and no imports inside functions but those that start-up needs."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import house  # noqa: E402

ALLOWED = {
    "peftcli.adapters.load": 2,
    "peftcli.cli.cache": 3,
    "peftcli.cli.check": 2,
    "peftcli.cli.combine": 1,
    "peftcli.cli.diff": 1,
    "peftcli.cli.evaluate": 3,
    "peftcli.cli.explain": 1,
    "peftcli.cli.generate": 4,
    "peftcli.cli.info": 3,
    "peftcli.cli.inspect": 5,
    "peftcli.cli.junit_report": 1,
    "peftcli.cli.merge": 1,
    "peftcli.cli.predict": 1,
    "peftcli.cli.push": 1,
    "peftcli.cli.schema": 1,
    "peftcli.cli.status": 1,
    "peftcli.cli.train": 5,
    "peftcli.cli.train_together": 6,
    "peftcli.cli.verify": 1,
    "peftcli.recipe.data_checks": 1,
    "peftcli.train.preview": 1,
    "peftcli.train.start": 2,
}
"""Module -> how many imports of the package may stand inside its functions. A command imports what it runs when it
runs, so that ``--help`` answers at once; ``train.preview`` and ``train.start`` do so for theirs. No number here may
grow, and no module outside ``cli`` may be added."""


@functools.cache
def parsed() -> Any:
    return house.parsed(ROOT)


def test_no_modules_import_one_another() -> None:
    assert house.cycles(house.imports(parsed(), ROOT)) == []


def test_imports_inside_functions_only_become_fewer() -> None:
    found = house.inner_imports(parsed(), ROOT)
    assert {name: count for name, count in found.items() if count > ALLOWED.get(name, 0)} == {}


def test_a_circle_is_found() -> None:
    assert house.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
