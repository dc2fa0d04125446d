"""What a person sees on a terminal of 80 columns: lines that fit, colours where they mean something, a screenful."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import trainkit

from peftcli.adapters.diff import analyse
from peftcli.cli import console
from peftcli.cli.progress import in_order
from peftcli.errors import UsageError


class Terminal:
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda _: True)
    monkeypatch.setenv("COLUMNS", "80")


def plain(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("error: no", "\x1b[1;31merror\x1b[0m: no"),
        ("warning: odd", "\x1b[33mwarning\x1b[0m: odd"),
        ("[a.yaml] warning: odd", "[a.yaml] \x1b[33mwarning\x1b[0m: odd"),
        ("verified: the folder is the trained model", "\x1b[32mverified\x1b[0m: the folder is the trained model"),
        ("errors are none", "errors are none"),
        ("step 1/4", "step 1/4"),
    ],
)
def test_a_log_has_colours_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, shown: str
) -> None:
    console.log(line)
    assert capsys.readouterr().err == f"{line}\n"
    monkeypatch.setattr(console, "is_terminal", lambda _: True)
    console.log(line)
    assert capsys.readouterr().err == f"{shown}\n"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.is_terminal(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.is_terminal(Terminal())  # type: ignore[arg-type]


def test_an_error_breaks_between_words_and_keeps_commands_whole(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"run: peftcli merge {'a' * 40} --output {'b' * 40}"
    console.report_error(UsageError("word " * 40, key="training.seed", hint=command), as_json=False)
    lines = plain(capsys.readouterr().err)
    assert set(lines[0].split()) == {"error:", "training.seed:", "word"}
    assert max(len(line) for line in lines if "peftcli" not in line) <= 80
    assert lines[-2:] == [command, "more: peftcli explain training.seed"]


def test_a_list_of_paths_names_their_folder_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    paths = [f"{data}/a.jsonl:1", f"{data}/b c.jsonl:2"]
    assert console.folder_once(paths) == f"{data}/: a.jsonl:1, b c.jsonl:2"
    assert console.folder_once(paths[:1]) == paths[0]
    assert console.folder_once([*paths, "x/y"]) == ", ".join([*paths, "x/y"])
    assert console.folder_once(["org/data row 1", "org/data row 2"]) == "org/data row 1, org/data row 2"
    assert console.folder_once([str(number) for number in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_a_dry_run_and_the_facts_of_an_adapter_are_a_screenful(
    terminal: None, cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainkit.write_recipe(tmp_path)
    dry = plain(cli("train", "recipe.yaml", "--dry-run").out)
    assert dry[0] == "would train:"
    assert dry[-1] == "  peftcli train recipe.yaml"
    run = trainkit.run_recipe(Path("recipe.yaml"), "training.max_steps=1", "method.target_modules=all-linear")
    modules = len(analyse(str(run.folder))["modules"])
    facts = plain(cli("info", run.folder).out)
    assert modules > 8
    assert any("layers.*.self_attn.q_proj" in line for line in facts)
    for screen in (dry, facts):
        assert len(screen) <= 24
        assert all(len(line) <= 80 or str(tmp_path) in line for line in screen)
    assert len(plain(cli("info", run.folder, "--updates").out)) > modules


def test_the_metric_that_matters_comes_first() -> None:
    measured = dict.fromkeys(("eval_accuracy", "eval_auc", "eval_loss", "eval_macro_f1"), 0.5)
    assert in_order(measured, "eval_macro_f1") == ["eval_macro_f1", "eval_loss", "eval_accuracy", "eval_auc"]
