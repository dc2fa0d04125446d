"""``peftcli status --watch`` follows a run to its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainkit

from peftcli.cli import console
from peftcli.train.runs import status as statuses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = trainkit.write_recipe(tmp_path_factory.mktemp("watched"))
    return trainkit.run_recipe(recipe, "training.max_steps=2").folder


@pytest.fixture
def ending(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a run go on for three looks, the first two alike, and end with an exit code."""
    monkeypatch.setattr("peftcli.cli.status._INTERVAL", 0.0)
    end = statuses.status(folder)

    def ending(code: int) -> None:
        running = {"status": "running", "pid": 5, "exit_code": None}
        states: list[dict[str, Any]] = [end | running | {"steps": {"done": at, "total": 2}} for at in (0, 0, 1)]
        states.append(end | {"exit_code": code, "status": "interrupted" if code else "complete"})
        monkeypatch.setattr(statuses, "status", lambda path: states.pop(0))

    return ending


@pytest.mark.parametrize("code", [0, 75, 137])
def test_a_line_per_change_and_the_exit_code_of_the_run(
    cli: Callable, folder: Path, ending: Callable[[int], None], code: int
) -> None:
    ending(code)
    ran = cli("status", folder, "--watch")
    assert ran.code == code
    assert [line.partition(",")[0].partition(":")[0] for line in ran.out.splitlines()] == [
        "running",
        "running",
        "interrupted" if code else "complete",
    ]
    assert ["step 0 of 2" in ran.out, "step 1 of 2" in ran.out, ran.err] == [True, True, ""]
    ending(code)
    ran = cli("status", folder, "--watch", "--json")
    assert (ran.code, json.loads(ran.out)["exit_code"]) == (code, code)


def test_a_terminal_keeps_the_last_state_alone(
    cli: Callable, folder: Path, ending: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(0)
    monkeypatch.setattr(console, "is_terminal", lambda _: True)
    ran = cli("status", folder, "--watch")
    assert ran.code == 0
    assert ran.out.startswith(f"{folder}: complete\n  steps ")
    assert "running" not in ran.out


def test_what_is_no_run_is_an_error(cli: Callable, tmp_path: Path) -> None:
    assert cli("status", tmp_path, "--watch", "--json").code == 2
