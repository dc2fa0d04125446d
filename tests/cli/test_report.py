"""``peftcli report`` and ``peftcli runs``: the page of a run, of several, and the list of runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import trainkit
from jsonschema import Draft202012Validator

from peftcli.errors import DataError
from peftcli.output_schemas import output_schema
from peftcli.reporting.write import render
from peftcli.train.run import train
from peftcli.train.runs.folder import StartOptions
from peftcli.train.runs.listing import read_run_files

EVIL = "<script>alert(1)</script> & done"
DIFFERENCE = {"base": 3.25, "adapter": 2.5, "difference": -0.75, "low": -1.0, "high": -0.5, "verdict": "better"}
COMPARISON = {
    "rows": 40, "units": 30, "unit": "groups", "draws": 10_000, "seconds": 2.0, "main": "eval_loss",
    "base_head_is_new": False, "metrics": {"eval_loss": DIFFERENCE},
    "right": {"base": 20, "kept": 18, "lost": 2, "gained": 9},
    "outputs": [{"row": "eval.jsonl:3", "chosen": "best", "input": EVIL, "wanted": "w", "base": "b", "adapter": "a"}],
}  # fmt: skip
FORGETTING = {
    "texts": 200, "tokens": 12_000, "base_loss": 3.0, "adapter_loss": 3.07, "loss": 0.07, "low": 0.04, "high": 0.1,
    "kl": 0.2, "kept_tokens": 0.8, "seconds": 3.0,
    "groups": {
        "arabic": {"texts": 6, "loss": 0.1, "kl": 0.3, "kept_tokens": 0.7},
        "english": {"texts": 90, "loss": 0.07, "kl": 0.2, "kept_tokens": 0.8},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> trainkit.Trained:
    recipe = trainkit.write_recipe(tmp_path_factory.mktemp("report"))
    return trainkit.run_recipe(recipe, "training.max_steps=2")


@pytest.fixture
def folder(trained: trainkit.Trained, tmp_path: Path) -> Path:
    """A run with a comparison and what was forgotten."""
    copy = tmp_path / "runs" / "one"
    shutil.copytree(trained.folder, copy)
    change(copy, comparison=COMPARISON, forgetting=FORGETTING)
    return copy


def change(folder: Path, **values: Any) -> None:
    record = json.loads((folder / "run.json").read_text()) | values
    (folder / "run.json").write_text(json.dumps(record))


def test_the_page_tells_the_run_and_stands_alone(folder: Path, cli: Callable) -> None:
    assert cli("report", folder).code == 0
    page, text = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    verdict = "The adapter is better than the base model: eval_loss is 2.5000, and 3.2500 without it"
    assert verdict in page
    assert "on 200 other texts its loss changed by +0.0700 nats a token" in page
    assert text.index("| english |") < text.index("| arabic |")
    assert EVIL not in page
    assert EVIL in unescape(page)
    assert not [mark for mark in ("<script", "http://", "https://", "@import", "url(") if mark in page]
    assert len(page) < 300_000
    assert "better than the base model" in text


def test_a_base_model_that_guesses_has_nothing_to_lose(folder: Path, cli: Callable) -> None:
    lost = "of 20 rows that the base model had right it gets 2 wrong"
    change(folder, forgetting={"skipped": "not a language model"})
    cli("report", folder)
    assert lost in (folder / "report.html").read_text()
    change(folder, comparison=COMPARISON | {"base_head_is_new": True})
    cli("report", folder)
    page = (folder / "report.html").read_text()
    assert lost not in page
    assert "which has no trained head and guesses" in page


def test_a_run_without_proof_has_a_page_too(trained: trainkit.Trained) -> None:
    page = (trained.folder / "report.html").read_text()
    assert "Verdict" in page
    assert trained.run["artefacts"][-1]["path"] in ("report.html", "report.md")


def test_a_run_without_evaluation_rows_has_a_page(folder: Path, cli: Callable) -> None:
    data = json.loads((folder / "run.json").read_text())["data"]
    del data["eval"]
    change(folder, data=data)
    ran = cli("report", folder)
    assert ran.code == 0, ran.err


def test_a_run_that_replaces_another_is_called_by_its_own_folder(trained: trainkit.Trained, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(trained.folder, out)
    recipe = replace(trained.recipe, training=replace(trained.recipe.training, output_dir=str(out), max_steps=3))
    trainkit.reset_accelerate()
    train(recipe, StartOptions(overwrite=True))
    page = (out / "report.html").read_text()
    assert "<h1>Report of again</h1>" in page
    assert f"peftcli merge {out} --output" in page
    assert ".overwrite" not in page + (out / "report.md").read_text()


def test_a_report_that_cannot_be_drawn_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.train.finish.render", lambda runs: 1 / 0)
    ran = trainkit.run_recipe(trainkit.write_recipe(tmp_path), "training.max_steps=1")
    assert (ran.run["status"], ran.run["exit_code"]) == ("complete", 0)
    assert not {"report.html", "report.md"} & {each["path"] for each in ran.run["artefacts"]}


def test_a_folder_that_cannot_be_read_is_named(folder: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    shut, scan = folder.parent / "shut", os.scandir
    shut.mkdir()

    def scandir(path: str) -> Any:
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", scandir)
    ran = cli("runs", folder.parent)
    assert ran.code == 0
    assert "shut is left out: cannot be read: Permission denied" in ran.err
    assert "1 run" in ran.out


def test_several_runs_are_compared_and_listed(folder: Path, cli: Callable, tmp_path: Path) -> None:
    other = folder.parent / "two"
    shutil.copytree(folder, other)
    record = json.loads((other / "run.json").read_text())
    for recipe in (record["recipe"], record["identity"]["recipe"]):
        recipe["training"]["learning_rate"] = 0.25
    (other / "run.json").write_text(json.dumps(record))
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "run.json").write_text("{")
    page = tmp_path / "both.html"
    assert cli("report", folder, other, "--output", page).code == 0
    assert "learning_rate" in page.read_text()
    ran = cli("runs", folder.parent, "--sort", "-training.learning_rate", "--plot", tmp_path / "curves.png")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines() if line.startswith(("one", "two"))] == ["two", "one"]
    assert max(map(len, ran.out.splitlines()[1:4])) <= 80
    assert "broken is left out" in ran.err
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(cli("runs", folder.parent, "--json").out)
    Draft202012Validator(output_schema("runs")).validate(found)
    assert len(found["runs"]) == 2
    assert len(found["damaged"]) == 1


@pytest.mark.parametrize("command", ["report", "runs"])
def test_a_folder_without_runs_is_one_error(command: str, tmp_path: Path, cli: Callable) -> None:
    ran = cli(command, tmp_path / "nothing")
    assert ran.code == 2
    assert len(ran.err.splitlines()) <= 3


GATE = {"metric": "eval_loss", "gate": "<= 1", "value": 2.5, "passed": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gates": [GATE]}, "1 of 1 gates failed (eval_loss is 2.5, expected <= 1)"),
        ({"gates": [GATE | {"passed": True}]}, "Its gate holds"),
        (
            {"status": "interrupted", "resumable": True},
            "interrupted after step 2 of 2. It can be resumed",
        ),
        (
            {"status": "failed", "error": DataError("row 3 is damaged").as_dict()},
            "not complete: failed after step 2 of 2: row 3 is damaged.",
        ),
    ],
    ids=["a gate that fails", "a gate that holds", "a run to resume", "a failed run"],
)
def test_the_page_says_how_the_run_ended(folder: Path, cli: Callable, changes: dict[str, Any], said: str) -> None:
    change(folder, **changes)
    ran = cli("report", folder, "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    Draft202012Validator(output_schema("report")).validate(answer)
    assert sorted(Path(path).name for path in answer["files"]) == ["report.html", "report.md"]
    page = (folder / "report.html").read_text()
    assert said in unescape(page)
    cells = unescape(re.sub(r"\s*<[^<>]+>\s*", "|", page))
    assert bool(re.search(r"\|eval_loss\|+<= 1\|+2.5000\|+(holds|FAILED)\|", cells)) == ("gates" in changes)


def test_curves_are_drawn_as_svg(folder: Path, cli: Callable) -> None:
    picture = folder.parent / "curves.svg"
    assert cli("runs", folder.parent, "--plot", picture).code == 0
    assert ElementTree.parse(picture).getroot().tag.endswith("}svg")


def test_runs_are_listed_without_torch(folder: Path) -> None:
    code = f"from peftcli.cli.app import main; import sys; code = main(['runs', {str(folder.parent)!r}]); " + (
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser_it_can_be_read(
    folder: Path, cli: Callable, look: Callable, tmp_path: Path, scheme: str, width: int
) -> None:
    assert cli("report", folder).code == 0
    shutil.copy(folder / "report.html", tmp_path / "page.html")
    found = look(
        "found.wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;"
        'found.contrast = Math.min(...all("h1, h2, p, td, th, a, pre, summary").map(contrast));'
        "const drawn = (name) => (each) => {"
        "  const paint = rgb(frame.contentWindow.getComputedStyle(each)[name]);"
        "  const [one, other] = [light(paint), light(behind(each))];"
        "  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);"
        "};"
        'found.text = Math.min(...all("svg text").map(drawn("fill")));'
        'found.curves = Math.min(...all(".curve").map(drawn("stroke")), ...all(".dot").map(drawn("fill"))); tell();',
        scheme,
        width,
    )
    assert found["wide"] <= 0
    assert min(found["contrast"], found["text"]) >= 4.5
    assert found["curves"] >= 3


def test_sample_pictures_of_a_folder_are_shown_if_they_can_be_read(trained: trainkit.Trained, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    (folder / "samples").mkdir()
    for step in range(20):
        image.new("RGB", (400, 300), (step, 0, 0)).save(folder / f"samples/step-{step:06}-0.png")
    (folder / "samples/step-000001-1.png").write_bytes(b"no picture")
    (folder / "samples/step-000001-2.png").symlink_to("/dev/zero")
    page = render([read_run_files(folder)])[".html"].decode()
    assert re.findall(r'alt="Sample 0, step (\d+)"', page) == ["0", "4", "8", "11", "15", "19"]
    assert "Sample 1" not in page
    assert "Sample 2" not in page
    assert len(page) < 100_000 + len(render([read_run_files(trained.folder)])[".html"])
