"""PSOFT: a rotation of the principal directions, which come from the base weight and not from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import ours
from torch import nn

from peftcli.core.files import read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import load_training_state, training_state, unsaved_state
from peftcli.errors import AdapterError
from peftcli.methods.psoft import PsoftConfig
from peftcli.methods.psoft.layers import PsoftLinear


def _layer(base: nn.Linear | None = None, **settings: Any) -> PsoftLinear:
    layer = PsoftLinear(base or nn.Linear(7, 5), "x", PsoftConfig(r=4, **settings)).eval()
    for value in layer.own_tensors().values():
        nn.init.normal_(value, std=0.3)
    return layer


@pytest.mark.parametrize("init", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("svd", ["full", "lowrank"])
def test_the_update_turns_the_weights_best_approximation(init: str, svd: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 5)
    layer = _layer(base, ab_svd_init=init, psoft_svd=svd, psoft_alpha=3, psoft_svd_lowrank_niter=50)
    u, s, vt = torch.linalg.svd(base.weight.detach())
    best = u[:, :4] @ torch.diag(s[:4]) @ vt[:4]
    with torch.no_grad():
        torch.testing.assert_close(layer.scaling * layer.psoft_B @ layer.psoft_A, best, atol=1e-4, rtol=1e-4)
        delta = layer.scaling * layer.psoft_B @ (layer.psoft_R() - torch.eye(4)) @ layer.psoft_A
        torch.testing.assert_close(layer.delta(), delta)
        x = torch.randn(2, 3, 7)
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T)


def test_without_the_vectors_it_is_a_rotation_that_keeps_the_angles_between_outputs() -> None:
    base = nn.Linear(6, 4, bias=False)
    layer = _layer(base, psoft_mag_a=False, psoft_mag_b=False)
    with torch.no_grad():
        turned, merged = layer.psoft_R(), base.weight + layer.delta()
        torch.testing.assert_close(turned @ turned.T, torch.eye(4), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged @ merged.T, base.weight @ base.weight.T, atol=1e-5, rtol=1e-5)
        assert (merged - base.weight).norm() > 0.1 * base.weight.norm()


def test_more_terms_of_the_sum_come_nearer_to_the_rotation() -> None:
    exact = _layer(psoft_mag_a=False, psoft_mag_b=False)
    weight = 0.1 * exact.psoft_R.weight.detach()
    exact.psoft_R.weight.data = weight
    errors = []
    for terms in (2, 4, 6, 8):
        near = _layer(psoft_mag_a=False, psoft_mag_b=False, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
        near.psoft_R.weight.data = weight
        errors.append((near.psoft_R() - exact.psoft_R()).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


def test_the_sum_is_as_exact_under_autocast() -> None:
    layer = _layer(use_cayley_neumann=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.psoft_R()
    assert torch.equal(found, layer.psoft_R())


def test_the_bound_holds_what_the_sum_is_made_from_and_leaves_what_is_below() -> None:
    bounded = _layer(use_cayley_neumann=True, cayley_neumann_eps=0.5, psoft_mag_a=False, psoft_mag_b=False)
    free = _layer(use_cayley_neumann=True, psoft_mag_a=False, psoft_mag_b=False)
    for size, alike in ((3.0, False), (0.01, True)):
        for layer in (bounded, free):
            nn.init.constant_(layer.psoft_R.weight, size)
        assert torch.allclose(bounded.psoft_R(), free.psoft_R()) == alike
    nn.init.zeros_(bounded.psoft_R.weight)
    bounded.psoft_R().sum().backward()
    assert torch.isfinite(bounded.psoft_R.weight.grad).all()  # type: ignore[arg-type]


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny("llama")
    inject(model, PsoftConfig(r=4))
    torch.testing.assert_close(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


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


def test_more_directions_than_a_layer_has_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"20 is more than 16, the smaller side of .*v_proj"):
        inject(tiny("llama"), PsoftConfig(r=20))


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"cayley_neumann_eps": 1.0}, "cayley_neumann_eps"), ({"psoft_svd": "quick"}, "psoft_svd"), ({"r": 0}, "r")],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], key: str) -> None:
    assert [found for found, _ in PsoftConfig.unchecked(**settings).problems()] == [key]
