"""The task of a recipe that names none."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from taskkit import CASES
from transformers import AutoConfig, BertConfig, LlamaConfig, T5Config, ViTConfig

from peftcli.errors import UsageError
from peftcli.tasks import TASKS
from peftcli.tasks.found import find_task


def config(kind: type, architecture: str | None = None) -> Any:
    made = kind()
    made.architectures = [architecture] if architecture else None
    return made


LLAMA = config(LlamaConfig, "LlamaForCausalLM")
T5 = config(T5Config, "T5ForConditionalGeneration")


@pytest.mark.parametrize(
    ("model", "columns", "task"),
    [
        (LLAMA, ["text"], "causal_lm"),
        (LLAMA, ["prompt", "completion", "id"], "causal_lm"),
        (LLAMA, ["messages"], "causal_lm"),
        (config(LlamaConfig), ["messages"], "causal_lm"),
        (T5, ["prompt", "completion"], "seq2seq_lm"),
        (LLAMA, ["chosen", "rejected", "prompt"], "preference"),
        (LLAMA, ["prompt", "completion", "label"], "causal_lm"),
        (config(LlamaConfig, "LlamaForSequenceClassification"), ["chosen", "rejected"], "reward"),
        (config(BertConfig, "BertModel"), ["anchor", "positive", "negative"], "feature_extraction"),
        (config(BertConfig, "BertModel"), ["sentence1", "sentence2", "score"], "feature_extraction"),
        (config(BertConfig, "BertModel"), ["tokens", "ner_tags"], "token_classification"),
        (config(BertConfig, "BertForMaskedLM"), ["text"], "masked_lm"),
        (config(BertConfig, "BertForMaskedLM"), ["text", "label"], "sequence_classification"),
        (config(BertConfig, "BertForMaskedLM"), ["anchor", "positive"], "feature_extraction"),
    ],
)
def test_one_task_is_left(model: Any, columns: list[str], task: str) -> None:
    name, reason, _ = find_task(model, columns)
    assert name == task
    assert columns[0] in reason


def test_answers_that_are_true_or_false_are_those_of_kto() -> None:
    columns = ["prompt", "completion", "label", "id"]
    name, reason, settings = find_task(LLAMA, columns, truths=["label"])
    assert (name, settings) == ("preference", {"loss": "kto"})
    assert reason.endswith("the columns completion, label, prompt")
    with pytest.raises(UsageError, match="no one task fits"):
        find_task(T5, columns, truths=["label"])


@pytest.mark.parametrize(
    ("model", "columns", "said"),
    [
        (T5, ["text"], "causal_lm"),
        (LLAMA, ["question"], "none"),
        (config(ViTConfig, "ViTModel"), ["text"], "ViTModel"),
    ],
)
def test_otherwise_the_candidates_are_listed(model: Any, columns: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        find_task(model, columns)
    assert caught.value.key == "task"
    assert str(caught.value.hint).startswith("set task to one of ")


def test_a_task_that_reads_more_of_the_columns_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(
        TASKS["causal_lm"], auto_class="AutoModelForSequenceClassification", reads=(("text", "label"),)
    )
    monkeypatch.setitem(TASKS, "sequence_classification", row)
    bert = AutoConfig.for_model("bert")
    bert.architectures = ["BertForMaskedLM"]
    assert find_task(bert, ["text", "label"])[0] == "sequence_classification"
    with pytest.raises(UsageError, match="no one task fits"):  # a language model, and rows for classification
        find_task(LLAMA, ["text", "label"])


def test_rows_say_of_their_tasks_what_is_true() -> None:
    template = "{{ messages }}"
    processor = SimpleNamespace(is_fast=True, mask_token_id=4, chat_template=template, image_processor=None)
    processor.tokenizer, processor.post_process_object_detection = processor, print
    processor.size = {"height": 32, "width": 32}
    for name, row in TASKS.items():
        config = SimpleNamespace(architectures=None, model_type="whisper", is_encoder_decoder=name == "seq2seq_lm")
        base: Any = SimpleNamespace(
            processor=lambda kind: processor,
            config=config,
            file=lambda name: None,
            name="base",
            spec=SimpleNamespace(chat_template=None),
        )
        task = row.open(row.settings(), base)
        assert task.columns


@pytest.mark.parametrize(
    ("name", "package", "extra", "code"),
    [
        ("sequence_classification", "sklearn", "metrics", 3),
        ("speech_recognition", "jiwer", "audio", 3),
        ("text_to_image", "diffusers", "diffusion", 4),
    ],
)
def test_a_missing_extra_is_named_before_the_model_is_loaded(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str, code: int
) -> None:
    recipe, find = CASES[name].write(tmp_path), importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda each, *more: None if each == package else find(each, *more))
    for opened in ("open.OpenBase", "pipeline.OpenPipeline"):
        monkeypatch.setattr(f"peftcli.models.{opened}.model", lambda *_, **__: pytest.fail("loaded"))
    for command in (("check", "--deep"), ("train",), ("evaluate",))[: 3 if code == 3 else 1]:
        assert f"pip install 'peftcli[{extra}]'" in cli(*command, recipe, code=code)
