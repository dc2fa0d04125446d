"""Merging in memory: what of it is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from peftcli.adapters.merged import load_merged
from peftcli.methods.lora import LoraConfig


class _FarFromZero(nn.Module):
    """A model whose logits are near 100."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8).requires_grad_(False)

    def forward(self, states: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=100 + self.head(states))


def test_logits_with_an_offset_are_compared_by_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge_badly(model: _FarFromZero) -> None:
        model.head.weight *= 1.01

    monkeypatch.setattr("peftcli.adapters.merged.merge_layer_by_layer", merge_badly)
    told: list[str] = []
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    load_merged(
        lambda: SimpleNamespace(model=_FarFromZero()), LoraConfig(), lambda loaded: loaded.model(states), told.append
    )
    assert told[0].startswith("not merged in memory: the logits of the first batch would differ by")
