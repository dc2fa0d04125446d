from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub

from peftcli.cli.app import main

GOOD = """\
base_model: org/model
task: causal_lm
method: {type: lora, r: 4}
dataset: {train: org/data, eval: org/held-out}
training:
  output_dir: outputs/run
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command line in this process."""

    def cli(*args: object) -> Ran:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return cli


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a good recipe, with lines after it."""

    def recipe(more: str = "", name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(GOOD + more, encoding="utf-8")
        return path

    return recipe


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process uses."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()
