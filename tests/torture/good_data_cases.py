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


def lines_of_text() -> dict[str, Valid]:
    return {
        "as it is": data(GOOD, trains=True),
        "lines that end as on Windows": data(GOOD.replace(b"\n", b"\r\n")),
        "no newline at the end": data(GOOD.rstrip()),
        "a byte order mark": data(codecs.BOM_UTF8 + GOOD),
        "blank lines": data(b"\n \t\n" + GOOD.replace(b"\n", b"\n\r\n") + b"\n\n"),
        "white space around": data(b"".join(b" \t" + line + b"  \n" for line in GOOD.splitlines())),
        "an ending in capitals": data(GOOD, "DATA.JSONL"),
        "a name with spaces": data(GOOD, "my data (1).jsonl"),
        "a name beyond ASCII": data(GOOD, "données été.jsonl"),
        "a long name": data(GOOD, "x" * 240 + ".jsonl"),
        "a name with two dots": data(GOOD, "data.v1.2.jsonl"),
        "escapes": data(
            '{"prompt": "\\u0071", "completion": "caf\\u00e9 \\ud83d\\ude00\\t\\/\\""}\n', used=1, holds='café 😀\t/"'
        ),
        "an escaped NUL": data('{"prompt": "q", "completion": "a\\u0000b"}\n', used=1, holds="b"),
        "an escaped terminal's escape": data('{"prompt": "q", "completion": "a\\u001b[31m"}\n', used=1, holds="[31m"),
        "line separators in a text": data(
            '{"prompt": "q", "completion": "a\u2028b\u2029c\x85d"}\n', used=1, holds="a\u2028b"
        ),
        "every plane of Unicode": rows(
            {"prompt": "\U0010ffff", "completion": "\U0001f600 नमस्ते العربية 漢字 e\u0301"}, holds="नमस्ते"
        ),
        "columns that are not read": rows(
            *({**row, "id": n, "x": {"y": [None, 1.5, True]}} for n, row in enumerate(GOOD_ROWS))
        ),
        "columns that some rows lack": rows(
            GOOD_ROWS[0], {**GOOD_ROWS[1], "note": "x"}, {**GOOD_ROWS[2], "other": None}
        ),
        "columns in another order": rows({"completion": "a", "prompt": "q"}, GOOD_ROWS[1], holds="after moon"),
        "numbers of any size": data(
            '{"prompt": "q", "completion": "a", "n": 123456789012345678901234567890, "m": -1.5e-300}\n',
            used=1,
            holds="a",
        ),
        "100 levels": data('{"prompt": "q", "completion": "a", "x": ' + "[" * 98 + "]" * 98 + "}\n", used=1, holds="a"),
        "equal keys in different objects": data(
            '{"prompt": "q", "completion": "a", "x": {"prompt": 1}}\n', used=1, holds="a"
        ),
        "an empty prompt": rows({"prompt": "", "completion": "after all"}, holds="after all"),
        "white space at the edges": rows({"prompt": " q\n", "completion": "\n a \n"}, holds="\n a \n"),
        "special tokens in a text": rows({"prompt": "<|im_start|>", "completion": "a"}, holds="a"),
        "a row of a megabyte": rows(
            {"prompt": "q", "completion": "tea " * 250_000},
            used=1,
            dataset="train: data.jsonl, max_length: 64, overlong: split",
        ),
        "a thousand rows": data(GOOD * 400, used=1200),
        "one row": rows({"prompt": "q", "completion": "a"}, holds="a"),
        "a limit": data(GOOD, dataset="train: data.jsonl, limit: 2", used=2),
        "a limit above the number of rows": data(GOOD, dataset="train: data.jsonl, limit: 99"),
        "a bad row that is skipped": data(GOOD + b"{\n", dataset="train: data.jsonl, on_bad_row: skip"),
    }


