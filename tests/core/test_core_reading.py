"""Files that anybody may have written: what is read of them, what is refused, and in which words."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from peftcli.core import files
from peftcli.core.files import read_tensors
from peftcli.core.weights import is_finite
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import DTYPES, WEIGHTS_FILE, open_weights

# tensors


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = 8 * torch.rand(6, generator=generator) - 4
    values = {name: drawn.to(getattr(torch, DTYPES[name])).view(2, 3) for name in DTYPES}
    return {**values, "empty": torch.empty(0, 3), "a number": torch.tensor(2.5)}


def test_tensors_of_every_dtype_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    safetensors.torch.save_file(_tensors(), tmp_path / WEIGHTS_FILE)
    found, expected = read_tensors(tmp_path), safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert list(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tolist() == value.tolist()


def test_safetensors_reads_what_is_written_and_writes_the_same(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    tensors = {"turned": shared.view(3, 4).t(), "a part": shared[3:7], "ü \n": shared, **_tensors()}
    files.write_tensor_file(tmp_path / "all.safetensors", tensors, {"b": "1", "a": "2"})
    found = safetensors.torch.load_file(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name
    with safetensors.safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "b": "1", "a": "2"}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    numbers = {name: value for name, value in tensors.items() if value.dtype in (torch.float32, torch.bfloat16)}
    files.write_tensor_file(ours, numbers)
    apart = {name: value.clone(memory_format=torch.contiguous_format) for name, value in numbers.items()}
    safetensors.torch.save_file(apart, theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_file_that_is_cut_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    safetensors.torch.save_file({"a": torch.ones(5000)}, path)
    with open_weights(path) as (header, file):
        os.truncate(path, 9000)
        with pytest.raises(AdapterError, match="damaged: it was truncated while it was read"):
            files.read_open_tensors(header, file, path)


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


def test_a_header_of_its_own_making_is_read_as_it_stands(tmp_path: Path) -> None:
    said = {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **said}).encode() + b"   "
    content = len(raw).to_bytes(8, "little") + raw + torch.tensor([1.5, 2.5]).numpy().tobytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    assert {name: value.tolist() for name, value in read_tensors(tmp_path).items()} == {"a": 1.5, "b": [2.5]}
