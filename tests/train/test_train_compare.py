from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trainkit
from trainkit import run_recipe, write_recipe

from peftcli.adapters.proof.bootstrap import paired_intervals
from peftcli.errors import PeftcliError, RecipeError, UsageError
from peftcli.tasks.parts import means
from peftcli.train import finish

COMPARES = ("training.compare_with_base=true", "training.eval_strategy=epoch")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_recipe(tmp_path)
    trainkit.write_rows(tmp_path / "eval.jsonl", trainkit.MESSAGES)
    return path


def _product(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "metrics.jsonl")]


def test_it_changes_nothing_of_the_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in it, a run ends with the same adapter when it is resumed; one too short for it says how to have it."""
    folder = recipe.parent
    without = run_recipe(recipe, "training.eval_strategy=epoch", f"training.output_dir={folder}/without")
    said = without.run["comparison"]["skipped"]
    assert "a tenth of the run" in said
    assert "training.compare_with_base=true" in said
    settings = (*COMPARES, "training.save_strategy=epoch", "training.load_best_model_at_end=true")
    whole = run_recipe(recipe, *settings, f"training.output_dir={folder}/whole")
    assert _product(whole.folder)[1] == _product(without.folder)[1]
    assert len(whole.run["comparison"]["outputs"]) == min(5, whole.run["comparison"]["rows"])

    def killed(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finish, "compare_run", killed)
        with pytest.raises(PeftcliError):
            run_recipe(recipe, *settings)
    resumed = run_recipe(recipe, *settings)
    assert _product(resumed.folder) == _product(whole.folder)
    assert resumed.run["comparison"]["metrics"] == whole.run["comparison"]["metrics"]


def test_a_gate_against_an_earlier_run(recipe: Path) -> None:
    folder = recipe.parent
    last = run_recipe(recipe, *COMPARES, f"training.output_dir={folder}/last").folder / "run.json"

    def gate(bound: str) -> str:
        return f"gates.max_regression={{against: {last}, eval_loss: {bound}}}"

    same, worse = ("training.eval_strategy=epoch", f"training.output_dir={folder}/same"), "training.learning_rate=1e-9"
    (found,) = run_recipe(recipe, *same, gate("0%")).run["gates"]
    assert found == {
        "metric": "eval_loss",
        "gate": f"at most 0% worse than {last}",
        "value": found["value"],
        "passed": True,
    }
    other = ("training.eval_strategy=epoch", worse, f"training.output_dir={folder}/worse")
    failed = run_recipe(recipe, *other, gate("0.01"))
    assert failed.run["exit_code"] == 12
    assert "all of the interval is beyond 0.01" in failed.run["gates"][0]["reason"]
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    trainkit.write_rows(folder / "fewer.jsonl", rows[:-1])
    refused = {
        f"dataset.eval={folder}/fewer.jsonl": "evaluation rows",
        "gates.max_regression.eval_perplexity=1%": None,
        "gates.max_regression.eval_bleu=1%": "not eval_bleu",
    }
    for setting, said in refused.items():
        settings = ("training.eval_strategy=epoch", f"training.output_dir={folder}/refused", gate("2%"), setting)
        if said is None:
            assert len(run_recipe(recipe, *settings).run["gates"]) == 2
            continue
        with pytest.raises(UsageError, match=said):
            run_recipe(recipe, *settings, f"training.output_dir={folder}/other")
    (last.parent / "eval_rows.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be compared with"):
        run_recipe(recipe, *other, gate("2%"), "training.output_dir=" + f"{folder}/none")
    last.unlink()
    with pytest.raises(RecipeError, match="no such file"):
        run_recipe(recipe, gate("2%"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gates.max_regression=2%", "expected an earlier run"),
        ("gates.max_regression={against: run.json}", "expected an earlier run"),
        ("gates.max_regression={against: run.json, eval_loss: low}", "a share such as 2%"),
        ("gates.eval_loss={against: run.json}", "max_regression has one"),
    ],
)
def test_bad_gates(recipe: Path, given: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        run_recipe(recipe, given)


def test_rows_that_belong_together_are_drawn_together() -> None:
    """Each row twice says no more than each row once; taken as rows of their own, the interval is too narrow."""
    random = np.random.default_rng(0)
    base, other = random.normal(size=(2, 60))
    once = paired_intervals(means(np.ones(60), loss=base), means(np.ones(60), loss=other))["loss"]
    twice = [means(np.ones(120), loss=np.repeat(each, 2)) for each in (base, other)]
    together = paired_intervals(*twice, np.repeat(np.arange(60), 2))["loss"]
    assert (together.low, together.high) == pytest.approx((once.low, once.high))
    apart = paired_intervals(*twice)["loss"]
    assert apart.high - apart.low < 0.8 * (once.high - once.low)
