"""Data files that are wrong, row by row and as a whole; and what turns good ones into bad ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(data: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return packed


def parquet(**columns: Any) -> bytes:
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), data)
    return data.getvalue()


def two_columns_of_one_name() -> bytes:
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"]), data
    )
    return data.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


# --- one bad row

NOT_JSON = "is not a JSON object: "
BAD_ROWS: dict[str, tuple[str | bytes, str]] = {
    "plain text": ("hello", NOT_JSON + "Expecting value at character 1"),
    "an object that is cut": ('{"a": ', NOT_JSON + "Expecting value at character 6"),
    "a string that is cut": ('{"a": "x', NOT_JSON + "Unterminated string"),
    "a Python dict": ("{'a': 1}", NOT_JSON + "Expecting property name"),
    "a key without quotes": ("{a: 1}", NOT_JSON + "Expecting property name"),
    "no colon": ('{"a" 1}', NOT_JSON + "Expecting ':' delimiter"),
    "no comma": ('{"a": 1 "b": 2}', NOT_JSON + "Expecting ',' delimiter"),
    "a comma too many": ('{"a": 1,}', NOT_JSON),
    "a comma behind it": ('{"a": 1},', NOT_JSON + "Text after the object at character 9"),
    "two objects": ('{"a": 1} {"b": 2}', NOT_JSON + "Text after the object"),
    "a comment": ('{"a": 1} // one', NOT_JSON + "Text after the object"),
    "a literal that is cut": ('{"a": tru}', NOT_JSON + "Expecting value"),
    "a capital literal": ('{"a": True}', NOT_JSON + "Expecting value"),
    "undefined": ('{"a": undefined}', NOT_JSON + "Expecting value"),
    "a plus sign": ('{"a": +1}', NOT_JSON + "Expecting value"),
    "a leading point": ('{"a": .5}', NOT_JSON + "Expecting value"),
    "a leading zero": ('{"a": 01}', NOT_JSON + "Expecting ',' delimiter"),
    "a hexadecimal number": ('{"a": 0x10}', NOT_JSON + "Expecting ',' delimiter"),
    "an unknown escape": ('{"a": "\\q"}', NOT_JSON + "Invalid \\escape at character 8"),
    "an escape that is cut": ('{"a": "\\u12"}', NOT_JSON + "Invalid"),
    "a bare tab in a string": ('{"a": "x\ty"}', NOT_JSON + "Invalid control character"),
    "a terminal's escape": ('\x1b[31m{"a": 1}', "'\\x1b[31m{"),
    "NaN": ('{"a": NaN}', "NaN is not JSON"),
    "Infinity": ('{"a": [Infinity]}', "Infinity is not JSON"),
    "-Infinity": ('{"a": {"b": -Infinity}}', "-Infinity is not JSON"),
    "1e999": ('{"a": 1e999}', "'1e999' is too large for a number"),
    "-1e999": ('{"a": [-1e999]}', "'-1e999' is too large for a number"),
    "a number of 5000 digits": ('{"a": ' + "9" * 5000 + "}", NOT_JSON + "Exceeds the limit"),
    "a key twice": ('{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs twice in one object"),
    "a key twice, deeper": ('{"a": [{"b": 1, "b": 2}]}', "the key 'b' occurs twice in one object"),
    "a key twice, once escaped": ('{"a": 1, "\\u0061": 2}', "the key 'a' occurs twice in one object"),
    "a long key twice": ('{"%s": 1, "%s": 2}' % (("k" * 9999,) * 2), "kkk...' occurs twice in one object"),
    "a list": ("[1]", "expected a JSON object, found a list: '[1]'"),
    "a list of objects": ('[{"a": 1}]', "expected a JSON object, found a list"),
    "a string": ('"x"', "expected a JSON object, found a string"),
    "null": ("null", "expected a JSON object, found null"),
    "true": ("true", "expected a JSON object, found a truth value"),
    "a number": ("-1.5", "expected a JSON object, found a number"),
    "half a surrogate pair": ('{"a": "\\ud800"}', "half of a surrogate pair"),
    "the other half": ('{"a": "x\\uDFFFy"}', "half of a surrogate pair"),
    "the halves in turn": ('{"a": "\\ude00\\ud83d"}', "half of a surrogate pair"),
    "half a surrogate pair in a key": ('{"\\udabc": 1}', "half of a surrogate pair"),
    "101 levels": ('{"a": ' + "[" * 100 + "1" + "]" * 100 + "}", "nested too deeply: more than 100 levels"),
    "100,000 brackets": ("[" * 100_000, "nested too deeply"),
    "100,000 closed brackets": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "100,000 objects": ('{"a":' * 100_000, "nested too deeply"),
    "a NUL byte": ('{"a": "\0"}', "contains a NUL byte"),
    "NUL bytes alone": ("\0" * 100, "consists of NUL bytes: a crash or a full disk"),
    "Latin-1": (b'{"a": "\xe9"}', "is not UTF-8: byte 0xe9 at byte 8 of the line"),
    "a byte that no UTF-8 holds": (b'{"a": "\xff"}', "is not UTF-8: byte 0xff at byte 8"),
    "a character that is cut": (b'{"a": "\xe2\x82"}', "is not UTF-8: byte 0xe2 at byte 8"),
    "a slash in two bytes": (b'{"a": "\xc0\xaf"}', "is not UTF-8: byte 0xc0 at byte 8"),
    "a surrogate as UTF-8": (b'{"a": "\xed\xa0\x80"}', "is not UTF-8: byte 0xed at byte 8"),
    "a character beyond Unicode": (b'{"a": "\xf4\x90\x80\x80"}', "is not UTF-8: byte 0xf4 at byte 8"),
    "a byte order mark in the middle": ('\ufeff{"a": 1}', "the line begins '\\ufeff{"),
    "a no-break space before": ('\xa0{"a": 1}', NOT_JSON + "Expecting value at character 1"),
    "a line separator between objects": ('{"a": 1}\u2028{"a": 2}', NOT_JSON + "Text after the object"),
    "a carriage return alone": ('{"a": 1}\r{"a": 2}', NOT_JSON + "Text after the object"),
    "a megabyte of something": ("x" * 1_000_000, NOT_JSON + "Expecting value at character 1"),
    "a megabyte of quotes": ('"' * 999_999, NOT_JSON),
}  # fmt: skip
"""A line of a .jsonl file, and words of its error."""

IN_LISTS = ["NaN", "1e999", "a key twice, deeper", "a list", "a string", "null", "a number", "half a surrogate pair",
            "101 levels"]  # fmt: skip
"""Those of them that leave no doubt where the next row of a list begins."""

BAD_RECORDS: dict[str, tuple[str | bytes, str]] = {
    "a field too few": ("1", "1 fields, but the header has 2: '1'"),
    "a field too many": ("1,2,3", "3 fields, but the header has 2"),
    "semicolons": ("1;2", "1 fields, but the header has 2"),
    "many fields": ("," * 100_000, "100001 fields, but the header has 2"),
    "a NUL byte": ("1,\0", "contains a NUL byte"),
    "a NUL byte alone": ("\0", "consists of NUL bytes"),
    "Latin-1": (b"1,\xe9", "is not UTF-8: byte 0xe9 at byte 3 of the line"),
    "Latin-1 in quotes": (b'1,"\xe9\n\xe8"', "is not UTF-8: byte 0xe9 at byte 4 of the line"),
    "a character that is cut": (b'"\xe2\x82",1', "is not UTF-8: byte 0xe2"),
    "a quote that begins too late": ('x"y,z,1', "3 fields, but the header has 2"),
    "a terminal's escape": ("\x1b[31m", "'\\x1b[31m'"),
}
"""A record below a header of two columns."""

# --- the file as a whole

BAD_FILES: dict[str, tuple[str, str | bytes, int | None, str]] = {
    "an empty file": ("a.jsonl", "", None, "is empty"),
    "an empty packed file": ("a.jsonl.gz", gzip.compress(b""), None, "is empty"),
    "blank lines": ("a.jsonl", "\n \r\n\t\n", None, "contains no rows"),
    "a byte order mark alone": ("a.jsonl", "\ufeff", None, "contains no rows"),
    "an empty list": ("a.json", "[]", None, "contains no rows"),
    "an empty CSV": ("a.csv", "\n\n", None, "contains no rows"),
    "a header alone": ("a.csv", "a,b\n", None, "contains no rows"),
    "gzip named .jsonl": ("a.jsonl", gzip.compress(b"{}"), None, "does not match its extension: it is gzip"),
    "gzip named .csv": ("a.csv", gzip.compress(b"a"), None, "it is gzip"),
    "zstd named .json": ("a.json", zstd(b"[]"), None, "it is zstd"),
    "packed twice": ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}")), None, "it is gzip"),
    "parquet named .jsonl": ("a.jsonl", parquet(a=[1]), None, "it is parquet"),
    "parquet named .csv": ("a.csv", parquet(a=[1]), None, "it is parquet"),
    "bzip2 named .jsonl": ("a.jsonl", bz2.compress(b"{}"), None, "it is bzip2"),
    "xz named .jsonl": ("a.jsonl", lzma.compress(b"{}"), None, "it is xz"),
    "a spreadsheet": ("a.csv", b"PK\x03\x04\x14\0\x06\0", None, "it is a .zip or .xlsx file"),
    "a database": ("a.json", b"SQLite format 3\0\x10\0", None, "it is an SQLite database"),
    "a PDF": ("a.jsonl", "%PDF-1.7\n", None, "it is a PDF"),
    "an Arrow file": ("a.jsonl", b"ARROW1\0\0\xff\xff\xff\xff", None, "it is an Arrow file"),
    "a web page": ("a.jsonl", "<!DOCTYPE html>\n<html>", None, "it is a web page"),
    "a pointer to the data": ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid x\n", None, "git lfs pull"),
    "text named .parquet": ("a.parquet", '{"a": 1}\n', None, "is not a parquet file, but text"),
    "gzip named .parquet": ("a.parquet", gzip.compress(parquet(a=[1])), None, "is not a parquet file, but gzip"),
    "noise named .parquet": ("a.parquet", b"\x01\x02\xff" * 50, None, "is not a parquet file"),
    "text named .gz": ("a.jsonl.gz", '{"a": 1}\n', None, "is named .gz, but is text"),
    "text named .zst": ("a.jsonl.zst", '{"a": 1}\n', None, "is named .zst, but is text"),
    "zstd named .gz": ("a.csv.gz", zstd(b"a\nb\n"), None, "is named .gz, but is zstd"),
    "gzip named .zst": ("a.csv.zst", gzip.compress(b"a\nb\n"), None, "is named .zst, but is gzip"),
    "noise named .gz": ("a.jsonl.gz", b"\x01\x02\xff" * 50, None, "the gzip data are damaged"),
    "noise named .zst": ("a.jsonl.zst", b"\x01\x02\xff" * 50, None, "the zstd data are damaged"),
    "text in packed parquet": ("a.parquet.gz", gzip.compress(b"a,b\n"), None, "is not a parquet file, but text"),
    "parquet of two columns with one name": ("a.parquet", two_columns_of_one_name(), None, "two columns are named 'a'"),
    "an object over many lines": ("a.json", '{"data":\n [{"a": 1}]}', 1, NOT_JSON),
    "a list that is not closed": ("a.json", '[{"a": 1}\n', 2, "expected ',' or ']', found ''"),
    "a list that ends in a comma": ("a.json", '[{"a": 1},\n', 2, "is not JSON: Expecting value"),
    "a bracket alone": ("a.json", "[", 1, "is not JSON: Expecting value"),
    "a list without a comma": ("a.json", '[{"a": 1}\n {"a": 2}]', 2, "expected ',' or ']', found '{\"a\": 2}]'"),
    "a list with two commas": ("a.json", '[{"a": 1},\n,{"a": 2}]', 2, "is not JSON: Expecting value"),
    "a comma before the end": ("a.json", '[{"a": 1},\n]', 2, "a comma before the closing ']'"),
    "text behind the list": ("a.json", '[{"a": 1}]\nmore', 2, "text after the end of the list: 'more'"),
    "a character that is cut behind the list": ("a.json", b"[]\n\xe2\x82", 2, "text after the end of the list"),
    "two lists": ("a.json", "[]\n[]", 2, "text after the end of the list: '[]'"),
    "an object that is cut": ("a.json", '[{"a": 1},\n{"a": }]', 2, "is not JSON: Expecting value; near '}]'"),
    "a Python dict in a list": ("a.json", "[{'a': 1}]", 1, "is not JSON: Expecting property name"),
    "a newline in a string": ("a.json", '[\n{"a": "x\ny"}]', 2, "Invalid control character"),
    "a NUL byte in a list": ("a.json", '[\n{"a": "\0"}]', 2, "Invalid control character; near '\\x00"),
    "NUL bytes in a list": ("a.json", '[\n{"a": 1},\n\0\0\n]', 3, "consists of NUL bytes"),
    "a string without an end": ("a.json", '[{"a": 1},\n{"a": "x}]', 2, "Unterminated string"),
    "a huge number in a list": ("a.json", "[\n" + "9" * 5000 + "]", 2, "Exceeds the limit"),
    "brackets in a list": ("a.json", "[\n" + "[" * 100_000, 2, "nested too deeply"),
    "no text in a list": ("a.json", b'[{"a": 1},\n\xff]', 2, "is not UTF-8: byte 0xff"),
    "a quote without an end": ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', 3, "is not CSV: unexpected end of data"),
    "text behind a quote": ("a.csv", 'a,b\n"1"x,2\n', 2, "is not CSV: ',' expected after '\"'"),
    "a column name twice": ("a.csv", "a,b, a\n1,2,3\n", 1, "the header names 'a' twice"),
    "one column, without a name": ("a.csv", '""\n1\n', 1, "column 1 of the header has no name"),
    "a column without a name": ("a.csv", "\na,\n1,2\n", 2, "column 2 of the header has no name"),
    "semicolons": ("a.csv", "a;b\n1\n2;3;4\n", 1, "one column, 'a;b': fields are separated by commas, not by ';'"),
    "tabs": ("a.csv", "a\tb\n1\n", 1, "not by '\\t'"),
    "a header that is no text": ("a.csv", b"\xc3\xa9,\xe9\n1,2\n", 1, "is not UTF-8"),
    "a NUL byte in the header": ("a.csv", "a,\0\n1,2\n", 1, "contains a NUL byte"),
    "an unknown kind": ("a.doc", "x", None, "unknown file type '.doc'"),
    "COCO": ("a.json", '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}', None, "is COCO's JSON"),
    "no kind": ("a", "x", None, "unknown file type ''"),
    "a kind that is not unpacked": ("a.jsonl.bz2", bz2.compress(b"{}"), None, "unknown file type '.bz2'"),
}  # fmt: skip
"""Name, content, line of the error, words of it."""


# --- what is no file


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pipe": (os.mkfifo, "is a pipe, not a regular file"),
    "a socket": (make_socket, "is a socket, not a regular file"),
    "a link to a device without end": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "a link to the terminal": (lambda path: path.symlink_to("/dev/tty"), "is a device, not a regular file"),
    "a link to nowhere": (lambda path: path.symlink_to(path.parent / "gone"), "cannot be read: No such file"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    "a file of the kernel": (lambda path: path.symlink_to("/proc/self/mem"), "is empty"),
    "a folder": (lambda path: path.mkdir(), "the folder contains no file that can be read"),
}


# --- content: each of these is a file in order, and nothing that could be trained on


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD_CONTENT: dict[str, dict[str, Any]] = {
    "null text": {"text": None},
    "a number for text": {"text": 5},
    "a list for text": {"text": ["x"]},
    "an object for text": {"text": {"x": "y"}},
    "empty text": {"text": " \n\t"},
    "a truth value for text": {"text": False},
    "null completion": {"prompt": "q", "completion": None},
    "null prompt": {"prompt": None, "completion": "a"},
    "empty completion": {"prompt": "q", "completion": ""},
    "a number for a completion": {"prompt": "q", "completion": 1.5},
    "turns as the prompt of a text": {"prompt": [USER], "completion": "a"},
    "null messages": {"messages": None},
    "text for messages": {"messages": "[Hello"},
    "an object for messages": {"messages": {"0": USER}},
    "no messages": turns(),
    "messages in messages": turns([USER, ANSWER]),
    "text for a message": turns("q", "a"),
    "null for a message": turns(USER, None),
    "no role": turns({"content": "q"}, ANSWER),
    "null role": turns({"role": None, "content": "q"}, ANSWER),
    "an unknown role": turns({"role": "robot", "content": "q"}, ANSWER),
    "a role with a capital": turns({"role": "User", "content": "q"}, ANSWER),
    "null content": turns({"role": "user", "content": None}, ANSWER),
    "null answer": turns(USER, {"role": "assistant", "content": None}),
    "no answer": turns(USER, {"role": "assistant"}),
    "a number for an answer": turns(USER, {"role": "assistant", "content": 7}),
    "an empty answer": turns(USER, {"role": "assistant", "content": "  "}),
    "parts for content": turns({"role": "user", "content": [{"type": "image"}]}, ANSWER),
    "no assistant": turns(USER),
    "a number for train": turns(USER, {**ANSWER, "train": 1}),
    "tools that are no JSON": {**turns(USER, ANSWER), "tools": "{"},
    "tools that are deep": {**turns(USER, ANSWER), "tools": "[" * 100_000},
    "tool calls that are none": turns(USER, {"role": "assistant", "tool_calls": [1]}),
    "null output": {"instruction": "q", "output": None},
    "a number for an instruction": {"instruction": 1, "output": "a"},
    "sharegpt without values": {"conversations": [{"from": "human"}, {"from": "gpt"}]},
    "sharegpt of an unknown kind": {"conversations": [{"from": "alien", "value": "q"}]},
    "no columns": {},
    "other columns": {"foo": "q", "bar": "a"},
    "two formats": {"text": "x", "prompt": "q", "completion": "a"},
    "columns with long names": {"x" * 100_000: 1, "y" * 100_000: 2},
    "10,000 columns": {f"column {n}": "x" for n in range(10_000)},
    "columns that move the cursor": {"\x1b[2J": "q", "a\nb": "x"},
}


# --- mutations of good files


def good_files() -> dict[str, bytes]:
    rows = [
        {"prompt": f"q {n} é😀", "completion": 'x,"\n' * (n % 5), "m": [{"role": "user", "content": "hi"}]}
        for n in range(20)
    ]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["a", "b"], *([row["prompt"], row["completion"]] for row in rows)])
    return {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".csv": text.getvalue().encode(),
        ".parquet": parquet(a=[row["prompt"] for row in rows], m=[row["m"] for row in rows]),
    }


PIECES = [b'"', b"\n", b"\r", b",", b"\0", b"[", b"{", b"}", b"\\", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"\x7f" * 4]


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.choice([1, 4]))
        elif kind == 2:
            del changed[at : at + rng.choice([1, 8, 100])]
        elif kind == 3:
            changed[at:at] = rng.choice(PIECES)
        else:
            del changed[max(1, at) :]
    return bytes(changed)
