from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trainkit
from classifierkit import write_classifier_recipe
from trainkit import PRODUCT, read_run, run_recipe, write_recipe

from peftcli.adapters.proof import forgetting
from peftcli.cli.app import main
from peftcli.cli.progress import summary
from peftcli.errors import DataError, GateFailed, PeftcliError, RecipeError, UsageError
from peftcli.recipe import load_recipe
from peftcli.train import forgetting as of_run
from peftcli.train.evaluate_adapter import measure
from peftcli.train.gates import raise_failed_gates

TRUE, FALSE = ("training.measure_forgetting=true",), ("training.measure_forgetting=false",)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    texts = forgetting.shipped_texts()[:24]
    monkeypatch.setattr(forgetting, "shipped_texts", lambda: texts)
    return write_recipe(tmp_path)


def test_it_changes_neither_adapter_nor_metrics(recipe: Path) -> None:
    """With the best adapter put back in its place, and dropout whose random numbers nothing may draw."""
    runs = {
        each: run_recipe(recipe, *trainkit.FULL, *each, f"training.output_dir={recipe.parent}/{len(each[0])}")
        for each in (TRUE, FALSE)
    }
    for name in PRODUCT:
        measured, plain = ((runs[each].folder / name).read_bytes() for each in (TRUE, FALSE))
        assert measured == plain, name
    assert runs[TRUE].run["forgetting"]["texts"] == 24
    assert "forgetting" not in runs[FALSE].run


def test_a_run_that_is_killed_while_it_measures_ends_the_same(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (*TRUE, "training.save_strategy=epoch")
    whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole")

    def kill(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(of_run, "measure_forgetting", kill)
        with pytest.raises(PeftcliError, match="KeyboardInterrupt"):
            run_recipe(recipe, *settings)
    assert read_run(recipe.parent / "out")["status"] != "complete"
    resumed = run_recipe(recipe, *settings)
    assert resumed.weights == whole.weights
    assert resumed.run["attempts"][-1]["from_step"] == 8
    seconds = {"seconds": 0.0}
    assert resumed.run["forgetting"] | seconds == whole.run["forgetting"] | seconds


@pytest.mark.parametrize(("bound", "passes"), [("<= 9", True), ("<= -9", False)])
def test_a_gate_has_it_measured_and_bounds_it(recipe: Path, bound: str, passes: bool) -> None:
    settings = (f"gates.forgetting={bound}",)
    done = run_recipe(recipe, *settings)
    found = done.run["forgetting"]
    (gate,) = done.run["gates"]
    assert gate == {"metric": "forgetting", "gate": bound, "value": found["loss"], "passed": passes}
    assert done.run["exit_code"] == (0 if passes else GateFailed.exit_code)
    assert "  forgotten   loss " in summary(done.run, "out")
    evaluated = measure(load_recipe(recipe, [*settings, "training.eval_strategy=epoch"]), str(done.folder))
    assert evaluated["forgetting"]["loss"] == pytest.approx(found["loss"], abs=1e-4)
    assert evaluated["exit_code"] == done.run["exit_code"]
    base = measure(load_recipe(recipe, [*settings, "training.eval_strategy=epoch"]), None)
    assert (base["gates"][0]["value"], "forgetting" in base) == (0.0, False)


def test_it_is_of_the_adapter_that_is_kept(recipe: Path) -> None:
    """The first steps learn, and the last ones ruin the model."""
    more = ("training.load_best_model_at_end=true", "training.eval_strategy=steps", "training.eval_steps=1")
    rate = ("training.learning_rate=0.5", "training.lr_scheduler_type=constant_with_warmup", "training.warmup_steps=7")
    best = run_recipe(recipe, *TRUE, *more, *rate)
    assert best.run["eval"]["best_step"] < 8
    settings = [*more, *rate, "gates.forgetting=<= 9"]
    evaluated = measure(load_recipe(recipe, settings), str(best.folder))
    assert best.run["forgetting"]["loss"] == pytest.approx(evaluated["forgetting"]["loss"], abs=1e-4)
    last = run_recipe(recipe, *TRUE, *rate, f"training.output_dir={recipe.parent}/last")
    assert abs(last.run["forgetting"]["loss"] - best.run["forgetting"]["loss"]) > 0.01


def test_auto_says_why_it_measures_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_recipe(recipe)
    assert done.run["forgetting"]["skipped"].endswith("too short to spend a tenth on it")
    assert "  forgotten   not measured: the run took " in summary(done.run, "out")

    def fail(*given: Any, **options: Any) -> Any:
        raise DataError("has no tokens")

    monkeypatch.setattr(of_run, "measure_forgetting", fail)
    done = run_recipe(recipe, "gates.forgetting=<= 0.05", f"training.output_dir={recipe.parent}/failed")
    assert done.run["forgetting"] == {"skipped": "has no tokens"}
    with pytest.raises(GateFailed, match="forgetting: not measured: has no tokens"):
        raise_failed_gates(done.run["gates"])


def test_auto_measures_within_a_tenth_of_the_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_run, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(of_run, "_SHARE", 1000.0)
    assert run_recipe(recipe).run["forgetting"]["texts"] == 24


def test_a_recipe_that_cannot_be_measured_is_refused(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"gates.forgetting: needs the measure, but training.measure_forgetting is"):
        load_recipe(recipe, ["gates.forgetting=<= 0.05", *FALSE])
    with pytest.raises(RecipeError, match=r"gates.forgetting: expected an operator"):
        load_recipe(recipe, ["gates.forgetting=0.05"])
    classifier = write_classifier_recipe(tmp_path / "classes")
    with pytest.raises(RecipeError, match=r"gates.forgetting: is measured for tasks that write text: causal_lm, seq2"):
        load_recipe(classifier, ["gates.forgetting=<= 0.05"])
    classifier.write_text(classifier.read_text().replace("task:", "# task:"))
    with pytest.raises(UsageError, match=r"gates.forgetting: is measured for tasks that write text"):
        run_recipe(classifier, "gates.forgetting=<= 0.05")


def test_the_report_for_a_ci_server_has_the_gate(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = recipe.parent / "report.xml"
    arguments = [str(recipe), "gates.forgetting=<= -9", "--junit", str(report), "--json", "--quiet"]
    assert main(["train", *arguments]) == GateFailed.exit_code
    assert json.loads(capsys.readouterr().out)["forgetting"]["texts"] == 24
    assert 'name="forgetting &lt;= -9"' in report.read_text()
