"""OFT, BOFT and HRA rotate: lengths and angles stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.protocols import after_step
from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.boft import BOFTConfig
from peftcli.methods.hra import HRAConfig
from peftcli.methods.oft import OFTConfig

CONFIGS: dict[str, Any] = {
    "oft": OFTConfig(oft_block_size=4, use_cayley_neumann=False),
    "oft-shared": OFTConfig(oft_block_size=0, r=3, use_cayley_neumann=False, block_share=True),
    "boft": BOFTConfig(boft_block_size=3),
    "boft-butterfly": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2),
    "hra": HRAConfig(r=4),
    "hra-orthogonal": HRAConfig(r=3, apply_GS=True),
}


def wrapped(config: Any, base: nn.Module, random: bool = True) -> Any:
    """The layer over a frozen base layer, its weights random."""
    layer = wrap(base.requires_grad_(False), "x", config)
    if random:
        randomise(layer)
    return layer.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rotation_is_orthogonal_and_has_a_way_back(name: str) -> None:
    layer = wrapped(CONFIGS[name], nn.Linear(12, 5))
    rotation = layer.rotated(torch.eye(12))
    assert (rotation - torch.eye(12)).abs().max() > 0.1
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(12), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.rotated(torch.eye(12), back=True), rotation.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "hra-orthogonal"])
def test_training_starts_from_the_base_layer(name: str) -> None:
    for base, x in ((nn.Linear(12, 5), torch.randn(2, 12)), (nn.Conv2d(3, 5, 2), torch.randn(2, 3, 4, 4))):
        layer = wrapped(CONFIGS[name], base, random=False)
        torch.testing.assert_close(layer(x), base(x), atol=1e-5, rtol=1e-5)
        layer(x).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.own_tensors().values())


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(12, 5), (2, 12)),
        (nn.Conv2d(3, 5, 2, stride=2, padding=1, dilation=2, padding_mode="reflect"), (2, 3, 8, 8)),
        (nn.Conv2d(2, 5, (2, 3)), (2, 2, 5, 5)),
    ],
)
def test_merged_is_the_same(name: str, base: nn.Module, x: tuple[int, ...]) -> None:
    layer, inputs = wrapped(CONFIGS[name], base), torch.randn(x)
    merged = layer.folded(dict(base.named_parameters()))
    torch.testing.assert_close(torch.func.functional_call(base, merged, (inputs,)), layer(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_convolutions_are_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="is a grouped convolution"):
        wrap(nn.Conv2d(4, 4, 3, groups=2), "x", CONFIGS[name])


def test_the_series_comes_near_the_rotation() -> None:
    exact = wrapped(OFTConfig(oft_block_size=4, use_cayley_neumann=False), nn.Linear(12, 5))
    errors = []
    for terms in (2, 5, 12):
        series = wrapped(OFTConfig(oft_block_size=4, num_cayley_neumann_terms=terms), nn.Linear(12, 5))
        for layer in (exact, series):
            layer.oft_R.weight.data.mul_(0.5 if layer is exact and terms == 2 else 1)
        series.oft_R.weight.data.copy_(exact.oft_R.weight)
        errors.append((series.rotated(torch.eye(12), back=True) - exact.rotated(torch.eye(12))).abs().max())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_coft_holds_the_blocks_near_the_identity() -> None:
    model, config = tiny("llama"), OFTConfig(oft_block_size=8, coft=True, eps=1e-3)
    inject(model, config)
    randomise(model)
    far = logits(model, batch("llama"))
    after_step(model, config, 1, 1)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    lengths = 2**0.5 * layer.oft_R.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1e-3 / 4**0.5))
    torch.testing.assert_close(logits(model, batch("llama")), far)  # held in the forward pass already
    assert (far - logits(tiny("llama"), batch("llama"))).abs().max() < 0.05


def test_coft_brings_the_blocks_back_while_they_train() -> None:
    model = tiny("llama").train()
    inject(model, OFTConfig(oft_block_size=8, coft=True, eps=1e-3))
    randomise(model)
    with torch.no_grad():
        logits(model, batch("llama"))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.oft_R.weight.norm(dim=1).max() > 0.1  # nothing changes where there is no gradient
    model(**batch("llama"))
    assert 2**0.5 * layer.oft_R.weight.norm(dim=1).max() < 1.01e-3 / 4**0.5


def test_a_block_size_that_divides_nothing_becomes_the_nearest_that_does() -> None:
    for given, size in ((5, 4), (7, 6), (8, 6), (9, 6), (10, 12), (40, 12)):
        assert wrapped(OFTConfig(oft_block_size=given), nn.Linear(12, 5)).oft_R.size == size
    assert wrapped(OFTConfig(oft_block_size=0, r=5), nn.Linear(12, 5)).oft_R.count == 4


@pytest.mark.parametrize("settings", [{"r": 4}, {"oft_block_size": 0}])
def test_blocks_are_given_by_their_size_or_their_number(settings: dict[str, int]) -> None:
    with pytest.raises(AdapterError, match="give either r or oft_block_size"):
        OFTConfig(**settings).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["0.17.1", None, "0.16.0@abc123"])
def test_files_of_the_older_series_are_refused(version: str | None) -> None:
    """PEFT warns, and computes another rotation than was trained."""
    values = {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["q"], "use_cayley_neumann": True}
    with pytest.raises(AdapterError, match=r"before PEFT 0\.18"):
        config_from_dict({**values, "peft_version": version})
    config_from_dict({**values, "peft_version": "0.18.0"})
    config_from_dict({**values, "peft_version": version, "use_cayley_neumann": False})


@pytest.mark.parametrize(
    "config", [OFTConfig(oft_block_size=2, module_dropout=0.5), BOFTConfig(boft_block_size=2, boft_dropout=0.5)]
)
def test_dropout_leaves_blocks_where_they_were_in_training_only(config: Any) -> None:
    layer = wrapped(config, nn.Linear(200, 5))
    turned = layer.rotated(torch.eye(200))
    thin = layer.train().rotated(torch.eye(200))
    same = ((thin - torch.eye(200)).abs() < 1e-6).all(1)
    assert 60 < same.sum() < 140
    torch.testing.assert_close(thin[~same], turned[~same])
