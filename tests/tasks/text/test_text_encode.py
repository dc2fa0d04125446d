from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chat_templates import trained
from examplekit import COLUMNS
from examplekit import outcome as outcome_of
from transformers import ByT5Tokenizer

from peftcli.data.rows import USED, Place, Row, Table
from peftcli.data.store import Outcome
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks import settings as task_settings
from peftcli.tasks.text.chat import IGNORED, Encoded
from peftcli.tasks.text.encode import CausalEncoder, Seq2SeqEncoder
from peftcli.tasks.text.findings import CUT_OFF, NO_TARGET, OVERLONG, Flag
from peftcli.tasks.text.formats import example_reader

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}]


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


def results(
    rows: list[dict[str, Any]], tokenizer: Any, encoder: type = CausalEncoder, **settings: Any
) -> list[Outcome | DataError]:
    """What became of each row; a row's error is among them."""
    read = example_reader(Table(Source(train="train.jsonl"), "train.jsonl", tuple(rows[0])))
    known = task_settings.CausalLMSettings if encoder is CausalEncoder else task_settings.Seq2SeqLMSettings
    encode = encoder(read, tokenizer, known(**settings))
    found: list[Outcome | DataError] = encode(
        [Row(values, Place("train.jsonl", line, line)) for line, values in enumerate(rows, 1)]
    )
    assert len(found) == len(rows)
    for each in found:
        if isinstance(each, Outcome):
            assert (each.reason == USED) == bool(each.examples)
            assert all(list(example.arrays) == list(COLUMNS) for example in each.examples)
    return found


