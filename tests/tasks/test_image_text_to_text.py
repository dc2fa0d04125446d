"""Conversations with pictures: ids are the processor's, the loss is the model's own, pictures' tokens are not cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from trainkit import run_recipe, write_rows
from visionkit import FAMILIES, family_base, llava_base, picture_rows

from peftcli.data.rows import Place, Row
from peftcli.errors import DataError, ModelError
from peftcli.methods.lora import LoraConfig
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions, table_of
from peftcli.tasks.pictures import open_image
from peftcli.tasks.text.findings import OVERLONG, Flag


def _task(name="llava"):
    row = TASKS["image_text_to_text"]
    return row.open(row.settings(max_new_tokens=4), open_base(BaseModel(name=str(family_base(name)))))


@pytest.fixture(scope="module")
def task():
    return _task()


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForImageTextToText.from_pretrained(llava_base()).eval()


def _rows(rows=None):
    return [Row(values, Place("rows", at), llava_base()) for at, values in enumerate(rows or picture_rows(), 1)]


def _encoded(task, rows):
    return task.encode(rows, task.read(table_of(rows, {})))


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_ids_are_the_processors_and_the_loss_is_the_models(family):
    if family.startswith("qwen"):
        pytest.importorskip("torchvision")  # of its video processor
    task = _task(family)
    model = transformers.AutoModelForImageTextToText.from_pretrained(family_base(family)).eval()
    examples = [outcome.examples[0] for outcome in _encoded(task, _rows())]
    batch = task.collate(examples, training=True)
    found = task.loss(model, batch)
    own = model(**batch).loss
    assert found.total.item() / sum(each.num_targets for each in examples) == pytest.approx(own.item(), rel=1e-5)
    trained = [label for label in examples[0].arrays["labels"] if label >= 0]
    assert task.tokenizer.decode(trained) == "It is red.<|im_end|>"
    one, *_ = picture_rows()
    parts = [{"type": "image", "path": one["images"][0]}, {"type": "text", "text": "Which colour?"}]
    messages = [{"role": "user", "content": parts}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "It is red."}]})
    own_ids = task.processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    assert examples[0].arrays["input_ids"] == list(own_ids)


def test_marks_of_pictures_are_not_special_tokens_in_texts():
    task, rows = _task(), picture_rows()
    rows[2]["messages"][0]["content"] = "Which <|im_end|> colour?"
    tokenizer = task.tokenizer
    assert "<image>" in {str(token) for token in tokenizer.added_tokens_decoder.values()}
    flagged = [bool(outcome.flags & Flag.MARKERS) for outcome in _encoded(task, _rows(rows))]
    assert flagged == [at == 2 for at in range(len(rows))]


def test_one_row_is_as_in_a_batch(task, model):
    examples = [outcome.examples[0] for outcome in _encoded(task, _rows())]
    together = task.loss(model, task.collate(examples, training=True)).total
    alone = sum(task.loss(model, task.collate([each], training=True)).total for each in examples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_marks_and_pictures_agree(task):
    row = picture_rows()[0]
    (error,) = _encoded(task, _rows([row | {"images": []}]))
    assert isinstance(error, DataError)
    assert "1 marks <image> and 0 pictures" in error.message


def test_forms_of_columns_are_one(task):
    row = picture_rows()[0]
    parts = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": "Which colour?"}]
    answer = row["messages"][1]
    forms = [
        [row],
        [{"messages": [{"role": "user", "content": parts}, answer]}],
        [{"image": row["images"][0], "prompt": "Which colour?", "completion": answer["content"]}],
    ]
    first, *others = (_encoded(task, _rows(form))[0].examples[0].arrays for form in forms)
    assert all(other == first for other in others)


def test_parts_take_the_given_pictures_in_order(task):
    one, two = (row["images"][0] for row in picture_rows()[:2])
    parts = [{"type": "image", "image": one}, {"type": "image"}, {"type": "text", "text": "Or?"}]
    row = {"messages": [{"role": "user", "content": parts}, picture_rows()[0]["messages"][1]]}
    right, none, many = _encoded(task, _rows([row | {"images": images} for images in ([two], [], [two, one])]))
    assert [Path(path).name for path, *_ in json.loads(right.examples[0].arrays["pictures"])] == [
        Path(one).name,
        Path(two).name,
    ]
    assert "2 marks <image> and 1 pictures" in none.message
    assert "2 marks <image> and 3 pictures" in many.message


def test_turns_that_say_so_are_not_trained_and_system_and_tools_are_read(task):
    row = picture_rows()[0]
    asked, answer = row["messages"]
    more = [asked, answer | {"train": False}, {"role": "user", "content": "Sure?"}, answer | {"content": "Yes."}]
    tools = [{"type": "function", "function": {"name": "zoom"}}]
    (outcome,) = _encoded(task, _rows([row | {"messages": more, "system": "Be brief.", "tools": tools}]))
    (example,) = outcome.examples
    trained = [label for label in example.arrays["labels"] if label >= 0]
    assert task.tokenizer.decode(trained) == "Yes.<|im_end|>"
    assert "Be brief." in example.arrays["text"]
    assert outcome.flags & Flag.UNSEEN  # this template has no words for tools


def test_the_tokens_of_a_picture_are_never_cut(task):
    short = TASKS["image_text_to_text"].open(replace(task.settings, max_length=6), task.base)
    (outcome,) = _encoded(short, _rows(picture_rows()[:1]))
    assert outcome.reason == OVERLONG
    assert not outcome.examples


def test_predict_is_transformers_generate(task, model):
    rows = _rows(picture_rows()[:3])
    answers = list(task.predict(model, rows, PredictOptions(batch_size=3)))
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    text = task.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    picture = open_image(Path(picture_rows()[0]["images"][0]).read_bytes()).convert("RGB")
    inputs = task.processor(text=[text], images=[picture], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answers[0]["text"] == task.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("connector", "targets"),
    [("frozen", "all-linear"), ("trained", "all-linear"), ("adapted", "all-linear"), ("frozen", "[q_proj, v_proj]")],
)
def test_a_run_adapts_what_the_settings_say(tmp_path, connector, targets):
    rows = write_rows(tmp_path / "rows.jsonl", picture_rows())
    (tmp_path / "recipe.yaml").write_text(f"""\
