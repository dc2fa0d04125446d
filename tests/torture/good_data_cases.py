"""Data that look odd and are in order, each with how many rows must be used and what one of them must hold."""

from __future__ import annotations

import codecs
import datetime
import decimal
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bad_data_cases import GOOD, GOOD_ROWS, lines
from hostile_data import ANSWER, USER, parquet, turns, zstd
from tables import cases


@dataclass(frozen=True)
class Valid:
    """Data that must be read."""

    files: dict[str, bytes]
    used: int = 3
    holds: str = "after moon"
    dataset: str = "train: data.jsonl"
    setup: Callable[[Path], object] = lambda folder: None
    task: str = "causal_lm"
    trains: bool = False
    """Whether ``train`` is asked too."""


def data(content: str | bytes, name: str = "data.jsonl", dataset: str = "", **rest: Any) -> Valid:
    raw = content if isinstance(content, bytes) else content.encode()
    return Valid({name: raw}, dataset=dataset or f"train: '{name}'", **rest)


def rows(*values: Any, holds: str = "", used: int = 0, **rest: Any) -> Valid:
    return data(lines(*values), used=used or len(values), holds=holds, **rest)


def compact(*values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)


def table(used: int = 2, holds: str = "one", **columns: Any) -> Valid:
    return data(parquet(**columns), "data.parquet", used=used, holds=holds)


def written(used: int = 2, holds: str = "one", **options: Any) -> Valid:
    """A parquet file of two texts, written with these options."""
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one tea", "two"]}), file, **options)
    return data(file.getvalue(), "data.parquet", used=used, holds=holds)


def arrow(type_name: str) -> Valid:
    import pyarrow

    types = {"large_string": pyarrow.large_string(), "string_view": pyarrow.string_view()}
    texts = pyarrow.array(["one", "two"])
    return table(text=texts.dictionary_encode() if type_name == "dictionary" else texts.cast(types[type_name]))


LINES = {
    "lines that end as on Windows": data(GOOD.replace(b"\n", b"\r\n")),
    "no newline at the end": data(GOOD.rstrip()),
    "a byte order mark": data(codecs.BOM_UTF8 + GOOD),
    "blank lines": data(b"\n \t\n" + GOOD.replace(b"\n", b"\n\r\n") + b"\n\n"),
    "white space around": data(b"".join(b" \t" + line + b"  \n" for line in GOOD.splitlines())),
    "columns that are not read": rows(
        *({**row, "id": n, "x": {"y": [None, 1.5, True]}} for n, row in enumerate(GOOD_ROWS))
    ),
    "columns that some rows lack": rows(GOOD_ROWS[0], {**GOOD_ROWS[1], "note": "x"}, {**GOOD_ROWS[2], "other": None}),
    "columns in another order": rows({"completion": "a", "prompt": "q"}, GOOD_ROWS[1], holds="after moon"),
}

CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in GOOD_ROWS)
TEXTS = {
    "a list": data(json.dumps(GOOD_ROWS), "data.json", trains=True),
    "a list, indented": data(json.dumps(GOOD_ROWS, indent=4), "data.json"),
    "a list, compact": data(compact(*GOOD_ROWS), "data.json"),
    "a list with a byte order mark": data(codecs.BOM_UTF8 + json.dumps(GOOD_ROWS).encode(), "data.json"),
    "a list after blank lines": data("\n\n \t" + json.dumps(GOOD_ROWS) + "\r\n\n", "data.json"),
    "a list that ends as on Windows": data(json.dumps(GOOD_ROWS, indent=1).replace("\n", "\r\n"), "data.json"),
    "one object on one line": data(json.dumps(GOOD_ROWS[1]), "data.json", used=1),
    "a list longer than what is read at once": data(json.dumps(GOOD_ROWS * 9000), "data.json", used=27_000),
    "CSV": data(CSV, "data.csv", trains=True),
    "CSV that ends as on Windows": data(CSV.replace("\n", "\r\n"), "data.csv"),
    "CSV that ends as on an old Macintosh": data(CSV.replace("\n", "\r"), "data.csv"),
    "CSV with a byte order mark": data("\ufeff" + CSV, "data.csv"),
    "CSV with spaces in its header": data(CSV.replace("prompt,completion", " prompt , completion "), "data.csv"),
    "CSV with blank lines": data("\n" + CSV.replace("\n", "\n\n"), "data.csv"),
    "CSV without a newline at the end": data(CSV.rstrip(), "data.csv"),
    "gzip": data(gzip.compress(GOOD), "data.jsonl.gz", trains=True),
    "gzip in two parts": data(
        gzip.compress(lines(GOOD_ROWS[0])) + gzip.compress(lines(*GOOD_ROWS[1:])), "data.jsonl.gz"
    ),
    "gzip with zeros behind it": data(gzip.compress(GOOD) + b"\0" * 512, "data.jsonl.gz"),
    "zstd": data(zstd(GOOD), "data.jsonl.zst"),
    "CSV in zstd": data(zstd(CSV.encode()), "data.csv.zst"),
    "a list in gzip": data(gzip.compress(json.dumps(GOOD_ROWS).encode()), "data.json.GZ"),
}

CHATS = [[USER, ANSWER], [{"role": "user", "content": "q", "name": None}, {**ANSWER, "name": None}]]
TABLES = {
    "parquet": data(
        parquet(**{key: [row[key] for row in GOOD_ROWS] for key in GOOD_ROWS[0]}), "data.parquet", trains=True
    ),
    "parquet in a .gz": data(gzip.compress(parquet(text=["one", "two"])), "data.parquet.gz", used=2, holds="one"),
    "parquet of conversations": table(messages=CHATS, holds="a"),
    "parquet with columns of many kinds": table(
        text=["one", "two"],
        number=[1, 2],
        time=[datetime.datetime(2024, 1, 1), None],
        day=[datetime.date(1, 1, 1), None],
        price=[decimal.Decimal("1.10"), None],
        raw=[b"\xff", None],
        inner=[{"a": [1]}, None],
        nothing=[None, None],
    ),
}

FORMATS = {
    "a conversation that is partly trained": rows(turns(USER, {**ANSWER, "train": False}, USER, ANSWER), holds="a"),
    "a conversation with weights": rows(turns(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}), holds="a"),
    "a conversation with thoughts": rows(turns(USER, {**ANSWER, "reasoning_content": "hm"}), holds="a"),
}

SOURCES = {
    "a link to a file": Valid({"x.jsonl": GOOD}, setup=lambda folder: (folder / "data.jsonl").symlink_to("x.jsonl")),
    "a link to a folder": Valid(
        {"x/a.jsonl": GOOD}, dataset="train: ./d", setup=lambda folder: (folder / "d").symlink_to("x")
    ),
    "two files that are one": Valid(
        {"d/a.jsonl": GOOD},
        6,
        dataset="train: d",
        setup=lambda folder: (folder / "d" / "b.jsonl").hardlink_to(folder / "d" / "a.jsonl"),
    ),
    "a file that may only be read": Valid(
        {"data.jsonl": GOOD}, setup=lambda folder: (folder / "data.jsonl").chmod(0o400)
    ),
}


def valid_data() -> dict[str, Valid]:
    """All of them, by name."""
    classes = cases("good_data", globals(), lines=LINES, text=TEXTS, table=TABLES, format=FORMATS, source=SOURCES)
    return {f"{of}: {name}": valid for of, own in classes.items() for name, valid in own.items()}
