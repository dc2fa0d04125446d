"""Rows of answers: every form of them gives the tokens of its conversations or texts, and what is odd is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from classifierkit import encoded, open_task, table_of

from peftcli.errors import DataError
from peftcli.tasks.text.answer_inputs import split
from peftcli.tasks.text.answers import _shared
from peftcli.tasks.text.findings import Flag

ASK = {"role": "user", "content": "What follows seven?"}
SYSTEM, MORE = {"role": "system", "content": "Count."}, {"role": "user", "content": "And then?"}
YES, NO = {"role": "assistant", "content": "tea"}, {"role": "assistant", "content": "the moon"}
CHATS = [[ASK, YES], [ASK, NO]]
FORMS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "messages": ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, CHATS),
    "messages as JSON in texts": (
        {"prompt": json.dumps([ASK]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
        CHATS,
    ),
    "texts that hold other JSON": (
        {"prompt": "[", "chosen": '[{"tea": 1}]', "rejected": "[1]"},
        ['[[{"tea": 1}]', "[[1]"],
    ),
    "whole conversations": ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, CHATS),
    "the prompt twice": ({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, CHATS),
    "the prompt as text and messages around it": (
        {"prompt": ASK["content"], "chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, ASK, NO]},
        [[SYSTEM, *chat] for chat in CHATS],
    ),
    "the prompt as text before shared turns": (
        {"prompt": ASK["content"], "chosen": [NO, MORE, YES], "rejected": [NO, MORE, NO]},
        [[ASK, NO, MORE, YES], [ASK, NO, MORE, NO]],
    ),
    "the prompt without its system turn in the answers": (
        {"prompt": [SYSTEM, ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        [[SYSTEM, *chat] for chat in CHATS],
    ),
    "the prompt in one answer": ({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [NO]}, CHATS),
    "the prompt as text": ({"prompt": ASK["content"], "chosen": [YES], "rejected": [NO]}, CHATS),
    "texts": ({"prompt": "sun", "chosen": " tea", "rejected": " moon"}, ["sun tea", "sun moon"]),
    "whole texts": ({"chosen": "sun mill tea", "rejected": "sun mill moon"}, ["sun mill tea", "sun mill moon"]),
    "a column of system": (
        {"system": "Count.", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        [[SYSTEM, *chat] for chat in CHATS],
    ),
    "a column of system beside another system turn, of parts": (
        {
            "system": "Sing.",
            "prompt": [{**SYSTEM, "content": [{"text": "Count."}]}, ASK],
            "chosen": [YES],
            "rejected": [NO],
        },
        [[SYSTEM, *chat] for chat in CHATS],
    ),
    "a column of system that is no text": (
        {"system": ["x"], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        CHATS,
    ),
    "a column of system and texts": (
        {"system": "moon", "prompt": "sun", "chosen": " tea", "rejected": " mill"},
        ["moon\n\nsun tea", "moon\n\nsun mill"],
    ),
    "one begins the other": ({"chosen": "sun tea", "rejected": "sun tea tea"}, ["sun tea", "sun tea tea"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tokens_of_both_answers(form: str) -> None:
    row, expected = FORMS[form]
    task = open_task("reward", "chat")
    [found] = encoded(task, [row])
    tokenizer = task.processor
    wanted = [
        tokenizer(each)["input_ids"] + [tokenizer.eos_token_id]
        if isinstance(each, str)
        else tokenizer.apply_chat_template(each, return_dict=False)
        for each in expected
    ]
    assert [each.tolist() for each in split(found, "input_ids")] == wanted
    assert (found.size, found.num_targets) == (sum(map(len, wanted)), 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "are the same"),
        ({"chosen": [ASK, YES], "rejected": [ASK, {**YES, "name": "Ada"}]}, "a key that the chat template leaves out"),
        ({"prompt": "Count.", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "in no user turn of chosen"),
        (
            {"prompt": "sun", "chosen": [SYSTEM, YES], "rejected": [{**SYSTEM, "content": "Sing."}, NO]},
            "begins with other turns than the other answer",
        ),
        (
            {"prompt": [SYSTEM, ASK], "chosen": [{**SYSTEM, "content": "Sing."}, ASK, YES], "rejected": [NO]},
            "begins with a system turn that is not the prompt's",
        ),
        (
            {"prompt": [ASK], "chosen": [MORE, YES], "rejected": [NO]},
            "begins with a user turn that is not the prompt's",
        ),
        ({"prompt": "sun", "chosen": "", "rejected": " tea"}, "is empty"),
        ({"chosen": [ASK, YES], "rejected": [ASK, YES, ASK]}, "no assistant turn of its own"),
        ({"chosen": [ASK, YES], "rejected": "tea"}, "expected a list of turns"),
        ({"system": 3, "prompt": "sun", "chosen": "tea", "rejected": "mill"}, "expected text, found a number"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_row(row: dict[str, Any], said: str) -> None:
    good = FORMS["messages" if isinstance(row["chosen"], list) else "texts"][0]
    fine, bad = encoded(open_task("reward", "chat"), [good, row])
    assert not isinstance(fine, DataError)
    assert isinstance(bad, DataError)
    assert said in bad.message
    assert bad.line == 2


@pytest.mark.parametrize(
    ("before", "no_prompt"), [([], True), ([SYSTEM], True), ([ASK], False), ([NO, MORE], False), ([SYSTEM, ASK], False)]
)
def test_answers_that_follow_no_turn_are_known(before: list[Any], no_prompt: bool) -> None:
    task = open_task("reward", "chat")
    table, rows = table_of(
        [{"question": "How many?", "chosen": [*before, YES], "rejected": [*before, {**YES, "content": "5"}]}]
    )
    [found] = task.encode(list(rows), task.read(table))
    assert bool(found.flags & Flag.NO_PROMPT) is no_prompt


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("sun mill tea", "sun mill team", "sun mill"),
        ("caf\u00e9", "caf\u00e9t\u00e9ria", ""),  # a word stays whole, in letters of any script with blanks
        ("\u041f\u0440\u0438\u0432\u0435\u0442", "\u041f\u0440\u0438\u044f\u0442\u043d\u043e", ""),
        ("\u5929\u84dd\uff1f\u6563\u5c04", "\u5929\u84dd\uff1f\u4e0d", "\u5929\u84dd\uff1f"),
    ],
)
def test_what_two_texts_begin_with(one: str, other: str, shared: str) -> None:
    assert one[: _shared(one, other)] == shared


def test_pairs_that_differ_beyond_the_cut_are_left_out() -> None:
    task = open_task("reward", "chat", max_length=6)
    long = "sun " * 9
    table, rows = table_of([{"prompt": long, "chosen": "tea", "rejected": "moon"}, FORMS["texts"][0]])
    cut, whole = task.encode(rows, task.read(table))
    assert (cut.examples, cut.reason in task.advice, cut.lost > 0) == ([], True, True)
    assert whole.examples


def test_the_limit_of_the_base_model_is_not_called_a_setting() -> None:
    task = open_task("reward", "chat", max_length=4096, overlong="error")
    limit = f"the base model reads {task.max_length} tokens"
    assert task.max_length < 4096
    assert all(limit in advice for advice in task.advice.values())
    [error] = encoded(task, [{"prompt": "sun " * 900, "chosen": "tea", "rejected": "moon"}])
    assert f"more than the {task.max_length} that the base model reads" in error.message


@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_a_prompt_and_its_completion_may_be_messages(train_on: str) -> None:
    """As TRL has them: the answers before are not trained."""
    task = open_task("causal_lm", "chat", train_on=train_on)
    before = {**YES, "train": False} if train_on == "answers" else YES
    [wanted] = encoded(task, [{"messages": [ASK, before, ASK, NO]}])
    [found] = encoded(task, [{"prompt": [ASK, YES, ASK], "completion": [NO]}])
    for name in ("input_ids", "labels"):
        assert list(found.arrays[name]) == list(wanted.arrays[name])
    assert found.num_targets == wanted.num_targets > 0
    [error] = encoded(task, [{"prompt": [ASK], "completion": [ASK]}])
    assert "assistant turn" in error.message
    for prompt in (7, ["a"]):
        [error] = encoded(task, [{"prompt": prompt, "completion": [NO]}])
        assert (error.key, error.message) == ("prompt", "expected messages, or a text")
