"""Sequence classification: texts and pairs, truncation, and one answer whatever the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from classifierkit import ROWS, base_of, encoded, head_model, open_task, scanned, table_of
from trainkit import base_folder

from peftcli.errors import DataError, ModelError
from peftcli.methods import config_from_dict
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions

ROW = TASKS["sequence_classification"]
LABELS: dict[str, Any] = {"labels": ["good", "bad"], "problem_type": "single_label"}
TEXTS = [{"text": " ".join(["sun"] * count)} for count in (1, 9, 3, 30, 2, 17, 5, 11)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
        *(("question", "sentence"), ("question", "passage"), ("text", "text_pair")),
    ],
)
def test_pairs_are_found_by_their_columns(one: str, other: str) -> None:
    task = open_task(**LABELS)
    [found] = encoded(task, [{one: "sun", other: "moon", "label": "bad"}])
    assert list(found.arrays["input_ids"]) == task.processor("sun", "moon")["input_ids"]


def test_a_sentence_alone_is_no_pair() -> None:
    task = open_task(**LABELS)
    [found] = encoded(task, [{"sentence": "sun", "label": "bad"}])
    assert list(found.arrays["input_ids"]) == task.processor("sun")["input_ids"]


def test_pairs_with_columns_of_other_names() -> None:
    task, columns = open_task(**LABELS), {"text": "left", "text_pair": "right"}
    [found] = encoded(task, [{"left": "sun", "right": "moon", "label": "bad"}], columns=columns)
    assert list(found.arrays["input_ids"]) == task.processor("sun", "moon")["input_ids"]


def test_what_is_too_long_is_cut_and_counted() -> None:
    task = open_task(**LABELS, max_length=10)
    table, rows = table_of([{"text": "sun " * count, "label": "good"} for count in (2, 50)])
    short, long = task.encode(rows, task.read(table))
    assert (short.flags, long.flags) == (0, task.flags["truncated"])
    assert long.size > 10
    assert [outcome.examples[0].size for outcome in (short, long)] == [short.size, 10]
    assert len(long.examples[0].arrays["input_ids"]) == 10


def test_no_row_is_longer_than_the_model_can_read() -> None:
    assert open_task(**LABELS).max_length == 64  # BERT's positions
    assert open_task(**LABELS, max_length=8).max_length == 8
    method = config_from_dict({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5})
    assert ROW.open(ROW.settings(**LABELS), base_of("bert"), method).max_length == 59
    task = open_task(**LABELS)
    task.base.config = transformers.RobertaConfig(max_position_embeddings=66, pad_token_id=1)
    assert task.max_length == 64  # the first two positions are not those of tokens


@pytest.mark.parametrize("value", [None, 3, ["sun"]])
def test_what_is_no_text_is_an_error(value: Any) -> None:
    [bad] = encoded(open_task(**LABELS), [{"text": value, "label": "good"}])
    assert isinstance(bad, DataError)
    assert (bad.line, bad.key) == (1, "text")


def test_a_text_without_tokens_is_an_error() -> None:
    [bad] = encoded(open_task(kind="llama", **LABELS), [{"text": "", "label": "good"}])
    assert bad.message == "holds no text"


def test_a_decoder_reads_the_last_token_of_a_row() -> None:
    task = open_task(kind="gpt2", **LABELS)
    model = head_model(task)
    ids = task.processor(TEXTS[0]["text"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        last = model.score(model.transformer(ids).last_hidden_state[:, -1])
    _, rows = table_of(TEXTS)
    first = next(task.predict(model, rows, PredictOptions()))
    assert list(first["scores"].values()) == pytest.approx(last.softmax(-1)[0].tolist(), abs=1e-6)


def test_a_text_may_not_hold_the_token_by_which_an_encoder_decoder_finds_its_end() -> None:
    for kind in ("bert", base_folder("t5")):
        task = open_task(kind=kind, **LABELS)
        texts = ("sun tea", f"sun {task.processor.eos_token} tea")
        right, other = encoded(task, [{"text": text, "label": "bad"} for text in texts])
        assert not isinstance(right, DataError)
        assert isinstance(other, DataError) == (kind != "bert")
    assert "finds the end of a text" in other.message


def test_a_model_without_a_pad_token_gets_one() -> None:
    task = open_task(kind="gpt2", **LABELS)
    task.processor.pad_token = None
    model = transformers.AutoModelForSequenceClassification.from_pretrained(task.base.name, **task.model_options())
    assert model.config.pad_token_id is None
    [note] = task.fit_model(model, None)
    assert "no pad token" in note
    assert model.config.pad_token_id == task.processor.pad_token_id is not None


def test_rows_to_answer_may_have_a_label() -> None:
    task = scanned(ROWS)
    _, rows = table_of([*ROWS, {"text": "sun", "label": "unheard of"}])
    assert len(list(task.predict(head_model(task), rows, PredictOptions()))) == len(ROWS) + 1


def test_token_types_tell_the_texts_of_a_pair_apart() -> None:
    task = open_task(**LABELS)
    task.processor.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    found = encoded(task, [{"sentence1": "sun", "sentence2": "moon", "label": "bad"}])
    batch = task.collate(found, training=True)
    assert batch["token_type_ids"].tolist() == [list(task.processor("sun", "moon")["token_type_ids"])]


def test_the_probe_is_read_by_the_model() -> None:
    task = open_task(kind="llama", **LABELS)
    with torch.no_grad():
        assert head_model(task)(**task.probe()).logits.shape == (2, 2)
    assert torch.equal(task.probe()["input_ids"], task.probe()["input_ids"])
    assert base_of("llama").config.vocab_size > task.probe()["input_ids"].max()


def test_a_model_that_reads_the_last_position_is_refused() -> None:
    task = open_task(**LABELS)
    task.base.config = transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=32)
    assert task.max_length == task.settings.max_length  # it says that it has -1 positions
    with pytest.raises(ModelError, match="reads a text at the last position of its row"):
        task.fit_model(transformers.XLNetForSequenceClassification(task.base.config), None)
