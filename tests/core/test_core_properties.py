"""For any shapes, r and patterns: inject, save, load and merge agree with one another."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.targets import module_matches
from peftcli.core.weights import adapter_state
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig

repeatable = settings(max_examples=40, derandomize=True, database=None)


class Block(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = Conv1D(width, inner)
        self.gate = nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x))) * torch.sigmoid(self.gate(x))


class Model(nn.Module):
    def __init__(self, vocabulary: int, width: int, inner: int, depth: int, bias: bool):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, inner, bias) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Model, dict[str, Any]]:
    width, depth = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    targets = draw(st.lists(st.sampled_from(["up", "down", "gate", "embed", "head"]), min_size=1, unique=True))
    layered = [name for name in targets if name in ("up", "down", "gate")]
    r = draw(st.integers(1, 8))
    config: dict[str, Any] = {
        "target_modules": targets,
        "r": r,
        "lora_alpha": draw(st.floats(0.125, 64)),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(targets), st.integers(1, 8))),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(targets), st.floats(0.125, 64))),
    }
    if layered and draw(st.booleans()):
        name = draw(st.sampled_from(layered))
        config["rank_pattern"][rf"layers\.{draw(st.integers(0, depth - 1))}\.{name}"] = draw(st.integers(1, 8))
    if layered == targets and draw(st.booleans()):
        kept = draw(st.lists(st.integers(0, depth - 1), min_size=1, unique=True))
        config["layers_to_transform"] = sorted(kept)
        config["rank_pattern"] = {key: value for key, value in config["rank_pattern"].items() if "\\" not in key}
    if "head" not in targets and draw(st.booleans()):
        config["modules_to_save"] = ["head"]
    torch.manual_seed(draw(st.integers(0, 1000)))
    model = Model(draw(st.integers(2, 12)), width, draw(st.integers(1, 9)), depth, draw(st.booleans()))
    return model.double().eval(), config


def _adapted(base: Model, values: dict[str, Any]) -> tuple[Model, LoraConfig]:
    model, config = copy.deepcopy(base), LoraConfig(**copy.deepcopy(values))
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model, config


@repeatable
@given(cases())
def test_inject_save_load_merge_unload(case: tuple[Model, dict[str, Any]]) -> None:
    base, values = case
    ids = torch.arange(base.embed.num_embeddings)[None]
    model, config = _adapted(base, values)
    with torch.no_grad():
        plain, adapted = base(ids), model(ids)
        with disabled(model):
            assert torch.equal(model(ids), plain)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, config, Path(folder))
            loaded = copy.deepcopy(base)
            load_adapter(loaded, config_from_dict(read_config(Path(folder))), Path(folder))
        assert torch.equal(loaded(ids), adapted)
        merge(model, config)
        torch.testing.assert_close(model(ids), adapted)
        unload(loaded)
        assert torch.equal(loaded(ids), plain)
    for done in (model, loaded):
        assert not adapter_layers(done)
        assert list(done.state_dict()) == list(base.state_dict())


@repeatable
@given(cases())
def test_a_new_adapter_changes_nothing_and_has_the_r_that_was_asked(case: tuple[Model, dict[str, Any]]) -> None:
    base, values = case
    model = copy.deepcopy(base)
    inject(model, LoraConfig(**{**values, "init_lora_weights": True}))
    ids = torch.arange(base.embed.num_embeddings)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), base(ids))
    for name, layer in adapter_layers(model).items():
        if hasattr(type(layer), "delta"):
            patterns = {key.replace("\\", ""): r for key, r in values["rank_pattern"].items()}
            asked = [r for key, r in patterns.items() if module_matches(name, key)]
            assert layer.r == (asked or [values["r"]])[0]


@repeatable
@given(cases())
def test_the_state_holds_the_adapter_and_nothing_else(case: tuple[Model, dict[str, Any]]) -> None:
    base, values = case
    model, _ = _adapted(base, values)
    state = adapter_state(model)
    assert sum(value.numel() for value in state.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert all(name.startswith("base_model.model.") and not value.requires_grad for name, value in state.items())
    biases = {name for name in state if name.endswith(".bias") and "head" not in name}
    assert not (biases and values["bias"] == "none")
