"""What methods draw, find in the base weight or leave out of the file is PEFT's, and several adapters add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.merge import merge
from peftcli.core.weights import load_state
from peftcli.methods import METHODS, config_from_dict

torch.sparse.check_sparse_tensor_invariants.disable()  # PEFT's FRoD leaves it open, of which torch warns

_TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 3}
DRAWN: list[tuple[str, str, dict[str, Any]]] = [
    ("vera", "llama", _TARGETS),
    ("vera", "llama", {**_TARGETS, "projection_prng_key": 5}),
    ("pvera", "llama", _TARGETS),
    ("pvera", "llama", {**_TARGETS, "projection_prng_key": 5}),
    ("randlora", "llama", _TARGETS),
    ("randlora", "llama", {**_TARGETS, "sparse": True}),
    ("randlora", "llama", {**_TARGETS, "very_sparse": True, "projection_prng_key": 4}),
    ("unilora", "llama", {"r": 2, "theta_d_length": 20}),
    ("unilora", "llama", {"r": 2, "theta_d_length": 20, "proj_seed": 7}),
    ("tinylora", "llama", {**_TARGETS, "u": 5, "projection_seed": 11}),
    ("supertuning", "llama", {"sparsity": 0.7}),
    ("supertuning", "llama", {"sparsity": 0.7, "select_top": False}),  # also among equals
    ("frod", "llama", {}),
    ("frod", "t5", {"projection_prng_key": 3}),
    ("frod", "bert", {}),
]


@pytest.mark.grid(each="method", keep=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("method", "kind", "settings"), DRAWN)
def test_what_never_trains_is_pefts_bit_for_bit(
    method: str, kind: str, settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT rounds it to the base model's dtype, so that the seed alone does not say which numbers they are."""
    if (method == "frod" and dtype == torch.float16) or (method == "tinylora" and dtype != torch.float32):
        return  # PEFT decomposes no weights in half precision, and rounds other numbers of TinyLoRA than are drawn
    model = tiny(kind).to(dtype)
    inject(model, METHODS[method].config_class()(**settings))
    monkeypatch.setattr("oracle.tiny", lambda kind: tiny(kind).to(dtype))
    oracle = theirs(kind, method, **settings, **({"progressbar": False} if method == "frod" else {}))
    for path, layer in adapter_layers(model).items():
        for name, value in layer.fixed_tensors().items():
            if name in ("tinylora_A", "tinylora_B"):
                continue  # singular vectors, whose signs are free
            if method == "frod":
                expected = getattr(oracle.base_model, name.replace(".", "_"))[layer.kind]["default"]
            else:
                own = getattr(oracle.base_model.model.get_submodule(path), name, None)
                expected = (getattr(oracle.base_model, name) if own is None else own)["default"]
                assert value.dtype == expected.dtype
            assert torch.equal(value, expected.to(value.dtype)), name


WRITTEN: list[tuple[str, dict[str, Any], set[str]]] = [
    ("vera", {**_TARGETS, "save_projection": False, "projection_prng_key": 9}, {"vera_lambda_b", "vera_lambda_d"}),
    ("randlora", {**_TARGETS, "randlora_alpha": 5, "save_projection": False}, {"randlora_lambda", "randlora_gamma"}),
    ("unilora", {"r": 2, "theta_d_length": 20}, {"unilora_theta_d"}),
    ("tinylora", {"u": 13, "weight_tying": 1.0, "save_projection": False}, {"0", "tinylora_A", "tinylora_B"}),
    ("supertuning", {"save_precomputed_indices": False}, {"supertuning_values"}),
    ("psoft", {"r": 4}, {"weight", "vector_a", "vector_b"}),
]


@pytest.mark.parametrize(("method", "settings", "names"), WRITTEN)
def test_the_file_holds_no_more_than_it_must(
    method: str, settings: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    model, config = ours("llama", method, **settings)
    save_adapter(model, config, tmp_path)
    assert {name.rpartition(".")[2] for name in read_tensors(tmp_path)} == names
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))


