"""OFT, BOFT, HRA and PSOFT rotate: lengths and angles stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from oracle import ours
from torch import nn

from peftcli.core.files import read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import AdapterLayer, adapter_layers
from peftcli.core.protocols import after_step
from peftcli.core.targets import wrap
from peftcli.core.weights import load_training_state, training_state, unsaved_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.boft import BOFTConfig
from peftcli.methods.hra import HRAConfig
from peftcli.methods.ia3 import IA3Config
from peftcli.methods.oft import OFTConfig
from peftcli.methods.psoft import PsoftConfig
from peftcli.methods.psoft.layers import PsoftLinear

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


def test_each_factor_doubles_what_comes_together() -> None:
    for factors, reach in ((1, 2), (2, 4), (3, 8)):
        config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factors)
        layer: Any = wrap(nn.Linear(8, 3).requires_grad_(False), "x", config)
        randomise(layer)
        touched = layer.rotated(torch.eye(8)).abs() > 1e-6
        assert torch.equal(touched, torch.block_diag(*[torch.ones(reach, reach)] * (8 // reach)).bool())


def test_the_scale_leaves_the_bias_alone_whatever_is_below() -> None:
    base = nn.Linear(8, 3).requires_grad_(False)
    below: AdapterLayer = wrap(base, "x", IA3Config(feedforward_modules=[]))
    x, zeros = torch.randn(2, 8), torch.zeros(1, 8)
    for bias, inner in (("none", base), ("none", below), ("boft_only", base)):
        layer = wrap(inner, "x", BOFTConfig(bias=bias)).requires_grad_(True)
        base.requires_grad_(False)
        randomise(layer)
        merged = {**dict(base.named_parameters()), **layer.folded(dict(base.named_parameters()))}
        torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), layer(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(zeros), layer.base_layer(zeros))


def _layer(**settings: Any) -> Any:
    return wrap(nn.Linear(6, 4).requires_grad_(False), "x", HRAConfig(**settings))


def test_an_odd_number_leaves_one_without_a_partner() -> None:
    layer = _layer(r=5)
    assert torch.equal(layer.hra_u[:, 0], layer.hra_u[:, 1])
    assert torch.equal(layer.hra_u[:, 2], layer.hra_u[:, 3])
    assert torch.linalg.det(layer.rotated(torch.eye(6))).item() < 0


def test_orthogonal_reflections_start_apart_and_are_orthogonal() -> None:
    layer = _layer(r=4, apply_GS=True)
    assert torch.linalg.matrix_rank(layer.hra_u) == 4
    rotation = layer.rotated(torch.eye(6))
    torch.testing.assert_close(rotation, rotation.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotation.trace(), torch.tensor(6.0 - 2 * 4), atol=1e-4, rtol=1e-4)


def _layer_psoft(base: nn.Linear | None = None, **settings: Any) -> PsoftLinear:
    layer = PsoftLinear(base or nn.Linear(7, 5), "x", PsoftConfig(r=4, **settings)).eval()
    for value in layer.own_tensors().values():
        nn.init.normal_(value, std=0.3)
    return layer


def test_without_the_vectors_it_is_a_rotation_that_keeps_the_angles_between_outputs() -> None:
    base = nn.Linear(6, 4, bias=False)
    layer = _layer_psoft(base, psoft_mag_a=False, psoft_mag_b=False)
    with torch.no_grad():
        turned, merged = layer.psoft_R(), base.weight + layer.delta()
        torch.testing.assert_close(turned @ turned.T, torch.eye(4), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged @ merged.T, base.weight @ base.weight.T, atol=1e-5, rtol=1e-5)
        assert (merged - base.weight).norm() > 0.1 * base.weight.norm()


def test_more_terms_of_the_sum_come_nearer_to_the_rotation() -> None:
    exact = _layer_psoft(psoft_mag_a=False, psoft_mag_b=False)
    weight = 0.1 * exact.psoft_R.weight.detach()
    exact.psoft_R.weight.data = weight
    errors = []
    for terms in (2, 4, 6, 8):
        near = _layer_psoft(
            psoft_mag_a=False, psoft_mag_b=False, use_cayley_neumann=True, num_cayley_neumann_terms=terms
        )
        near.psoft_R.weight.data = weight
        errors.append((near.psoft_R() - exact.psoft_R()).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


def test_the_sum_is_as_exact_under_autocast() -> None:
    layer = _layer_psoft(use_cayley_neumann=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.psoft_R()
    assert torch.equal(found, layer.psoft_R())


def test_the_bound_holds_what_the_sum_is_made_from_and_leaves_what_is_below() -> None:
    bounded = _layer_psoft(use_cayley_neumann=True, cayley_neumann_eps=0.5, psoft_mag_a=False, psoft_mag_b=False)
    free = _layer_psoft(use_cayley_neumann=True, psoft_mag_a=False, psoft_mag_b=False)
    for size, alike in ((3.0, False), (0.01, True)):
        for layer in (bounded, free):
            nn.init.constant_(layer.psoft_R.weight, size)
        assert torch.allclose(bounded.psoft_R(), free.psoft_R()) == alike
    nn.init.zeros_(bounded.psoft_R.weight)
    bounded.psoft_R().sum().backward()
    assert torch.isfinite(bounded.psoft_R.weight.grad).all()  # type: ignore[arg-type]


def test_alpha_cancels_out() -> None:
    found = [logits(ours("llama", "psoft", r=4, psoft_alpha=alpha)[0], batch("llama")) for alpha in (4, 64)]
    torch.testing.assert_close(*found)


def test_the_file_holds_what_trains_and_a_checkpoint_the_directions_too(tmp_path: Path) -> None:
    model, config = ours("llama", "psoft", r=4)
    save_adapter(model, config, tmp_path)
    assert {name.partition("_proj.")[2] for name in read_tensors(tmp_path)} == {
        "psoft_R.weight",
        "psoft_R.vector_a",
        "psoft_R.vector_b",
    }
    assert {name.rpartition(".")[2] for name in unsaved_state(model)} == {"psoft_A", "psoft_B"}
    again = tiny("llama")
    inject(again, PsoftConfig(r=4))
    layer = next(iter(adapter_layers(again).values()))
    layer.psoft_A.mul_(-1)  # as another machine might find them
    load_training_state(again, training_state(model))
    assert torch.equal(logits(again, batch("llama")), logits(model, batch("llama")))
