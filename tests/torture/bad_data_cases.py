"""Data that are wrong: each with what the message must name, the file and the line or the key, and words of it."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hostile_data import (
    ANSWER,
    BAD_CONTENT,
    BAD_FILES,
    BAD_RECORDS,
    BAD_ROWS,
    IN_LISTS,
    PACKERS,
    SPECIAL,
    USER,
    parquet,
    turns,
    zstd,
)

GOOD_ROWS = [{"prompt": f"What follows {word}?", "completion": f"after {word}"} for word in ("sun", "moon", "tea")]
CHAT = turns(USER, ANSWER)


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


GOOD = lines(*GOOD_ROWS)


@dataclass(frozen=True)
class Case:
    """Data that no run can use."""

    files: dict[str, bytes]
    says: str
    """Words of the message."""
    file: str | None = "data.jsonl"
    """What the message must name; None: no file is to blame."""
    line: int | None = None
    key: str | None = None
    dataset: str = "train: data.jsonl"
    """The recipe's section."""
    setup: Callable[[Path], object] = lambda folder: None
    """Makes what is no file."""
    task: str = "causal_lm"
    code: int = 3
    """2 where the recipe names what is not there."""
    more: dict[str, str] = field(default_factory=dict)
    """Other settings of the recipe."""


def data(content: str | bytes, says: str, name: str = "data.jsonl", dataset: str = "", **rest: Any) -> Case:
    """One file."""
    raw = content if isinstance(content, bytes) else content.encode()
    return Case({name: raw}, says, rest.pop("file", name), dataset=dataset or f"train: {name}", **rest)


def rows(*values: Any, says: str, line: int = 1, **rest: Any) -> Case:
    return data(lines(*values), says, line=line, **rest)


def settings(dataset: str, says: str, content: bytes = GOOD, **rest: Any) -> Case:
    return data(content, says, dataset=dataset, **rest)


def table(says: str, **columns: Any) -> Case:
    return data(parquet(**columns), says, "data.parquet")


def _raw(bad: str | bytes) -> bytes:
    return bad if isinstance(bad, bytes) else bad.encode()


def _made(make: Callable[[Path], object], folder: Path) -> object:
    return make(folder / "data.jsonl")


def _shared() -> Iterator[tuple[str, Case]]:
    """The tables of tests/hostile_data.py, in rows that could be trained otherwise."""
    first, last = lines(GOOD_ROWS[0]), lines(GOOD_ROWS[1])
    for name, (bad, says) in BAD_ROWS.items():
        yield f"line: {name}", data(first + _raw(bad) + b"\n" + last, says, line=2)
    for packed in (".gz", ".zst"):
        for name in ("Latin-1", "a NUL byte", "a key twice", "an object that is cut"):
            bad, says = BAD_ROWS[name]
            content = PACKERS[packed](first + _raw(bad) + b"\n" + last)
            yield f"line in {packed}: {name}", data(content, says, f"data.jsonl{packed}", line=2)
    for name in IN_LISTS:
        bad, says = BAD_ROWS[name]
        content = b"[" + first + b",\n" + _raw(bad) + b"\n,\n" + last + b"]"
        yield f"in a list: {name}", data(content, says, "data.json", line=3)
    for name, (bad, says) in BAD_RECORDS.items():
        content = b'prompt,completion\n"before\n",one\n' + _raw(bad) + b"\nafter,two\n"
        yield f"record: {name}", data(content, says, "data.csv", line=4)
    for name, (file, content, line, says) in BAD_FILES.items():
        yield f"file: {name}", data(content, says, file, line=line)
    for name, (make, says) in SPECIAL.items():
        lost = name in ("a link to nowhere", "a link to itself")
        yield (
            f"no file: {name}",
            Case(
                {},
                "no such file" if lost else says,
                "recipe.yaml" if lost else "./data.jsonl",
                dataset="train: ./data.jsonl",
                setup=partial(_made, make),
                code=2 if lost else 3,
            ),
        )
    for name, values in BAD_CONTENT.items():
        yield (
            f"content: {name}",
            data(b"\n" + lines(values), "", line=None if "columns" in name or "two f" in name else 2),
        )


