"""Every method computes its formula, and merges to it; on convolutions the merged layer is the adapted one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formulas import FORMULAS
from models_tiny import randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject, set_trainable
from peftcli.errors import AdapterError
from peftcli.methods import METHODS


def _adapted(base: nn.Module, method: str, settings: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A model of this layer alone, and the adapter's layer over it."""
    torch.manual_seed(0)
    model = nn.Sequential(base)
    layers = inject(model, METHODS[method].config_class()(target_modules=["0"], **settings)).layers
    return model.eval(), layers["0"]


@pytest.mark.parametrize("stored", ["linear", "conv1d"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_linear_layer_computes_its_formula_and_merges_to_it(name: str, stored: str) -> None:
    row = FORMULAS[name]
    outputs, inputs = row.shape
    torch.manual_seed(1)
    base, x = nn.Linear(inputs, outputs), torch.randn(2, 4, inputs)
    if stored == "conv1d":
        base, linear = Conv1D(outputs, inputs), base
        base.weight.data, base.bias.data = linear.weight.data.T.contiguous(), linear.bias.data
    tensors = {key: value.detach().clone() for key, value in base.named_parameters()}
    before = base(x)
    model, layer = _adapted(base, row.method, row.settings)
    with torch.no_grad():
        if row.starts:
            torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
        set_trainable(model, True)
        randomise(model)
        weight = tensors["weight"] if stored == "linear" else tensors["weight"].T
        made = row.formula(layer, weight, tensors["bias"])
        new, bias = made if isinstance(made, tuple) else (made, tensors["bias"])
        assert not torch.allclose(F.linear(x, new, bias), before, atol=1e-3)
        for given in (x, x[0, 0], x[:, None]) if row.method not in ("poly", "frod") else (x,):
            torch.testing.assert_close(layer(given), F.linear(given, new, bias), atol=1e-4, rtol=1e-4)
        merged = tensors | layer.folded(dict(tensors))
        found = merged["weight"] if stored == "linear" else merged["weight"].T
        torch.testing.assert_close(found, new.expand(found.shape), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(merged["bias"], bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, row in FORMULAS.items() if row.starts and "init_weights" not in row.settings]
)
def test_without_a_start_from_nothing_there_is_an_update(name: str) -> None:
    row = FORMULAS[name]
    names = (entry.name for entry in fields(METHODS[row.method].config_class()))
    key = next(name for name in names if name.startswith("init_") and name.endswith("_weights"))
    base, x = nn.Linear(*reversed(row.shape)), torch.randn(3, row.shape[1])
    before = base(x)
    model, _ = _adapted(base, row.method, {**row.settings, key: False})
    assert not torch.allclose(model(x), before, atol=1e-4)


CONVOLUTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "1d": (nn.Conv1d, {}),
    "2d": (nn.Conv2d, {"stride": 2, "padding": 1, "dilation": 2, "padding_mode": "reflect"}),
    "3d": (nn.Conv3d, {"kernel_size": (1, 2, 2)}),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "uneven": (nn.Conv2d, {"kernel_size": (2, 3)}),
    "same": (nn.Conv2d, {"dilation": 2, "padding": "same"}),
    "circular": (nn.Conv1d, {"padding": 2, "padding_mode": "circular"}),
    "no bias": (nn.Conv1d, {"bias": False}),
    "grouped": (nn.Conv2d, {"groups": 2, "dilation": 2}),
}
_SPLIT = {"use_effective_conv2d": True}
OVER: dict[str, tuple[str, dict[str, Any], str]] = {
    "lora": ("lora", {"r": 2}, "1d 2d 3d"),
    "lora_bias": ("lora", {"r": 2, "lora_bias": True}, "1d 2d 3d"),
    "dora": ("lora", {"r": 2, "use_dora": True}, "1d 2d 3d"),
    "hira": ("hira", {"r": 2}, "1d 2d 3d"),
    "adalora": ("adalora", {"init_r": 3, "target_r": 3}, "2d grouped"),
    "loha": ("loha", {"r": 2}, "1d 2d grouped"),
    "loha, split": ("loha", {"r": 2, **_SPLIT}, "1d 2d grouped"),
    "lokr": ("lokr", {"r": 1}, "1d 2d grouped"),
    "lokr, split": ("lokr", {"r": 1, **_SPLIT}, "1d 2d grouped"),
    "lokr, both": ("lokr", {"r": 1, "decompose_both": True}, "1d 2d grouped"),
    "oft": ("oft", {"oft_block_size": 2, "use_cayley_neumann": False}, "2d"),
    "oft, shared": ("oft", {"oft_block_size": 0, "r": 2, "block_share": True}, "2d"),
    "boft": ("boft", {"boft_block_size": 2}, "2d"),
    "boft, butterfly": ("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, "2d"),
    "hra": ("hra", {"r": 4}, "2d"),
    "hra, orthogonal": ("hra", {"r": 2, "apply_GS": True}, "2d"),
    "ia3": ("ia3", {"feedforward_modules": []}, "1d 2d 3d grouped"),
    "ia3, inputs": ("ia3", {"feedforward_modules": ["0"]}, "1d 2d 3d grouped"),
}
"""Method, settings, and which convolutions it adapts."""


@pytest.mark.grid(each="name", keep=3)
@pytest.mark.filterwarnings("ignore:lora_bias")
@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("name", OVER)
def test_a_merged_convolution_computes_what_the_adapted_one_does(name: str, conv: str) -> None:
    (kind, moves), (method, settings, adapted) = CONVOLUTIONS[conv], OVER[name]
    torch.manual_seed(0)
    base = kind(4, 6, **{"kernel_size": 3, **moves})
    dims = base.weight.ndim - 2
    if f"{dims}d" not in adapted or (base.groups > 1 and "grouped" not in adapted):
        if method != "lora":  # grouped ones have a test of their own
            with pytest.raises(AdapterError, match=r"grouped convolution|adapts"):
                _adapted(base, method, settings)
        return
    x = torch.randn(2, 4, *[9] * dims)
    before = base(x)
    tensors = {key: value.detach().clone() for key, value in base.named_parameters()}
    model, layer = _adapted(base, method, settings)
    if name != "hra, orthogonal":
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
    layer(x).square().sum().backward()
    assert any(value.grad.abs().sum() > 0 for value in layer.own_tensors().values())
    set_trainable(model, True)
    randomise(model)
    with torch.no_grad():
        expected = layer(x)
        assert not torch.allclose(expected, before, atol=1e-3)
        if "lora_bias" in settings and base.bias is None:
            with pytest.raises(AdapterError, match="lora_bias: cannot be merged"):
                layer.folded(dict(tensors))
            return
        merged = tensors | layer.folded(dict(tensors))
        if name == "hira":
            factor = torch.einsum("or,ri...->oi...", layer.hira_B.flatten(1), layer.hira_A)
            torch.testing.assert_close(merged["weight"], tensors["weight"] * (1 + factor))
        torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), expected, atol=1e-4, rtol=1e-4)
