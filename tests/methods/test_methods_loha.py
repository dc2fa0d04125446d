"""LoHa and LoKr make the deltas of their formulas, and leave out of them what the settings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.loha import LoHaConfig
from peftcli.methods.lokr import LoKrConfig

CONFIGS = [LoHaConfig, LoKrConfig]


def wrapped(config: Any, base: nn.Module, random: bool = True) -> Any:
    """The layer over a frozen base layer, its weights random."""
    layer: AdapterLayer = wrap(base.requires_grad_(False), "x.proj", config)
    for parameter in layer.own_tensors().values():
        if random:
            nn.init.normal_(parameter)
    return layer


def test_loha_multiplies_two_products() -> None:
    layer = wrapped(LoHaConfig(r=3, alpha=6), nn.Linear(5, 7))
    first, second = layer.hada_w1_a @ layer.hada_w1_b, layer.hada_w2_a @ layer.hada_w2_b
    torch.testing.assert_close(layer.delta(), 2 * first * second)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("settings", [{}, {"init_weights": "lycoris"}, {"decompose_both": True, "r": 1}])
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_starts_from_the_base_layer(kind: Any, settings: dict[str, Any]) -> None:
    for base, x in ((nn.Linear(20, 24), torch.randn(2, 20)), (nn.Conv2d(20, 24, 3), torch.randn(2, 20, 4, 4))):
        for split in (False, True):
            given = {**settings, "use_effective_conv2d": split} if kind is LoKrConfig else {}
            layer = wrapped(kind(r=given.pop("r", 2), **given), base, random=False)
            assert torch.equal(layer(x), base(x))
            (layer(x) * torch.randn(layer(x).shape)).sum().backward()
            assert any(parameter.grad.abs().sum() > 0 for parameter in layer.own_tensors().values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_a_start_from_nothing_there_is_an_update(kind: Any) -> None:
    layer = wrapped(kind(init_weights=False), nn.Linear(20, 24), random=False)
    assert layer.delta().abs().sum() > 0


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("split", [False, True])
def test_a_convolution_keeps_its_padding_and_dilation(kind: Any, split: bool) -> None:
    base = nn.Conv2d(8, 12, (3, 2), padding=2, padding_mode="circular", dilation=2, groups=2)
    layer = wrapped(kind(r=1, use_effective_conv2d=split), base)
    x = torch.randn(2, 8, 9, 9)
    merged = layer.merged_tensors(dict(base.named_parameters()))
    torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("base", "x"), [(nn.Linear(8, 400), (4, 8)), (nn.Conv1d(8, 400, 1), (4, 8, 1))])
def test_rank_dropout_leaves_out_outputs_in_training_only(kind: Any, base: nn.Module, x: tuple[int, ...]) -> None:
    layer = wrapped(kind(rank_dropout=0.25), base)
    inputs = torch.randn(x)
    full = (layer.eval()(inputs) - base(inputs)).flatten(1)
    thin = (layer.train()(inputs) - base(inputs)).flatten(1)
    gone = (thin == 0).all(0)
    assert 40 < gone.sum() < 160
    scale = 1 if kind is LoKrConfig else 1 / 0.75
    torch.testing.assert_close(thin[:, ~gone], scale * full[:, ~gone], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_module_dropout_leaves_out_the_layer_and_not_its_gradients(kind: Any) -> None:
    base = nn.Linear(8, 4)
    layer, x = wrapped(kind(module_dropout=0.5), base), torch.randn(3, 8)
    outputs = [layer(x) for _ in range(40)]
    gone = [torch.equal(output, base(x)) for output in outputs]
    assert 5 < sum(gone) < 35
    outputs[gone.index(True)].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.own_tensors().values())


@pytest.mark.parametrize(("kind", "name"), [(LoHaConfig, "LoHa"), (LoKrConfig, "LoKr")])
def test_other_layers_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(AdapterError, match=f"x is a LayerNorm; {name} adapts Linear"):
        wrap(nn.LayerNorm(4), "x", kind())