CHATS = {
    "roles of another tool": rows(
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, says="unknown role: null"
    ),
    "an answer of a list": rows(
        turns(USER, {"role": "assistant", "content": ["a"]}), says="expected text, found a list"
    ),
    "an answer of an object": rows(turns(USER, {"role": "assistant", "content": {"text": "a"}}), says="expected text"),
    "tool calls that are text": rows(
        turns(USER, {"role": "assistant", "tool_calls": "f()"}), says="expected a list of {function"
    ),
    "a tool call without a name": rows(
        turns(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}), says="expected a list"
    ),
    "a tool call whose name is a number": rows(
        turns(USER, {"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}), says="expected a list"
    ),
    "tools that are an object": rows({**CHAT, "tools": {"a": 1}}, says="expected a list of objects"),
    "tools that are names": rows({**CHAT, "tools": ["f"]}, says="expected a list of objects"),
    "train for a question": rows(turns({**USER, "train": True}, ANSWER), says="a user turn is never trained"),
    "train in quotes": rows(turns(USER, {**ANSWER, "train": "false"}), says="expected true or false"),
    "trian": rows(turns(USER, {**ANSWER, "trian": False}), says="did you mean train?"),
    "a weight of a half": rows(turns(USER, {**ANSWER, "weight": 0.5}), says="expected 0 or 1"),
    "tools where the template has no words for them": rows(
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
        says="ChatML has no words for tools",
        more={"chat_template": "chatml"},
    ),
    "sharegpt with a wrong system prompt": rows(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": 5},
        says="expected text",
    ),
    "sharegpt of numbers": rows({"conversations": [1, 2]}, says="expected an object"),
    "sharegpt that is text": rows({"conversations": "human: q"}, says="expected a list of turns"),
    "sharegpt without an answer": rows(
        {"conversations": [{"from": "human", "value": "q"}]}, says="contains no assistant turn"
    ),
    "no answer in the second row": rows(CHAT, turns(USER), says="contains no assistant turn", line=2),
    "a role in the third row": rows(
        CHAT, CHAT, turns({"role": "bot", "content": "q"}, ANSWER), says="unknown role", line=3
    ),
    "a thousand turns and one that is null": rows(
        turns(*[USER, ANSWER] * 500, None), says="expected an object, found null", key="messages[1000]"
    ),
}
COLUMNS = {
    "one row lacks the column": rows(*GOOD_ROWS, {"prompt": "q"}, says="missing", line=4),
    "one row has other columns": rows(
        *GOOD_ROWS, {"text": "x"}, says="fit the formats text and prompt_completion", line=None, key="dataset.format"
    ),
    "one row's answer is null": rows(*GOOD_ROWS, {"prompt": "q", "completion": None}, says="found null", line=4),
    "a column that the recipe names and nobody has": settings(
        "train: data.jsonl, columns: {prompt: qestion}", "no column 'qestion'", key="dataset.columns.prompt"
    ),
    "a column that no format has": settings(
        "train: data.jsonl, columns: {promt: prompt}", "the task reads no column 'promt'", key="dataset.columns.promt"
    ),
    "a column of another format": settings(
        "train: data.jsonl, format: text, columns: {completion: prompt}", "", key="dataset."
    ),
    "another format": settings(
        "train: data.jsonl, format: messages", "format messages needs messages", key="dataset.format"
    ),
    "alpaca without outputs": rows({"instruction": "q"}, says="no format fits", line=None, key="dataset.format"),
    "columns that another tool has": rows(
        {"question": "q", "answer": "a"}, says="no format fits", line=None, key="dataset.format"
    ),
    "columns in capitals": rows(
        {"Prompt": "q", "Completion": "a"}, says="no format fits", line=None, key="dataset.format"
    ),
    "columns with spaces": rows(
        {" prompt": "q", "completion ": "a"}, says="no format fits", line=None, key="dataset.format"
    ),
    "CSV without a header": data("q,a\nr,b\n", "no format fits", "data.csv", key="dataset.format"),
    "CSV with numbers in the header": data("1,2\nr,b\n", "no format fits", "data.csv", key="dataset.format"),
    "CSV with an empty answer": data("prompt,completion\nq,a\nr,\n", "is empty", "data.csv", line=3),
    "CSV with an answer of spaces": data('prompt,completion\nq,"  "\n', "is empty", "data.csv", line=2),
    "CSV of one column that is text": data('text\nhello\n" "\n', "is empty", "data.csv", line=3),
    "CSV with messages as JSON": data(
        'messages\n"[{""role"": ""user""}]"\n', "expected a list of turns", "data.csv", line=2
    ),
}
TABLES = {
    "numbers for text": table("expected text, found a number", text=[1, 2]),
    "bytes for text": table("expected text", text=[b"x", b"y"]),
    "truth values for text": table("expected text", text=[True]),
    "lists for text": table("expected text, found a list", text=[["x"]]),
    "objects for text": table("expected text, found an object", text=[{"x": "y"}]),
    "nothing but nulls": table("found null", text=[None, None]),
    "a null among texts": table("row 2: ", text=["x", None]),
    "an empty text among texts": table("row 3: is empty", text=["x", "y", " "]),
    "no rows": table("contains no rows", text=[]),
    "other columns": table("no format fits", q=["x"], a=["y"]),
    "turns without a role": table("unknown role", messages=[[{"content": "q"}, {"content": "a"}]]),
    "turns whose answer is null": table(
        "row 1: ", messages=[[{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]]
    ),
    "turns that are null": table("expected a list of turns, found null", messages=[None]),
}
WHOLE = {
    "no row that can be used": settings(
        "train: data.jsonl, on_bad_row: skip", "none of the 2 rows can be used", b"x\ny\n", line=1
    ),
    "nothing to train within max_length": settings("train: data.jsonl, max_length: 1", "zero trained tokens"),
    "all rows are too long": settings("train: data.jsonl, max_length: 2, overlong: drop", "zero trained tokens"),
    "a row that is too long": settings(
        "train: data.jsonl, max_length: 4, overlong: error", "more than dataset.max_length", line=1
    ),
    "a row of ten million characters": data(
        lines(GOOD_ROWS[0], {"prompt": "q", "completion": "x" * 10_000_001}), "characters of text, more than", line=2
    ),
    "a limit before the first good row": settings(
        "train: data.jsonl, limit: 1", "is not a JSON object", b"x\n" + GOOD, line=1
    ),
    "one row to hold out from": settings(
        "train: data.jsonl, eval_fraction: 0.5",
        "one row cannot be split",
        lines(GOOD_ROWS[0]),
        key="dataset.eval_fraction",
        file=None,
    ),
    "a bad row to evaluate on": Case(
        {"data.jsonl": GOOD, "eval.jsonl": GOOD + b"{\n"},
        "is not a JSON object",
        "eval.jsonl",
        4,
        dataset="train: data.jsonl, eval: eval.jsonl",
    ),
    "an empty file to evaluate on": Case(
        {"data.jsonl": GOOD, "eval.jsonl": b""}, "is empty", "eval.jsonl", dataset="train: data.jsonl, eval: eval.jsonl"
    ),
    "a folder to evaluate on that holds nothing": Case(
        {"data.jsonl": GOOD},
        "the folder contains no file that can be read",
        "./held",
        dataset="train: data.jsonl, eval: ./held",
        setup=lambda folder: (folder / "held").mkdir(),
        key="",
    ),
    "a bad row in the second of a mix": Case(
        {"data.jsonl": GOOD, "b.csv": b"prompt,completion\nq,\n"},
        "is empty",
        "b.csv",
        2,
        dataset="mix: [data.jsonl, b.csv]",
    ),
    "a second of a mix that has other columns": Case(
        {"data.jsonl": GOOD, "b.csv": b"q,a\nx,y\n"},
        "no format fits",
        "b.csv",
        key="dataset.format",
        dataset="mix: [data.jsonl, b.csv]",
    ),
    "a format that does not fit the second of a mix": Case(
        {"data.jsonl": GOOD, "b.jsonl": lines(CHAT)},
        "format prompt_completion needs",
        "b.jsonl",
        key="dataset.format",
        dataset="mix: [data.jsonl, b.jsonl], format: prompt_completion",
    ),
    "a text for an encoder-decoder": data(
        lines({"text": "x"}), "a text alone has no source and target", key="dataset.format", task="seq2seq_lm"
    ),
    "a conversation without a question for an encoder-decoder": data(
        lines(turns(ANSWER)), "the conversation has no question", line=1, task="seq2seq_lm"
    ),
}


def template(
    text: str, says: str = "does not come to an end", code: int = 4, row: dict[str, Any] = CHAT, **rest: Any
) -> Case:
    """A conversation, and a chat template for it."""
    files = {"data.jsonl": lines(row), "t.jinja": text.encode()}
    given: dict[str, Any] = {"key": "base_model.chat_template", "file": None} | rest
    return Case(files, says, code=code, more={"chat_template": "t.jinja"}, **given)


PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "loops in loops": template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + PLAIN
    ),
    "a macro that calls itself twice": template(
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}" + PLAIN
    ),
    "loops in a long conversation only": template(
        "{% if messages | length > 3 %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}" + PLAIN,
        row=turns(*[USER, ANSWER] * 3),
        file="data.jsonl",
        line=1,
    ),
    "a text that doubles": template(
        "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}" + PLAIN
    ),
    "a text of ten billion characters": template("{{ 'x' * 10000000000 }}" + PLAIN),
    "a number without end": template("{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}{{ 9 ** (9 ** 9) }}" + PLAIN),
    "a width of ten billion": template("{{ 'x' | center(10000000000) }}" + PLAIN),
    "no conversation in it": template(
        "Hello", "does not show a plain question and its answer", 3, key=None, file="data.jsonl"
    ),
    "a refusal": template(
        "{{ raise_exception('no \x1b[31m') }}", "refuses the conversation", 3, key=None, file="data.jsonl"
    ),
    "an escape from the sandbox": template(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + PLAIN, "unsafe", 3, key=None, file="data.jsonl"
    ),
    "an include": template(
        "{% include '/etc/passwd' %}" + PLAIN, "refuses the conversation", 3, key=None, file="data.jsonl"
    ),
    "a tag that is not closed": template(
        "{% for m in messages %}", "no chat template", key="base_model.chat_template", file="t.jinja", line=1
    ),
    "nothing": template("", "is empty", file="t.jinja"),
}


