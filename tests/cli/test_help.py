from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import trainkit
from typer.main import get_command

from peftcli import errors
from peftcli.adapters.proof.readers import READERS
from peftcli.cli import app, console, explain
from peftcli.cli.combine import combine
from peftcli.cli.generate import generate
from peftcli.cli.verify import verify
from peftcli.methods.combinations import COMBINATIONS
from peftcli.schema import Quantization


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Makes ``peftcli schema`` raise."""

    def failing(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr("peftcli.recipe.reference.json_schema", fail)

    return failing


def test_choices_are_those_of_the_tables() -> None:
    """The command line lists them itself, since the tables import torch."""

    def taken(command: Callable[..., object], option: str) -> tuple[Any, ...]:
        return get_type_hints(command, include_extras=True)[option].__metadata__, get_type_hints(command)[option]

    assert get_args(taken(combine, "method")[1]) == COMBINATIONS
    [option], _ = taken(verify, "readers")
    assert option.metavar.split("|") == list(READERS)
    stored = get_args(get_type_hints(Quantization)["type"])
    assert get_args(get_args(taken(generate, "quantization")[1])[0]) == ("none", *stored)


def test_help(cli) -> None:
    ran = cli("--help")
    assert (ran.code, ran.err) == (0, "")
    assert cli().out == ran.out
    for name in ("check", "explain", "schema", "info"):
        assert f"\n  {name} " in ran.out
        assert cli(name, "--help").code == 0
    assert "\x1b" not in ran.out


def test_the_help_begins_with_a_first_hour_and_cuts_nothing(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = cli().out
    headings = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[0] == "The first hour:"
    assert headings[-1] == "Options:"
    there = [name for name in app.FIRST_HOUR if name in get_command(app.app).commands]
    assert {"check", "inspect", "train", "predict"} <= set(there)
    assert [line.split()[0] for line in text.partition("The first hour:\n")[2].splitlines()[: len(there)]] == there
    commands = text.partition("The first hour:")[2].partition("Options:")[0]
    lines = {line.split()[0]: line for line in commands.splitlines() if line.startswith("  ")}
    assert list(lines) == [*there, *(name for name in get_command(app.app).commands if name not in there)]
    assert {name: line for name, line in lines.items() if not line.endswith(".") or "..." in line} == {}
    assert max(map(len, text.splitlines())) <= 80


def test_usage_shows_what_must_be_given(cli) -> None:
    assert cli("merge", "--help").out.startswith("Usage: peftcli merge ADAPTER --output OUTPUT [OPTIONS]\n")
    ran = cli("train", "--help").out
    assert ran.startswith("Usage: peftcli train RECIPE [KEY=VALUE]... [OPTIONS]\n")
    assert "\n  [KEY=VALUE]...  Settings to override.\n" in ran


TASK_OF_SLURM = {
    **{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2"},
    **{"SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
}
"""The second of two on a node."""


def test_commands_that_run_in_one_process(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in trainkit.ranks()[0].items():
        monkeypatch.setenv(name, value)
    ran = cli("schema")
    assert (ran.code, ran.err) == (0, "schema runs in one of the 2 processes that were started\n")
    assert json.loads(ran.out)
    assert cli("train").err.startswith("error: Missing argument")
    monkeypatch.setenv("RANK", "1")
    ran = cli("schema")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    monkeypatch.setattr(os, "environ", os.environ | TASK_OF_SLURM)
    for name in trainkit.ranks()[0]:
        os.environ.pop(name)
    ran = cli("schema")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == "schema runs in task 0 alone; to run it in each task, set SLURM_STEP_NUM_TASKS=1\n"


def test_version(cli) -> None:
    ran = cli("--version")
    assert ran.code == 0
    assert ran.out.startswith("peftcli ")


@pytest.mark.slow
def test_python_dash_m() -> None:
    ran = subprocess.run([sys.executable, "-m", "peftcli", "chek"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: No such command 'chek'.")


@pytest.mark.parametrize(
    "args",
    [
        *(["chek"], ["check"], ["check", "--nope", "x"], ["schema", "x", "y"], ["status", ""]),
        *(["merge", "x", "--output", ""], ["predict", "x", "--input", ""], ["train", "x", "--junit", ""]),
        *([each, ""] for each in ("train", "check", "evaluate", "inspect")),
        ["train", "x", "--resume", ""],
    ],
)
def test_usage_errors(cli, args: list[str]) -> None:
    ran = cli(*args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert "--help`" in ran.err
    body = json.loads(cli(*args, "--json").out)
    assert (body["error"]["kind"], body["error"]["exit_code"]) == ("UsageError", 2)


@pytest.mark.parametrize(
    "error",
    [kind("broken [bold]", hint="mend it") for kind in (errors.DataError, errors.HubError, errors.GateFailed)]
    + [errors.RecipeError([errors.Problem("broken [bold]", "x.yaml", 3)])],
)
def test_our_errors_keep_their_exit_code(cli, failing, error: errors.PeftcliError) -> None:
    failing(error)
    ran = cli("schema")
    assert (ran.code, ran.out, ran.err) == (error.exit_code, "", f"error: {error}\n")


def test_an_error_as_json(cli, failing) -> None:
    failing(errors.StorageError("full", file="a\x1bb", hint="mend it"))
    ran = cli("schema", "--json")  # schema has no --json: the usage error comes first
    assert json.loads(ran.out)["error"]["exit_code"] == 2
    code = console.report_error(errors.StorageError("full"), as_json=False)
    assert code == 7


def test_one_json_object_even_when_a_command_fails_after_printing_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "json_printed", False)
    assert console.report_error(errors.GateFailed("low", key="gates.loss"), as_json=True) == 12
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "kind": "GateFailed",
            "message": "low",
            "file": None,
            "line": None,
            "key": "gates.loss",
            "hint": None,
            "exit_code": 12,
        }
    }
    console.print_json({"loss": float("nan"), "rows": [float("inf"), 1.5], "text": "\u2028é"})
    console.report_error(errors.GateFailed("low"), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [None, 1.5], "text": "\u2028é"}


def test_a_broken_pipe_other_than_stdout_is_an_error(cli, failing) -> None:
    failing(BrokenPipeError(32, "Broken pipe"))
    ran = cli("schema")
    assert (ran.code, ran.err) == (7, "error: Broken pipe\n")


def test_too_little_memory_is_no_matter_of_training_alone(cli, failing) -> None:
    failing(MemoryError())
    ran = cli("schema")
    assert ran.code == 8
    assert "more memory" in ran.err
    assert "train" not in ran.err


def test_a_bug_is_one_line_unless_debugged(cli, failing) -> None:
    failing(ZeroDivisionError("1 / 0 \x1b[31m"))
    ran = cli("schema")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "error: peftcli failed: ZeroDivisionError: 1 / 0 \\x1b[31m; run with --debug for the traceback\n"
    )
    for args in (["schema", "--debug"], ["--debug", "schema"]):
        ran = cli(*args)
        assert ran.code == 1
        assert ran.err.startswith("Traceback (most recent call last):")


def test_interrupt(cli, failing) -> None:
    failing(KeyboardInterrupt())
    ran = cli("schema")
    assert (ran.code, ran.err) == (130, "error: stopped (SIGINT)\n")


@pytest.mark.grid
@pytest.mark.parametrize(
    ("args", "code", "err"),
    [(["schema"], 141, ""), (["train", "none.yaml", "--json"], 2, "error: none.yaml: no such file\n")],
)
def test_a_closed_pipe_is_quiet_and_an_error_keeps_its_code(args: list[str], code: int, err: str) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "peftcli", *args], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (code, err)


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("<&- >&- 2>&-", 2, ""),
        ("2>/dev/full", 2, '{\n  "error": '),
        ("2>&1 >/dev/full", 2, "error: unknown name"),
        ("--json 2>&1 >/dev/full", 7, "error: standard output: cannot be written: No space left on device\n"),
    ],
)
def test_streams_that_cannot_be_written(streams: str, code: int, said: str) -> None:
    words = "explain nothing --json" if code == 2 else "explain training"
    ran = subprocess.run(
        f"'{sys.executable}' -m peftcli {words} {streams}", shell=True, stdout=subprocess.PIPE, text=True, check=False
    )
    assert ran.returncode == code
    assert ran.stdout.startswith(said)


def test_output_that_the_terminal_cannot_encode() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "peftcli", "explain", "ü\u4e2d"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert ran.returncode == 2
    assert b"'\\xfc\\u4e2d'" in ran.stderr


def test_other_libraries_write_what_the_terminal_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    with console.redacted_streams():
        print("ü\u4e2d", flush=True)
    assert shown.getvalue() == b"\\xfc\\u4e2d\n"


@pytest.mark.parametrize(("encoding", "readable"), [("utf-8", "é 中 👩"), ("ascii", ""), ("latin-1", "")])
def test_json_is_readable_where_stdout_is_utf_8(monkeypatch: pytest.MonkeyPatch, encoding: str, readable: str) -> None:
    shown, text = io.BytesIO(), "é 中 👩\x7f\xad\u202e\u2028\ud800\U000e0001\n"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    console.print_json({"a": text})
    written = shown.getvalue().decode()
    assert json.loads(written) == {"a": text}
    assert readable in written
    assert not set("\x7f\xad\u202e\u2028\U000e0001") & set(written)


def test_clean() -> None:
    assert console.clean("a\tb\nc é 中 👩\u200d👧") == "a\tb\nc é 中 👩\u200d👧"
    assert console.clean("\x1b[2J\r\x9b\u202e\ud800\u2028") == "\\x1b[2J\\r\\x9b\\u202e\\ud800\\u2028"


def test_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda _: True)
    console.table(("name", "value"), [("[red]a", "\x1b[31m")])
    assert capsys.readouterr().out.split() == ["name", "value", "[red]a", "\\x1b[31m"]
    monkeypatch.setenv("COLUMNS", "30")
    console.table(("name", "link"), [("a", "https://example.org/a/page/of/a/method")])
    assert "https://example.org/a/page/of/a/method" in "".join(capsys.readouterr().out.split())


def test_commands_say_what_they_do(cli) -> None:
    for command in app.app.registered_commands:
        assert command.callback is not None
        assert (command.callback.__doc__ or "").strip()
    assert (explain.explain.__doc__ or "").partition("\n")[0] in cli("explain", "--help").out
