"""Super-Tuning: which numbers of a weight train, alone and beside a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.files import read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.methods.supertuning import SupertuningConfig
from peftcli.methods.supertuning.layers import SupertuningLinear


@pytest.mark.parametrize("top", [True, False])
def test_the_numbers_of_the_largest_or_the_smallest_size_train(top: bool) -> None:
    base = nn.Linear(5, 8)
    layer = SupertuningLinear(base, "x", SupertuningConfig(sparsity=0.89, select_top=top, init_weights=False))
    x = torch.randn(2, 3, 5)
    with torch.no_grad():
        sizes = base.weight.abs()
        edge = sizes.flatten().sort(descending=top).values[3]
        touched = layer.delta() != 0
        assert torch.equal(touched, sizes >= edge if top else sizes <= edge)
        assert touched.sum() == 4
        torch.testing.assert_close(layer(x), base(x) + x @ layer.delta().T)


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 2.0), (6.0, 3.0)])
def test_a_lora_stands_beside_them(alpha: float | None, scaling: float) -> None:
    base = nn.Linear(5, 8)
    config = SupertuningConfig(sparsity=0.9, r=2, lora_alpha=alpha, lora_dropout=0.5, init_weights=False)
    layer = SupertuningLinear(base, "x", config).eval()
    x = torch.randn(2, 5)
    with torch.no_grad():
        low = scaling * layer.supertuning_lora_B.weight @ layer.supertuning_lora_A.weight
        sparse = torch.zeros(40).index_put((layer.supertuning_indices.long(),), layer.supertuning_values).view(8, 5)
        torch.testing.assert_close(layer.delta(), sparse + low)
        torch.testing.assert_close(layer(x), base(x) + x @ (sparse + low).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [True, False])
def test_the_places_are_pefts_also_among_equals(dtype: torch.dtype, top: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"sparsity": 0.7, "select_top": top}
    model = tiny("llama").to(dtype)
    inject(model, SupertuningConfig(**settings))
    monkeypatch.setattr("oracle.tiny", lambda kind: tiny(kind).to(dtype))
    oracle = theirs("llama", "supertuning", **settings).base_model.model
    for path, layer in adapter_layers(model).items():
        assert torch.equal(layer.supertuning_indices, oracle.get_submodule(path).supertuning_indices["default"])


@pytest.mark.parametrize("r", [None, 3])
def test_a_new_adapter_changes_nothing(r: int | None) -> None:
    model = tiny("llama")
    inject(model, SupertuningConfig(r=r))
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_the_places_can_be_left_out_of_the_file(tmp_path: Path) -> None:
    model, config = ours("llama", "supertuning", save_precomputed_indices=False)
    save_adapter(model, config, tmp_path)
    assert {name.rpartition(".")[2] for name in read_tensors(tmp_path)} == {"supertuning_values"}


def test_at_least_one_number_trains() -> None:
    layer = SupertuningLinear(nn.Linear(3, 3), "x", SupertuningConfig())
    assert layer.supertuning_values.shape == (1,)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"r": 0}, "r"),
        ({"lora_alpha": 4.0}, "lora_alpha"),
        ({"r": 2, "lora_alpha": 0.0}, "lora_alpha"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], key: str) -> None:
    assert [found for found, _ in SupertuningConfig.unchecked(**settings).problems()] == [key]
