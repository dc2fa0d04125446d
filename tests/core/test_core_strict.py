"""A file or config that is not what it says is refused with all that is wrong, before memory is taken for it."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from promises import base_settings
from safetensors.torch import load_file, save_file
from torch import nn

import peftcli
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.targets import find_targets
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import read_header
from peftcli.methods import METHODS, config_from_dict

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _saved(folder: Path, method: str = "lora", **more: Any) -> Path:
    """The folder, with an adapter for the tiny Llama."""
    config = METHODS[method].config_class()(**base_settings(method, "llama"), **more)
    model = tiny("llama")
    inject(model, config)
    randomise(model)
    save_adapter(model, config, folder)
    return folder


def _load(folder: Path, model: nn.Module | None = None) -> None:
    load_adapter(model or tiny("llama"), config_from_dict(read_config(folder)), folder)


def _change(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# tensors


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.grid(keep=6)
def test_all_that_is_wrong_with_a_file_is_one_error(method: str, tmp_path: Path) -> None:
    tensors = load_file(_saved(tmp_path, method) / WEIGHTS)
    not_read = re.compile(r".*\.adamss_rows|.*_proj\.randlora_[AB]")  # only PEFT's files lack it; only PEFT needs it
    names = [name for name in tensors if not not_read.fullmatch(name)]
    extra = names[0] + "_of_another_kind"
    tensors[extra] = torch.ones(2)
    tensors[names[0]] = torch.zeros(*tensors[names[0]].shape, 7)
    expected = [f"unexpected: {extra}", f"shape: {names[0]} is"]
    if len(names) > 1:
        del tensors[names[1]]
        expected.append(f"missing: {names[1]}")
    if len(names) > 2:
        kind = torch.int64 if tensors[names[2]].is_floating_point() else torch.float32
        tensors[names[2]] = tensors[names[2]].to(kind)
        expected.append(f"type: {names[2]} is {str(kind).removeprefix('torch.')}")
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    model = tiny("llama")
    with pytest.raises(AdapterError) as caught:
        _load(tmp_path, model)
    assert str(tmp_path / WEIGHTS) in str(caught.value)
    for line in expected:
        assert f"\n  {line}" in str(caught.value)
    assert list(model.state_dict()) == list(tiny("llama").state_dict())


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_found(method: str, value: float, tmp_path: Path) -> None:
    tensors = load_file(_saved(tmp_path, method) / WEIGHTS)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    model = tiny("llama")
    with pytest.raises(AdapterError, match=re.escape(f"not finite: {name}")):
        _load(tmp_path, model)
    assert list(model.state_dict()) == list(tiny("llama").state_dict())


@pytest.mark.parametrize("name", ["U16", "F4", "F8_E8M0", "F77"])
def test_numbers_of_a_strange_kind_are_refused(name: str, tmp_path: Path) -> None:
    header = {"x": {"dtype": name, "shape": [2], "data_offsets": [0, {"U16": 4, "F4": 1}.get(name, 2)]}}
    _saved(tmp_path)
    _write_header(tmp_path / WEIGHTS, json.dumps(header).encode(), header["x"]["data_offsets"][1])  # type: ignore[index]
    with pytest.raises(AdapterError, match=rf"x: is {name}, which no adapter's tensors are|damaged"):
        _load(tmp_path)


# headers


def _write_header(path: Path, header: bytes, size: int = 0) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def _entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 0),
    "no JSON": (b"{", 0),
    "a list": (b"[]", 0),
    "nested": (b"[" * 100_000, 0),
    "not UTF-8": (b"\xff\xfe", 0),
    "twice": (b'{"a": %s, "a": %s}' % ((json.dumps(_entry()).encode(),) * 2), 8),
    "too short": (json.dumps({"a": _entry()}).encode(), 7),
    "too long": (json.dumps({"a": _entry()}).encode(), 9),
    "overlap": (json.dumps({"a": _entry(), "b": _entry(offsets=(4, 12))}).encode(), 12),
    "a hole": (json.dumps({"a": _entry(), "b": _entry(offsets=(12, 20))}).encode(), 20),
    "shape and size": (json.dumps({"a": _entry(shape=(3,))}).encode(), 8),
    "huge shape": (json.dumps({"a": _entry(shape=(1 << 62, 1 << 62))}).encode(), 8),
    "negative shape": (json.dumps({"a": _entry(shape=(-1, -2))}).encode(), 8),
    "negative offsets": (json.dumps({"a": _entry(offsets=(-8, 0))}).encode(), 0),
    "a float": (json.dumps({"a": _entry(shape=(2.0,))}).encode(), 8),
    "true": (json.dumps({"a": _entry(shape=(True, 2))}).encode(), 8),
    "no shape": (json.dumps({"a": {"dtype": "F32", "data_offsets": (0, 8)}}).encode(), 8),
    "no offsets": (json.dumps({"a": {"dtype": "F32", "shape": (2,)}}).encode(), 8),
    "three offsets": (json.dumps({"a": _entry(offsets=(0, 4, 8))}).encode(), 8),
    "text": (json.dumps({"a": "b"}).encode(), 0),
    "a strange dtype": (json.dumps({"a": _entry(dtype="F33")}).encode(), 8),
    "offsets that are floats": (json.dumps({"a": _entry(offsets=(0.0, 8.0))}).encode(), 8),
    "notes that are no text": (b'{"__metadata__": {"a": 1}}', 0),
    "UTF-16": ("{}".encode("utf-16"), 0),
    "a list as dtype": (json.dumps({"a": _entry(dtype=["F32"])}).encode(), 8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    header, size = HEADERS[name]
    _saved(tmp_path)
    _write_header(tmp_path / WEIGHTS, header, size)
    for read in (_load, lambda folder: read_header(folder / WEIGHTS)):
        with pytest.raises(AdapterError, match="damaged: ") as caught:
            read(tmp_path)
        assert str(tmp_path / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize("length", [1 << 25, 1 << 40, (1 << 64) - 1])
def test_the_length_of_a_header_is_bounded(length: int, tmp_path: Path) -> None:
    _saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(AdapterError, match="header is larger than 16 MB"):
        _load(tmp_path)


def test_headers_of_many_tensors_and_of_empty_ones_are_read(tmp_path: Path) -> None:
    tensors = {f"base_model.model.layers.{i}.experts.{i}.up_proj.lora_A.weight": torch.ones(1) for i in range(20_000)}
    save_file({**tensors, "empty": torch.ones(0, 3)}, tmp_path / WEIGHTS, {"format": "pt"})
    header = read_header(tmp_path / WEIGHTS)
    assert len(header) == 20_001
    assert (header["empty"].shape, header["empty"].numel) == ((0, 3), 0)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_pipe_is_no_file(file: str, tmp_path: Path) -> None:
    (_saved(tmp_path) / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(AdapterError, match=f"{file}: is a pipe, not a regular file"):
        _load(tmp_path)


# configs

HUGE = 10**15

ABSURD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "r": ("lora", {}, {"r": HUGE}),
    "r of a pattern": ("lora", {}, {"rank_pattern": {"q_proj": HUGE}}),
    "r of an embedding": ("lora", {"target_modules": ["embed_tokens"]}, {"r": HUGE}),
    "r 0": ("lora", {}, {"r": 0}),
    "negative r": ("lora", {}, {"r": -4}),
    "another r": ("lora", {}, {"r": 16}),
    "alpha": ("lora", {}, {"lora_alpha": -1}),
    "infinite alpha": ("lora", {}, {"lora_alpha": float("inf")}),
    "more modules": ("lora", {}, {"target_modules": ["q_proj", "v_proj", "k_proj"]}),
    "fewer modules": ("lora", {}, {"target_modules": ["q_proj"]}),
    "a saved module": ("lora", {}, {"modules_to_save": ["lm_head"]}),
    "another kind": ("lora", {}, {"use_dora": True}),
    "virtual tokens": ("prompt_tuning", {}, {"num_virtual_tokens": HUGE}),
    "prefix": ("prefix_tuning", {}, {"num_virtual_tokens": HUGE}),
    "p-tuning": ("p_tuning", {}, {"num_virtual_tokens": HUGE}),
    "loha": ("loha", {}, {"r": HUGE}),
    "adalora": ("adalora", {}, {"init_r": HUGE}),
    "unknown": ("lora", {}, {"peft_type": "LORRA"}),
    "another method": ("lora", {}, {"peft_type": "IA3"}),
}


@pytest.mark.parametrize("name", ABSURD)
def test_a_config_that_the_file_does_not_bear_out_is_refused(name: str, tmp_path: Path) -> None:
    method, given_settings, changes = ABSURD[name]
    _change(_saved(tmp_path, method, **given_settings), **changes)
    model = tiny("llama")
    with pytest.raises(AdapterError):
        _load(tmp_path, model)
    assert list(model.state_dict()) == list(tiny("llama").state_dict())
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        lambda: peftcli.LoraConfig(r=HUGE),
        lambda: peftcli.LoraConfig(target_modules=["embed_tokens"], r=HUGE),
        lambda: peftcli.LoraConfig(rank_pattern={"q_proj": HUGE}),
        lambda: peftcli.PromptTuningConfig(num_virtual_tokens=HUGE),
    ],
)
def test_a_new_adapter_of_absurd_size_is_refused(config: Callable[[], Any]) -> None:
    with pytest.raises(AdapterError):
        inject(tiny("llama"), config())


# patterns


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_bomb_in_a_config_is_harmless(key: str) -> None:
    bomb = {"target_modules": r"(.+)+x", "exclude_modules": r"(.+)+x", "rank_pattern": {r"(.+)+x": 2}}[key]
    with pytest.raises(AdapterError, match=key):
        find_targets(tiny("llama"), peftcli.LoraConfig(**{key: bomb})) if key != "rank_pattern" else inject(
            tiny("llama"), peftcli.LoraConfig(rank_pattern=bomb)
        )
