"""Weighted sums of adapters under PEFT's names: what its own come to."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, logits, tiny
from peft.utils import merge_utils as theirs

import peftcli
from peftcli.errors import AdapterError
from peftcli.peft_api import helpers


def _two(lib: Any, kind: str, **settings: Any) -> Any:
    config = getattr(lib, kind)(**settings)
    model = lib.get_peft_model(tiny("llama"), copy.deepcopy(config), "one")
    model.add_adapter("two", config)
    for seed, name in enumerate(("one", "two")):
        tensors = lib.get_peft_model_state_dict(model, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        drawn = {key: torch.randn(tensors[key].shape, generator=generator) for key in sorted(tensors)}
        lib.set_peft_model_state_dict(model, drawn, adapter_name=name)
    return model.eval()


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(
    ("kind", "settings", "how"),
    [
        ("IA3Config", {}, {}),
        ("IA3Config", {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*\.down_proj"}, {}),
        ("LoraConfig", {}, {"combination_type": "svd", "svd_rank": 4, "svd_clamp": 0.9}),
        ("LoraConfig", {}, {"combination_type": "ties_svd", "svd_rank": 4, "svd_clamp": 0.8, "density": 0.5}),
        ("LoraConfig", {}, {"combination_type": "svd", "svd_full_matrices": False}),
        ("LoraConfig", {"r": 4, "rank_pattern": {"q_proj": 2}}, {"combination_type": "svd"}),
        ("LoraConfig", {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [79]}, {"combination_type": "svd"}),
    ],
)
def test_a_weighted_adapter_computes_as_pefts(kind: str, settings: dict[str, Any], how: dict[str, Any]) -> None:
    found = []
    for lib in (peftcli, peft):
        model = _two(lib, kind, **settings)
        model.add_weighted_adapter(["one", "two"], [0.3, 0.7], "sum", **how)
        model.set_adapter("sum")
        found.append(logits(model, batch("llama")))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_a_module_that_one_ia3_adapter_leaves_alone_has_the_factor_one_there() -> None:
    config = {"feedforward_modules": []}
    model = peftcli.get_peft_model(tiny("llama"), peftcli.IA3Config(target_modules=["k_proj"], **config), "a")
    model.add_adapter("b", peftcli.IA3Config(target_modules=["v_proj"], **config))
    before = logits(model, batch("llama"))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    model.set_adapter("c")
    torch.testing.assert_close(logits(model, batch("llama")), before)
    for name, problem in {"svd": "has no matrices", "ties": "has no matrices"}.items():
        with pytest.raises(AdapterError, match=problem):
            model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "d", combination_type=name)
    with pytest.raises(AdapterError, match="density: cat drops nothing"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "d", density=0.5)
    model.add_adapter("lora", peftcli.LoraConfig())
    with pytest.raises(AdapterError, match=r"peft_type: .*a is for IA3, lora is for LORA"):
        model.add_weighted_adapter(["a", "lora"], [0.5, 0.5], "d")
    model.add_adapter("other", peftcli.BOFTConfig())
    with pytest.raises(AdapterError, match="other is BOFT, which cannot be combined"):
        model.add_weighted_adapter(["other"], [1], "d")


@pytest.mark.parametrize("name", ["task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_merged_tensors_are_pefts(name: str) -> None:
    torch.manual_seed(0)
    tensors, weights = [torch.randn(4, 5) for _ in range(3)], torch.tensor([0.5, -1.0, 2.0])
    given = [] if name == "task_arithmetic" else [0.6]
    found = []
    for lib in (helpers, theirs):
        torch.manual_seed(1)
        found.append(getattr(lib, name)(tensors, weights, *given))
    torch.testing.assert_close(*found)


def test_pruned_tensors_are_pefts() -> None:
    values = torch.randn(4, 5)
    for method, rescale in (("magnitude", False), ("random", False), ("random", True)):
        found = []
        for lib in (helpers, theirs):
            torch.manual_seed(1)
            found.append(lib.prune(values, 0.3, method, rescale=rescale))
        torch.testing.assert_close(*found)
    with pytest.raises(AdapterError, match="magnitude or random"):
        helpers.prune(values, 0.3, "smallest")


def test_the_vote_on_signs_is_pefts() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 4, 5).round()
    for method in ("total", "frequency"):
        masks = [lib.calculate_majority_sign_mask(values, method) for lib in (helpers, theirs)]
        assert torch.equal(*masks)
        torch.testing.assert_close(*(lib.disjoint_merge(values, masks[0]) for lib in (helpers, theirs)))
    with pytest.raises(AdapterError, match="majority_sign"):
        helpers.calculate_majority_sign_mask(values, "loudest")