def other_texts() -> dict[str, Valid]:
    table_text = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in GOOD_ROWS)
    return {
        "a list": data(json.dumps(GOOD_ROWS), "data.json", trains=True),
        "a list, indented": data(json.dumps(GOOD_ROWS, indent=4), "data.json"),
        "a list, compact": data(compact(*GOOD_ROWS), "data.json"),
        "a list with a byte order mark": data(codecs.BOM_UTF8 + json.dumps(GOOD_ROWS).encode(), "data.json"),
        "a list after blank lines": data("\n\n \t" + json.dumps(GOOD_ROWS) + "\r\n\n", "data.json"),
        "a list that ends as on Windows": data(json.dumps(GOOD_ROWS, indent=1).replace("\n", "\r\n"), "data.json"),
        "lines in a file that is named .json": data(GOOD, "data.json"),
        "one object on one line": data(json.dumps(GOOD_ROWS[1]), "data.json", used=1),
        "a list longer than what is read at once": data(json.dumps(GOOD_ROWS * 9000), "data.json", used=27_000),
        "CSV": data(table_text, "data.csv", trains=True),
        "CSV that ends as on Windows": data(table_text.replace("\n", "\r\n"), "data.csv"),
        "CSV that ends as on an old Macintosh": data(table_text.replace("\n", "\r"), "data.csv"),
        "CSV with a byte order mark": data("\ufeff" + table_text, "data.csv"),
        "CSV in quotes": data(
            '"prompt","completion"\n"q, 1","say ""after moon""\n\nor not"\n',
            "data.csv",
            used=1,
            holds='say "after moon"\n\nor',
        ),
        "CSV with spaces in its header": data(
            table_text.replace("prompt,completion", " prompt , completion "), "data.csv"
        ),
        "CSV with blank lines": data("\n" + table_text.replace("\n", "\n\n"), "data.csv"),
        "CSV without a newline at the end": data(table_text.rstrip(), "data.csv"),
        "CSV with columns that are not read": data("id,prompt,completion,x\n1,q,after moon,\n", "data.csv", used=1),
        "CSV with an empty prompt": data("prompt,completion\n,after moon\n", "data.csv", used=1),
        "CSV of one column": data("text\nafter moon\n007\n", "data.csv", used=2),
        "CSV with a field of a megabyte": data(
            f"prompt,completion\nq,{'tea ' * 250_000}\n",
            "data.csv",
            used=1,
            holds="",
            dataset="train: data.csv, max_length: 64, overlong: split",
        ),
        "gzip": data(gzip.compress(GOOD), "data.jsonl.gz", trains=True),
        "gzip in two parts": data(
            gzip.compress(lines(GOOD_ROWS[0])) + gzip.compress(lines(*GOOD_ROWS[1:])), "data.jsonl.gz"
        ),
        "gzip with zeros behind it": data(gzip.compress(GOOD) + b"\0" * 512, "data.jsonl.gz"),
        "zstd": data(zstd(GOOD), "data.jsonl.zst"),
        "CSV in zstd": data(zstd(table_text.encode()), "data.csv.zst"),
        "a list in gzip": data(gzip.compress(json.dumps(GOOD_ROWS).encode()), "data.json.GZ"),
    }


def tables() -> dict[str, Valid]:
    chats = [[USER, ANSWER], [{"role": "user", "content": "q", "name": None}, {**ANSWER, "name": None}]]
    return {
        "parquet": data(
            parquet(**{key: [row[key] for row in GOOD_ROWS] for key in GOOD_ROWS[0]}), "data.parquet", trains=True
        ),
        "parquet, not packed": written(compression="none"),
        "parquet in gzip inside": written(compression="gzip"),
        "parquet in zstd inside": written(compression="zstd"),
        "parquet in brotli inside": written(compression="brotli"),
        "parquet with a row a group": written(row_group_size=1),
        "parquet of version 1": written(version="1.0"),
        "parquet with checksums": written(write_page_checksum=True),
        "parquet without statistics": written(write_statistics=False, use_dictionary=False),
        "parquet in a .gz": data(gzip.compress(parquet(text=["one", "two"])), "data.parquet.gz", used=2, holds="one"),
        "parquet of large strings": arrow("large_string"),
        "parquet of views": arrow("string_view"),
        "parquet of a dictionary": arrow("dictionary"),
        "parquet of conversations": table(messages=chats, holds="a"),
        "parquet with nulls where nothing is needed": table(
            instruction=["q", "q"], output=["one", "two"], input=[None, "x"]
        ),
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


def formats() -> dict[str, Valid]:
    return {
        "texts": rows({"text": "after moon"}, {"text": "x"}, holds="after moon"),
        "conversations": rows(
            turns(USER, ANSWER, USER, ANSWER), turns({"role": "system", "content": "s"}, USER, ANSWER), holds="q"
        ),
        "a conversation that is partly trained": rows(turns(USER, {**ANSWER, "train": False}, USER, ANSWER), holds="a"),
        "a conversation with weights": rows(
            turns(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}), holds="a"
        ),
        "a conversation with thoughts": rows(turns(USER, {**ANSWER, "reasoning_content": "hm"}), holds="a"),
        "alpaca": rows(
            {"instruction": "q", "output": "after moon"},
            {"instruction": "q", "input": "i", "output": "x"},
            holds="after moon",
        ),
        "alpaca with nulls": rows(
            {"instruction": "q", "input": None, "output": "after moon", "system": None}, holds="after moon"
        ),
        "sharegpt": rows(
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "after moon"}]},
            holds="after moon",
        ),
        "columns by other names": rows(
            {"question": "q", "answer": "after moon"},
            dataset="train: data.jsonl, columns: {prompt: question, completion: answer}",
        ),
        "columns by each other's names": rows(
            {"prompt": "after moon", "completion": "q"},
            holds="qafter moon",
            dataset="train: data.jsonl, columns: {prompt: completion, completion: prompt}",
        ),
        "a format where two would fit": rows(
            {"text": "x", "prompt": "q", "completion": "after moon"},
            dataset="train: data.jsonl, format: prompt_completion",
        ),
        "for an encoder-decoder": data(GOOD, task="seq2seq_lm", holds="What follows"),
        "long rows in pieces": rows(
            {"text": "tea " * 300}, dataset="train: data.jsonl, max_length: 32, overlong: split", holds="tea"
        ),
        "all tokens are trained": data(GOOD, dataset="train: data.jsonl, train_on: all"),
    }


