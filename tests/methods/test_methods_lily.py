"""Lily: its formula, which layers share which matrices, and that each trains once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import ours
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import named_tensors
from peftcli.methods import config_from_dict
from peftcli.methods.lily import LilyConfig
from peftcli.methods.lily.layers import LilyLinear

SETTINGS: dict[str, Any] = {"r": 4, "num_B": 3, "target_modules": ["q_proj", "down_proj"]}


def test_the_update_is_a_mixture_that_all_positions_agree_on() -> None:
    base = nn.Linear(5, 7)
    layer = LilyLinear(base, "x", LilyConfig(r=4, num_B=3, scaling=0.5, init_weights=False))
    x = torch.randn(2, 6, 5)
    with torch.no_grad():
        hidden = x @ layer.lily_A.weight.T
        shares = (hidden @ layer.lily_router.weight.T).softmax(-1).mean((0, 1))
        mixed = sum(share * part for share, part in zip(shares, layer.lily_B.weight.view(3, 4, 7), strict=True))
        torch.testing.assert_close(layer(x), base(x) + 0.5 * hidden @ mixed)
        assert not torch.allclose(layer(x[:1]), layer(x)[:1]), "a row's result depends on the others of its batch"


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(5))


def test_neighbours_share_a_and_all_layers_of_a_kind_share_b() -> None:
    model = Stack()
    layers = inject(model, LilyConfig(r=2, stride_A=2, target_modules=["up", "down"])).layers
    for kind in ("up", "down"):
        group: list[Any] = [layers[f"layers.{number}.{kind}"] for number in range(5)]
        assert len({id(layer.lily_B) for layer in group}) == 1
        a = [layer.lily_A for layer in group]
        assert a[0] is a[1] is not a[2] is a[3] is not a[4]
    assert len({id(layer.lily_router) for layer in layers.values()}) == 10


@pytest.mark.parametrize(
    "left_out",
    [
        {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"},
        {"exclude_modules": ["4.down"]},
        {"exclude_modules": r".*\.0\.up", "unreached": ["layers.4.down"]},
    ],
)
def test_layers_that_are_left_out_leave_the_others_sharing(left_out: dict[str, Any]) -> None:
    config = LilyConfig(r=2, **left_out)
    layers: dict[str, Any] = inject(Stack(), config).layers
    assert len(layers) < 10
    for kind in ("up", "down"):
        assert len({layer.lily_B for name, layer in layers.items() if name.endswith(kind)}) == 1
    read: Any = config_from_dict(config.file_dict())
    assert read.target_modules == {"up", "down"}, "by these names PEFT shares"
    assert inject(Stack(), read).layers.keys() == layers.keys()


def test_layers_of_one_name_and_several_shapes_do_not_share() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6)), nn.Sequential(nn.Linear(4, 8)))
    first, second = inject(model, LilyConfig(r=2, stride_A=2, target_modules=["0.0", "1.0"])).layers.values()
    assert first.lily_A is not second.lily_A
    both = inject(nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 8)), LilyConfig(r=2, target_modules=r"\d")).layers
    assert len({id(layer.lily_B) for layer in both.values()}) == 2


def test_what_is_shared_trains_once_and_is_written_for_each_layer(tmp_path: Path) -> None:
    model, config = ours("llama", "lily", **SETTINGS, stride_A=2)
    trained, written = named_tensors(model), adapter_layers(model)
    assert len(trained) == 2 + 2 + 4, "A and B of each kind, and a router each"
    assert len({id(parameter) for _, _, parameter in trained.values()}) == len(trained)
    before = {name: parameter.clone() for name, (_, _, parameter) in trained.items()}
    optimizer = torch.optim.AdamW([parameter for _, _, parameter in trained.values()], lr=1e-2)
    model(**labelled("llama")).loss.backward()
    optimizer.step()
    assert not any(torch.equal(before[name], parameter) for name, (_, _, parameter) in trained.items())
    save_adapter(model, config, tmp_path)
    tensors = read_tensors(tmp_path)
    assert len(tensors) == 3 * len(written)
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        first, second = (tensors[f"base_model.model.model.layers.{n}.{kind}.lily_B.weight"] for n in (0, 1))
        assert torch.equal(first, second)


def test_a_loaded_adapter_shares_again_and_trains_on(tmp_path: Path) -> None:
    model, config = ours("llama", "lily", **SETTINGS, stride_A=2)
    save_adapter(model, config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path, trainable=True)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))
    assert named_tensors(loaded).keys() == named_tensors(model).keys()
    assert all(parameter.requires_grad for _, _, parameter in named_tensors(loaded).values())


@pytest.mark.parametrize(("settings", "key"), [({"num_B": 1}, "num_B"), ({"stride_A": 0}, "stride_A")])
def test_settings_that_mean_nothing(settings: dict[str, Any], key: str) -> None:
    assert [found for found, _ in LilyConfig.unchecked(**settings).problems()] == [key]
