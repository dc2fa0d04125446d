"""BEFT's bias, and where it can go."""

from __future__ import annotations

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.merge import merge
from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.beft import BeftConfig


@pytest.mark.parametrize(("kind", "mergeable"), [("qwen2", True), ("bert", True), ("llama", False), ("t5", False)])
def test_it_merges_into_layers_with_a_bias(kind: str, mergeable: bool) -> None:
    model, config = tiny(kind), BeftConfig()
    assert config.merge_problem() is None  # not known yet
    inject(model, config)
    randomise(model)
    expected = logits(model, batch(kind))
    assert (config.merge_problem() is None) == mergeable
    if mergeable:
        merge(model, config)
    else:
        with pytest.raises(AdapterError, match=r"cannot be merged here: .* has no bias"):
            merge(model, config)
        with pytest.raises(AdapterError, match="cannot be merged here"):
            merge(model)
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-4, rtol=1e-4)


def test_the_bias_is_added_and_starts_at_nothing() -> None:
    base, x = nn.Linear(5, 3), torch.randn(2, 5)
    layer = wrap(base, "x", BeftConfig())
    assert torch.equal(layer(x), base(x))
    layer.beft_bias.data.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(layer(x), base(x) + torch.tensor([1.0, 2.0, 3.0]))
    assert wrap(base, "x", BeftConfig(init_weights=False)).beft_bias.abs().sum() > 0
