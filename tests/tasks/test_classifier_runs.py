"""Runs of the classification tasks: what ``test_task_runs.py`` does not ask of every task."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifierkit import ROWS, classifier_base, write_classifier_recipe
from promises import settings_of, why_not
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from trainkit import Trained, base_folder, run_recipe, tokenizer, write_rows
from transformers import AutoModelForSequenceClassification

from peftcli.data.rows import Place, Row
from peftcli.errors import DataError
from peftcli.methods import METHODS
from peftcli.recipe import load_recipe
from peftcli.train.evaluate_adapter import measure

EVALUATES = ("training.max_steps=2", "training.eval_strategy=steps", "training.eval_steps=2")


def pictures(run: Trained) -> list[str]:
    held_out = Path(run.recipe.dataset.eval or "")
    return [str(path) for path in sorted(held_out.rglob("*.png"))[:3]]


def inputs(run: Trained, row: str) -> dict[str, torch.Tensor]:
    """What transformers makes of a text or a picture."""
    import transformers
    from PIL import Image

    base = run.recipe.base_model.name
    if row.endswith(".png"):
        processor = transformers.AutoImageProcessor.from_pretrained(run.folder, backend="pil")
        return dict(processor(Image.open(row).convert("RGB"), return_tensors="pt"))
    encoded = transformers.AutoTokenizer.from_pretrained(base)(row, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["vit", "resnet", "siglip2"])
def test_pictures_are_answered_as_transformers_and_peft_answer_them(tmp_path: Path, kind: str) -> None:
    import peft
    import transformers

    from peftcli.adapters.predict import load_predictor

    run = run_recipe(write_classifier_recipe(tmp_path, kind), "training.max_steps=2")
    base = transformers.AutoModelForImageClassification.from_pretrained(run.recipe.base_model.name, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, run.folder).eval()
    predictor = load_predictor(str(run.folder))
    rows = pictures(run)
    for row, answer in zip(rows, predictor.answer(predictor.rows(rows)), strict=True):
        with torch.no_grad():
            scores = model(**inputs(run, row)).logits[0].softmax(-1)
        assert answer["scores"] == pytest.approx(dict(zip(("blue", "red"), scores.tolist(), strict=True)), abs=1e-5)


@pytest.mark.parametrize("says", ["run.json", "task.json"])
def test_rows_are_answered_in_the_number_format_that_evaluation_used(tmp_path: Path, says: str) -> None:
    from peftcli.adapters.predict import load_predictor

    run = run_recipe(write_classifier_recipe(tmp_path), *EVALUATES, "training.bf16=true")
    if says == "task.json":  # an adapter from the hub
        (run.folder / "run.json").unlink()
    rows = ROWS[18:]

    def loss(**options: Any) -> float:
        predictor = load_predictor(str(run.folder), batch_size=3, **options)  # the batches of evaluation
        answers = predictor.answer([Row(dict(each), Place("eval.jsonl", at)) for at, each in enumerate(rows, 1)])
        scores = [answer["scores"][row["label"]] for answer, row in zip(answers, rows, strict=True)]
        return -sum(map(math.log, scores)) / len(scores)

    measured = run.run["eval"]["kept"]["eval_loss"]
    assert loss() == pytest.approx(measured, rel=1e-6)
    assert loss(dtype="float32") != pytest.approx(measured, rel=1e-5)


def test_virtual_tokens_leave_a_long_text_the_positions_that_remain(tmp_path: Path) -> None:
    from peftcli.adapters.predict import load_predictor

    path, long = write_classifier_recipe(tmp_path, "bert"), "sun " * 90  # 64 positions
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write(json.dumps({"text": long, "label": "bad"}) + "\n")
    run = run_recipe(path, "method={type: prompt_tuning}", "training.num_train_epochs=1", "training.max_steps=-1")
    assert run.run["data"]["truncated"] == 1
    predictor = load_predictor(str(run.folder))
    [answer] = predictor.answer(predictor.rows([long]))
    assert answer["label"] in ("good", "bad")


@pytest.mark.parametrize("kind", ["vit", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_head_for_as_many_other_labels_is_trained_and_said(tmp_path: Path, kind: str) -> None:
    import transformers

    path, base = write_classifier_recipe(tmp_path, kind), tmp_path / "base"
    auto = transformers.AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    own = ["blue", "red"] if kind == "vit" else ["ham", "spam"]
    for labels in (own, ["healthy", "rust"]):
        shutil.copytree(classifier_base(kind), base, dirs_exist_ok=True)
        names = dict(enumerate(labels))
        auto.from_pretrained(classifier_base(kind), id2label=names, label2id={}).save_pretrained(base)
        out = f"training.output_dir={tmp_path}/{labels[0]}"
        run = run_recipe(path, f"base_model={base}", "training.max_steps=1", out)
        said = run.warnings
        other = labels != own
        assert any("was made for other labels (healthy, rust), and is trained too" in text for text in said) is other
        saved = json.loads((run.folder / "adapter_config.json").read_text()).get("modules_to_save")
        assert bool(saved) is (other or kind == "bert")
    if kind == "vit":  # an adapter that was trained over the head as it was
        tensors = load_file(run.folder / "adapter_model.safetensors")
        kept = {name: value for name, value in tensors.items() if "classifier" not in name}
        save_file(kept, run.folder / "adapter_model.safetensors", {"format": "pt"})
        config = json.loads((run.folder / "adapter_config.json").read_text()) | {"modules_to_save": None}
        (run.folder / "adapter_config.json").write_text(json.dumps(config))
        assert measure(load_recipe(path, [f"base_model={base}"]), str(run.folder))["eval"]["last"]


def test_gates_are_applied(cli: Callable, tmp_path: Path) -> None:
    recipe = write_classifier_recipe(tmp_path)
    assert "eval_accuracy is" in cli("train", recipe, *EVALUATES, "gates.eval_accuracy=> 1", code=12)


def test_a_label_of_evaluation_that_training_lacks_stops_the_run(tmp_path: Path) -> None:
    recipe = write_classifier_recipe(tmp_path)
    write_rows(tmp_path / "eval.jsonl", [*ROWS[18:], {"text": "sun", "label": "ugly"}])
    with pytest.raises(DataError, match="'ugly' is not one of the classes: good, bad") as caught:
        run_recipe(recipe)
    assert (caught.value.file, caught.value.line) == (f"{tmp_path}/eval.jsonl", 7)


@pytest.mark.parametrize(
    ("rows", "settings", "metric"),
    [
        ([{"text": f"sun {n}", "label": [["a"], ["b", "a"], []][n % 3]} for n in range(12)], {}, "eval_micro_f1"),
        ([{"text": "sun " * n, "label": n + 0.5} for n in range(1, 13)], {}, "eval_pearson"),
        ([{"premise": "sun", "hypothesis": f"moon {n}", "label": n % 3} for n in range(12)], {}, "eval_matthews"),
    ],
    ids=["multi_label", "regression", "pairs"],
)
def test_other_labels_and_pairs_train(tmp_path: Path, rows: Any, settings: dict[str, Any], metric: str) -> None:
    recipe = write_classifier_recipe(tmp_path, **settings)
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    run = run_recipe(recipe, *EVALUATES)
    assert metric in run.run["eval"]["last"]


def test_a_single_score_is_compared_by_its_size(tmp_path: Path) -> None:
    from peftcli.adapters.predict import load_predictor

    recipe, told = write_classifier_recipe(tmp_path), list[str]()
    rows = [{"text": f"sun {n}", "label": n + 0.5} for n in range(32)]
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    run = run_recipe(recipe, "training.max_steps=1")
    asked = [Row(row, Place("a row", number)) for number, row in enumerate(rows)]
    load_predictor(str(run.folder), batch_size=1, merge_for=asked, tell=told.append)
    assert [text.partition(":")[0] for text in told] == ["merged in memory"]


@pytest.mark.slow
def test_numbers_have_more_digits_than_bfloat16(tmp_path: Path) -> None:
    """Near 2003 it has 2000 and 2008."""
    recipe = write_classifier_recipe(tmp_path)
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"sun {n}", "label": 2003.0} for n in range(4)])
    run = run_recipe(recipe, "training.max_steps=1")
    file = run.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: value + 2003 * name.endswith("classifier.bias") for name, value in tensors.items()}, file)
    ours = ["training.bf16=true", "training.eval_on_start=true", f"training.output_dir={tmp_path}/more"]
    more = run_recipe(recipe, *EVALUATES, *ours, f"training.init_adapter_from={run.folder}")
    alone = measure(load_recipe(recipe, ["training.bf16=true"]), str(run.folder))
    for found in (more.run["eval"]["first"], alone["eval"]["last"]):
        assert found["eval_mse"] < 4


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_an_encoder_decoder_trains_and_merges(cli: Callable, tmp_path: Path, kind: str) -> None:
    """Its head finds a row by its one token of the end, in what checks of the adapter feed too."""
    base, recipe = tmp_path / "base", write_classifier_recipe(tmp_path)
    shutil.copytree(base_folder(kind), base)
    reads = tokenizer()
    end = [(reads.eos_token, reads.eos_token_id)]
    reads.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0][0]}", special_tokens=end)
    reads.save_pretrained(base)
    cli("train", recipe, f"base_model={base}", "training.max_steps=1")
    cli("merge", tmp_path / "out", "--output", tmp_path / "merged")


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_auto_class_needs_no_number_of_labels(tmp_path: Path, kind: str) -> None:
    from peftcli import AutoPeftModelForSequenceClassification
    from peftcli.adapters.predict import load_predictor

    recipe = write_classifier_recipe(tmp_path, kind)
    rows = [{"text": f"{word} {n}", "label": word} for n in range(5) for word in ("sun", "moon", "tea")]
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    run = run_recipe(recipe, "training.max_steps=2")
    predictor = load_predictor(str(run.folder))
    [expected] = predictor.answer(predictor.rows(["sun"]))
    with_names = AutoPeftModelForSequenceClassification.from_pretrained(run.folder).eval()
    assert with_names.config.id2label == {0: "sun", 1: "moon", 2: "tea"}
    (run.folder / "task.json").unlink()
    (run.folder / "run.json").unlink()
    by_shape = AutoPeftModelForSequenceClassification.from_pretrained(run.folder).eval()
    assert by_shape.config.num_labels == 3
    for model in (with_names, by_shape):
        with torch.no_grad():
            scores = model(**inputs(run, "sun")).logits[0].softmax(-1).tolist()
        assert scores == pytest.approx(list(expected["scores"].values()), abs=1e-5)
    foreign = load_predictor(str(run.folder))
    [found] = foreign.answer(foreign.rows(["sun"]))
    assert list(found["scores"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert list(found["scores"].values()) == pytest.approx(scores, abs=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.grid
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_get_peft_model_trains_under_trainer_and_loads_in_peft(tmp_path: Path, kind: str) -> None:
    import peft
    import transformers

    from peftcli import LoraConfig, get_peft_model

    base = classifier_base(kind)
    name = "SequenceClassification" if kind == "bert" else "ImageClassification"
    auto = getattr(transformers, f"AutoModelFor{name}")
    torch.manual_seed(0)
    if kind == "bert":
        batch = {"input_ids": torch.randint(300, (4, 9))}
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    else:
        batch = {"pixel_values": torch.randn(4, 3, 32, 32)}
        config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    labels = torch.tensor([0, 1, 2, 1])
    rows = [{**{name: value[n] for name, value in batch.items()}, "labels": labels[n]} for n in range(4)]
    model = get_peft_model(auto.from_pretrained(base, num_labels=3), config)
    settings = {"report_to": [], "save_strategy": "no", "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    settings |= {"remove_unused_columns": False, "label_names": ["labels"]}  # as PEFT's examples do for pictures
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), num_train_epochs=2, **settings)
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits
        again = peft.PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=3), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=0)


_USUAL = ("p_tuning",)
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in _USUAL]


@pytest.mark.parametrize("method", [*_USUAL, *OTHERS])
def test_every_method_trains_an_encoder(tmp_path: Path, method: str) -> None:
    if why_not(method, "bert"):
        pytest.skip("PEFT's method does not fit this kind of model")
    recipe = write_classifier_recipe(tmp_path)
    not_of_recipes = ("task_type", "inference_mode", "num_tasks")
    settings = {key: value for key, value in settings_of(method, "bert").items() if key not in not_of_recipes}
    run = run_recipe(recipe, f"method={json.dumps({**settings, 'type': method})}", *EVALUATES)
    assert run.run["eval"]["last"]["eval_loss"] > 0
