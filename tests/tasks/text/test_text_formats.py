from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from peftcli.data.rows import Place, Row, Table
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks.text.formats import (
    AlpacaExample,
    ChatExample,
    PairExample,
    detect_format,
    example_reader,
)

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def examples(*rows: dict[str, Any], lines: bool = True, **settings: Any) -> list[Any]:
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    table = Table(Source(train="train.jsonl", **settings), "train.jsonl", columns, first=rows[0])
    read = example_reader(table)
    return [read(Row(row, Place("train.jsonl", at, at if lines else None))) for at, row in enumerate(rows, 1)]


def refused(*rows: dict[str, Any], **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        examples(*rows, **settings)
    assert len(str(caught.value).splitlines()) <= 6
    return caught.value


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_pair_keeps_white_space_and_other_columns_do_not_matter() -> None:
    assert examples({"prompt": "Q: ", "completion": " a\n", "id": 7}) == [PairExample("Q: ", " a\n")]
    assert examples({"prompt": "", "completion": "a"}) == [PairExample("", "a")]


def test_alpaca() -> None:
    plain, full = examples(
        {"instruction": "Add", "input": "", "output": "3"},
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be kind."},
    )
    assert plain == AlpacaExample("Add", "3")
    assert full.chat().messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Add\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert plain.pair() == PairExample("### Instruction:\nAdd\n\n### Response:\n", "3")
    assert full.pair() == PairExample("Be kind.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n", "3")
    assert examples({"instruction": "Add", "input": None, "output": "3"}) == [plain]


@pytest.mark.parametrize("history", [[["Hi", "Hello"], ["1?", "1."]], '[["Hi", "Hello"], ["1?", "1."]]'])
def test_the_history_of_an_instruction_is_earlier_turns(history: Any) -> None:
    [example] = examples({"instruction": "2?", "output": "2.", "history": history})
    assert [turn["content"] for turn in example.chat().messages] == ["Hi", "Hello", "1?", "1.", "2?", "2."]
    assert [turn["role"] for turn in example.chat().messages] == ["user", "assistant"] * 3
    assert example.source() == "Hi\n\nHello\n\n1?\n\n1.\n\n2?"
    assert example.pair().prompt.startswith("### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\n1?")
    assert examples({"instruction": "2?", "output": "2.", "history": "a text of another kind"})[0].history == ()
    for first in ([["Hi"]], [["Hi", " "]]):
        assert refused({"instruction": "2?", "output": "2.", "history": first}).key.startswith("history[0]")


def test_turns_that_a_column_which_is_read_repeats_are_not_dropped() -> None:
    turns = [{"role": "user", "content": 'It\'s\n"1"?'}, {"role": "assistant", "content": "Yes."}]
    for values in (
        {"messages": turns, "prompt": turns[:1]},
        {"messages": turns, "rejected": [*turns[:1], {"role": "assistant", "content": "No."}]},
        {"text": "Ada lives in Paris.", "entities": [["Paris", "LOC"]]},
        {"text": 'User: It\'s\n"1"?\nAssistant: Yes.', "conversation": turns},
    ):
        row = Row(values, Place("a.jsonl", 1))
        read = example_reader(Table(Source(train="a.jsonl"), "a.jsonl", tuple(values), first=values))
        assert not read.drops_turns(row)
        assert read.drops_turns(replace(row, values=values | {"history": [["It's", "No."]]}))


def test_messages_keep_what_the_template_reads_and_lose_nulls() -> None:
    user = {"role": "user", "content": "x", "tool_calls": None, "name": None}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "3", "tool_call_id": "1"}
    answer = {"role": "assistant", "content": "it is 3", "reasoning_content": "hm"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    [example] = examples({"messages": [user, call, tool, answer], "tools": tools})
    assert example == ChatExample(
        [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALL]}, tool, answer], tools
    )
    [text] = examples({"messages": [user, answer], "tools": '[{"type": "function"}]'})
    assert text.tools == [{"type": "function"}]
    [each] = examples({"messages": [user, answer], "tools": ['{"type": "function"}', {"type": "b"}]})
    assert each.tools == [{"type": "function"}, {"type": "b"}]


