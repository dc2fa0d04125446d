"""HiRA: the base weight times a low-rank factor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import ours
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods.hira import HiraConfig
from peftcli.methods.hira.layers import wrap

BASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (2, 5)),
    "conv1d of gpt2": (lambda: Conv1D(7, 5), (2, 5)),
    "convolution": (lambda: nn.Conv1d(5, 7, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    "convolution over an image": (lambda: nn.Conv2d(5, 7, 3, stride=2, dilation=2), (2, 5, 8, 8)),
    "convolution over a volume": (lambda: nn.Conv3d(5, 7, 2), (1, 5, 3, 3, 3)),
}


@pytest.mark.parametrize("name", BASES)
def test_the_update_is_the_weight_times_the_factor(name: str) -> None:
    build, shape = BASES[name]
    base, x = build(), torch.randn(shape)
    layer = wrap(base, "x", HiraConfig(r=3)).eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x))
        for parameter in layer.own_tensors().values():
            parameter.normal_()
        factor = torch.einsum("or,ri...->oi...", layer.hira_B.flatten(1), layer.hira_A)
        weight = base.weight
        merged = weight * (1 + (factor.T if isinstance(base, Conv1D) else factor))
        torch.testing.assert_close(layer.folded({"weight": weight})["weight"], merged)
        changed = layer(x)
        base.weight.copy_(merged)
        torch.testing.assert_close(changed, base(x), atol=1e-4, rtol=1e-4)


def test_an_embedding_that_scales_is_merged_right() -> None:
    model, config = ours("gemma3", "hira", r=4, target_modules=["embed_tokens", "q_proj"])
    expected = logits(model, batch("gemma3"))
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("gemma3")), expected, atol=1e-4, rtol=1e-4)


def test_whispers_convolutions_go_too() -> None:
    model, config = ours("whisper", "hira", r=4, target_modules=["conv1", "conv2", "q_proj"])
    expected = logits(model, batch("whisper"))
    assert not torch.allclose(expected, logits(tiny("whisper"), batch("whisper")), atol=1e-3)
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("whisper")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("start", "deviation"), [(True, math.sqrt(1 / 400 / 3)), ("gaussian", 1 / 50), (False, 1.0)])
def test_how_a_and_b_start(start: Any, deviation: float) -> None:
    layer = wrap(nn.Linear(400, 300), "x", HiraConfig(r=50, init_weights=start))
    assert layer.hira_A.std().item() == pytest.approx(deviation, rel=0.05)
    assert bool(layer.hira_B.any()) == (start is False)


def test_several_adapters_each_start_from_the_models_own_weight() -> None:
    model = tiny("gpt2")
    configs = [HiraConfig(r=2, init_weights=False) for _ in range(2)]
    for name, config in zip(("first", "second"), configs, strict=True):
        inject(model, config, name)
    outer = model.transformer.h[0].attn.c_attn
    weight = outer.base_layer.base_layer.weight
    factors = [(layer.hira_B @ layer.hira_A).T for layer in (outer, outer.base_layer)]
    torch.testing.assert_close(outer.folded({"weight": weight})["weight"], weight * (1 + factors[0] + factors[1]))
    outer.base_layer.enabled = False
    torch.testing.assert_close(outer.folded({"weight": weight})["weight"], weight * (1 + factors[0]))
    before = logits(model, batch("gpt2"))
    merge(model, *configs)
    torch.testing.assert_close(logits(model, batch("gpt2")), before, atol=1e-4, rtol=1e-4)


def test_what_it_does_not_adapt_is_refused() -> None:
    with pytest.raises(AdapterError, match="x is a LayerNorm; HiRA adapts"):
        wrap(nn.LayerNorm(4), "x", HiraConfig())
    with pytest.raises(AdapterError, match="x is a grouped convolution"):
        wrap(nn.Conv1d(4, 4, 3, groups=2), "x", HiraConfig())
    with pytest.raises(AdapterError, match=r"rank_pattern=.* is not supported"):
        HiraConfig.from_dict({"peft_type": "HIRA", "rank_pattern": {"q_proj": 2}})