FROM_BASE: dict[str, tuple[str, dict[str, Any]]] = {
    "psoft": ("psoft", {"r": 4}),
    "psoft-lowrank": ("psoft", {"r": 4, "psoft_svd": "lowrank"}),
    "tinylora": ("tinylora", {}),
    "tinylora-seed": ("tinylora", {"save_projection": False}),
    "vera": ("vera", {"r": 3}),
    "vera-seed": ("vera", {"r": 3, "save_projection": False}),
    "pvera-seed": ("pvera", {"r": 8, "save_projection": False}),
    "frod": ("frod", {}),
    "peanut": ("peanut", {"r": 4, "depth": 1}),
    "deft": ("deft", {}),
    "supertuning": ("supertuning", {"r": 2}),
    "supertuning-found-again": ("supertuning", {"save_precomputed_indices": False}),
}


@pytest.mark.grid(each="case")
@pytest.mark.parametrize("case", FROM_BASE)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_on_the_meta_device_is_merged_all_the_same(case: str, kind: str, tmp_path: Path) -> None:
    """As when merging shard by shard: the update may come from the base weight."""
    method, settings = FROM_BASE[case]
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


_GLORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
TOGETHER: list[tuple[str, tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = [
    ("gpt2", ("hira", {"r": 2}), ("hira", {"r": 2})),
    ("llama", ("miss", {"r": 8, "init_weights": "bat"}), ("miss", {"r": 8, "init_weights": "bat"})),
    ("opt", ("lora", {"target_modules": ["q_proj"]}), ("deft", {"target_modules": ["q_proj"]})),
    ("opt", ("lora", {"target_modules": ["q_proj"]}), ("deft", {"target_modules": ["q_proj"], "bias": "all"})),
    *(
        ("qwen2", (method, {"target_modules": ["q_proj"]}), ("glora", {**_GLORA, "bias": bias}))
        for method in ("lora", "beft")
        for bias in ("none", "glora_only")
    ),
]


@pytest.mark.parametrize(("kind", "first", "second"), TOGETHER)
def test_beside_another_adapter_an_update_is_made_from_the_models_own_weight(
    kind: str, first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]
) -> None:
    model, configs = tiny(kind), [METHODS[method].config_class()(**settings) for method, settings in (first, second)]
    for name, config in zip("ab", configs, strict=True):
        inject(model, config, name)
    set_trainable(model, True)
    randomise(model)
    expected, outer = logits(model.eval(), batch(kind)), next(iter(adapter_layers(model, "b").values()))
    if hasattr(outer, "delta_of"):
        base = dict(base_module(outer).named_parameters())
        outer.base_layer.enabled = False
        torch.testing.assert_close(outer.folded(base)["weight"], base["weight"] + outer.delta_of(base["weight"]))
        outer.base_layer.enabled = True
    merge(model, *configs)
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-4, rtol=1e-4)


OWN_SIZES: list[tuple[str, dict[str, Any], str, list[float]]] = [
    ("c3a", {"block_size": 8, "block_size_pattern": {"v_proj": 4}}, "block", [8, 4, 8, 4]),
    ("delora", {"r": 4, "rank_pattern": {"v_proj": 2}}, "delora_A", [4, 2, 4, 2]),
    ("delora", {"lambda_pattern": {"layers.1.self_attn.q_proj": 0.5}}, "delora_lambda", [15, 15, 0.5, 15]),
    ("fourierft", {"n_frequency": 9, "n_frequency_pattern": {"v_proj": 4, "layers.1.self_attn.q_proj": 2}},
     "fourierft_spectrum", [9, 4, 2, 4]),
    ("waveft", {"n_frequency": 9, "n_frequency_pattern": {"v_proj": 4}}, "waveft_spectrum", [9, 4, 9, 4]),
    ("osf", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1": 2, "v": 0.25}}, "kept",
     [16, 4, 2, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "settings", "attribute", "expected"), OWN_SIZES)
def test_layers_may_have_sizes_of_their_own(
    method: str, settings: dict[str, Any], attribute: str, expected: list[float]
) -> None:
    model = tiny("llama")
    inject(model, METHODS[method].config_class()(**settings))
    found = [torch.as_tensor(getattr(layer, attribute)).detach() for layer in adapter_layers(model).values()]
    sizes = [len(each) if each.numel() > 1 else float(each) for each in found]
    assert sizes == expected
