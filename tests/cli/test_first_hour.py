"""A stranger's path: an empty environment, the wheel, a table of their own, an adapter on a hub. Seven commands."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub

ROOT = Path(__file__).parents[2]
TICKETS = {
    "Billing": ("invoice", "refund", "card", "payment", "price", "receipt"),
    "Delivery": ("parcel", "courier", "tracking", "address", "package", "postman"),
    "Login": ("password", "account", "code", "username", "browser", "reset"),
}
ADDED = ("It is urgent", "Please help", "Since Monday", "Nobody answers", "I asked twice", "My name is Ana")


def write_tickets(path: Path) -> None:
    """A table as Excel saves it: semicolons, cp1252, columns that nobody has named for a program."""
    rows = [
        (
            f"T-{at:04}",
            f"The {one} and the {other} are wrong, café: {ADDED[at % 6]} ({at * 7919 % 1000}), {third}?",
            team,
        )
        for at, (team, words, first) in enumerate(
            (team, words, first) for first in range(6) for more in range(12) for team, words in TICKETS.items()
        )
        for one, other, third in [(words[first], words[(first + at) % 6], words[at % 5])]
    ]
    with path.open("w", encoding="cp1252", newline="") as file:
        csv.writer(file, delimiter=";", lineterminator="\r\n").writerows([("Ticket", "Message", "Team"), *rows])


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but pip, and beside it the wheel of this tree."""
    folder = tmp_path_factory.mktemp("stranger")
    source = folder / "source"
    source.mkdir()
    for name in ("peftcli", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(wheel, check=True)
    venv.create(folder / "venv", with_pip=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_an_empty_environment_to_an_adapter_on_a_hub(
    stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    base = Path(os.environ.get("PEFTCLI_MODELS", ROOT / "models")) / "MiniLM-L6"
    subprocess.run([sys.executable, ROOT / "configs/tasks/fetch.py", "minilm", base], check=True)
    work = tmp_path / "work"
    work.mkdir()
    write_tickets(work / "tickets.csv")
    (wheel,) = stranger.glob("*.whl")
    commands, started = list[str](), time.perf_counter()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "PEFTCLI"))}
    bin = stranger / "venv" / "bin"
    with Hub() as hub:
        env = clean | {"PATH": f"{bin}{os.pathsep}{clean['PATH']}", "HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
        env |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "2"}

        def types(*words: str | Path) -> Any:
            """Run a command as the stranger would; its JSON where it prints some."""
            commands.append(" ".join(map(str, words)))
            since = time.perf_counter()
            done = subprocess.run(
                words, cwd=work, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
            )
            with capsys.disabled():
                print(f"{time.perf_counter() - since:6.1f} s  {' '.join(map(str, words))[:110]}")
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            return json.loads(done.stdout) if "--json" in words else done.stdout

        types("pip", "install", "--quiet", f"{wheel}[metrics]")
        installed = time.perf_counter()
        drafted = types("peftcli", "init", "tickets.csv", "--base", base, "--json")
        assert drafted["task"] == "sequence_classification"
        assert (drafted["columns"]["text"], drafted["columns"]["label"]) == ("Message", "Team")
        types("peftcli", "check", "--deep", "recipe.yaml")
        assert "Delivery" in types("peftcli", "inspect", "recipe.yaml")
        record = types("peftcli", "train", "recipe.yaml", "--json")
        assert record["status"] == "complete"
        assert record["eval"]["kept"]["eval_accuracy"] > 0.6  # of three classes
        run = next(path.parent for path in work.rglob("adapter_config.json") if "checkpoints" not in path.parts)
        answered = types("peftcli", "predict", run, "My parcel is lost, and the courier has no tracking", "--json")
        assert answered["rows"][0]["label"] == "Delivery"
        types("peftcli", "push", run, "alice/tickets", "--base-model-id", "sentence-transformers/all-MiniLM-L6-v2")
        assert "adapter_model.safetensors" in hub.repos["alice/tickets"].refs["main"][-1].files
    minutes, of_install = (time.perf_counter() - started) / 60, (installed - started) / 60
    record_property("minutes", round(minutes, 1))
    with capsys.disabled():
        print(f"{len(commands)} commands in {minutes:.1f} minutes, {of_install:.1f} of them for pip")
    assert len(commands) == 7
