"""Biases that train beside an adapter, where the model holds another one, or reads them without a call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_tiny import ids, logits, randomise, tiny
from torch import nn

import peftcli
from peftcli.errors import AdapterError


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
    with pytest.raises(AdapterError, match="without calling it; default can only be used for whole batches"):
        model(x, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)
    model.add_adapter("fresh", peftcli.LoraConfig(target_modules=["first"]))
    model.set_adapter("fresh")
    torch.testing.assert_close(model(x), expected)
