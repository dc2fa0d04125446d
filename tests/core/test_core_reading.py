"""Files that anybody may have written: what is read of them, what is refused, and in which words."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.core import files
from peftcli.core.files import read_tensors
from peftcli.core.weights import is_finite
from peftcli.errors import AdapterError, ModelError
from peftcli.guard import patterns
from peftcli.guard.adapter_header import DTYPES, WEIGHTS_FILE, opened_weights
from peftcli.guard.files import cut, open_regular, read_object, shown, shown_name
from peftcli.guard.patterns import PatternError, check_cost, compiled, ends_with

# objects


def _read(folder: Path, text: str | bytes, *, strict: bool = True) -> dict[str, object]:
    path = folder / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_object(path, 1000, strict=strict)


def test_an_object_is_read(tmp_path: Path) -> None:
    assert _read(tmp_path, '\ufeff{"a": [1, {"b": 2.5}],\r\n"ä": null}') == {"a": [1, {"b": 2.5}], "ä": None}


REFUSED: dict[str, tuple[str | bytes, int | None, str | None, str]] = {
    "cut": ('{"a": 1,\n"b"', 2, None, "not valid JSON"),
    "not UTF-8": (b'{"a":\n"\xff"}', 2, None, "not UTF-8 text"),
    "no object": ("[1]", None, None, "holds no JSON object"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', None, "b", "is given twice"),
    "no number": ('{"a": NaN}', None, None, "NaN is no number"),
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
    with pytest.raises(ValueError, match="a pipe, no regular file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(ModelError, match="is a pipe, no regular file"):
        read_object(tmp_path / "pipe", 10, ModelError)


@pytest.mark.parametrize(
    "value", ["a" * 5000, ["b" * 5000] * 5000, {"k" * 99: {"x": {"y": {"z": 1}}}}, "\x1b[31m\n\u202e"]
)
def test_foreign_values_are_short_and_on_one_line(value: object) -> None:
    assert shown(value).isprintable()
    assert len(shown(value)) < 600


def test_foreign_names_stay_as_they_are_unless_they_are_strange() -> None:
    assert shown_name("model.layers.0.ä") == "model.layers.0.ä"
    assert shown_name("a\nb") == r"'a\nb'"
    assert len(shown_name("a" * 500)) < 100
    assert cut("a\x1b[2J\nb\ud800") == r"a\x1b[2J\nb\ud800"
    assert len(cut("a" * 10_000)) < 700


# tensors


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = 8 * torch.rand(6, generator=generator) - 4
    values = {name: drawn.to(files._DTYPES[name]).view(2, 3) for name in DTYPES}
    return {**values, "empty": torch.empty(0, 3), "a number": torch.tensor(2.5)}


def test_tensors_of_every_dtype_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    safetensors.torch.save_file(_tensors(), tmp_path / WEIGHTS_FILE)
    found, expected = read_tensors(tmp_path), safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert list(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tolist() == value.tolist()


def test_a_file_that_is_cut_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    safetensors.torch.save_file({"a": torch.ones(5000)}, path)
    with opened_weights(path) as (header, file):
        os.truncate(path, 9000)
        with pytest.raises(AdapterError, match="damaged: it ended while it was read"):
            files._read(header, file, path)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_found_wherever_it_stands(dtype: torch.dtype, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 8, 15, 16, 31, 33, 100, 1000):
        good = torch.randn(count, generator=generator).to(dtype)
        assert is_finite(good)
        for place in {0, count // 2, count - 1}:
            bad = good.clone()
            bad[place] = torch.tensor(value).to(dtype)
            assert not is_finite(bad), (count, place)


def test_opposite_infinities_are_found_and_large_numbers_are_none() -> None:
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
    assert is_finite(torch.full((1000,), 3.4e38))
    assert is_finite(torch.full((1000,), 65504.0, dtype=torch.float16))
    assert is_finite(torch.tensor([[1, 2]]))
    assert is_finite(torch.empty(0))


def test_a_number_that_another_dtype_cannot_hold_is_found() -> None:
    value = torch.tensor([1e39], dtype=torch.float64)
    assert is_finite(value)
    assert not is_finite(value, torch.float32)
    assert not is_finite(torch.tensor([1e5]), torch.float16)
    assert is_finite(torch.tensor([6e4]), torch.float16)


# patterns

_WORDS = st.lists(st.sampled_from(["a", "b", "ab", "_", ".", "a.b", "1"]), min_size=1, max_size=5).map("".join)


@given(_WORDS, st.text("ab_.1", min_size=1, max_size=9))
@settings(max_examples=500, derandomize=True, deadline=None, database=None)
def test_a_plain_name_means_what_it_means_as_a_pattern(name: str, text: str) -> None:
    assert ends_with(text, name) == bool(re.fullmatch(rf"(.*\.)?({name})", text))


def test_patterns_that_python_may_take_long_for_are_read_otherwise() -> None:
    assert isinstance(compiled(r".*\.layers\.\d+\.(q|v)_proj").read, re.Pattern)
    for bomb in (r"(.*)*x", r"(a|a)*b", "(?i)" + "[\\x01-\\U0010ffff]+" * 3, r"(?:(?:){60000}){60000}", ".*" * 9):
        assert not isinstance(compiled(bomb).read, re.Pattern), bomb


def test_neither_way_to_read_a_pattern_recurses_forever() -> None:
    with pytest.raises(PatternError, match=r"nested too deeply|is no regular expression"):
        compiled("(?=(.*)*" * 200 + "a" + ")" * 200).fullmatch("a" * 50)


def test_a_pattern_may_take_more_steps_for_more_texts() -> None:
    slow = compiled.__wrapped__(r"([a-z]+\.?)*_proj")
    assert all(slow.fullmatch(f"model.layers.self_attn.q{number % 10}_proj") is False for number in range(3000))


def test_many_patterns_are_refused_before_they_are_tried() -> None:
    check_cost([f"model.layers.{number}.q_proj" for number in range(100_000)])
    check_cost([rf"layers\.{number}\..*_proj" for number in range(80)])
    with pytest.raises(PatternError, match="take too long to match"):
        check_cost([rf"layers\.{number}\..*_proj.*" for number in range(80)])


def test_every_way_to_match_is_tried_by_bits_too() -> None:
    with mock.patch.object(patterns, "_QUICK", -1.0):
        for text, names in {
            r"a.*?\.b{1,2}(?!c)": ["a.b", "ax.bb", "a.bbb", "b"],
            "(?i)A_?1": ["a_1", "A1", "a11"],
        }.items():
            slow = compiled.__wrapped__(text)
            assert not isinstance(slow.read, re.Pattern)
            assert [slow.fullmatch(name) for name in names] == [bool(re.fullmatch(text, name)) for name in names]


def test_a_header_of_its_own_making_is_read_as_it_stands(tmp_path: Path) -> None:
    said = {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **said}).encode() + b"   "
    content = len(raw).to_bytes(8, "little") + raw + torch.tensor([1.5, 2.5]).numpy().tobytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    assert {name: value.tolist() for name, value in read_tensors(tmp_path).items()} == {"a": 1.5, "b": [2.5]}