def test_contents_of_parts_are_one_text_where_all_are_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    [example] = examples(turns(("user", parts), ("assistant", "c")))
    assert example.messages[0] == {"role": "user", "content": "ab"}
    for other in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "image", "text": "alt"}):
        row = turns(("user", [*parts, other]), ("assistant", "c"))
        assert "expected text, found a list" in refused(row).message


@pytest.mark.parametrize("own", [{"content": "Be brief."}, {"content": [{"text": "Be kind."}], "train": False}])
def test_a_column_of_system_is_read_beside_no_system_turn_and_where_it_is_text(own: dict[str, Any]) -> None:
    row = turns(("user", "a"), ("assistant", "b"))
    said = {"role": "system", "content": "Be kind."}
    for column, first in (("Be kind.", [said]), (["Be kind."], []), (None, [])):
        assert examples({**row, "system": column}) == [ChatExample([*first, *row["messages"]])]
    [example] = examples({"messages": [{"role": "system", **own}, *row["messages"]], "system": "Be kind."})
    assert [turn["role"] for turn in example.messages] == ["system", "user", "assistant"]
    assert "expected text, found a list" in refused({**row, "s": ["x"]}, columns={"system": "s"}).message


@pytest.mark.parametrize("keys", [("role", "content"), ("role", "value"), ("from", "content")])
def test_keys_of_messages_and_of_sharegpt_mixed(keys: tuple[str, str]) -> None:
    row = turns(("user", "a"), ("assistant", "b"))
    mixed = [dict(zip(keys, turn.values(), strict=True)) for turn in row["messages"]]
    assert examples({"conversations": mixed}) == [ChatExample(row["messages"])]


def test_train_false() -> None:
    row = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row["messages"][1]["train"] = False
    row["messages"][3]["train"] = True
    [example] = examples(row)
    assert example.untrained == {1}
    assert all("train" not in message for message in example.messages)


def test_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b", "train": False},
            {"from": "observation", "value": "c"},
            {"from": "assistant", "value": "d"},
        ],
        "system": "Be kind.",
    }
    [example] = examples(row)
    assert example == ChatExample(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "tool", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
        None,
        frozenset({2}),
    )


def test_renamed_columns() -> None:
    mapping = {"prompt": "question", "completion": "answer"}
    assert examples({"question": "a", "answer": "b", "prompt": 5}, columns=mapping) == [PairExample("a", "b")]
    error = refused({"question": "a", "answer": " "}, columns=mapping)
    assert (error.file, error.line, error.key) == ("train.jsonl", 1, "answer")
    error = refused({"chat": [{"role": "user", "content": 1}]}, columns={"messages": "chat"})
    assert error.key == "chat[0].content"


def test_two_formats_fit() -> None:
    row = {"instruction": "a", "output": "b", "text": "c"}
    assert detect_format(["completion", "prompt"]) == "prompt_completion"
    error = refused(row)
    assert "text and alpaca" in error.message
    assert "{format: alpaca}" in str(error)
    assert examples(row, format="alpaca") == [AlpacaExample("a", "b")]


def test_the_keys_of_objects_are_named_as_columns() -> None:
    row = {"id": 1, "translation": {"en": "Hi", "fr": "Salut"}}
    table = Table(Source(train="a.jsonl"), "a.jsonl", tuple(row), first=row)
    with pytest.raises(DataError, match=r"Keys of objects are columns too: translation\.en, translation\.fr\."):
        example_reader(table)


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ({"promt": "a", "completion": "b"}, "format: prompt_completion, columns: {prompt: promt}"),
        ({"question": "a", "answer": "b", "response": "c"}, "columns: {prompt: question, completion: answer}"),
        ({"conversation": []}, "columns: {messages: conversation}"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "for task: preference"),
        ({"foo": 1, "bar": 2}, "columns: {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}"),
        ({f"column{index}": 1 for index in range(2000)}, "column11, ..."),
    ],
)
def test_no_format_fits(row: dict[str, Any], written: str) -> None:
    error = refused(row)
    text = str(error)
    assert error.file == "train.jsonl"
    assert next(iter(row)) in text
    assert "alpaca: instruction, output" in text
    assert written in text
    assert len(text) < 1000
    assert len(text.splitlines()) <= 6


def test_named_format_lacks_a_column() -> None:
    error = refused({"promt": "a", "completion": "b"}, format="prompt_completion")
    assert "needs prompt; the columns are: promt, completion" in error.message
    assert "columns: {prompt: promt}" in str(error)


