"""Arrow routes every token as PEFT does, and leaves the experts as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, logits, randomise, tiny

from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.peft_api import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model

OPTIONS: dict[str, Any] = {"top_k": 2, "router_temperature": 0.7, "rng_seed": 3}


def _saved(folder: Path, seed: int, kind: str = "llama", **settings: Any) -> Path:
    model = get_peft_model(tiny(kind), LoraConfig(**{"r": 4, **settings}))
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def experts(tmp_path: Path) -> list[Path]:
    return [_saved(tmp_path / str(seed), seed, lora_alpha=seed + 4) for seed in range(4)]


@pytest.mark.grid
@pytest.mark.parametrize("general", [False, True])
def test_the_logits_are_pefts(general: bool, experts: list[Path]) -> None:
    paths = [str(path) for path in experts]
    made = []
    for module, config in ((create_arrow_model, ArrowConfig), (peft.create_arrow_model, peft.ArrowConfig)):
        model = module(tiny("llama"), paths[:3], config(use_gks=general, **OPTIONS), paths[3:])
        made.append(logits(model.eval(), batch("llama")))
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-5)
    alone = logits(PeftModel.from_pretrained(tiny("llama"), experts[0]), batch("llama"))
    assert not torch.allclose(made[0], alone, atol=1e-2)


def test_adapters_come_and_go_and_stay_as_they_are(experts: list[Path]) -> None:
    whole = create_arrow_model(tiny("llama"), experts[:3], ArrowConfig(use_gks=True, **OPTIONS), experts[3:]).eval()
    expected = logits(whole, batch("llama"))
    model = create_arrow_model(tiny("llama"), experts[:2], ArrowConfig(use_gks=True, **OPTIONS), experts[3:]).eval()
    of_two = logits(model, batch("llama"))
    before = {key: value.clone() for key, value in adapter_state(model.get_base_model(), "task_0").items()}
    model.load_adapter(experts[2], adapter_name="task_2")
    assert torch.equal(logits(model, batch("llama")), expected)
    assert torch.equal(logits(copy.deepcopy(model), batch("llama")), expected)
    model.delete_adapter("task_2")
    assert torch.equal(logits(model, batch("llama")), of_two)
    assert all(
        torch.equal(value, before[key]) for key, value in adapter_state(model.get_base_model(), "task_0").items()
    )
    model.set_adapter("task_0")
    alone = PeftModel.from_pretrained(tiny("llama"), experts[0])
    assert torch.equal(logits(model, batch("llama")), logits(alone, batch("llama")))
    base = model.unload()
    assert torch.equal(logits(base, batch("llama")), logits(tiny("llama"), batch("llama")))
    assert not base._forward_pre_hooks


def test_an_expert_that_trains_is_routed_by_its_new_direction(experts: list[Path]) -> None:
    model = create_arrow_model(tiny("llama"), experts[:2], ArrowConfig(**OPTIONS)).eval()
    layer = next(iter(adapter_layers(model, "arrow_router").values()))
    logits(model, batch("llama"))
    first = layer.found[1]
    logits(model, batch("llama"))
    assert layer.found[1] is first
    with torch.no_grad():
        layer.experts["task_0"].lora_A.weight.add_(1.0)
    logits(model, batch("llama"))
    assert not torch.equal(layer.found[1][0], first[0])


def test_a_router_is_neither_merged_nor_loaded(experts: list[Path], tmp_path: Path) -> None:
    model = create_arrow_model(tiny("llama"), experts[:2], ArrowConfig(**OPTIONS))
    with pytest.raises(AdapterError, match="Cannot merge an active Arrow router adapter"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "saved/task_1")
    model.set_adapter("task_1")
    assert torch.equal(logits(again, batch("llama")), logits(model.eval(), batch("llama")))
    with pytest.raises(AdapterError, match="arrow_config: is not supported in a file"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "saved/arrow_router")


def test_what_cannot_be_routed_is_named(experts: list[Path], tmp_path: Path) -> None:
    wrong: dict[str, tuple[list[Path], dict[str, Any]]] = {
        "rank mismatch: .*q_proj has r 8 in task_1 and 4 in task_0": ([experts[0], _saved(tmp_path / "r", 1, r=8)], {}),
        "target_modules mismatch: .*k_proj": ([experts[0], _saved(tmp_path / "k", 1, target_modules=["k_proj"])], {}),
        "use_dora: Arrow would leave it out; task_0": ([_saved(tmp_path / "d", 1, use_dora=True)], {}),
        "must only target Linear layers; model.embed_tokens in task_0 is a Embedding": (
            [_saved(tmp_path / "e", 1, target_modules=["embed_tokens"])],
            {},
        ),
        "task_specific_adapter_paths: names no adapter": ([], {}),
        "general_adapter_paths: are needed for use_gks": (experts[:1], {"use_gks": True}),
        "arrow_config.top_k: must be above 0, not 0": (experts[:1], {"top_k": 0}),  # already when it is made
    }
    for message, (paths, settings) in wrong.items():
        with pytest.raises(AdapterError, match=message):
            create_arrow_model(tiny("llama"), paths, ArrowConfig(**settings))
    model = create_arrow_model(tiny("llama"), experts[:2], ArrowConfig(top_k=3))
    with pytest.raises(AdapterError, match="top_k: 3 of 2 experts cannot be chosen"):
        logits(model, batch("llama"))
    with pytest.raises(AdapterError, match="arrow_config: routes among adapters"):
        get_peft_model(tiny("llama"), LoraConfig(arrow_config=ArrowConfig()))
