"""With --json, a command that fails prints exactly one JSON object, whatever it fails at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.main import get_command

from peftcli.cli.app import app
from peftcli.output_schemas import output_schema

COMMANDS = get_command(app).commands
WITH_JSON = sorted(name for name, each in COMMANDS.items() if any("--json" in one.opts for one in each.params))


def words(name: str, value: str) -> list[str]:
    """A command line with a value for each argument and option that must be given."""
    out = []
    for param in COMMANDS[name].params:
        if param.required:
            out += [param.opts[0], "new"] if param.param_type_name == "option" else [value]
    return out


@pytest.mark.parametrize("name", WITH_JSON)
@pytest.mark.parametrize("how", ["no such file", "an empty word", "an unknown option", "a word too many"])
def test_one_object_describes_a_failure(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {
        "no such file": words(name, "missing.yaml"),
        "an empty word": words(name, ""),
        "an unknown option": [*words(name, "missing.yaml"), "--nope"],
        "a word too many": [*words(name, "missing.yaml"), "a", "b", "c"],
    }[how]
    ran = cli(name, *given, "--json")
    if ran.code == 0:
        assert not words(name, "x"), "it has something to do without a word"
        return
    answer = json.loads(ran.out)
    if name == "check" and "error" not in answer:
        assert answer["errors"]
        return
    Draft202012Validator(output_schema("error")).validate(answer)
    error = answer["error"]
    assert error["exit_code"] == ran.code
    assert {"kind", "message", "file", "line", "key", "hint"} <= error.keys()
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) <= 6