@pytest.mark.parametrize(
    ("columns", "key", "hint"),
    [
        ({"prompt": "qestion"}, "dataset.columns.prompt", "Closest: question"),
        ({"promt": "question"}, "dataset.columns.promt", "Closest: prompt"),
        ({"tools": "question"}, "dataset.columns.tools", None),
    ],
)
def test_bad_column_names(columns: dict[str, str], key: str, hint: str) -> None:
    error = refused({"question": "a", "prompt": "x", "completion": "b"}, columns=columns)
    assert error.key == key
    assert error.hint == hint


GOOD_CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "key", "message"),
    [
        ({"text": None}, "text", "expected text, found null"),
        ({"text": " \n"}, "text", "is empty"),
        ({"prompt": "a", "completion": ""}, "completion", "is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input", "found a number"),
        ({"messages": "x"}, "messages", "expected a list of turns, found a string"),
        ({"messages": "[{"}, "messages", "is not JSON"),
        ({"messages": '[{"role": "user", "role": "user"}]'}, "messages", "the key 'role' occurs twice"),
        ({"messages": ["x"]}, "messages[0]", "expected an object, found a string"),
        (turns(("user", "a")), "messages", "no assistant turn"),
        (turns(("human", "a"), ("assistant", "b")), "messages[0].role", "unknown role: 'human'"),
        (turns(("user", None), ("assistant", "b")), "messages[0].content", "found null"),
        (turns(("user", "a"), ("assistant", " ")), "messages[1].content", "is empty"),
        ({"messages": [{"input": "a", "output": "b"}]}, "messages[0].role", "the turn has: input, output"),
        ({"messages": [*GOOD_CHAT, {"role": "user", "content": "a", "train": True}]}, "messages[2].train", "never"),
        ({"messages": [{**GOOD_CHAT[1], "train": "no"}]}, "messages[0].train", "expected true or false"),
        ({"messages": [{**GOOD_CHAT[1], "tool_calls": ["x"]}]}, "messages[0].tool_calls", "expected a list of"),
        ({"messages": GOOD_CHAT, "tools": "{"}, "tools", "is not JSON"),
        ({"messages": GOOD_CHAT, "tools": [1]}, "tools", "expected a list of objects"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "conversations[0].from", "unknown role: 'robot'"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value", "found null"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "conversations", "contains no assistant turn"),
    ],
)
def test_bad_row(row: dict[str, Any], key: str, message: str) -> None:
    good: dict[str, Any] = {
        "text": {"text": "a"},
        "prompt": {"prompt": "a", "completion": "b"},
        "instruction": {"instruction": "a", "output": "b"},
        "messages": {"messages": GOOD_CHAT},
        "conversations": {"conversations": [{"from": "gpt", "value": "x"}]},
    }[next(iter(row))]
    error = refused(good, row)
    assert (error.file, error.line, error.key) == ("train.jsonl", 2, key)
    assert message in error.message


def test_turns_may_be_json_in_a_text() -> None:
    """As CSV files have them."""
    expected = examples({"messages": GOOD_CHAT})
    assert examples({"messages": json.dumps(GOOD_CHAT, indent=1)}) == expected
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert examples({"conversations": json.dumps(sharegpt)}) == expected


def test_a_row_that_lacks_a_column_names_its_own() -> None:
    error = refused({"text": "a"}, {"txt": "b"})
    assert (error.line, error.key, "txt" in error.message) == (2, "text", True)


