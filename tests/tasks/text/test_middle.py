"""train_on: middle: the order of the parts, what is trained, and bases that cannot."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from classifierkit import table_of
from trainkit import base_folder, run_recipe, scratch, tokenizer, write_rows

from peftcli.cli.app import main
from peftcli.errors import DataError, ModelError
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
CODE = [f"def add_{n}(one, two):\n    total = one + two\n    return total * {n}\n" for n in range(12)]


@functools.cache
def code_base(marks: tuple[str, ...] = MARKS) -> Path:
    """A tiny decoder whose tokenizer has tokens for the parts of a text."""
    folder = scratch() / f"code-{abs(hash(marks))}"
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder())
    known = tokenizer(chat=False)
    known.add_special_tokens({"extra_special_tokens": [*marks]})
    model.resize_token_embeddings(len(known))
    model.save_pretrained(folder)
    known.save_pretrained(folder)
    return folder


def open_task(base: Path | None = None, **settings: Any) -> Any:
    row = TASKS["causal_lm"]
    opened = open_base(BaseModel(name=str(base or code_base())))
    return row.open(row.settings(train_on="middle", **settings), opened)


def encoded(task: Any, *texts: str) -> list[Any]:
    table, rows = table_of([{"text": text} for text in texts])
    return list(task.encode(rows, task.read(table)))


def parts_of(task: Any, example: Any) -> list[str]:
    """Prefix, suffix, middle, and what ends it, of an example; trained are the last two."""
    ids, labels = (np.asarray(example.arrays[name]).tolist() for name in ("input_ids", "labels"))
    marks = [task.processor.convert_tokens_to_ids(each) for each in MARKS]
    places = [ids.index(mark) for mark in marks]
    assert places == sorted(places)
    assert places[0] == 0
    assert labels == [-100] * (places[2] + 1) + ids[places[2] + 1 :]
    assert example.num_targets == len(ids) - places[2] - 1
    pieces = ids[1 : places[1]], ids[places[1] + 1 : places[2]], ids[places[2] + 1 : -1], ids[-1:]
    return [task.processor.decode(each) for each in pieces]


def test_prefix_suffix_middle_and_the_middle_is_trained() -> None:
    task, places = open_task(), set()
    for text, outcome in zip(CODE, encoded(task, *CODE), strict=True):
        (example,) = outcome.examples
        before, after, middle, end = parts_of(task, example)
        assert before + middle + after == text
        assert middle
        assert end == task.processor.eos_token
        places.add((len(before), len(middle)))
    assert len(places) > 6
    again = encoded(open_task(), *CODE)
    assert [each.examples[0].arrays for each in again] == [each.examples[0].arrays for each in encoded(task, *CODE)]


@pytest.mark.parametrize("how", ["truncate", "split", "drop", "error"])
def test_a_long_text_is_cut_before_its_parts_are_drawn(how: str) -> None:
    task, text = open_task(max_length=40, overlong=how), "".join(CODE)
    (outcome,) = encoded(task, text)
    if how == "error":
        assert isinstance(outcome, DataError)
        assert "more than dataset.max_length: 40" in outcome.message
        return
    found = ["".join(np.array(parts_of(task, each), dtype=object)[[0, 2, 1]]) for each in outcome.examples]
    assert all(each.size <= 40 for each in outcome.examples)
    assert len(found) == {"truncate": 1, "drop": 0}.get(how, len(found))
    assert text.startswith("".join(found[:1]))
    assert how != "split" or len("".join(found)) > 0.9 * len(text)


@pytest.mark.parametrize(
    "marks",
    [
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        tuple(f"<\uff5cfim▁{each}\uff5c>" for each in ("begin", "hole", "end")),
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ],
)
def test_the_tokens_are_found_however_they_are_written(marks: tuple[str, ...]) -> None:
    task = open_task(code_base(marks))
    (outcome,) = encoded(task, CODE[0])
    ids = list(outcome.examples[0].arrays["input_ids"])
    places = [ids.index(task.processor.convert_tokens_to_ids(each)) for each in marks]
    assert places == sorted(places)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="no tokens for prefix, suffix, middle"):
        open_task(base_folder())
    task = open_task()
    table, rows = table_of([{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="needs rows of texts"):
        task.encode(rows, task.read(table))
    recipe = tmp_path / "recipe.yaml"
    data = write_rows(tmp_path / "train.jsonl", [{"text": text} for text in CODE])
    recipe.write_text(
        f"base_model: {base_folder()}\ntask: causal_lm\nmethod: {{type: lora, target_modules: [q_proj]}}\n"
        f"dataset: {{train: {data}, train_on: middle}}\ntraining: {{output_dir: {tmp_path}/out}}\n"
    )
    assert main(["train", str(recipe)]) == 4
    assert "was not trained to fill in a middle" in capsys.readouterr().err


def test_it_trains_packed_and_not(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = write_rows(tmp_path / "train.jsonl", [{"text": text} for text in CODE])
    recipe.write_text(
        f"base_model: {code_base()}\ntask: causal_lm\nmethod: {{type: lora, r: 4, target_modules: all-linear}}\n"
        f"dataset: {{train: {data}, eval: {data}, train_on: middle, max_length: 128}}\n"
        f"training: {{output_dir: {tmp_path}/out, max_steps: 6, learning_rate: 1e-2, bf16: false, logging_steps: 1}}\n"
    )
    run = run_recipe(recipe)
    assert run.losses[-1] < run.losses[0]
    shutil.rmtree(run.folder)
    packed = run_recipe(recipe, "dataset.packing=true")
    assert packed.run["eval"]["last"]["eval_loss"] > 0
