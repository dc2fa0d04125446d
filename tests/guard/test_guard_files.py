"""Untrusted files: what is read of them, what is refused, and in which words."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from peftcli.errors import AdapterError, ModelError
from peftcli.guard.files import command_word, one_line, open_regular, read_json_object, short_name, short_repr


def _read(folder: Path, text: str | bytes, *, strict: bool = True) -> dict[str, object]:
    path = folder / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_json_object(path, 1000, strict=strict)


def test_an_object_is_read(tmp_path: Path) -> None:
    assert _read(tmp_path, '\ufeff{"a": [1, {"b": 2.5}],\r\n"ä": null}') == {"a": [1, {"b": 2.5}], "ä": None}


REFUSED: dict[str, tuple[str | bytes, int | None, str | None, str]] = {
    "cut": ('{"a": 1,\n"b"', 2, None, "not valid JSON"),
    "empty": ("\n", None, None, "is empty"),
    "not UTF-8": (b'{"a":\n"\xff"}', 2, None, "not UTF-8 text"),
    "no object": ("[1]", None, None, "holds no JSON object"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', None, "b", "is given twice"),
    "no number": ('{"a": NaN}', None, None, "NaN is not a number"),
    "large": ('{"a": 1}' + " " * 1000, None, None, "1,008 bytes, and at most 1,000"),
    "deep": ('{"a": ' + "[" * 64 + "]" * 64 + "}", None, None, "nested deeper than 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_object_is_said_with_its_place(name: str, tmp_path: Path) -> None:
    text, line, key, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message) as caught:
        _read(tmp_path, text)
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(tmp_path / "a.json"), line, key)


def test_what_json_leaves_open_is_read_unless_it_must_be_strict(tmp_path: Path) -> None:
    found = _read(tmp_path, '{"a": 1, "a": Infinity}', strict=False)
    assert found == {"a": math.inf}


def test_63_levels_are_read(tmp_path: Path) -> None:
    assert _read(tmp_path, '{"a": ' + "[" * 63 + "]" * 63 + "}")


def test_a_pipe_is_neither_read_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a pipe, not a regular file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is a pipe, not a regular file"):
        read_json_object(tmp_path / "pipe", 10, ModelError)


@pytest.mark.parametrize(
    "value", ["a" * 5000, ["b" * 5000] * 5000, {"k" * 99: {"x": {"y": {"z": 1}}}}, "\x1b[31m\n\u202e", [1 << 20_000]]
)
def test_foreign_values_are_short_and_on_one_line(value: object) -> None:
    assert short_repr(value).isprintable()
    assert len(short_repr(value)) < 600


def test_foreign_names_stay_as_they_are_unless_they_are_strange() -> None:
    assert short_name("model.layers.0.ä") == "model.layers.0.ä"
    assert short_name("a\nb") == r"'a\nb'"
    assert len(short_name("a" * 500)) < 100
    assert one_line("a\x1b[2J\nb\ud800") == r"a\x1b[2J\nb\ud800"
    assert one_line("a" * 600) == "a" * 600  # nothing is cut
    assert one_line("a" * 601) == one_line("a" * 10_000) == f"{'a' * 600} ..."


@pytest.mark.parametrize(("path", "word"), [("out/a", "out/a"), ("a b", "'a b'"), ("-out", "./-out"), ("~", "'~'")])
def test_a_path_as_a_word_of_a_command(path: str, word: str) -> None:
    assert command_word(path) == word
