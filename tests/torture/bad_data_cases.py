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
from tables import cases

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
        content = 'prompt,completion\n"café\n",one\n'.encode() + _raw(bad) + b"\nafter,two\n"
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
}
WHOLE = {
    "a row of ten million characters": data(
        lines(GOOD_ROWS[0], {"prompt": "q", "completion": "x" * 10_000_001}), "characters of text, more than", line=2
    ),
    "one row to hold out from": settings(
        "train: data.jsonl, eval_fraction: 0.5",
        "one row cannot be split",
        lines(GOOD_ROWS[0]),
        key="dataset.eval_fraction",
        file=None,
    ),
    "a folder to evaluate on that holds nothing": Case(
        {"data.jsonl": GOOD},
        "the folder contains no file that can be read",
        "./held",
        dataset="train: data.jsonl, eval: ./held",
        setup=lambda folder: (folder / "held").mkdir(),
        key="",
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
    "loops in a long conversation only": template(
        "{% if messages | length > 3 %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}" + PLAIN,
        row=turns(*[USER, ANSWER] * 3),
        file="data.jsonl",
        line=1,
    ),
}


def folder_of(**files: str) -> Callable[[Path], None]:
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
    folder_of(**{"a.jsonl": GOOD.decode()})(at)
    os.mkfifo(at / "d" / "b.jsonl")


def _many(at: Path) -> None:
    (at / "d").mkdir()
    for number in range(300):
        (at / "d" / f"{number:03}.jsonl").write_bytes(GOOD if number < 299 else GOOD + b"{}x\n")


FOLDERS = {
    "a link to itself": folder("is a link to a folder above itself", _loop, file="d/in"),
    "a pipe among files": folder("is a pipe, not a regular file", _pipe, file="./d/b.jsonl"),
    "an empty file among files": folder(
        "is empty", folder_of(**{"a.jsonl": GOOD.decode(), "b.jsonl": ""}), file="./d/b.jsonl"
    ),
    "a bad row in the last of 300 files": folder("Text after the object", _many, file="./d/299.jsonl", line=4),
    "other columns in the second file": folder(
        "missing",
        folder_of(**{"a.jsonl": GOOD.decode(), "b.jsonl": '{"prompt": "x", "answer": "y"}\n'}),
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
    classes = cases("bad_data", globals(), chat=CHATS, columns=COLUMNS, whole=WHOLE, template=TEMPLATES, folder=FOLDERS)
    return found | {f"{of}: {name}": case for of, own in classes.items() for name, case in own.items()}
