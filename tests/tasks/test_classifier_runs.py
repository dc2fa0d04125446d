"""Runs of the classification tasks: what every task is promised, on an encoder, a decoder, a ViT and a ResNet."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from classifierkit import COLOURS, ROWS, classifier_base, write_classifier_recipe
from promises import settings_of, why_not
from safetensors.torch import load_file
from trainkit import Child, Trained, at_step, read_run, run_recipe, write_rows

from peftcli.cli import console
from peftcli.cli.app import main
from peftcli.errors import DataError, Interrupted
from peftcli.methods import METHODS

KINDS = ["bert", "llama", "vit", "resnet"]
EVALUATES = ("training.eval_strategy=steps", "training.eval_steps=4")
SAVES = ("training.save_strategy=steps", "training.save_steps=3")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def cli(*args: object, code: int = 0) -> Any:
        monkeypatch.setattr(console, "_json_printed", False)
        trainkit.reset_accelerate()
        assert main([str(arg) for arg in args]) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        return json.loads(out) if "--json" in args else out + err * bool(code)

    return cli


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Trained]]:
    """The recipe and the finished run of a kind of base model."""
    done: dict[str, tuple[Path, Trained]] = {}

    def get(kind: str) -> tuple[Path, Trained]:
        if kind not in done:
            recipe = write_classifier_recipe(tmp_path_factory.mktemp(kind), kind)
            done[kind] = recipe, run_recipe(recipe, *EVALUATES)
        return done[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_records_what_it_found(runs: Callable, kind: str) -> None:
    _, run = runs(kind)
    assert run.losses[-1] < run.losses[0]
    assert {"eval_loss", "eval_accuracy", "eval_macro_f1", "eval_auc"} <= set(run.run["eval"]["last"])
    described = json.loads((run.folder / "task.json").read_text())["settings"]
    names = ["good", "bad"] if kind in ("bert", "llama") else sorted(COLOURS)
    assert (described["labels"], described["problem_type"]) == (names, "single_label")
    assert run.run["data"]["targets"] == run.run["data"]["examples"]
    tensors = load_file(run.folder / "adapter_model.safetensors")
    head = [name for name in tensors if "lora_" not in name]
    assert head, "the new head is saved"
    assert all(tensors[name].shape[0] == 2 for name in head)


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_the_same_seed_gives_the_same_adapter(runs: Callable, kind: str) -> None:
    recipe, run = runs(kind)
    again = run_recipe(recipe, *EVALUATES, f"training.output_dir={recipe.parent}/again")
    assert again.weights == run.weights
    other = run_recipe(recipe, *EVALUATES, f"training.output_dir={recipe.parent}/other", "training.seed=7")
    assert other.weights != run.weights


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_byte_for_byte(tmp_path: Path, kind: str) -> None:
    recipe = write_classifier_recipe(tmp_path, kind)
    whole = run_recipe(recipe, *EVALUATES, *SAVES, f"training.output_dir={tmp_path}/whole")
    with pytest.raises(Interrupted):
        run_recipe(recipe, *EVALUATES, *SAVES, on_event=at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resumed = run_recipe(recipe, *EVALUATES, *SAVES)
    for name in trainkit.PRODUCT[:3]:
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_two_processes_give_the_series_of_one(tmp_path: Path, kind: str) -> None:
    recipe = write_classifier_recipe(tmp_path, kind)
    one = run_recipe(recipe, *EVALUATES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = (f"training.output_dir={tmp_path}/two", "training.per_device_train_batch_size=2", *EVALUATES)
    children = [
        Child(
            tmp_path,
            "train",
            recipe,
            *settings,
            env={**shared, "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [child.wait() for child in children] == [0, 0], children[0].err
    two = trainkit.read_metrics(tmp_path / "two")
    assert [entry["loss"] for entry in two if "loss" in entry] == pytest.approx(one.losses, rel=1e-4)
    measured = read_run(tmp_path / "two")["eval"]["last"]
    assert measured == pytest.approx(one.run["eval"]["last"], rel=1e-4)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_evaluate_gives_the_metrics_of_training(runs: Callable, cli: Callable, kind: str) -> None:
    recipe, run = runs(kind)
    measured = cli("evaluate", recipe, "--adapter", run.folder, "--json")
    assert measured["eval"]["last"] == pytest.approx(run.run["eval"]["last"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_predicts_the_same(runs: Callable, cli: Callable, tmp_path: Path, kind: str) -> None:
    import transformers

    _, run = runs(kind)
    cli("merge", run.folder, "--output", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"]["0"] in ("good", "blue")
    from peftcli.adapters.predict import load_predictor

    task = "SequenceClassification" if kind in ("bert", "llama") else "ImageClassification"
    merged = getattr(transformers, f"AutoModelFor{task}").from_pretrained(tmp_path / "merged").eval()
    rows = ["sun tea", "moon"] if kind in ("bert", "llama") else pictures(run)
    answers = load_predictor(str(run.folder))
    expected = [each["score"] for each in answers.answer(answers.rows(rows))]
    with torch.no_grad():
        found = [float(merged(**inputs(run, merged, each)).logits[0].softmax(-1).max()) for each in rows]
    assert found == pytest.approx(expected, abs=1e-5)


def pictures(run: Trained) -> list[str]:
    held_out = Path(run.recipe.dataset.eval or "")
    return [str(path) for path in sorted(held_out.rglob("*.png"))[:3]]


def inputs(run: Trained, model: Any, row: str) -> dict[str, torch.Tensor]:
    """What transformers makes of a text or a picture."""
    import transformers
    from PIL import Image

    base = run.recipe.base_model.name
    if row.endswith(".png"):
        processor = transformers.AutoImageProcessor.from_pretrained(run.folder, backend="pil")
        return {"pixel_values": processor(Image.open(row).convert("RGB"), return_tensors="pt")["pixel_values"]}
    encoded = transformers.AutoTokenizer.from_pretrained(base)(row, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_predicts_the_same(runs: Callable, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    import peft
    import transformers

    from peftcli.adapters.predict import load_predictor

    _, run = runs(kind)
    name = "SequenceClassification" if kind in ("bert", "llama") else "ImageClassification"
    base = getattr(transformers, f"AutoModelFor{name}").from_pretrained(run.recipe.base_model.name, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, run.folder).eval()
    rows = ["sun tea", "moon"] if kind in ("bert", "llama") else pictures(run)
    predictor = load_predictor(str(run.folder))
    answers = predictor.answer(predictor.rows(rows))
    for row, answer in zip(rows, answers, strict=True):
        with torch.no_grad():
            scores = model(**inputs(run, model, row)).logits[0].softmax(-1)
        assert list(answer["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)
    assert [str(each.message) for each in recwarn if "peft" in str(each.filename)] == []


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_the_cards_example_runs(runs: Callable, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, run = runs(kind)
    card = (run.folder / "README.md").read_text()
    assert f"peftcli predict {run.folder}" in card or "peftcli predict path/to/this/adapter" in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/adapter", str(run.folder))
    exec(code.replace("path/to/the/base/model", run.recipe.base_model.name), {})
    assert capsys.readouterr().out.strip() in ("good", "bad", "red", "blue")


def test_gates_are_applied(cli: Callable, tmp_path: Path) -> None:
    recipe = write_classifier_recipe(tmp_path)
    assert "eval_accuracy is" in cli("train", recipe, *EVALUATES, "gates.eval_accuracy=> 1", code=12)


def test_a_label_of_evaluation_that_training_lacks_stops_the_run(tmp_path: Path) -> None:
    recipe = write_classifier_recipe(tmp_path)
    write_rows(tmp_path / "eval.jsonl", [*ROWS[18:], {"text": "sun", "label": "ugly"}])
    with pytest.raises(DataError, match="'ugly' is not one of the classes: good, bad") as caught:
        run_recipe(recipe)
    assert (caught.value.file, caught.value.line) == (f"{tmp_path}/eval.jsonl", 7)


def test_a_missing_extra_is_named_before_the_model_is_loaded(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_classifier_recipe(tmp_path, labels="[good, bad]", problem_type="single_label")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    for command in (("check", "--deep"), ("train",), ("evaluate",)):
        assert "pip install 'peftcli[metrics]'" in cli(*command, recipe, code=3)


def test_the_second_run_takes_its_examples_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcli.tasks.sequence_classification import SequenceClassification

    recipe = write_classifier_recipe(tmp_path)
    run_recipe(recipe, "training.max_steps=1")
    monkeypatch.setattr(SequenceClassification, "encode_inputs", lambda *_: pytest.fail("encoded again"))
    run_recipe(recipe, "training.max_steps=1", f"training.output_dir={tmp_path}/again")


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_the_commands_know_the_task(runs: Callable, cli: Callable, kind: str) -> None:
    recipe, run = runs(kind)
    assert "problems" not in cli("check", recipe)
    cli("check", "--deep", recipe)
    cli("info", run.folder)
    assert "examples of a step" in cli("inspect", recipe)
    inspected = cli("inspect", recipe, "--json")
    assert len(inspected["audit"]["train"]["sources"]) == 1
    assert inspected["audit"]["train"]["rows"] == run.run["data"]["rows"]
    cli("train", recipe, "--dry-run")


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


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_auto_class_needs_no_number_of_labels(tmp_path: Path, kind: str) -> None:
    from peftcli import AutoPeftModelForSequenceClassification
    from peftcli.adapters.predict import load_predictor

    recipe = write_classifier_recipe(tmp_path, kind)
    rows = [{"text": f"{word} {n}", "label": word} for n in range(5) for word in ("sun", "moon", "tea")]
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    run = run_recipe(recipe)
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
            scores = model(**inputs(run, model, "sun")).logits[0].softmax(-1).tolist()
        assert scores == pytest.approx(list(expected["scores"].values()), abs=1e-5)
    foreign = load_predictor(str(run.folder))
    [found] = foreign.answer(foreign.rows(["sun"]))
    assert list(found["scores"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert list(found["scores"].values()) == pytest.approx(scores, abs=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
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
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), num_train_epochs=5, **settings)
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits
        again = peft.PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=3), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=0)


_USUAL = ("ia3", "p_tuning", "prefix_tuning", "prompt_tuning")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in _USUAL]


@pytest.mark.parametrize("method", [*_USUAL, *OTHERS])
def test_every_method_trains_an_encoder(tmp_path: Path, method: str) -> None:
    if why_not(method, "bert"):
        pytest.skip("PEFT's method does not fit this kind of model")
    recipe = write_classifier_recipe(tmp_path)
    not_of_recipes = ("task_type", "inference_mode", "num_tasks")
    settings = {key: value for key, value in settings_of(method, "bert").items() if key not in not_of_recipes}
    run = run_recipe(recipe, f"method={json.dumps({**settings, 'type': method})}", "training.max_steps=2", *EVALUATES)
    assert run.run["eval"]["last"]["eval_loss"] > 0
