"""What Tab completes, as bash, zsh and fish ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ASKED = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
sys.argv = ["peftcli"]
from peftcli.cli.app import main
main()
"""


@pytest.fixture
def tab(tmp_path: Path) -> Callable[..., list[str]]:
    """The completions of a command line that ends with the word to complete."""
    (tmp_path / "a.yaml").write_text("")
    (tmp_path / "configs/deep").mkdir(parents=True)
    (tmp_path / "configs/deep/b.yml").write_text("")
    (tmp_path / "configs/deep/rows.jsonl").write_text("")

    def tab(line: str, shell: str = "bash") -> list[str]:
        if shell == "bash":
            words = line.replace("=", " = ").split() + [""] * line.endswith(" ")
            asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
        else:
            asked = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        env = {**os.environ, "_PEFTCLI_COMPLETE": f"complete_{shell}", **asked}
        command = [sys.executable, "-c", ASKED]
        ran = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.stderr == "False\n", "torch takes seconds"
        return ran.stdout.splitlines()

    return tab


@pytest.mark.parametrize(
    ("line", "shell", "found"),
    [
        ("peftcli insp", "bash", ["inspect"]),
        ("peftcli train ", "bash", ["a.yaml", "configs/"]),
        ("peftcli train con", "bash", ["configs/deep/b.yml"]),
        ("peftcli check a", "bash", ["a.yaml"]),
        ("peftcli train a.yaml training.le", "bash", ["training.learning_rate=", "training.learning_rate=auto"]),
        ("peftcli train a.yaml training.bf16=", "bash", ["auto", "true", "false"]),
        ("peftcli train a.yaml training.lr_scheduler_type=co", "bash", ["cosine", "constant", "constant_with_warmup"]),
        ("peftcli explain answers_c", "bash", ["answers_cut"]),
        ("peftcli schema ev", "bash", ["evaluate"]),
        ("peftcli train a.yaml training.bf16=t", "fish", ["training.bf16=true"]),
    ],
)
def test_what_is_completed(tab: Callable[..., list[str]], line: str, shell: str, found: list[str]) -> None:
    assert tab(line, shell) == found


def test_several_settings_come_with_their_help_where_the_shell_shows_it(tab: Callable[..., list[str]]) -> None:
    found = tab("peftcli train a.yaml training.w", "fish")
    assert [line.partition("\t")[0] for line in found][:2] == ["training.warmup_ratio=", "training.warmup_steps="]
    assert all("\t" in line for line in found)
    assert tab("peftcli train a.yaml training.w", "zsh")[0].startswith('_arguments \'*: :(("training.warmup_ratio=":')


def test_the_help_tells_of_it(cli: Callable) -> None:
    assert "--install-completion" in cli("--help").out