def _folder(**files: str) -> Callable[[Path], None]:
    """A folder ``d`` with such files in it."""

    def make(folder: Path) -> None:
        (folder / "d").mkdir()
        for name, text in files.items():
            path = folder / "d" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


def folder(says: str, setup: Callable[[Path], object], file: str = "./d", **rest: Any) -> Case:
    return Case({}, says, file, dataset="train: ./d", setup=setup, **rest)


def _loop(at: Path) -> None:
    (at / "d").mkdir()
    (at / "d" / "in").symlink_to("../d")


def _pipe(at: Path) -> None:
    _folder(**{"a.jsonl": GOOD.decode()})(at)
    os.mkfifo(at / "d" / "b.jsonl")


def _many(at: Path) -> None:
    (at / "d").mkdir()
    for number in range(300):
        (at / "d" / f"{number:03}.jsonl").write_bytes(GOOD if number < 299 else GOOD + b"{}x\n")


FOLDERS = {
    "nothing in it": folder("the folder contains no file that can be read", _folder()),
    "hidden files only": folder("the folder contains no file that can be read", _folder(**{".a.jsonl": "{}"})),
    "files of other kinds": folder("it contains: a.txt, b.md", _folder(**{"a.txt": "x", "b.md": "y"})),
    "train and test": folder(
        "the folder contains several splits", _folder(**{"train.jsonl": "{}", "test.jsonl": "{}"})
    ),
    "train and validation in folders": folder(
        "the folder contains several splits", _folder(**{"train/a.jsonl": "{}", "validation/a.jsonl": "{}"})
    ),
    "what save_to_disk wrote": folder(
        "was written by Dataset.save_to_disk", _folder(**{"dataset_info.json": "{}", "a.arrow": "x"})
    ),
    "a link to itself": folder("is a link to a folder above itself", _loop, file="d/in"),
    "a pipe among files": folder("is a pipe, not a regular file", _pipe, file="./d/b.jsonl"),
    "an empty file among files": folder(
        "is empty", _folder(**{"a.jsonl": GOOD.decode(), "b.jsonl": ""}), file="./d/b.jsonl"
    ),
    "a bad row in the last of 300 files": folder("Text after the object", _many, file="./d/299.jsonl", line=4),
    "other columns in the second file": folder(
        "missing",
        _folder(**{"a.jsonl": GOOD.decode(), "b.jsonl": '{"prompt": "x", "answer": "y"}\n'}),
        file="./d/b.jsonl",
        line=1,
    ),
    "a name that moves the cursor": Case(
        {},
        "is empty",
        None,
        dataset="train: ./d",
        setup=lambda at: ((at / "d").mkdir(), (at / "d" / "\x1b[2J.jsonl").write_text("")),
        key="",
    ),
    "a name that is no text": Case(
        {},
        "is empty",
        None,
        dataset="train: ./d",
        setup=lambda at: ((at / "d").mkdir(), (at / "d" / os.fsdecode(b"\xff.jsonl")).touch()),
        key="",
    ),
}


