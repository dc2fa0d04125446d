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
from visionkit import CHATS, PLAIN, family_base, llava_base, picture_rows, plain_rows

from peftcli.adapters.proof.verify import verify_adapter
from peftcli.data.rows import Place, Row
from peftcli.errors import DataError, ModelError
from peftcli.methods.lora import LoraConfig
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions, table_of
from peftcli.tasks.pictures import open_image
from peftcli.tasks.scores import as_computed
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.tasks.text.findings import OVERLONG, Flag
from peftcli.train.events import Message


def _task(name="llava", **base):
    row = TASKS["image_text_to_text"]
    return row.open(row.settings(max_new_tokens=4), open_base(BaseModel(name=str(family_base(name)), **base)))


def _model(name):
    return transformers.AutoModelForImageTextToText.from_pretrained(family_base(name)).eval()


@pytest.fixture(scope="module")
def task():
    return _task()


@pytest.fixture(scope="module")
def model():
    return _model("llava")


def _rows(rows=None):
    return [Row(values, Place("rows", at), llava_base()) for at, values in enumerate(rows or picture_rows(), 1)]


def _encoded(task, rows):
    return task.encode(rows, task.read(table_of(rows, {})))


@pytest.mark.parametrize("family", CHATS)
def test_ids_are_the_processors_and_the_loss_is_the_models(family):
    task, model = _task(family), _model(family)
    examples = [outcome.examples[0] for outcome in _encoded(task, _rows())]
    batch = as_computed(model, task.collate(examples, training=True))
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


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of a processor of transformers
@pytest.mark.parametrize(("family", "beams"), [*((family, 1) for family in (*CHATS, *PLAIN)), ("llava", 2)])
def test_predict_is_transformers_generate(family, beams):
    task, model = _task(family), _model(family)
    task.settings = replace(task.settings, num_beams=beams)
    rows = plain_rows() if family in PLAIN else picture_rows()
    answers = list(task.predict(model, _rows(rows[:2]), PredictOptions(batch_size=2)))
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    if family in PLAIN:
        text = f"{task.mark}Which colour?"
    else:
        text = task.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = as_computed(model, task.processor(text=[text], images=[_picture()], return_tensors="pt"))
    inputs.pop("labels", None)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert answers[0]["text"] == task.tokenizer.decode(ids, skip_special_tokens=True).strip() != ""


def _picture():
    """The picture of the first row."""
    return open_image(Path(picture_rows()[0]["images"][0]).read_bytes()).convert("RGB")


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of a processor of transformers
@pytest.mark.parametrize("family", PLAIN)
def test_without_a_chat_template_rows_have_the_processors_own_form(family):
    task, model = _task(family), _model(family)
    examples = [outcome.examples[0] for outcome in _encoded(task, _rows(plain_rows()))]
    batch = task.collate(examples, training=True)
    found, own = task.loss(model, batch), model(**batch).loss
    assert found.total.item() / sum(each.num_targets for each in examples) == pytest.approx(own.item(), rel=1e-5)
    text, answer = f"{task.mark}Which colour?", "It is red."
    apart = {"suffix": [answer]} if task.takes_suffix else {}
    whole = text if apart else f"{text}{answer}<|im_end|>"
    inputs = task.processor(text=[whole], images=[_picture()], return_tensors="pt", **apart)
    assert examples[0].arrays["input_ids"] == inputs["input_ids"][0].tolist()
    trained = [label for label in examples[0].arrays["labels"] if label >= 0]
    assert task.tokenizer.decode(trained) == "It is red.<|im_end|>"
    task.check_model(model)


def test_a_row_without_the_picture_that_a_processor_needs_is_an_error():
    row = {"images": [], "prompt": "Which colour?", "completion": "Red."}
    for family, refused in (("paligemma", True), ("llava_plain", False)):
        (found,) = _encoded(_task(family), _rows([row]))
        assert isinstance(found, DataError) == refused
    assert "has no picture" in _encoded(_task("paligemma"), _rows([row]))[0].message