def encode(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[Outcome]:
    """The same, where every row can be used."""
    found = results(rows, tokenizer, **options)
    for each in found:
        if isinstance(each, DataError):
            raise each
    return [each for each in found if isinstance(each, Outcome)]


def features(outcomes: list[Outcome]) -> list[dict[str, list[int]]]:
    return [example.arrays for outcome in outcomes for example in outcome.examples]


def texts(outcomes: list[Outcome], tokenizer: Any) -> list[list[str]]:
    return [trained(Encoded(**each), tokenizer) for each in features(outcomes)]


def test_pairs(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers(add_bos=True)
    outcomes = encode([pair("Q\n", "A"), pair("Q2\n", "Bee")], tokenizer)
    assert texts(outcomes, tokenizer) == [["A</s>"], ["Bee</s>"]]
    for outcome, feature in zip(outcomes, features(outcomes), strict=True):
        targets = sum(label != IGNORED for label in feature["labels"])
        assert outcome == outcome_of([feature], [targets], tokens=len(feature["input_ids"]))


@pytest.mark.parametrize(
    ("prompt", "completion", "differs"),
    [("Is it ", "Paris", True), ("Is it", " Paris", False), ("Is it ", "7", False), (" ", "Paris", False)],
)
def test_a_blank_that_the_completion_takes_from_its_prompt(
    prompt: str, completion: str, differs: bool, tokenizers: Callable[..., Any]
) -> None:
    [outcome] = encode([pair(prompt, completion)], tokenizers(add_bos=True))
    assert bool(outcome.flags & Flag.PROMPT_DIFFERS) == differs
    [outcome] = encode([pair(prompt, completion)], tokenizers(add_bos=True), train_on="all")
    assert not outcome.flags & Flag.PROMPT_DIFFERS


def test_a_line_that_an_answer_takes_from_what_the_template_asks_with(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("smollm")
    rows = [chat(CHAT[0], {**CHAT[1], "content": content}) for content in ("Hello", "\n\nHello")]
    assert [bool(each.flags & Flag.PROMPT_DIFFERS) for each in encode(rows, tokenizer)] == [False, True]


def test_train_on_all_of_a_pair(tokenizers: Callable[..., Any]) -> None:
    [outcome] = encode([pair("Q\n", "A")], tokenizers(), train_on="all")
    [feature] = features([outcome])
    assert feature["labels"] == feature["input_ids"]
    assert outcome.examples[0].num_targets == len(feature["input_ids"]) - 1  # nothing predicts the first token


def test_conversations_use_the_template(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("smollm")
    assert texts(encode([chat(*CHAT)], tokenizer), tokenizer) == [["A<|im_end|>"]]
    outcomes = encode([{"instruction": "Add", "output": "3", "input": "1 2"}], tokenizer)
    assert texts(outcomes, tokenizer) == [["3<|im_end|>"]]
    assert "user\nAdd\n\n1 2<|im_end|>" in tokenizer.decode(features(outcomes)[0]["input_ids"])
    [outcome] = encode([{"instruction": "Add", "output": "Three", "input": "1 2"}], tokenizers())
    text = tokenizer.decode(features([outcome])[0]["input_ids"])
    assert text == "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\nThree</s>"
    with pytest.raises(DataError, match="no chat template"):
        encode([chat(*CHAT)], tokenizers())


def test_a_refused_conversation_has_its_line_and_the_others_are_encoded(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("gemma")
    rows = [chat(*CHAT), chat({"role": "system", "content": "S"}, *CHAT), {"messages": 5}, chat(*CHAT)]
    good, refused, malformed, again = results(rows, tokenizer)
    assert isinstance(refused, DataError)
    assert isinstance(malformed, DataError)
    assert "System role not supported" in refused.message
    assert (refused.file, refused.line, malformed.line) == ("train.jsonl", 2, 3)
    assert [good] == [again] == encode([chat(*CHAT)], tokenizer)


def test_answers_that_nothing_ends_are_flagged(tokenizers: Callable[..., Any]) -> None:
    for rows, tokenizer in (([chat(*CHAT)], tokenizers("open_ended")), ([{"text": "ab"}], tokenizers(eos=None))):
        assert encode(rows, tokenizer)[0].flags & Flag.OPEN
    for rows, tokenizer in (([chat(*CHAT)], tokenizers("smollm")), ([{"text": "ab"}], tokenizers())):
        assert not encode(rows, tokenizer)[0].flags & Flag.OPEN


SHORT, LATE, LONG = pair("Q\n", "A"), pair("12345678", "A"), pair("Q\n", "987654321")


def test_overlong_rows_are_cut(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers()
    outcomes = encode([SHORT, LATE, LONG], tokenizer, max_length=8, overlong="truncate")
    assert texts(outcomes, tokenizer) == [["A</s>"], ["987654"]]
    assert [(each.reason, each.size, each.lost) for each in outcomes] == [
        (USED, 4, 0),
        (CUT_OFF, 10, 2),
        (USED, 12, 4),
    ]
    assert [each.flags for each in outcomes] == [0, *[Flag.TRUNCATED | Flag.ANSWER_CUT] * 2]


def test_a_cut_that_takes_no_trained_token_is_told_apart(tokenizers: Callable[..., Any]) -> None:
    turns = [*CHAT, {"role": "user", "content": "r" * 50}]
    [outcome] = encode([chat(*turns)], tokenizers("llama3"), max_length=30)
    assert (outcome.flags & (Flag.TRUNCATED | Flag.ANSWER_CUT), outcome.lost) == (Flag.TRUNCATED, 0)


def test_overlong_rows_are_dropped(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers()
    outcomes = encode([SHORT, LATE, LONG], tokenizer, max_length=8, overlong="drop")
    assert texts(outcomes, tokenizer) == [["A</s>"]]
    assert [each.reason for each in outcomes] == [USED, OVERLONG, OVERLONG]


@pytest.mark.parametrize("length", [7, 8, 11, 16, 30, 31, 39])
def test_overlong_rows_are_split_and_no_target_is_lost(tokenizers: Callable[..., Any], length: int) -> None:
    tokenizer = tokenizers()
    text = "9876543210" * 3
    [whole] = encode([{"text": text}], tokenizer)
    [split] = encode([{"text": text}], tokenizer, max_length=length, overlong="split")
    assert sum(each.num_targets for each in split.examples) == sum(each.num_targets for each in whole.examples)
    pieces = [each["input_ids"] for each in features([split])]
    assert all(len(piece) <= length for piece in pieces)
    joined = pieces[0] + [id_ for piece in pieces[1:] for id_ in piece[1:]]
    assert joined == features([whole])[0]["input_ids"]
    assert bool(split.flags & Flag.SPLIT) == (len(split.examples) > 1) == (length < whole.size)


def test_split_pieces_without_a_target_are_left_out(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers()
    [outcome] = encode([pair("1234567890" * 3, "Bee")], tokenizer, max_length=10, overlong="split")
    assert "".join(text for run in texts([outcome], tokenizer) for text in run) == "Bee</s>"
    assert len(outcome.examples) == 1
    assert outcome.flags == Flag.SPLIT | Flag.PIECES_LEFT_OUT


def test_overlong_error_has_its_line(tokenizers: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"12 tokens, more than dataset\.max_length: 8") as caught:
        encode([SHORT, LONG], tokenizers(), max_length=8, overlong="error")
    assert caught.value.line == 2


def test_exactly_max_length_is_not_overlong(tokenizers: Callable[..., Any]) -> None:
    [outcome] = encode([pair("Q\n", "98765")], tokenizers(), max_length=8, overlong="error")
    assert outcome == Outcome(outcome.examples, size=8)
    assert outcome.examples[0].size == 8


def test_rows_without_a_target(tokenizers: Callable[..., Any]) -> None:
    silent = [CHAT[0], {**CHAT[1], "train": False}]
    assert [each.reason for each in encode([chat(*CHAT), chat(*silent)], tokenizers("smollm"))] == [USED, NO_TARGET]


def seq2seq(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> list[Outcome]:
    return encode(rows, tokenizer, encoder=Seq2SeqEncoder, **settings)


def test_seq2seq(tokenizers: Callable[..., Any]) -> None:
    tokenizer = ByT5Tokenizer()  # adds EOS to source and target
    turns = [*CHAT, {"role": "user", "content": "r"}, {"role": "assistant", "content": "B"}]
    outcomes = [
        *seq2seq([pair("ab", "c")], tokenizer),
        *seq2seq([{"instruction": "Add", "output": "3", "input": "1 2", "system": "S"}], tokenizer),
        *seq2seq([chat(*CHAT), chat(*turns)], tokenizer),
    ]
    assert [tokenizer.decode(each["input_ids"]) for each in features(outcomes)] == [
        "ab</s>", "S\n\nAdd\n\n1 2</s>", "q</s>", "user: q\nassistant: A\nuser: r</s>",
    ]  # fmt: skip
    assert [tokenizer.decode(each["labels"]) for each in features(outcomes)] == ["c</s>", "3</s>", "A</s>", "B</s>"]
    assert [each.examples[0].num_targets for each in outcomes] == [2] * 4
    assert [each.size for each in outcomes] == [sum(map(len, each.values())) for each in features(outcomes)]

    outcomes = seq2seq([pair("ab", "c")], tokenizers())
    assert tokenizers().decode(features(outcomes)[0]["labels"]) == "c</s>"  # this one adds none by itself
    assert seq2seq([pair("ab", "c")], tokenizers(eos=None))[0].flags == Flag.OPEN


def test_seq2seq_with_a_chat_template(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("llama3", add_bos=True)
    [feature] = features(seq2seq([chat(*CHAT)], tokenizer))
    assert feature["input_ids"] == tokenizer.apply_chat_template(
        CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )


def test_seq2seq_overlong() -> None:
    tokenizer = ByT5Tokenizer()
    rows = [pair("ab", "c"), pair("123456789", "c"), pair("ab", "123456789")]
    outcomes = seq2seq(rows, tokenizer, max_length=6)
    assert [tokenizer.decode(each["input_ids"]) for each in features(outcomes)] == ["ab</s>", "12345</s>", "ab</s>"]
    assert [tokenizer.decode(each["labels"]) for each in features(outcomes)] == ["c</s>", "c</s>", "123456"]
    assert [each.lost for each in outcomes] == [0, 0, 4]
    assert [each.flags for each in outcomes] == [0, Flag.TRUNCATED, Flag.TRUNCATED | Flag.ANSWER_CUT]
    outcomes = seq2seq(rows, tokenizer, max_length=6, overlong="drop")
    assert [each.reason for each in outcomes] == [USED, OVERLONG, OVERLONG]
    with pytest.raises(DataError, match="10 tokens") as caught:
        seq2seq(rows, tokenizer, max_length=6, overlong="error")
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "a"}, {}, "no source and target"),
        (chat(CHAT[1]), {}, "no question followed by a trained answer"),
        (chat(CHAT[0], {**CHAT[1], "train": False}), {}, "no question followed by a trained answer"),
    ],
)
def test_seq2seq_refused(row: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        seq2seq([row], ByT5Tokenizer(), **settings)
