"""The calculated table of docs/scaling.md is that of its script."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import many_gpus


def test_the_table_is_that_of_its_script() -> None:
    assert many_gpus.PAGE.read_text() == many_gpus.page(), "run: python docs/many_gpus.py"