def test_rows_without_lines_are_counted() -> None:
    with pytest.raises(DataError, match="row 2: is empty"):
        examples({"text": "a"}, {"text": ""}, lines=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"a": 1, "a": 2}', "arguments: the key 'a' occurs twice"),
        (r'{"a": "\ud800"}', "arguments: contains half of a surrogate pair"),
        ({"a": date(2026, 1, 2)}, "is not JSON: Object of type date"),
    ],
)
def test_arguments_and_tools_are_json_as_strict_as_rows(arguments: Any, message: str) -> None:
    call = {"function": {"name": "add", "arguments": arguments}}
    error = refused({"messages": [GOOD_CHAT[0], {"role": "assistant", "tool_calls": [call]}]})
    assert (error.key, message in error.message) == ("messages[1].tool_calls", True)
    tools = f"[{arguments}]" if isinstance(arguments, str) else [arguments]
    error = refused({"messages": GOOD_CHAT, "tools": tools})
    assert (error.key, message.removeprefix("arguments: ") in error.message) == ("tools", True)


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
@pytest.mark.parametrize("wrapped", [True, False])
def test_arguments_in_a_string_are_what_the_string_says(arguments: Any, wrapped: bool) -> None:
    function = {"name": "add", "arguments": arguments}
    call = {"type": "function", "function": function} if wrapped else function
    [example] = examples({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]})
    [written] = example.messages[1]["tool_calls"]
    assert written.get("function", written) == {"name": "add", "arguments": {"a": 1}}


def test_tool_calls_of_sharegpt_are_read() -> None:
    [example] = examples({"conversations": [{"from": "gpt", "value": None, "tool_calls": [CALL]}]})
    assert example.messages == [{"role": "assistant", "tool_calls": [CALL]}]


def test_openai_weights_say_what_is_trained() -> None:
    turns = [{**GOOD_CHAT[0]}, {**GOOD_CHAT[1], "weight": 0}, {**GOOD_CHAT[0]}, {**GOOD_CHAT[1], "weight": 1}]
    [example] = examples({"messages": turns})
    assert example.untrained == {1}
    assert all("weight" not in message for message in example.messages)
    other_names = {"role": "from", "content": "value"}
    sharegpt = [{other_names.get(key, key): value for key, value in turn.items()} for turn in turns]
    assert examples({"conversations": sharegpt}) == [example]


@pytest.mark.parametrize(
    ("more", "key", "message"),
    [
        ({"trian": False}, "trian", "did you mean train"),
        ({"loss": False}, "loss", "did you mean train"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call", "did you mean tool_calls"),
        ({"weight": 2}, "weight", "expected 0 or 1"),
    ],
)
def test_keys_that_would_be_ignored_in_silence(more: dict[str, Any], key: str, message: str) -> None:
    error = refused({"messages": [GOOD_CHAT[0], {**GOOD_CHAT[1], **more}]})
    assert error.key == f"messages[1].{key}"
    assert message in error.message
    error = refused({"conversations": [{"from": "gpt", "value": "b", **more}]})
    assert (error.key, message in error.message) == (f"conversations[0].{key}", True)


@pytest.mark.parametrize(
    ("columns", "name", "names"),
    [
        (["question", "answer"], "prompt_completion", {"prompt": "question", "completion": "answer"}),
        (["input", "output"], "prompt_completion", {"prompt": "input", "completion": "output"}),
        (["id", "Prompt", "Response"], "prompt_completion", {"prompt": "Prompt", "completion": "Response"}),
        (
            ["system_prompt", "question", "response"],
            "prompt_completion",
            {"system": "system_prompt", "prompt": "question", "completion": "response"},
        ),
        (["instruction", "response"], "alpaca", {"output": "response"}),
        (["instruction", "context", "response"], "alpaca", {"output": "response", "input": "context"}),
        (["document", "summary"], "prompt_completion", {"prompt": "document", "completion": "summary"}),
        (["content"], "text", {"text": "content"}),
    ],
)
def test_columns_that_leave_no_choice_are_read(columns: list[str], name: str, names: dict[str, str]) -> None:
    table = Table(Source(train="a"), "a", tuple(columns), first=dict.fromkeys(columns, "x"))
    reader = example_reader(table)
    assert (reader.name, {key: column for key, column in reader.names.items() if column in columns}) == (
        name,
        {key: key for key in reader.names if key in columns} | names,
    )
    assert all(f"{column} as {key}" in reader.implied for key, column in names.items())


@pytest.mark.parametrize(
    "columns",
    [
        ["question", "context", "answer"],  # the context may be a part of the prompt
        ["question", "answer", "response"],
        ["content", "label"],
        ["chosen", "rejected", "question", "answer"],
    ],
)
def test_columns_that_leave_a_choice_are_an_error(columns: list[str]) -> None:
    table = Table(Source(train="a"), "a", tuple(columns), first=dict.fromkeys(columns, "x"))
    with pytest.raises(DataError, match="no format fits"):
        example_reader(table)
