"""``--quiet``: no progress, only warnings, errors and the answer."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainkit
from typer.main import get_command

from peftcli.cli.app import app
from peftcli.errors import PeftWarning

BRIEF = ("dataset.limit=1", "training.max_steps=30", "training.learning_rate=1e-2")
"""So that answers come to an end soon."""
ALL = {
    "demo",
    "sweep",
    "train",
    "evaluate",
    "inspect",
    "generate",
    "predict",
    "merge",
    "export",
    "combine",
    "convert",
    "push",
    "verify",
    "trace",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and an adapter in lora/."""
    folder = tmp_path_factory.mktemp("quiet")
    recipe = trainkit.write_recipe(folder)
    trainkit.run_recipe(recipe, *BRIEF, f"training.output_dir={folder}/lora")
    trainkit.write_rows(folder / "asked.jsonl", 2 * trainkit.PROMPTS[:1])
    return folder


@pytest.fixture
def told(cli: Callable, place: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The log of a command that succeeds; with --quiet there is none, and the answer is the same."""

    def told(*args: object, new: Path | None = None) -> list[str]:
        def run(*more: object) -> tuple[str, str]:
            trainkit.reset_accelerate()
            to = () if new is None else ("--output", new.with_name(f"{new.name}{len(more)}"))
            ran = cli(*args, *to, *more)
            assert ran.code == 0, ran.err
            return (ran.out if new is None else ran.out.replace(str(to[1]), str(new))), ran.err

        (loud, log), (quiet, nothing) = run(), run("--quiet")
        assert nothing == ""
        assert quiet == loud != ""
        return log.splitlines()

    return told


def test_every_command_that_shows_progress_has_it() -> None:
    commands = get_command(app).commands
    options = {(name, one.help) for name, command in commands.items() for one in command.params if one.name == "quiet"}
    assert {name for name, _ in options} == ALL
    assert {text for _, text in options} == {"Print no progress, only warnings, errors and the answer."}


def test_generate(told: Callable, place: Path, tmp_path: Path) -> None:
    files = ("--input", place / "asked.jsonl", "--max-new-tokens", 2)
    assert told("generate", place / "lora", *files, new=tmp_path / "answers.jsonl") == ["2/2"]
    assert told("predict", place / "lora", *files[:2], new=tmp_path / "predictions.jsonl")[-1].startswith("2")


def test_merge(told: Callable, place: Path, tmp_path: Path) -> None:
    log = told("merge", place / "lora", new=tmp_path / "merged")
    assert [line.partition(" ")[0] for line in log] == ["merging", "shard", "verifying:", "verifying:"]


def test_export(told: Callable, place: Path, tmp_path: Path) -> None:
    assert told("export", place / "lora", "--for", "vllm", new=tmp_path / "plain")[0].startswith("computing")


def test_combine_and_evaluate(told: Callable, place: Path, tmp_path: Path) -> None:
    told("combine", f"{place}/lora=1", new=tmp_path / "sum")
    told("evaluate", place / "recipe.yaml")
    told("verify", place / "lora", "--with", "peft")


def test_inspect(told: Callable, place: Path, tmp_path: Path) -> None:
    log = told("inspect", place / "recipe.yaml", "--html", tmp_path / "page.html")
    assert log[0] == "reading the data"
    assert log[-1] == f"page: {tmp_path}/page.html"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push(told: Callable, cli: Callable, place: Path, hub: Any) -> None:
    to = ("push", place / "lora", "alice/tiny", "--base-model-id", "acme/base")
    assert told(*to)[-1].startswith("uploaded 5 files, ")
    ran = cli(*to, "--dry-run", "--quiet")
    assert "adapter_model.safetensors\n" in ran.out, "what would be uploaded is the answer"


def test_warnings_and_errors_are_shown(cli: Callable, tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path)
    rows = tmp_path / "eval.jsonl"
    rows.write_text(rows.read_text() + "{broken\n")
    for command in ("evaluate", "inspect"):
        ran = cli(command, recipe, "dataset.on_bad_row=skip", "--quiet")
        assert ran.code == 0
        assert ("warning: bad_rows" in ran.err) == (command == "evaluate")
        ran = cli(command, recipe, "--quiet")
        assert ran.code == 3
        assert ran.err.startswith("error: ")


def test_a_warning_of_python_that_is_peftclis_own_is_a_line_as_the_others(cli: Callable) -> None:
    assert cli("--version").code == 0
    assert warnings.formatwarning(PeftWarning("odd"), PeftWarning, "file.py", 3) == "warning: odd\n"
    assert warnings.formatwarning("odd", UserWarning, "file.py", 3).startswith("file.py:3: UserWarning: odd")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.slow  # processes that import everything
def test_on_a_terminal_no_bars_of_downloads_are_drawn(cli: Callable, place: Path, tmp_path: Path, hub: Any) -> None:
    assert cli("push", place / "lora", "alice/tiny", "--base-model-id", "acme/base").code == 0

    def shown(name: str, *more: str) -> bytes:
        controller, terminal = pty.openpty()
        blocks: list[bytes] = []
        reader = threading.Thread(target=_read, args=(controller, blocks))
        reader.start()
        words = [sys.executable, "-m", "peftcli", "combine", "alice/tiny=1", "--output", str(tmp_path / name), *more]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("TQDM", "HF_HUB"))}
        env["HF_HOME"] = str(tmp_path / f"home-{name}")
        done = subprocess.run(words, env=env, stdout=subprocess.DEVNULL, stderr=terminal, check=False)
        os.close(terminal)
        reader.join(10)
        assert done.returncode == 0, blocks
        return b"".join(blocks)

    assert shown("loud") != b""
    assert shown("quiet", "--quiet") == b""


def _read(controller: int, blocks: list[bytes]) -> None:
    while True:
        try:
            block = os.read(controller, 4096)
        except OSError:  # the terminal was closed
            return
        if not block:
            return
        blocks.append(block)
