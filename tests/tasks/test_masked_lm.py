"""Masked language modelling: what is masked, when, and what fills it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from classifierkit import table_of
from maskedkit import TEXTS, masked_base
from trainkit import base_folder, run_recipe, write_rows

from peftcli.cli.app import main
from peftcli.errors import DataError, ModelError
from peftcli.models.open import open_base
from peftcli.recipe import load_recipe
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions

KINDS = ("bert", "roberta", "modernbert", "esm")
LONG = " ".join(TEXTS)
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVK"


def open_task(kind: str = "bert", **settings: Any) -> Any:
    row = TASKS["masked_lm"]
    return row.open(row.settings(**settings), open_base(BaseModel(name=str(masked_base(kind)))))


def model_of(task: Any) -> Any:
    return task.base.model("AutoModelForMaskedLM", torch.float32).model.eval()


def encoded(task: Any, *texts: str) -> list[Any]:
    table, rows = table_of([{"text": text} for text in texts])
    return list(task.encode(rows, task.read(table)))


def examples_of(task: Any, *texts: str) -> list[Any]:
    return [example for outcome in encoded(task, *texts) for example in outcome.examples]


def masked(task: Any, examples: Any, draw: int = 0) -> torch.Tensor:
    batch = task.collate([replace(each, draw=draw + at) for at, each in enumerate(examples)], training=bool(draw))
    return batch["labels"] != -100


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(kind: str) -> None:
    task = open_task(kind, max_length=40)
    examples = examples_of(task, *([PROTEIN, PROTEIN[:20]] if kind == "esm" else TEXTS))
    batch, model = task.collate(examples, training=False), model_of(task)
    inputs = {name: value for name, value in batch.items() if not name.startswith("_")}
    found = task.loss(model, batch)
    count = int((batch["labels"] != -100).sum())
    assert count == sum(each.num_targets for each in examples)
    with torch.no_grad():
        outputs = model(**inputs)
    assert float(found.total.detach()) == pytest.approx(count * float(outputs.loss), rel=1e-4)
    chosen = batch["labels"] != -100
    right = (outputs.logits.argmax(-1) == batch["labels"])[chosen].sum()
    assert float(found.sums["correct"]) == pytest.approx(float(right))
    assert sum(found.of_targets["loss"]) == pytest.approx(float(found.total.detach()))
    assert len(found.of_targets["loss"]) == count


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_that_is_set_is_masked_and_never_a_special_token(kind: str) -> None:
    task = open_task(kind, mlm_probability=0.2, max_length=30)
    texts = [PROTEIN[at : at + 20] for at in range(36)] if kind == "esm" else TEXTS
    examples = examples_of(task, *(f"{text}{'L' * (number % 9)}" for text in texts for number in range(9))) * 3
    examples = [replace(each, draw=at) for at, each in enumerate(examples, start=1)]
    batch = task.collate(examples, training=True)
    chosen = batch["labels"] != -100
    ids = torch.tensor([task.processor.mask_token_id, *special(task)])
    own = np.concatenate([np.asarray(each.arrays["input_ids"]) for each in examples])
    there = sum(int((np.asarray(each.arrays["words"]) >= 0).sum()) for each in examples)
    assert there == (~np.isin(own, ids)).sum()
    assert chosen.sum() / there == pytest.approx(0.2, abs=0.03)
    seen, labels = batch["input_ids"], batch["labels"]
    assert not torch.isin(labels[chosen], ids).any()
    shares = [(seen == task.processor.mask_token_id)[chosen].float().mean(), (seen == labels)[chosen].float().mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.06)


def special(task: Any) -> list[int]:
    return [int(each) for each in task.processor.all_special_ids]


def test_masks_change_with_each_draw_and_stay_in_evaluation() -> None:
    task = open_task(mlm_probability=0.3)
    examples = examples_of(task, *TEXTS)
    again = examples_of(open_task(mlm_probability=0.3), *TEXTS)
    assert torch.equal(masked(task, examples), masked(task, again))
    assert torch.equal(masked(task, examples, 7), masked(task, again, 7))
    assert not torch.equal(masked(task, examples, 7), masked(task, examples, 70))
    alone = [task.collate([each], training=False)["labels"][0] for each in examples]
    together = task.collate(examples[::-1], training=False)["labels"].flip(0)
    assert all(torch.equal(one, other[: len(one)]) for one, other in zip(alone, together, strict=True))
    assert len({tuple(row.nonzero()[0].tolist()) for row in masked(task, examples)}) > 3


@pytest.mark.parametrize("kind", KINDS[:3])
def test_whole_words_are_masked_whole(kind: str) -> None:
    task = open_task(kind, whole_words=True, mlm_probability=0.3)
    examples = examples_of(task, *(text.replace("sun", "ostentation") for text in TEXTS))
    for draw in range(1, 40, 13):
        for row, example in zip(masked(task, examples, draw), examples, strict=True):
            words = np.asarray(example.arrays["words"])
            hidden = words[row[: len(words)].numpy()]
            assert set(np.flatnonzero(np.isin(words, hidden))) == set(np.flatnonzero(row))
            assert len(hidden) <= max(example.num_targets, np.bincount(hidden).max())
    word = examples_of(task, "ostentation")[0]
    chosen = task.collate([word], training=False)
    assert int((chosen["labels"] != -100).sum()) == word.size - 2, "a text of one word"
    assert float(task.loss(model_of(task), chosen).of_targets["loss"].shape[0]) == word.num_targets


def test_a_long_text_becomes_several_examples_and_nothing_is_lost() -> None:
    task = open_task(max_length=16)
    (outcome,) = encoded(task, LONG)
    ids = task.processor(LONG)["input_ids"]
    parts = [np.asarray(each.arrays["input_ids"]).tolist() for each in outcome.examples]
    assert [token for part in parts for token in part[1:-1]] == ids[1:-1]
    assert max(map(len, parts)) <= 16
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert (outcome.flags & 1, outcome.size) == (1, len(ids))


def test_texts_of_nothing_but_special_tokens_are_left_out_and_counted(tmp_path: Path, capsys: Any) -> None:
    task = open_task()
    nothing, unknown, good = encoded(task, "ΩΩ [SEP]", "the sun Ω warms Ω", TEXTS[0])
    assert (nothing.examples, nothing.reason) == ([], "nothing but special tokens")
    assert (unknown.flags, good.flags) == (2, 0)
    rows = write_rows(tmp_path / "train.jsonl", [{"text": text} for text in (*TEXTS, "ΩΩ", "Ω [MASK]")])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {masked_base('bert')}\ntask: masked_lm\nmethod: {{type: lora, target_modules: all-linear}}\n"
        f"dataset: {{train: {rows}}}\ntraining: {{output_dir: {tmp_path}/out}}\n"
    )
    assert main(["inspect", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "hold nothing but special tokens, and are left out" in shown
    assert "|masked]]" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_predict_fills_masks_as_transformers_does(kind: str) -> None:
    task = open_task(kind)
    model, mask = model_of(task), task.processor.mask_token
    texts = [f"{mask}MKT{mask}YIA", f"MKTAYIA{mask}"] if kind == "esm" else [f"the {mask} warms {mask} us", f"a {mask}"]
    table_rows = table_of([{"text": text} for text in texts])[1]
    found = list(task.predict(model, table_rows, PredictOptions(batch_size=2)))
    asks = transformers.pipeline("fill-mask", model=model, tokenizer=task.processor)
    for text, answer in zip(texts, found, strict=True):
        wanted = asks(text, top_k=5)
        wanted = wanted if isinstance(wanted[0], list) else [wanted]
        assert len(answer["fills"]) == text.count(mask)
        for ours, theirs in zip(answer["fills"], wanted, strict=True):
            assert [each["token"] for each in ours] == [each["token_str"] for each in theirs]
            assert [each["score"] for each in ours] == pytest.approx([each["score"] for each in theirs], rel=1e-3)


@pytest.mark.parametrize(
    ("text", "said"), [("the sun", "has no mask"), ("[MASK] sun " * 40, "tokens, more than the 64 that are read")]
)
def test_what_predict_refuses(text: str, said: str) -> None:
    task = open_task()
    with pytest.raises(DataError, match=said):
        list(task.predict(model_of(task), table_of([{"text": text}])[1], PredictOptions()))


def test_bases_without_mask_or_head_are_refused(tmp_path: Path) -> None:
    row, settings = TASKS["masked_lm"], TASKS["masked_lm"].settings()
    with pytest.raises(ModelError, match="has no mask token"):
        row.open(settings, open_base(BaseModel(name=str(base_folder()))))
    with pytest.raises(DataError, match="a fast one"):
        open_task("esm", whole_words=True)
    rows = write_rows(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    headless = tmp_path / "headless"
    model_of(open_task()).bert.save_pretrained(headless)
    open_task().processor.save_pretrained(headless)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {headless}\ntask: masked_lm\nmethod: {{type: lora, target_modules: all-linear}}\n"
        f"dataset: {{train: {rows}}}\ntraining: {{output_dir: {tmp_path}/out}}\n"
    )
    with pytest.raises(ModelError, match="has no trained BertForMaskedLM head"):
        run_recipe(recipe)


def test_a_trained_head_is_saved_without_the_decoder_that_is_tied(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rows = write_rows(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {masked_base('bert')}\ntask: masked_lm\n"
        "method: {type: lora, r: 4, target_modules: all-linear, modules_to_save: [cls.predictions.transform]}\n"
        f"dataset: {{train: {rows}}}\ntraining: {{output_dir: {tmp_path}/out, max_steps: 2, bf16: false}}\n"
    )
    run = run_recipe(recipe)
    saved = [name for name in load_file(run.folder / "adapter_model.safetensors") if "lora_" not in name]
    assert len(saved) == 4
    assert all("transform" in name for name in saved)


def test_init_and_recipes_without_a_task_find_it(tmp_path: Path, capsys: Any) -> None:
    rows = write_rows(tmp_path / "train.jsonl", [{"text": f"{text} {number}"} for number, text in enumerate(TEXTS)])
    recipe = tmp_path / "recipe.yaml"
    command = ["init", str(rows), "--base", str(masked_base("bert")), "--output", str(recipe)]
    assert main(command) == 0, capsys.readouterr().err
    assert load_recipe(recipe).task == {"type": "masked_lm"}