def _damaged() -> Iterator[tuple[str, Case]]:
    """Files that are packed, or tables, and end early or were changed."""
    long = lines(*({"prompt": f"q {n}", "completion": random.Random(n).randbytes(20).hex()} for n in range(200)))
    for packed, pack in PACKERS.items():
        if not packed:
            continue
        whole = pack(long)
        for part in (0.1, 0.5, 0.9):
            content = whole[: int(len(whole) * part)]
            yield f"{packed} that ends at {part:.0%}", data(content, "end too early", f"data.jsonl{packed}")
        for cut in (1, 4, 8):
            yield f"{packed} without its last {cut} bytes", data(whole[:-cut], "end too early", f"data.jsonl{packed}")
        for at in (0.3, 0.6) if packed == ".gz" else ():  # zstd has a checksum only where it is asked for
            changed = bytearray(whole)
            changed[int(len(changed) * at)] ^= 0xFF
            yield f"{packed} with a byte changed at {at:.0%}", data(bytes(changed), "", f"data.jsonl{packed}")
        yield f"{packed} with something behind it", data(whole + b"garbage", " data ", f"data.jsonl{packed}")
    numbers = list(range(500))
    whole = parquet(text=[f"row {n} {random.Random(n).randbytes(9).hex()}" for n in numbers], n=numbers)
    for name, content in {
        "its first half": whole[: len(whole) // 2],
        "its last half": whole[len(whole) // 2 :],
        "its first 4 bytes": whole[:4],
        "all but its last byte": whole[:-1],
        "all but its last 8 bytes": whole[:-8],
        "a footer that is 0 bytes long": whole[:-8] + b"\0\0\0\0PAR1",
        "a footer that is longer than the file": whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        "a footer of zeros": whole[:-200] + b"\0" * 192 + whole[-8:],
        "a footer of noise": whole[:-300] + random.Random(1).randbytes(292) + whole[-8:],
        "an encrypted table's mark": whole[:-4] + b"PARE",
    }.items():
        yield f"parquet: {name}", data(content, "is not a parquet file", "data.parquet")
    yield (
        "parquet in gzip: its first half",
        data(gzip.compress(whole[: len(whole) // 2]), "is not a parquet file", "data.parquet.gz"),
    )
    yield (
        "parquet in zstd: noise",
        data(zstd(random.Random(2).randbytes(999)), "is not a parquet file", "data.parquet.zst"),
    )


def bad_data() -> dict[str, Case]:
    """All of them, by name."""
    found = dict([*_shared(), *((f"damaged: {name}", case) for name, case in _damaged())])
    for of, cases in {
        "chat": CHATS,
        "columns": COLUMNS,
        "table": TABLES,
        "whole": WHOLE,
        "template": TEMPLATES,
        "folder": FOLDERS,
    }.items():
        found |= {f"{of}: {name}": case for name, case in cases.items()}
    return found
