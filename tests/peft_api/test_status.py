"""``get_layer_status`` and ``get_model_status`` say of a model what PEFT's say."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from models_tiny import tiny
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import peftcli
from peftcli.core.layer import AdapterLayer, adapter_layers
from peftcli.errors import AdapterError


class Small(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 10)
        self.first, self.second, self.last = (nn.Linear(10, 10) for _ in range(3))
        self.conv = nn.Conv2d(3, 10, 3)


def _two(lib: ModuleType, saved: list[str] | None = None) -> Any:
    one = lib.LoraConfig(target_modules=["first", "conv", "embedding"], modules_to_save=saved)
    model = lib.get_peft_model(Small(), one, "one")
    model.add_adapter("two", lib.LoraConfig(target_modules=["first", "second"], r=2))
    return model


def _freeze_one(model: Any) -> None:
    names = ("first.base_layer.lora_A.weight", "first.lora_A.one.weight")
    next(value for name, value in model.named_parameters() if name.endswith(names)).requires_grad_(False)


def _first_alone(model: Any) -> None:
    for name, module in model.named_modules():
        if ".first" in name and isinstance(module, (AdapterLayer, BaseTunerLayer)):
            module.set_adapter("two")


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize(
    ("saved", "change"),
    [
        (["last"], lambda model: None),
        (["last"], lambda model: model.set_requires_grad("two")),
        (["last"], _freeze_one),
        (["last"], lambda model: model.half()),
        (None, _first_alone),
        # PEFT calls both irregular with modules_to_save
        (None, lambda model: model.set_adapter("two")),
        (None, lambda model: (model.merge_adapter(["two"]), model.merge_adapter(["one"]))),
        (None, lambda model: (model.set_adapter("one"), model.merge_adapter(["two"]))),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_model_is_in_the_state_that_peft_says(saved: list[str] | None, change: Any) -> None:
    here, there = _two(peftcli, saved), _two(peft, saved)
    change(here)
    change(there)
    model = peftcli.get_model_status(here), peft.get_model_status(there)
    assert dataclasses.asdict(model[0]) == dataclasses.asdict(model[1])
    mine, theirs = (
        {layer.name: dataclasses.asdict(layer) for layer in model.get_layer_status()} for model in (here, there)
    )
    assert mine == theirs
    assert here.get_model_status() == model[0]


def test_a_plainly_injected_model_is_in_the_state_that_peft_says() -> None:
    mine, theirs = (lib.get_model_status(_two(lib, ["last"]).base_model.model) for lib in (peftcli, peft))
    assert dataclasses.asdict(mine) == dataclasses.asdict(theirs)
    with pytest.raises(AdapterError, match="No adapter layers found"):
        peftcli.get_model_status(Small())


def test_disabled_adapters_and_single_layers() -> None:
    model = _two(peftcli)
    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    assert not model.has_active_enabled_adapter
    model.enable_adapter_layers()
    next(iter(adapter_layers(model).values())).enabled = False
    assert model.get_model_status().enabled == "irregular"
    assert {layer.enabled for layer in model.get_layer_status()} == {True, False}


def test_of_adapters_that_train_in_other_ways() -> None:
    for lib in (peftcli, peft):
        model = lib.get_peft_model(Small(), lib.LoHaConfig(target_modules=["first"]))
        assert model.get_layer_status()[0].module_type == "loha.Linear"
        assert model.get_model_status().adapter_model_type == "LoHaModel"
        rows = lib.LoraConfig(target_modules=["first"], trainable_token_indices={"embedding": [1]})
        kinds = [layer.module_type for layer in lib.get_peft_model(Small(), rows).get_layer_status()]
        assert sorted(kinds) == ["TrainableTokensLayer", "lora.Linear"]
        inside = lib.LoraConfig(target_parameters=["first.weight"], target_modules=[])
        layers = lib.get_peft_model(Small(), inside).get_layer_status()
        assert [layer.module_type for layer in layers] == ["lora.ParamWrapper"]


def test_what_peft_asks_of_a_model() -> None:
    for lib in (peftcli, peft):
        model = _two(lib, ["last"])
        assert model.modules_to_save == {"last"}
        assert model.peft_type == "LORA"
        assert model.base_model_torch_dtype is None
        narrow = tiny("llama").to(torch.bfloat16)
        config = lib.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5], modules_to_save=["lm_head"]
        )
        narrow = lib.get_peft_model(narrow, config)
        assert narrow.dtype == narrow.base_model_torch_dtype == torch.bfloat16
        head = narrow.get_output_embeddings()
        hidden = torch.ones(1, head.in_features, dtype=torch.bfloat16)
        assert not isinstance(head, (AdapterLayer, BaseTunerLayer))  # which TRL refuses
        assert head.weight.dtype == head(hidden).dtype == torch.bfloat16
        assert model.has_active_enabled_adapter
