"""Methods whose update comes from the base weight, over a model on the meta device, as when merging shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import tiny
from oracle import ours
from torch import nn

from peftcli.core.files import read_config, read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.weights import load_state
from peftcli.methods import config_from_dict

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "psoft": ("psoft", {"r": 4}),
    "psoft-lowrank": ("psoft", {"r": 4, "psoft_svd": "lowrank"}),
    "tinylora": ("tinylora", {}),
    "tinylora-seed": ("tinylora", {"save_projection": False}),
    "pvera-seed": ("pvera", {"r": 8, "save_projection": False}),
    "frod": ("frod", {}),
    "peanut": ("peanut", {"r": 4, "depth": 1}),
    "deft": ("deft", {}),
    "supertuning": ("supertuning", {"r": 2}),
    "supertuning-found-again": ("supertuning", {"save_precomputed_indices": False}),
}


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_on_the_meta_device_is_merged_all_the_same(case: str, kind: str, tmp_path: Path) -> None:
    method, settings = CASES[case]
    model, config = ours(kind, method, **settings)
    save_adapter(model, config, tmp_path)
    empty, read = tiny(kind).to("meta"), config_from_dict(read_config(tmp_path))
    read.inference_mode = True
    inject(empty, read)
    load_state(empty, read_tensors(tmp_path))
    for name, layer in adapter_layers(model).items():
        weight = {"weight": nn.Parameter(base_module(layer).weight.clone())}
        found = adapter_layers(empty)[name].folded(weight)["weight"]
        torch.testing.assert_close(found, layer.folded(weight)["weight"])
        assert not torch.allclose(found, weight["weight"], atol=1e-3)
