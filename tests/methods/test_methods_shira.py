"""SHiRA: trained numbers at random places of a weight."""

from __future__ import annotations

import pytest
import torch
from models_tiny import tiny
from oracle import ours
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state, named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.shira.config import ShiraConfig
from peftcli.methods.shira.layers import ShiraLinear


def test_the_update_is_the_numbers_at_their_places() -> None:
    base = nn.Linear(9, 6)
    layer = ShiraLinear(base, "x", ShiraConfig(r=2)).eval()
    assert layer.shira_weight.shape == (30,)
    nn.init.normal_(layer.shira_weight)
    expected = torch.zeros(6, 9)
    for (row, column), value in zip(layer.shira_indices.T.tolist(), layer.shira_weight.tolist(), strict=True):
        expected[row, column] = value
    assert expected.count_nonzero() == 30, "a place was drawn twice"
    x = torch.randn(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x) + x @ expected.T)


def test_the_file_says_where_and_training_leaves_that_alone() -> None:
    model, _ = ours("llama", "shira", r=2)
    state = adapter_state(model)
    assert {value.dtype for name, value in state.items() if name.endswith("indices")} == {torch.int32}
    assert {name.rpartition(".")[2] for name in named_tensors(model)} == {"shira_weight"}


def test_a_seed_chooses_the_places() -> None:
    def places(seed: int | None) -> torch.Tensor:
        return ShiraLinear(nn.Linear(20, 20), "x", ShiraConfig(r=2, random_seed=seed)).shira_indices

    assert torch.equal(places(None), places(None))
    assert torch.equal(places(3), places(3))
    assert not torch.equal(places(3), places(4))


def test_masks_of_ones_own_are_refused_by_name_and_their_files_are_read() -> None:
    with pytest.raises(AdapterError, match="mask of your own") as caught:
        ShiraConfig().mask_fn = lambda layer, r: None  # type: ignore[attr-defined]
    assert caught.value.key == "mask_fn"
    with pytest.raises(AdapterError, match="'mine' is not supported"):
        ShiraConfig(mask_type="mine").check()  # type: ignore[arg-type]
    ShiraConfig.from_dict({"peft_type": "SHIRA", "mask_type": "mine", "inference_mode": True})


def test_more_numbers_than_there_are_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(AdapterError, match=r"asks for 2048 of the 1024 numbers of .*q_proj") as caught:
        inject(model, ShiraConfig())
    assert caught.value.key == "r"
    assert not adapter_layers(model)
