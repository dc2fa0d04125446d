"""Another adapter in the place of one, in a model that may be compiled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from peft.utils import hotswap as theirs
from torch import nn

import peftcli
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError
from peftcli.peft_api import hotswap


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(12, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.last(self.first(x).relu())


_IDS = torch.arange(12).view(2, 6)
_ALL = ["embed", "conv", "first", "last"]


def _net() -> nn.Module:
    torch.manual_seed(0)
    return _Net().eval()


def _saved(folder: Path, seed: int, **settings: Any) -> torch.Tensor:
    """Write an adapter with random weights, and return what the model computes with it."""
    model = peftcli.get_peft_model(_net(), peftcli.LoraConfig(**{"target_modules": _ALL, **settings}))
    randomise(model, seed)
    model.eval().save_pretrained(folder, save_embedding_layers=False)
    return model(_IDS)


def _swapped(folder: Path, model: Any, name: str = "new") -> torch.Tensor:
    hotswap.hotswap_adapter(model, folder / name, adapter_name="default")
    return model(_IDS)


@pytest.mark.grid
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 16, "use_rslora": True},
        {"r": 8, "rank_pattern": {"last": 4}, "alpha_pattern": {"first": 3}},  # larger: the layers are widened
        {"r": 2, "target_modules": ["conv", "first"]},
    ],
)
def test_a_swapped_adapter_computes_and_is_saved_as_a_loaded_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    _saved(tmp_path / "old", 1, r=4, lora_alpha=2, rank_pattern={"embed": 16})
    expected = _saved(tmp_path / "new", 2, **settings)
    model = peftcli.PeftModel.from_pretrained(_net(), tmp_path / "old")
    for layer in adapter_layers(model.get_base_model()).values():
        layer.set_scale("default", 0.0)
    torch.testing.assert_close(_swapped(tmp_path, model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = peftcli.PeftModel.from_pretrained(_net(), tmp_path / "again")
    torch.testing.assert_close(again(_IDS), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_without_task_type_is_swapped_into_a_new_model(tmp_path: Path) -> None:
    """Its file notes the class of the base model, and a new config does not."""
    saved = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig())
    saved.save_pretrained(tmp_path)
    new = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig())
    randomise(new)
    hotswap.hotswap_adapter(new, tmp_path, adapter_name="default")
    torch.testing.assert_close(logits(new.eval(), batch("llama")), logits(saved.eval(), batch("llama")))


def test_an_adapter_of_experts_is_swapped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    said = []
    for seed, name in enumerate(("old", "new")):
        model = peftcli.get_peft_model(tiny("mixtral"), peftcli.LoraConfig(**settings, lora_alpha=2 + seed))
        randomise(model, seed)
        model.eval().save_pretrained(tmp_path / name)
        said.append(logits(model, batch("mixtral")))
    model = peftcli.PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "old")
    torch.testing.assert_close(logits(model, batch("mixtral")), said[0])
    hotswap.hotswap_adapter(model, tmp_path / "new", adapter_name="default")
    torch.testing.assert_close(logits(model, batch("mixtral")), said[1])


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    torch._dynamo.reset()  # other tests compiled the same code
    first = _saved(tmp_path / "old", 1, r=4, target_modules=["first", "last"])
    expected = _saved(tmp_path / "new", 2, r=6, lora_alpha=24, target_modules=["first", "last"])
    model = peftcli.PeftModel.from_pretrained(_net(), tmp_path / "old")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert model.peft_config["default"].r == 8
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        torch.testing.assert_close(compiled(_IDS), first)
        torch.testing.assert_close(_swapped(tmp_path, compiled), expected)
        torch.testing.assert_close(_swapped(tmp_path, compiled, "old"), first)
    _saved(tmp_path / "larger", 2, r=9, target_modules=["first", "last"])
    with pytest.raises(AdapterError, match=r"shape: .*first\.lora_A\.weight is \(9, 8\), the model has \(8, 8\)"):
        _swapped(tmp_path, compiled, "larger")
    with pytest.raises(AdapterError, match=r"\*before\* compiling"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, target_rank=16)


def test_a_widened_adapter_computes_what_it_did_and_pefts_shapes(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": _ALL, "rank_pattern": {"first": 2}, "alpha_pattern": {"last": 32}}
    here = peftcli.get_peft_model(_net(), peftcli.LoraConfig(**settings)).eval()
    there = peft.get_peft_model(_net(), peft.LoraConfig(**{**settings, "target_modules": _ALL[2:]}))
    randomise(here)
    before, trained = here(_IDS), copy.deepcopy(here.peft_config["default"])
    hotswap.prepare_model_for_compiled_hotswap(here, target_rank=8, config=trained)
    theirs.prepare_model_for_compiled_hotswap(there, target_rank=8)
    torch.testing.assert_close(here(_IDS), before)
    tensors = peftcli.get_peft_model_state_dict(here)
    shapes = {name: value.shape for name, value in peft.get_peft_model_state_dict(there).items()}
    assert {name: value.shape for name, value in tensors.items() if name in shapes} == shapes
    assert trained.alpha_pattern == {"first": 32.0, "last": 64.0}
    assert trained.to_dict() == here.peft_config["default"].to_dict()
    assert (trained.r, trained.rank_pattern) == (8, {"first": 8})


def test_tensors_are_swapped_in_a_plain_model_under_pefts_names() -> None:
    config = peftcli.LoraConfig(target_modules=["first"], r=2)
    model = peftcli.inject_adapter_in_model(config, _net())
    new = {"first.lora_A.default.weight": torch.rand(2, 8), "first.lora_B.default.weight": torch.rand(16, 2)}
    before = model(_IDS)
    hotswap.hotswap_adapter_from_state_dict(model, new, "default", config)
    assert not torch.allclose(model(_IDS), before)
    assert model.first.lora_A.weight.equal(new["first.lora_A.default.weight"])
    assert model.first.lora_A.weight.requires_grad


def test_what_does_not_fit_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    _saved(tmp_path / "old", 1, target_modules=["first"])
    for name, settings in {
        "other modules": {"target_modules": ["first", "last"], "r": 32},
        "dora": {"use_dora": True, "target_modules": ["first"]},
        "saved": {"target_modules": ["first"], "modules_to_save": ["last"]},
    }.items():
        _saved(tmp_path / name, 2, **settings)
    peftcli.get_peft_model(_net(), peftcli.IA3Config(target_modules=["first"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    model = peftcli.PeftModel.from_pretrained(_net(), tmp_path / "old")
    before = peftcli.get_peft_model_state_dict(model)
    for name, problem in {
        "other modules": r"unexpected: base_model\.model\.last\.lora_A\.weight",
        "dora": "use_dora: the adapters differ",
        "saved": "modules_to_save: the adapters differ",
        "ia3": "works for LORA, not IA3",
    }.items():
        with pytest.raises(AdapterError, match=problem):
            _swapped(tmp_path, model, name)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="default is merged"):
        _swapped(tmp_path, model, "old")
    model.unmerge_adapter()
    after = peftcli.get_peft_model_state_dict(model)
    assert all(after[name].equal(before[name]) for name in before)
    with pytest.raises(AdapterError, match="it is 8 already"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    with pytest.raises(AdapterError, match="No adapter layers found on the model"):
        hotswap.prepare_model_for_compiled_hotswap(_net(), target_rank=4)
