from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import junitparser
import pytest
import trainkit
import typer
from trainkit import write_recipe

from peftcli.cli import console
from peftcli.cli.junit import junit_report, write_junit
from peftcli.errors import DataError, GateFailed, Problem, RecipeError, StorageError, UsageError
from peftcli.system.outputs import StdoutClosed

PASSED = {"metric": "eval_loss", "gate": "<= 1.2", "value": 1.1, "passed": True}
FAILED = {"metric": "eval_token_accuracy", "gate": ">= 0.5", "value": 0.25, "passed": False}
MISSING = {"metric": "eval_bleu", "gate": "> 1", "value": None, "passed": False}
ERROR = {"kind": "DataError", "message": "no field", "file": "a.jsonl", "line": 3, "key": "dataset", "hint": "Mend it."}


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., Path]:
    """Writes a report."""

    def report(**changes: Any) -> Path:
        given = {"suite": "recipe", "gates": [], "metrics": {}, "seconds": 1.5, "error": None, **changes}
        write_junit(tmp_path / "new/report.xml", **given)
        return tmp_path / "new/report.xml"

    return report


def cases(path: Path) -> dict[str, str]:
    """What a CI server reads: test case -> passed, or what went wrong."""
    suites = junitparser.JUnitXml.fromfile(str(path))
    [suite] = suites
    found = {}
    for case in suite:
        assert case.classname == suite.name
        found[case.name] = ", ".join(f"{type(one).__name__} {one.type}: {one.message}" for one in case.result)
    assert suite.tests == len(found)
    assert suite.failures == sum("Failure" in text for text in found.values())
    assert suite.errors == sum("Error " in text for text in found.values())
    return {name: text or "passed" for name, text in found.items()}


def assert_shape(path: Path) -> None:
    """What the schema of Ant's reports wants, which is the stricter one; Jenkins's takes the same."""
    root = ElementTree.parse(path).getroot()
    assert (root.tag, root.attrib, [child.tag for child in root]) == ("testsuites", {}, ["testsuite"])
    suite = root[0]
    wanted = {"name", "timestamp", "hostname", "tests", "failures", "errors", "skipped", "time", "package", "id"}
    assert suite.attrib.keys() == wanted
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
    assert all(suite.attrib[name].isdecimal() for name in ("tests", "failures", "errors", "skipped", "id"))
    tags = [child.tag for child in suite]
    assert tags == ["properties", *["testcase"] * int(suite.attrib["tests"]), "system-out", "system-err"]
    assert all(child.attrib.keys() == {"name", "value"} for child in suite[0])
    for case in suite.iter("testcase"):
        assert case.attrib.keys() == {"name", "classname", "time"}
        assert re.fullmatch(r"\d+\.\d{3}", case.attrib["time"])
        assert len(case) <= 1
        assert all(child.tag in ("failure", "error") and child.attrib.keys() == {"message", "type"} for child in case)


def test_a_case_a_gate(report: Callable[..., Path]) -> None:
    path = report(gates=[PASSED, FAILED, MISSING], metrics={"eval_loss": 1.1, "device": "cpu"})
    assert_shape(path)
    assert cases(path) == {
        "eval_loss <= 1.2": "passed",
        "eval_token_accuracy >= 0.5": "Failure GateFailed: eval_token_accuracy is 0.25, expected >= 0.5",
        "eval_bleu > 1": "Failure GateFailed: eval_bleu was not measured, or is not finite, expected > 1",
    }
    [suite] = junitparser.JUnitXml.fromfile(str(path))
    assert {one.name: one.value for one in suite.properties()} == {"eval_loss": "1.1", "device": "cpu"}
    assert (suite.name, suite.time) == ("recipe", 1.5)


def test_a_run_without_gates(report: Callable[..., Path]) -> None:
    path = report(seconds=None)
    assert_shape(path)
    assert cases(path) == {"run": "passed"}


def test_a_run_that_failed(report: Callable[..., Path]) -> None:
    path = report(error=ERROR, gates=[PASSED])
    assert_shape(path)
    assert cases(path) == {"eval_loss <= 1.2": "passed", "run": "Error DataError: no field"}
    text = ElementTree.parse(path).getroot().findtext(".//error")
    assert text == "a.jsonl:3: dataset: no field\nMend it."


def test_every_mistake_of_a_recipe(report: Callable[..., Path]) -> None:
    mistakes = [Problem("unknown key", "r.yaml", 3, 1, "training.sead", "seed"), Problem("no such file", "r.yaml", 4)]
    path = report(error=RecipeError(mistakes).as_dict())
    assert cases(path) == {"run": "Error RecipeError: unknown key"}
    text = ElementTree.parse(path).getroot().findtext(".//error")
    assert text == "r.yaml:3:1: training.sead: unknown key; did you mean 'seed'?\nr.yaml:4: no such file"


