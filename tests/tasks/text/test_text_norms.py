"""RMSNorm as one function: outputs and gradients are the model's own, and where they are not it is left alone."""

from __future__ import annotations

import pytest
import torch
from models_tiny import labelled, tiny

from peftcli.core.inject import inject
from peftcli.methods.ln_tuning import LNTuningConfig
from peftcli.methods.lora import LoraConfig
from peftcli.tasks.text.fast.norms import fuse_norms


def gradients(kind: str, dtype: torch.dtype, *, fused: bool, autocast: bool = False) -> dict[str, torch.Tensor]:
    model = tiny(kind).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator).to(dtype)
    torch.manual_seed(0)
    inject(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if fused:
        fuse_norms(model)
        assert replaced(model) == 2 * model.config.num_hidden_layers
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.train()(**labelled(kind)).loss.backward()
    return {name: each.grad.float() for name, each in model.named_parameters() if each.grad is not None}


def replaced(model: torch.nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - each).norm() / each.norm()) for name, each in expected.items())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients_are_those_of_the_plain_way(kind: str) -> None:
    plain = gradients(kind, torch.float32, fused=False)
    assert off(gradients(kind, torch.float32, fused=True), plain) < 1e-5
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        rounded = gradients(kind, dtype, fused=False, autocast=autocast)
        found = gradients(kind, dtype, fused=True, autocast=autocast)
        assert off(found, plain) < 1.3 * off(rounded, plain)


def test_other_norms_and_trained_ones_are_left_alone() -> None:
    for kind in ("gemma3", "gpt2"):  # 1 + weight; means are taken off
        model = tiny(kind)
        fuse_norms(model)
        assert not replaced(model)
    model = tiny("llama")
    inject(model, LNTuningConfig())
    fuse_norms(model)
    assert not replaced(model)