def sources() -> dict[str, Valid]:
    return {
        "a folder": Valid(
            {"d/a.jsonl": GOOD, "d/b.csv": b"prompt,completion\nq,a\n"}, 4, dataset="train: ./d", trains=True
        ),
        "a folder in a folder": Valid({"d/in/a.jsonl": GOOD, "d/b.jsonl": GOOD}, 6, dataset="train: d/"),
        "a folder with other files beside": Valid(
            {"d/a.jsonl": GOOD, "d/README.md": b"#", "d/.hidden.jsonl": b"x"}, dataset="train: d"
        ),
        "a folder named train beside one named test": Valid(
            {"d/train/a.jsonl": GOOD, "d/test/a.jsonl": GOOD}, dataset="train: d/train"
        ),
        "a link to a file": Valid(
            {"x.jsonl": GOOD}, setup=lambda folder: (folder / "data.jsonl").symlink_to("x.jsonl")
        ),
        "a link to a folder": Valid(
            {"x/a.jsonl": GOOD}, dataset="train: ./d", setup=lambda folder: (folder / "d").symlink_to("x")
        ),
        "two files that are one": Valid(
            {"d/a.jsonl": GOOD},
            6,
            dataset="train: d",
            setup=lambda folder: (folder / "d" / "b.jsonl").hardlink_to(folder / "d" / "a.jsonl"),
        ),
        "a mix": Valid(
            {"data.jsonl": GOOD, "b.csv": b"prompt,completion\nq,a\n"}, 4, dataset="mix: [data.jsonl, b.csv]"
        ),
        "a mix with weights": Valid(
            {"data.jsonl": GOOD, "b.jsonl": GOOD},
            6,
            dataset="mix: [{train: data.jsonl, weight: 3}, {train: b.jsonl, weight: 0.5}]",
        ),
        "a mix of formats": Valid(
            {"data.jsonl": GOOD, "b.jsonl": lines(turns(USER, ANSWER))}, 4, dataset="mix: [data.jsonl, b.jsonl]"
        ),
        "a file to evaluate on": Valid(
            {"data.jsonl": GOOD, "e.jsonl": lines({"prompt": "q", "completion": "a"})},
            dataset="train: data.jsonl, eval: e.jsonl",
        ),
        "a part to evaluate on": Valid({"data.jsonl": GOOD * 10}, 27, dataset="train: data.jsonl, eval_fraction: 0.1"),
        "a file in another folder, by ..": Valid({"x/data.jsonl": GOOD}, dataset="train: x/../x/data.jsonl"),
        "a file that may only be read": Valid(
            {"data.jsonl": GOOD}, setup=lambda folder: (folder / "data.jsonl").chmod(0o400)
        ),
    }


def valid_data() -> dict[str, Valid]:
    """All of them, by name."""
    groups = {"lines": lines_of_text, "text": other_texts, "table": tables, "format": formats, "source": sources}
    return {f"{of}: {name}": valid for of, make in groups.items() for name, valid in make().items()}
