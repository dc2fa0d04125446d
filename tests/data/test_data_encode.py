from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chat_templates import trained
from transformers import ByT5Tokenizer

from peftcli.data.chat import IGNORED, Encoded
from peftcli.data.encode import CUT_OFF, NO_TARGET, OVERLONG, encode_examples, encode_seq2seq
from peftcli.data.formats import AlpacaExample, ChatExample, Example, PairExample, TextExample
from peftcli.data.load import Rows
from peftcli.errors import DataError
from peftcli.schema import Dataset

CHAT = ChatExample([{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}])


def rows_for(examples: list[Any]) -> Rows:
    return Rows([{}] * len(examples), (), "train.jsonl", list(range(1, len(examples) + 1)), "abc")


def encode(examples: list[Example], tokenizer: Any, **settings: Any) -> Any:
    return encode_examples(examples, rows_for(examples), tokenizer, Dataset(train="train.jsonl", **settings))


def encode_sources(examples: list[Example], tokenizer: Any, **settings: Any) -> Any:
    return encode_seq2seq(examples, rows_for(examples), tokenizer, Dataset(train="train.jsonl", **settings))


def texts(features: list[dict[str, list[int]]], tokenizer: Any) -> list[list[str]]:
    return [trained(Encoded(**each), tokenizer) for each in features]