def test_messages_need_a_chat_template():
    with pytest.raises(DataError, match="'messages' needs a chat template") as caught:
        _encoded(_task("llava_plain"), _rows())
    assert "base_model.chat_template" in caught.value.hint
    assert not isinstance(_encoded(_task("llava_plain", chat_template="chatml"), _rows())[0], DataError)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of a processor of transformers
def test_a_model_that_reads_answers_in_both_directions_is_refused():
    with pytest.raises(ModelError, match="sees the tokens that it would have to predict"):
        _task("paligemma", chat_template="chatml").check_model(_model("paligemma"))


def test_a_model_that_fails_on_pictures_is_refused(task):
    model = _model("llava")
    model.model.get_image_features = lambda pixels: pixels  # transformers gives it more
    with pytest.raises(ModelError, match=r"LlavaForConditionalGeneration .* fails on a text with a picture"):
        task.check_model(model)


@pytest.mark.parametrize("family", [*CHATS, *PLAIN])
def test_padding_is_left_out_where_nothing_changes(family):
    task, model = _task(family), _model(family)
    examples = [each.examples[0] for each in _encoded(task, _rows(plain_rows() if family in PLAIN else picture_rows()))]
    batch, found = task.collate(examples, training=True), []
    for way in ("padded", "unpadded"):
        if way == "unpadded":
            # in two the tokens of a picture, or of a prompt, see those behind them; Llama 4 attends in chunks
            assert unpad(model, probe=task.padded_probe(model)) == (family not in ("gemma3", "paligemma", "llama4"))
        model.zero_grad()
        task.loss(model, batch).total.backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


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


def test_a_metric_of_ones_own_is_measured_and_not_saved(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", picture_rows())
    (tmp_path / "own.py").write_text("def count(answers, wanted):\n    return len(answers) + len(wanted)\n")
    own = f"metric_code: {tmp_path}/own.py:count, trust_metric_code: true"
    (tmp_path / "recipe.yaml").write_text(f"""\
base_model: {llava_base()}
task: {{type: image_text_to_text, max_new_tokens: 2, {own}}}
method: {{type: lora, r: 4, target_modules: all-linear}}
dataset: {{train: {rows}, eval: {rows}}}
training: {{output_dir: {tmp_path}/out, max_steps: 1, bf16: false, per_device_train_batch_size: 4}}
""")
    run = run_recipe(tmp_path / "recipe.yaml")
    assert run.run["eval"]["last"]["eval_count"] == 2 * len(picture_rows())
    assert "metric_code" not in (run.folder / "task.json").read_text()
    verify_adapter(str(run.folder))


@pytest.mark.parametrize(("family", "said"), [("qwen2_vl", "computed without padding"), ("gemma3", "padded: Gemma3")])
def test_a_run_says_whether_rows_are_padded(tmp_path, family, said):
    rows = write_rows(tmp_path / "rows.jsonl", picture_rows())
    (tmp_path / "recipe.yaml").write_text(f"""\
base_model: {family_base(family)}
task: image_text_to_text
method: {{type: lora, r: 4, target_modules: all-linear}}
dataset: {{train: {rows}}}
training: {{output_dir: {tmp_path}/out, max_steps: 2, bf16: false, per_device_train_batch_size: 4}}
""")
    run = run_recipe(tmp_path / "recipe.yaml")
    assert any(f"rows are {said}" in event.text for event in run.events if isinstance(event, Message))
    assert all(loss > 0 for loss in run.losses)


def test_a_connector_inside_the_tower_is_refused():
    task, model = _task("qwen2_vl"), _model("qwen2_vl")
    task.settings = replace(task.settings, connector="trained")
    with pytest.raises(ModelError, match="no connector"):
        task.fit_model(model, LoraConfig())


@pytest.mark.parametrize("family", [*CHATS, *PLAIN])
def test_answers_do_not_depend_on_the_batch(family):
    task, model = _task(family), _model(family)
    rows = _rows((plain_rows() if family in PLAIN else picture_rows())[:6])
    alone, together = (list(task.predict(model, rows, PredictOptions(batch_size=size))) for size in (1, 6))
    assert alone == together
