"""The calculated table of docs/scaling.md is that of its script."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import scaling


def test_the_table_is_that_of_its_script() -> None:
    assert scaling.PAGE.read_text() == scaling.page(), "run: python docs/scaling.py"