base_model: {llava_base()}
task: {{type: image_text_to_text, connector: {connector}}}
method: {{type: lora, r: 4, target_modules: {targets}}}
dataset: {{train: {rows}, eval: {rows}}}
training: {{output_dir: {tmp_path}/out, max_steps: 2, bf16: false, per_device_train_batch_size: 4, verify: true}}
""")
    run_recipe(tmp_path / "recipe.yaml")
    names = load_file(tmp_path / "out/adapter_model.safetensors")
    assert not any("vision_tower" in name for name in names)
    assert any("language_model" in name for name in names)
    assert any("multi_modal_projector" in name for name in names) == (connector != "frozen")


def test_a_connector_inside_the_tower_is_refused():
    pytest.importorskip("torchvision")
    task = _task("qwen2_vl")
    model = transformers.AutoModelForImageTextToText.from_pretrained(family_base("qwen2_vl"))
    task.settings = replace(task.settings, connector="trained")
    with pytest.raises(ModelError, match="no connector"):
        task.fit_model(model, LoraConfig())


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_answers_do_not_depend_on_the_batch(family):
    if family.startswith("qwen"):
        pytest.importorskip("torchvision")
    task = _task(family)
    model = transformers.AutoModelForImageTextToText.from_pretrained(family_base(family)).eval()
    rows = _rows(picture_rows()[:6])
    alone, together = (list(task.predict(model, rows, PredictOptions(batch_size=size))) for size in (1, 6))
    assert alone == together
