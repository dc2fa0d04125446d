"""PEANuT: the network that makes the update from the base weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import batch, logits, tiny
from torch import nn
from transformers.activations import ACT2FN

from peftcli.core.inject import inject
from peftcli.methods.peanut import ACTIVATIONS, PeanutConfig
from peftcli.methods.peanut.layers import _ACTIVATIONS, PeanutLinear


def test_without_hidden_layers_it_is_two_matrices_and_an_activation() -> None:
    base = nn.Linear(5, 7)
    layer = PeanutLinear(base, "x", PeanutConfig(r=3, scaling=0.5, init_weights=False))
    x = torch.randn(2, 4, 5)
    with torch.no_grad():
        delta = 0.5 * layer.peanut_B.weight @ (layer.peanut_A.weight @ base.weight).relu()
        torch.testing.assert_close(layer.delta(), delta)
        torch.testing.assert_close(layer(x), base(x) + x @ delta.T)


def test_hidden_layers_add_what_came_in_at_their_level() -> None:
    base = nn.Linear(5, 7)
    layer = PeanutLinear(base, "x", PeanutConfig(r=3, depth=2, act_fn="tanh", init_weights=False))
    inward, outward = ([part.weight for part in parts] for parts in (layer.peanut_encoders, layer.peanut_decoders))
    with torch.no_grad():
        first = (layer.peanut_A.weight @ base.weight).tanh()
        second = (inward[0] @ first).tanh()
        deepest = (inward[1] @ second).tanh()
        back = (outward[0] @ deepest).tanh() + second
        out = (outward[1] @ back).tanh() + first
        torch.testing.assert_close(layer.delta(), layer.peanut_B.weight @ out)


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(_ACTIVATIONS[name](x), ACT2FN[name](x))


def test_activations_that_have_weights_or_are_unknown_are_refused() -> None:
    assert set(ACT2FN) - set(ACTIVATIONS) == {"gelu_10", "laplace", "prelu", "sqrtsoftplus", "xielu"}
    assert [key for key, _ in PeanutConfig.unchecked(act_fn="prelu").problems()] == ["act_fn"]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_new_adapter_changes_nothing(depth: int) -> None:
    model = tiny("gpt2")
    inject(model, PeanutConfig(depth=depth))
    assert torch.equal(logits(model, batch("gpt2")), logits(tiny("gpt2"), batch("gpt2")))


@pytest.mark.parametrize(("settings", "key"), [({"depth": -1}, "depth"), ({"scaling": 0}, "scaling")])
def test_settings_that_mean_nothing(settings: dict[str, Any], key: str) -> None:
    assert [found for found, _ in PeanutConfig.unchecked(**settings).problems()] == [key]
