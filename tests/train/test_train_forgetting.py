from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
import transformers
from classifierkit import classifier_base, write_classifier_recipe
from trainkit import PRODUCT, read_run, run_recipe, tokenizer, write_recipe, write_rows

from peftcli.adapters.proof import forgetting
from peftcli.cli.app import main
from peftcli.cli.progress import summary
from peftcli.errors import DataError, GateFailed, PeftcliError, RecipeError, UsageError
from peftcli.recipe import load_recipe
from peftcli.train import compare
from peftcli.train import forgetting as of_run
from peftcli.train.evaluate_adapter import measure
from peftcli.train.gates import raise_failed_gates

GATE = "gates.forgetting=<= 0.05"
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
    classifier, evaluates = write_classifier_recipe(tmp_path / "classes"), ("training.eval_strategy=epoch",)
    uncompared = (*evaluates, "training.compare_with_base=false")
    with pytest.raises(RecipeError, match=r"gates.forgetting: needs the measure, but training.compare_with_base is"):
        load_recipe(classifier, [GATE, *uncompared])
    with pytest.raises(RecipeError, match=r"gates.forgetting: needs evaluation data"):
        load_recipe(classifier, [GATE, *evaluates, "dataset.eval=null"])
    with pytest.raises(UsageError, match=r"gates.forgetting: .* has no trained head for the task: it guesses"):
        run_recipe(classifier, GATE, *evaluates)
    classifier.write_text(classifier.read_text().replace("task:", "# task:"))
    with pytest.raises(UsageError, match=r"gates.forgetting: needs the measure, but training.compare_with_base is"):
        run_recipe(classifier, GATE, *uncompared)
    with pytest.raises(UsageError, match=r"gates.forgetting: compares evaluation rows, which the recipe does not have"):
        run_recipe(classifier, GATE, "dataset.eval=null")
    numbers = [{"text": f"sun {at}", "label": at / 7} for at in range(12)]
    data = write_rows(tmp_path / "numbers.jsonl", numbers)
    with pytest.raises(UsageError, match=r"gates.forgetting: compares rows that are right or wrong, and an answer of"):
        run_recipe(classifier, GATE, *evaluates, f"dataset.train={data}", f"dataset.eval={data}")


@pytest.mark.parametrize(
    ("taught", "asked", "lost"),
    [("good", "good", 0.0), ("bad", "good", 1.0), ("good", "bad", "the base model has no row right")],
)
def test_rows_that_the_base_model_had_right_are_counted(
    tmp_path: Path,
    taught: str,
    asked: str,
    lost: float | str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base model calls every row good. What it is taught of them, and what they are, it keeps or loses."""
    monkeypatch.setattr(compare, "_DRAW_SECONDS", 0.1)
    folder, rows = tmp_path / "base", [{"text": f"sun tea {at}", "label": asked} for at in range(6)]
    rows.append({"text": "winter stone", "label": "bad"})  # which the base model has wrong
    classes = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(classifier_base("bert"), **classes)
    base.classifier.weight.data.zero_()
    base.classifier.bias.data.copy_(torch.tensor([0.1, -0.1]))
    base.save_pretrained(folder)
    tokenizer(chat=False).save_pretrained(folder)
    recipe = write_classifier_recipe(tmp_path / "run", labels="[good, bad]")
    held_out = write_rows(tmp_path / "eval.jsonl", rows)
    train = write_rows(tmp_path / "train.jsonl", [row | {"label": taught} for row in rows])
    settings = [
        f"base_model={folder}", f"dataset.eval={held_out}", f"dataset.train={train}", "training.learning_rate=0.1",
        "method.modules_to_save=[classifier]", "training.eval_strategy=epoch", "gates.forgetting=<= 0.05",
    ]  # fmt: skip
    done = run_recipe(recipe, *settings)
    (gate,) = done.run["gates"]
    if isinstance(lost, str):
        assert gate["reason"].startswith(f"not measured: {lost}")
    else:
        assert gate["value"] == lost
    assert gate["passed"] == (lost == 0.0)
    assert main(["evaluate", str(done.folder), *settings, "--json"]) == done.run["exit_code"]
    assert json.loads(capsys.readouterr().out)["gates"] == [gate]
    report, card = ((done.folder / name).read_text() for name in ("report.md", "README.md"))
    assert "forgetting | \\<= 0.05" in report
    assert ("rows that the base model had right, this adapter has" in card) == isinstance(lost, float)


def test_the_report_for_a_ci_server_has_the_gate(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = recipe.parent / "report.xml"
    arguments = [str(recipe), "gates.forgetting=<= -9", "--junit", str(report), "--json", "--quiet"]
    assert main(["train", *arguments]) == GateFailed.exit_code
    assert json.loads(capsys.readouterr().out)["forgetting"]["texts"] == 24
    assert 'name="forgetting &lt;= -9"' in report.read_text()