def test_whatever_a_name_holds(report: Callable[..., Path]) -> None:
    odd = "a\x00b\x1b[31m\ud800\ufffe <&\"'> é 中 👩 ]]>\t\nend"
    gate = {**FAILED, "metric": odd}
    path = report(suite=odd, gates=[gate], metrics={odd: odd}, error={**ERROR, "message": odd})
    assert_shape(path)
    assert path.read_bytes().isascii()
    [suite] = junitparser.JUnitXml.fromfile(str(path))
    shown = "a\\x00b\\x1b[31m\\ud800\\ufffe <&\"'> é 中 👩 ]]>\t\nend"
    assert suite.name == shown
    assert [one.value for one in suite.properties()] == [shown]
    assert [case.name for case in suite] == [f"{shown} >= 0.5", "run"]


def test_it_holds_no_secret(report: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "correct-horse-battery-9"
    monkeypatch.setenv("TRACKER_API_TOKEN", secret)
    error = {**ERROR, "message": f"no {secret}", "hint": f"not {secret}"}
    path = report(suite=secret, gates=[{**FAILED, "metric": secret}], metrics={secret: secret}, error=error)
    assert secret not in path.read_text()
    assert "no ***" in cases(path)["run"]


def test_it_replaces_an_older_one_whole_or_not_at_all(
    report: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = report(gates=[PASSED])
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        report(gates=[FAILED])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.xml"]
    report(gates=[FAILED])
    assert path.read_bytes() != before


def test_a_pipe_and_a_link_stay_what_they_are(report: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    path = tmp_path / "new/report.xml"
    path.symlink_to(tmp_path / "real.xml")
    report()
    assert path.is_symlink()
    assert cases(tmp_path / "real.xml") == {"run": "passed"}
    path.unlink()
    os.mkfifo(path)
    with ThreadPoolExecutor() as pool:
        content = pool.submit(path.read_bytes)
        report()
    assert path.is_fifo()
    assert content.result().startswith(b"<?xml")


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_junit(tmp_path, suite="a", gates=[], metrics={}, seconds=None, error=None)
    assert caught.value.file == str(tmp_path)


# --- around a run ---------------------------------------------------------------------------------------------------


def ends(path: Path | None, error: Exception, **run: Any) -> None:
    """A run that ends with ``error``, which must come through."""

    def body() -> None:
        with junit_report(path, Path("configs/mine.yaml")) as found:
            found |= run
            raise error

    with pytest.raises(type(error)) as caught:
        body()
    assert caught.value is error


def test_an_error_inside_goes_into_the_report_and_on(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    ends(path, DataError("no field", file="a.jsonl", line=3), gates=[PASSED], eval={"kept": {"eval_loss": 1.1}})
    assert cases(path) == {"eval_loss <= 1.2": "passed", "run": "Error DataError: no field"}
    [suite] = junitparser.JUnitXml.fromfile(str(path))
    assert suite.name == "mine"


def test_a_gate_that_fails_inside_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    ends(path, GateFailed("low"), gates=[FAILED])
    assert list(cases(path)) == ["eval_token_accuracy >= 0.5"]


def test_a_bug_is_an_error_too(tmp_path: Path) -> None:
    ends(tmp_path / "r.xml", ZeroDivisionError("1 / 0"))
    assert cases(tmp_path / "r.xml") == {"run": "Error PeftcliError: ZeroDivisionError: 1 / 0"}


def test_an_error_of_the_operating_system_is_one_of_ours(tmp_path: Path) -> None:
    ends(tmp_path / "r.xml", OSError(28, "No space left on device"))
    assert cases(tmp_path / "r.xml") == {"run": "Error StorageError: No space left on device"}


def test_of_processes_that_were_launched_those_write_it(tmp_path: Path) -> None:
    ends(tmp_path / "r.xml", typer.Exit(3))
    assert not (tmp_path / "r.xml").exists()


def test_a_report_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.xml"

    def body() -> None:
        with junit_report(path, Path("mine.yaml")):
            path.mkdir()
            raise DataError("no field")

    with pytest.raises(DataError):
        body()
    assert capsys.readouterr().err.startswith(f"warning: {path}: is a folder")


def test_a_path_that_takes_no_report_is_told_before_the_run(cli: Callable, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "file").touch()
    for path, code in ((tmp_path, 2), (tmp_path / "file/new/r.xml", 7), ("/proc/r.xml", 7)):
        ran = cli("train", recipe, "--junit", path)
        assert (ran.code, ran.err.count("r.xml") or ran.err.count("is a folder")) == (code, 1)
        assert not (tmp_path / "out").exists()


def test_no_path_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with junit_report(None, Path("mine.yaml")):
        pass
    ends(None, DataError("no field"))
    assert list(tmp_path.iterdir()) == []


def unread(_: str) -> None:
    raise StdoutClosed


# --- evaluate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "code"), [("<= 100", 0), ("<= 0.01", 12)])
def test_evaluate(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: str, code: int) -> None:
    path = tmp_path / "reports/junit.xml"
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ("training.eval_strategy=epoch", f"gates.eval_loss={gate}")
    ran = cli("evaluate", write_recipe(tmp_path), *settings, "--junit=~/reports/junit.xml")
    assert ran.code == code, ran.err
    assert_shape(path)
    [(name, said)] = cases(path).items()
    assert name == f"eval_loss {gate}"
    assert said.startswith("passed" if code == 0 else "Failure GateFailed: eval_loss is ")
    [suite] = junitparser.JUnitXml.fromfile(str(path))
    facts = {one.name: one.value for one in suite.properties()}
    assert f"eval_loss {facts['eval_loss']}" in ran.out
    assert facts["device"] == "cpu"
    assert facts["versions.torch"]
    assert suite.time > 0
    monkeypatch.setattr(console, "out", unread)
    assert cli("evaluate", tmp_path / "recipe.yaml", *settings, f"--junit={path}").code == (code or 141)
    assert list(cases(path)) == [name]


@pytest.mark.parametrize(
    ("change", "code", "kind"),
    [("training.sead=1", 2, "RecipeError"), ("base_model=.", 4, "ModelError")],
)
def test_evaluate_that_fails(cli: Callable, tmp_path: Path, change: str, code: int, kind: str) -> None:
    ran = cli("evaluate", write_recipe(tmp_path), change, "--junit", tmp_path / "junit.xml")
    assert ran.code == code
    assert cases(tmp_path / "junit.xml")["run"].startswith(f"Error {kind}: ")


def test_evaluate_where_the_report_cannot_be_written(cli: Callable, tmp_path: Path) -> None:
    ran = cli("evaluate", write_recipe(tmp_path), "--junit", trainkit.base_folder())
    assert ran.code == 2
    assert str(trainkit.base_folder()) in ran.err


def test_of_several_processes_one_answers(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    settings = ("training.eval_strategy=epoch", "gates.eval_loss=<= 0.01")
    ran = cli("evaluate", write_recipe(tmp_path), *settings, "--junit", tmp_path / "junit.xml")
    assert (ran.code, ran.out) == (0, "")
    assert not (tmp_path / "junit.xml").exists()


# --- train ----------------------------------------------------------------------------------------------------------

MEASURED = "training.eval_strategy=epoch"


@pytest.mark.parametrize(("gate", "code"), [("<= 100", 0), ("<= 0.01", 12)])
def test_train(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: str, code: int) -> None:
    path, recipe = tmp_path / "junit.xml", write_recipe(tmp_path)
    trainkit.reset_accelerate()
    for _ in range(2):  # trained, and complete already
        ran = cli("train", recipe, MEASURED, f"gates.eval_loss={gate}", "--junit", path)
        assert ran.code == code, ran.err
        assert_shape(path)
        [(name, said)] = cases(path).items()
        assert name == f"eval_loss {gate}"
        assert said.startswith("passed" if code == 0 else "Failure GateFailed: eval_loss is ")
        path.rename(tmp_path / "before.xml")
    [suite] = junitparser.JUnitXml.fromfile(str(tmp_path / "before.xml"))
    facts = {one.name: one.value for one in suite.properties()}
    run = trainkit.read_run(tmp_path / "out")
    assert facts["eval_loss"] == f"{run['eval']['kept']['eval_loss']:.6g}"
    assert facts["recipe_sha256"] == run["recipe_sha256"]
    assert (facts["steps.done"], facts["parameters.trainable"]) == ("8", "3712")
    assert suite.time == pytest.approx(run["wall_seconds"], abs=1e-3)
    monkeypatch.setattr(console, "out", unread)
    assert cli("train", recipe, MEASURED, f"gates.eval_loss={gate}", "--junit", path).code == (code or 141)
    assert list(cases(path)) == [name]


def test_train_that_fails(cli: Callable, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "train.jsonl").write_text("{broken\n")
    assert cli("train", recipe, "--junit", tmp_path / "junit.xml").code == 3
    assert cases(tmp_path / "junit.xml")["run"].startswith("Error DataError: ")


def test_train_that_is_stopped(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    child = trainkit.Child(tmp_path, "train", recipe, "training.max_steps=100000", "--junit", tmp_path / "junit.xml")
    metrics = tmp_path / "out/metrics.jsonl"
    child.until(lambda: metrics.exists() and bool(metrics.read_text()))
    child.signal(signal.SIGUSR1)
    assert child.wait() == 75
    assert cases(tmp_path / "junit.xml")["run"].startswith("Error Interrupted: stopped after step ")


@pytest.mark.slow  # starts processes
def test_train_in_two_processes(tmp_path: Path) -> None:
    path, recipe = tmp_path / "junit.xml", write_recipe(tmp_path)
    words = ("train", recipe, "launch.num_processes=2", MEASURED, "--junit", path)
    assert trainkit.Child(tmp_path, *words, "gates.eval_loss=<= 0.01").wait() == 12
    assert list(cases(path)) == ["eval_loss <= 0.01"]
    assert trainkit.Child(tmp_path, *words, "method.target_modules=[q_porj]", "--overwrite").wait() == 4
    assert cases(path)["run"].startswith("Error NoMatchingPeftModuleError: ")
