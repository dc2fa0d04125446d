"""``peftcli evaluate`` with tasks of lm-eval, and of a run's folder."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import pytest
import trainkit
from jsonschema import Draft202012Validator
from trainkit import PAIRS, run_recipe, write_recipe, write_rows

from peftcli.adapters.generate import load_generator
from peftcli.output_schemas import output_schema
from peftcli.tasks.text.generation import GenerationSettings
from peftcli.tasks.text.log_probability import score_continuations

TASK = """\
task: spoken
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs: {{until: ["{until}"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return run_recipe(write_recipe(tmp_path), trainkit.PROMPT_TUNING, "training.learning_rate=0.1").folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    pairs = [{"prompt": question, "completion": answer} for question, answer in PAIRS[:6]]
    return write_rows(tmp_path / "pairs.jsonl", pairs)


def test_without_the_package_the_extra_is_named(cli: Callable, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda each, *more: None if each == "lm_eval" else find(each, *more)
    )
    ran = cli("evaluate", adapter, "--lm-eval", "hellaswag")
    assert (ran.code, "pip install 'peftcli[lm-eval]'" in ran.err) == (2, True)


def test_a_runs_folder_is_measured_by_its_own_recipe(cli: Callable, tmp_path: Path) -> None:
    done = run_recipe(write_recipe(tmp_path), "training.max_steps=2", "training.eval_strategy=epoch")
    trainkit.reset_accelerate()
    ran = cli("evaluate", done.folder, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["eval"]["last"] == pytest.approx(done.run["eval"]["last"], rel=1e-6)
    (done.folder / "recipe.yaml").unlink()
    ran = cli("evaluate", done.folder)
    assert (ran.code, "has no recipe.yaml" in ran.err) == (2, True)
    assert cli("evaluate", done.folder, "--limit", 3).code == 2


def test_rows_of_ones_own_give_the_log_probabilities_of_the_model(cli: Callable, adapter: Path, rows: Path) -> None:
    pytest.importorskip("lm_eval")
    ran = cli("evaluate", adapter, "--lm-eval", rows, "--json")
    assert ran.code == 0, ran.err
    measured = json.loads(ran.out)
    Draft202012Validator(output_schema("evaluate")).validate(measured)
    found = measured["tasks"]["pairs"]["metrics"]["log_probability"]
    mine = {side: _by_hand(adapter, with_adapter=side == "adapter") for side in ("base", "adapter")}
    for side, values in mine.items():
        assert found[side] == pytest.approx(fmean(values), abs=1e-5)
        assert found[f"{side}_stderr"] == pytest.approx(stdev(values) / math.sqrt(len(values)), rel=1e-4)
    change = [after - before for before, after in zip(mine["base"], mine["adapter"], strict=True)]
    assert abs(found["difference"]) > 0.01
    assert found["difference"] == pytest.approx(fmean(change), abs=1e-5)
    assert found["difference_stderr"] == pytest.approx(stdev(change) / math.sqrt(len(change)), rel=1e-4)
    kept = json.loads((adapter / "lm_eval.json").read_text())["tasks"]["pairs"]
    assert kept["metrics"] == measured["tasks"]["pairs"]["metrics"]


def _by_hand(adapter: Path, *, with_adapter: bool) -> list[float]:
    """The log-probability of each pair, one conversation at a time."""
    loaded = load_generator(str(adapter), with_adapter=with_adapter)
    found = []
    for question, answer in PAIRS[:6]:
        before = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids, whole = (loaded.tokenizer.encode(text, add_special_tokens=False) for text in (before, before + answer))
        (scored,) = score_continuations(loaded.model, [(ids, whole[len(ids) :])], 0)
        found.append(scored.log_probability)
    return found


def test_a_task_file_and_choices_run_in_one_call(cli: Callable, adapter: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    task = tmp_path / "spoken.yaml"
    (said,) = load_generator(str(adapter)).generate([PAIRS[0][0]], GenerationSettings(max_new_tokens=8))
    write_rows(rows, [{"prompt": PAIRS[0][0], "completion": said.text[:3]}, {"prompt": "x", "completion": "no"}])
    task.write_text(TASK.format(rows=rows, until=said.text[3:5].replace('"', '\\"')))
    quiz = [{"prompt": "Which?", "choices": ["a", "b"], "answer": answer} for answer in (0, "b")]
    choices = write_rows(tmp_path / "quiz.jsonl", quiz)
    ran = cli("evaluate", adapter, "--lm-eval", f"{task},{choices}", "--limit", 2, "--batch-size", 3)
    assert ran.code == 0, ran.err
    assert "spoken  exact_match" in ran.out
    assert "quiz    acc" in ran.out
    record = json.loads((adapter / "lm_eval.json").read_text())["tasks"]
    assert record["spoken"]["metrics"]["exact_match"]["adapter"] == 0.5
    assert (record["spoken"]["limit"], record["quiz"]["samples"]) == (2, 2)


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("arc_esy", None, 2, "closest: arc_easy"),
        ("code.yaml", "task: t\nprocess_docs: !function utils.run\n", 3, "no code"),
        ("part.yaml", "task: t\ninclude: other.yaml\n", 3, "not a task file"),
        ("gone.yaml", "task: t\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n", 3, "cannot run"),
        ("none.jsonl", None, 3, "no such file"),
        ("odd.jsonl", '{"prompt": "x"}\n', 3, "odd.jsonl:1: completion: must be a text"),
        ("wrong.jsonl", '{"prompt": "x", "choices": ["a", "b"], "answer": "c"}\n', 3, "is not one of the choices"),
    ],
)
def test_what_cannot_be_measured_is_one_error(
    cli: Callable, adapter: Path, tmp_path: Path, name: str, content: str | None, code: int, message: str
) -> None:
    pytest.importorskip("lm_eval")
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    ran = cli("evaluate", adapter, "--lm-eval", path if "." in name else name)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) <= 6
    assert not (adapter / "lm_eval.json").exists()
