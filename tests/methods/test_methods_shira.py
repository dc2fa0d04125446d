"""SHiRA: trained numbers at random places of a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import randomise, tiny
from oracle import loaded_by_peft, ours, same_logits
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state, named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.shira import ShiraConfig
from peftcli.methods.shira.layers import ShiraLinear
from peftcli.peft_api import PeftModel, get_peft_model


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


def _every_eighth(layer: nn.Linear, r: int, **_: Any) -> torch.Tensor:
    return (torch.arange(layer.weight.numel()).view(layer.weight.shape) % 8 == 3).to(layer.weight)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Argument self.mask_type")  # PEFT's
def test_a_mask_of_ones_own_is_pefts(tmp_path: Path) -> None:
    masked = {}
    for name, classes in {
        "here": (ShiraConfig, get_peft_model),
        "peft": (peft.ShiraConfig, peft.get_peft_model),
    }.items():
        settings = classes[0](r=2, target_modules=["q_proj"], mask_type="every eighth")
        settings.mask_fn = _every_eighth
        masked[name] = classes[1](tiny("llama"), settings)
    here, there = adapter_state(masked["here"].get_base_model()), peft.get_peft_model_state_dict(masked["peft"])
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key].int(), there[key].int()) for key in here if key.endswith("indices"))
    model = masked["here"]
    randomise(model)
    model.save_pretrained(tmp_path)
    same_logits("llama", PeftModel.from_pretrained(tiny("llama"), tmp_path), model)
    same_logits("llama", loaded_by_peft("llama", tmp_path), model)


def test_what_is_no_mask_is_refused_and_files_need_none() -> None:
    wrong: dict[str, Any] = {
        r"must return a tensor \(6, 9\) of zeros and ones": lambda layer, r, **_: layer.weight.T,
        "chose 1 numbers of x, not 30": lambda layer, r, **_: torch.eye(6, 9) * torch.eye(9)[0],
    }
    for message, mask_fn in wrong.items():
        config = ShiraConfig(r=2)
        config.mask_fn = mask_fn  # type: ignore[misc]
        with pytest.raises(AdapterError, match=message) as caught:
            ShiraLinear(nn.Linear(9, 6), "x", config)
        assert caught.value.key == "mask_fn"
    with pytest.raises(AdapterError, match="'mine' needs a function"):
        ShiraConfig(mask_type="mine").check()
    ShiraConfig.from_dict({"peft_type": "SHIRA", "mask_type": "mine", "inference_mode": True})


def test_more_numbers_than_there_are_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(AdapterError, match=r"asks for 2048 of the 1024 numbers of .*q_proj") as caught:
        inject(model, ShiraConfig())
    assert caught.value.key == "r"
    assert not adapter_layers(model)