def test_pairs(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers(add_bos=True)
    features, report = encode([PairExample("Q\n", "A"), PairExample("Q2\n", "Bee")], tokenizer)
    assert texts(features, tokenizer) == [["A</s>"], ["Bee</s>"]]
    tokens = sum(len(each["input_ids"]) for each in features)
    targets = sum(label != IGNORED for each in features for label in each["labels"])
    assert report.as_dict() == {
        "files": ["train.jsonl"],
        "sha256": {"train.jsonl": "abc"},
        "rows": 2,
        "used": 2,
        "dropped": {},
        "truncated": 0,
        "tokens": tokens,
        "targets": targets,
    }
    assert report.warnings == []


def test_train_on_all_of_a_pair(tokenizers: Callable[..., Any]) -> None:
    [feature], report = encode([PairExample("Q\n", "A")], tokenizers(), train_on="all")
    assert feature["labels"] == feature["input_ids"]
    assert report.targets == len(feature["input_ids"]) - 1  # nothing predicts the first token


def test_conversations_use_the_template(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("smollm")
    features, report = encode([CHAT, AlpacaExample("Add", "3", "1 2")], tokenizer)
    assert texts(features, tokenizer) == [["A<|im_end|>"], ["3<|im_end|>"]]
    assert "user\nAdd\n\n1 2<|im_end|>" in tokenizer.decode(features[1]["input_ids"])
    assert report.warnings == []


def test_many_conversations_are_each_what_they_are_alone(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("llama3")
    many: list[Example] = [
        ChatExample([{"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": f"A{at} " * (at % 7 + 1)}])
        for at in range(1100)
    ]
    features, report = encode(many, tokenizer)
    assert report.used == 1100
    for at in (0, 511, 512, 1099):
        assert features[at] == encode([many[at]], tokenizer)[0][0]


def test_alpaca_without_a_template(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers()
    features, _ = encode([AlpacaExample("Add", "Three", "1 2")], tokenizer)
    text = tokenizer.decode(features[0]["input_ids"])
    assert text == "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\nThree</s>"
    assert texts(features, tokenizer) == [["Three</s>"]]


def test_conversations_without_a_template_are_refused(tokenizers: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="no chat template") as caught:
        encode([CHAT], tokenizers())
    assert caught.value.file == "train.jsonl"
    assert "prompt and completion" in str(caught.value)


def test_a_refused_conversation_has_its_line(tokenizers: Callable[..., Any]) -> None:
    bad = ChatExample([{"role": "system", "content": "S"}, *CHAT.messages])
    with pytest.raises(DataError, match="System role not supported") as caught:
        encode([CHAT, bad], tokenizers("gemma"))
    assert (caught.value.file, caught.value.line) == ("train.jsonl", 2)


def test_answers_that_nothing_ends_give_a_warning(tokenizers: Callable[..., Any]) -> None:
    assert "end-of-turn" in encode([CHAT], tokenizers("open_ended"))[1].warnings[0]
    assert "no EOS token" in encode([TextExample("ab")], tokenizers(eos=None))[1].warnings[0]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_overlong(tokenizers: Callable[..., Any], overlong: str) -> None:
    tokenizer = tokenizers()
    short, late, long = PairExample("Q\n", "A"), PairExample("12345678", "A"), PairExample("Q\n", "987654321")
    features, report = encode([short, late, long], tokenizer, max_length=8, overlong=overlong)
    if overlong == "drop":
        assert texts(features, tokenizer) == [["A</s>"]]
        assert (report.used, report.truncated, report.dropped) == (1, 0, {OVERLONG: 2})
    else:
        assert texts(features, tokenizer) == [["A</s>"], ["987654"]]
        assert (report.used, report.truncated, report.dropped) == (2, 1, {CUT_OFF: 1})
    assert report.rows == 3
    assert report.tokens == sum(len(each["input_ids"]) for each in features)


def test_overlong_error_has_its_line(tokenizers: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"12 tokens, more than dataset\.max_length: 8") as caught:
        encode([PairExample("Q\n", "A"), PairExample("Q\n", "987654321")], tokenizers(), max_length=8, overlong="error")
    assert caught.value.line == 2


def test_exactly_max_length_is_not_overlong(tokenizers: Callable[..., Any]) -> None:
    features, report = encode([PairExample("Q\n", "98765")], tokenizers(), max_length=8, overlong="error")
    assert len(features[0]["input_ids"]) == 8
    assert report.truncated == 0


def test_zero_trained_tokens(tokenizers: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="zero trained tokens") as caught:
        encode([PairExample("12345678", "A")] * 2, tokenizers(), max_length=8)
    assert f"2 {CUT_OFF}" in caught.value.message
    assert "max_length: 8" in str(caught.value)
    assert caught.value.file == "train.jsonl"

    silent = ChatExample(CHAT.messages, None, frozenset({1}))
    with pytest.raises(DataError, match=f"1 {NO_TARGET}"):
        encode([silent], tokenizers("smollm"))
    assert encode([CHAT, silent], tokenizers("smollm"))[1].dropped == {NO_TARGET: 1}


def test_seq2seq(tokenizers: Callable[..., Any]) -> None:
    tokenizer = ByT5Tokenizer()  # adds EOS to source and target
    turns = [*CHAT.messages, {"role": "user", "content": "r"}, {"role": "assistant", "content": "B"}]
    features, report = encode_sources(
        [PairExample("ab", "c"), AlpacaExample("Add", "3", "1 2", "S"), CHAT, ChatExample(turns)], tokenizer
    )
    assert [tokenizer.decode(each["input_ids"]) for each in features] == [
        "ab</s>", "S\n\nAdd\n\n1 2</s>", "q</s>", "user: q\nassistant: A\nuser: r</s>",
    ]  # fmt: skip
    assert [tokenizer.decode(each["labels"]) for each in features] == ["c</s>", "3</s>", "A</s>", "B</s>"]
    assert report.targets == 8
    assert report.tokens == sum(len(each["input_ids"]) + len(each["labels"]) for each in features)

    features, _ = encode_sources([PairExample("ab", "c")], tokenizers())
    assert tokenizers().decode(features[0]["labels"]) == "c</s>"  # this one adds none by itself


def test_seq2seq_with_a_chat_template(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("llama3", add_bos=True)
    [feature], _ = encode_sources([CHAT], tokenizer)
    assert feature["input_ids"] == tokenizer.apply_chat_template(
        CHAT.messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )


def test_seq2seq_overlong() -> None:
    tokenizer = ByT5Tokenizer()
    examples: list[Example] = [PairExample("ab", "c"), PairExample("123456789", "c"), PairExample("ab", "123456789")]
    features, report = encode_sources(examples, tokenizer, max_length=6)
    assert [tokenizer.decode(each["input_ids"]) for each in features] == ["ab</s>", "12345</s>", "ab</s>"]
    assert [tokenizer.decode(each["labels"]) for each in features] == ["c</s>", "c</s>", "123456"]
    assert (report.used, report.truncated) == (3, 2)
    features, report = encode_sources(examples, tokenizer, max_length=6, overlong="drop")
    assert (len(features), report.dropped) == (1, {OVERLONG: 2})
    with pytest.raises(DataError, match="10 tokens") as caught:
        encode_sources(examples, tokenizer, max_length=6, overlong="error")
    assert caught.value.line == 2
    with pytest.raises(DataError, match="zero trained tokens"):
        encode_sources(examples[1:], tokenizer, max_length=6, overlong="drop")


@pytest.mark.parametrize(
    ("example", "settings", "message"),
    [
        (TextExample("a"), {}, "no source and target"),
        (ChatExample(CHAT.messages[1:]), {}, "no question with a trained answer"),
        (ChatExample(CHAT.messages, None, frozenset({1})), {}, "no question with a trained answer"),
        (PairExample("a", "b"), {"train_on": "all"}, "trained on the target only"),
    ],
)
def test_seq2seq_refused(example: Example, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_sources([example], ByT5Tokenizer(), **settings)
