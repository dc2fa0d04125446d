"""Biases that train beside an adapter, where the model holds another one, or reads them without a call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import Gated, ids, logits, randomise, tiny
from torch import nn

import peftcli
from peftcli.core.inject import inject
from peftcli.errors import AdapterError


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("first", ["none", "lora_only", "all"])
@pytest.mark.parametrize("kind", ["qwen2", "opt"])
def test_all_biases_train_beside_another_adapter(tmp_path: Path, kind: str, first: str) -> None:
    config = peftcli.LoraConfig(bias="all", r=2, target_modules=["q_proj"])
    alone = peftcli.get_peft_model(tiny(kind), config).get_nb_trainable_parameters()[0]
    other = peftcli.LoraConfig(bias=first, r=2, target_modules=["q_proj", "v_proj"])  # type: ignore[arg-type]
    model = peftcli.get_peft_model(tiny(kind), other)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert model.get_nb_trainable_parameters()[0] == alone
    randomise(model)
    said = {"second": logits(model.eval(), {"input_ids": ids(2, 5)})}
    model.set_adapter("default")
    said["default"] = logits(model, {"input_ids": ids(2, 5)})
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        loaded = peftcli.PeftModel.from_pretrained(tiny(kind), folder).eval()
        assert torch.equal(logits(loaded, {"input_ids": ids(2, 5)}), said[name])
        model.set_adapter(name)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, {"input_ids": ids(2, 5)}), said[name], rtol=0, atol=1e-5)
        model.unmerge_adapter()


@pytest.mark.parametrize(("writer", "reader"), [(peft, peftcli), (peftcli, peft)])
def test_biases_inside_a_module_with_an_adapted_parameter_train_too(writer: Any, reader: Any, tmp_path: Path) -> None:
    base, x = nn.Sequential(Gated(), nn.Linear(8, 8)), torch.randn(2, 8)
    config = writer.LoraConfig(target_parameters=["0.gate"], bias="all", init_lora_weights=False)
    model = writer.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") and value.requires_grad:
                value += 1
    model.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x))
    assert sum(name.endswith("bias") for name in reader.get_peft_model_state_dict(loaded)) == 2


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_that_trains_is_counted_once(bias: str) -> None:
    counts = []
    for lib in (peftcli, peft):
        model: Any = lib.get_peft_model(tiny("opt"), lib.LoraConfig(bias=bias))
        counts.append(model.get_nb_trainable_parameters())
        assert counts[-1][1] == model.get_model_status().total_params
    injection = inject(tiny("opt"), peftcli.LoraConfig(bias=bias))  # type: ignore[arg-type]
    assert counts == [(injection.trainable, injection.total)] * 2


class _Attends(nn.Module):
    """Its attention reads weight and bias of ``out_proj`` and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        out: torch.Tensor = self.attention(x, x, x)[0]
        return out


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"modules_to_save": ["attention.out_proj"]}])
def test_what_is_read_without_a_call_is_that_of_the_active_adapter(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    base, x = _Attends().eval(), torch.randn(2, 3, 8)
    expected = base(x)
    config = peftcli.LoraConfig(target_modules=["first"], **settings)  # type: ignore[arg-type]
    model = peftcli.get_peft_model(base, config).eval()
    randomise(model)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    with pytest.raises(AdapterError, match=r"attention\.out_proj without calling it"):
        model(x, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)
    model.add_adapter("fresh", peftcli.LoraConfig(target_modules=["first"]))
    model.set_adapter("fresh")
    torch.testing.assert_close(model(x), expected)


def test_rows_of_adapters_with_dora_and_biases_are_told_apart() -> None:
    settings = {"use_dora": True, "target_modules": ["q_proj"]}
    model = peftcli.get_peft_model(tiny("qwen2"), peftcli.LoraConfig(bias="all", **settings), "one")  # type: ignore[arg-type]
    randomise(model)
    model.add_adapter("two", peftcli.LoraConfig(**settings))  # type: ignore[arg-type]
    model.set_adapter("two")
    randomise(model, seed=2)
    rows = {"input_ids": ids(3, 5)}
    expected = []
    for at, name in enumerate(("one", "two")):
        model.set_adapter(name)
        expected.append(logits(model.eval(), rows)[at])
    with model.disable_adapter():
        expected.append(logits(model, rows)[2])
    found = model(**rows, adapter_names=["one", "two", "__base__"]).logits
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_a_weight_may_be_read_for_its_dtype_in_a_batch_of_several_adapters() -> None:
    model = peftcli.get_peft_model(tiny("t5"), peftcli.LoraConfig(target_modules=["q"], modules_to_save=["wo"]), "one")
    model.add_adapter("two", peftcli.LoraConfig(target_modules=["q"]))
    rows = {"input_ids": ids(2, 5), "decoder_input_ids": ids(2, 4)}
    assert model.eval()(**rows, adapter_names=["one", "two"]).logits.shape[0] == len(rows["input_ids"])
