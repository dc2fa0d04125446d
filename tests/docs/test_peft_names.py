"""docs/peft.md knows every public name of the installed PEFT, and says the truth about each."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest
from docs_pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import peft_names

LISTED = {name for names in peft_names.PUBLIC.values() for name in names.split()}


@pytest.mark.parametrize("module", peft_names.PUBLIC)
def test_the_page_knows_each_public_name_of_peft(module: str) -> None:
    place = importlib.import_module(module)
    defined = [name for name, value in vars(place).items() if getattr(value, "__module__", None) == module]
    public = {name for name in getattr(place, "__all__", defined) if not name.startswith("_")}
    assert sorted(public - LISTED) == []


@pytest.mark.parametrize("module", peft_names.PUBLIC)
def test_a_name_is_here_unless_the_page_says_why_not(module: str) -> None:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(module.replace("peft", "peftcli.peft_api", 1))
    place = sys.modules.get(module.replace("peft", "peftcli.peft_api", 1))
    names = peft_names.PUBLIC[module].split()
    here = {name for name in names if hasattr(place, name)}
    assert here == {name for name in names if peft_names.absent(name) is None}


def test_each_reason_is_about_a_name_of_peft() -> None:
    used = {
        next((pattern for pattern in peft_names.ABSENT if peft_names.matches(name, pattern)), None) for name in LISTED
    }
    assert used - {None} == set(peft_names.ABSENT)
