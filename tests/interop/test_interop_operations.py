"""Operations on adapters beside PEFT's: several at once, rows, merging, combining."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from models_tiny import PAD, batch, ids, logits, tiny
from oracle import silence

import peftcli
from peftcli.core.layer import AdapterLayer
from peftcli.methods.combinations import COMBINATIONS

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj"]},
}
T5 = {"a": {"r": 4, "target_modules": ["q", "v"]}, "b": {"r": 2, "target_modules": ["q", "wo"]}}
KINDS = {"llama": SETTINGS, "t5": T5}
ROWS = ["b", "__base__", "a", "b"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PEFT warns of what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _two(lib: ModuleType, kind: str = "llama", **more: Any) -> Any:
    """A model with two adapters, made with either library; the weights are the same."""
    settings = KINDS[kind]
    model = lib.get_peft_model(tiny(kind), lib.LoraConfig(**settings["a"], **more), "a")
    model.add_adapter("b", lib.LoraConfig(**settings["b"], **more))
    for seed, name in enumerate("ab", 1):
        tensors = lib.get_peft_model_state_dict(model, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        lib.set_peft_model_state_dict(
            model,
            {key: 0.3 * torch.randn(tensors[key].shape, generator=generator) for key in sorted(tensors)},
            adapter_name=name,
        )
    return model.eval()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def _close(here: torch.Tensor, there: torch.Tensor) -> None:
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


@pytest.mark.grid
def test_the_same_walk_through_all_operations(kind: str, tmp_path: Path) -> None:
    here, there = (_walk(lib, kind, tmp_path / lib.__name__) for lib in (peftcli, peft))
    for mine, theirs in zip(here, there, strict=True):
        if isinstance(mine, torch.Tensor):
            _close(mine, theirs)
        else:
            assert mine == theirs


def _walk(lib: ModuleType, kind: str, folder: Path) -> list[Any]:
    """What can be seen of a model after each of PEFT's operations."""
    model, seen = _two(lib, kind), []

    def look() -> None:
        trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        seen.extend([logits(model, batch(kind)), model.active_adapter, model.active_adapters, trains])
        seen.append(sorted(model.peft_config))

    look()
    model.set_adapter("b")
    look()
    model.save_pretrained(folder)
    seen.append(sorted(str(path.relative_to(folder)) for path in folder.rglob("adapter_*")))
    model.set_adapter("a", inference_mode=True)
    look()
    with model.disable_adapter():
        seen.append(logits(model, batch(kind)))
    model.set_requires_grad(["a", "b"])
    look()
    model.merge_adapter()
    seen.append(logits(model, batch(kind)))
    model.unmerge_adapter()
    look()
    model.load_adapter(folder / "b", "c")
    look()
    model.set_adapter("c")
    look()
    model.delete_adapter("b")
    look()
    seen.append(logits(model.merge_and_unload(safe_merge=True), batch(kind)))
    return seen


@pytest.mark.parametrize("act", ["merge", "delete"])
def test_adapters_that_do_not_adapt_the_same_modules_are_not_mixed(act: str) -> None:
    """As PEFT mixes them: a is on v_proj alone, b on k_proj."""
    alone, model = _two(peftcli), _two(peftcli)
    if act == "merge":
        alone.set_adapter("b")
        model.merge_adapter(adapter_names=["b"])
    else:
        model.add_adapter("c", peftcli.LoraConfig(**SETTINGS["b"]))
        model.set_adapter("c")
        model.delete_adapter("c")
        assert model.active_adapter == "a"
    _close(logits(model, batch("llama")), logits(alone, batch("llama")))


@pytest.mark.grid(each="writer")
@pytest.mark.parametrize("writer", ["peft", "peftcli"])
def test_folders_of_several_adapters_go_both_ways(writer: str, kind: str, tmp_path: Path) -> None:
    libs = {"peft": peft, "peftcli": peftcli}
    written = _two(libs[writer], kind)
    written.save_pretrained(tmp_path)
    reader = libs["peftcli" if writer == "peft" else "peft"]
    with silence():
        model = reader.PeftModel.from_pretrained(tiny(kind), tmp_path / "a", "a")
        model.load_adapter(tmp_path / "b", "b")
    for name in "ab":
        for each in (written, model):
            each.set_adapter(name)
        _close(logits(model, batch(kind)), logits(written, batch(kind)))


# rows


@pytest.mark.grid
def test_rows_of_a_batch_get_their_adapters(kind: str) -> None:
    inputs = batch(kind, rows=len(ROWS))
    with torch.no_grad():
        here, there = (_two(lib, kind)(**inputs, adapter_names=ROWS).logits for lib in (peftcli, peft))
    _close(here, there)


@pytest.mark.grid
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_a_generated_batch_get_their_adapters(kind: str, beams: int) -> None:
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    prompts = {"input_ids": ids(4, 7), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    here, there = (_two(lib, kind).generate(**prompts, adapter_names=ROWS, **options) for lib in (peftcli, peft))
    assert torch.equal(here, there)


def test_rows_with_heads_of_their_own() -> None:
    found = []
    for lib in (peftcli, peft):
        config = {"target_modules": ["query"], "modules_to_save": ["classifier"], "r": 2}
        model = lib.get_peft_model(tiny("bert"), lib.LoraConfig(**config), "a")
        model.add_adapter("b", lib.LoraConfig(**config))
        for seed, name in enumerate("ab", 1):
            model.set_adapter(name)
            tensors = lib.get_peft_model_state_dict(model, adapter_name=name)
            generator = torch.Generator().manual_seed(seed)
            made = {key: torch.randn(tensors[key].shape, generator=generator) for key in sorted(tensors)}
            lib.set_peft_model_state_dict(model, made, adapter_name=name)
        with torch.no_grad():
            found.append(model.eval()(**batch("bert", rows=4), adapter_names=ROWS).logits)
    _close(*found)


# combining


def _deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The update of every weight of one adapter, by the name of its module in the base model."""
    if isinstance(model, peft.PeftModel):
        return {
            path.removeprefix("base_model.model."): module.get_delta_weight(name).detach()
            for path, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.lora_A
        }
    return {
        path.removeprefix("base_model.model.").replace(".base_layer", ""): module.delta().detach()
        for path, module in model.named_modules()
        if isinstance(module, AdapterLayer) and module.adapter == name
    }


def _off(model: Any, name: str, weights: list[float]) -> float:
    """How far an adapter is from the weighted sum of a and b, as a share of it."""
    parts = [_deltas(model, "a"), _deltas(model, "b")]
    exact = {
        path: sum(weight * part[path] for weight, part in zip(weights, parts, strict=True) if path in part)
        for path in {**parts[0], **parts[1]}
    }
    found = _deltas(model, name)
    assert found.keys() == exact.keys()
    off = math.hypot(*(float((found[path] - exact[path]).norm()) for path in exact))
    return off / math.hypot(*(float(value.norm()) for value in exact.values()))


@pytest.mark.grid
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.3], [1.0, -0.5]])
def test_interop_3_4_weighted_adapters_err_as_pefts_and_by_default_not_at_all(
    weights: list[float],
) -> None:
    """interop.md, 3.4: against the true weighted sum, cat errs by nothing, svd by some, linear by much."""
    off: dict[str, dict[str, float]] = {}
    for lib in (peftcli, peft):
        model = _two(lib)
        for way in ("cat", "svd", "linear"):
            model.add_weighted_adapter(["a", "b"], weights, way, combination_type=way)
        model.add_weighted_adapter(["a", "b"], weights, "default")
        off[lib.__name__] = {way: _off(model, way, weights) for way in ("cat", "svd", "linear", "default")}
    assert off["peftcli"] == pytest.approx({**off["peft"], "default": 0.0}, abs=1e-5)
    assert off["peft"]["cat"] < 1e-6
    assert off["peft"]["default"] == pytest.approx(off["peft"]["svd"])
    assert 0.05 < off["peft"]["svd"] < off["peft"]["linear"]


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.3], [1.0, -0.5]])
@pytest.mark.parametrize("way", COMBINATIONS)
def test_every_way_to_combine_gives_pefts_updates(
    way: str, weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_fifth(like: torch.Tensor, generator: Any = None) -> torch.Tensor:
        """What DARE draws, by no chance."""
        return (torch.arange(like.numel()).view_as(like) % 5 < 3).to(like.dtype)

    monkeypatch.setattr(torch, "bernoulli", every_fifth)
    found = []
    for lib in (peftcli, peft):
        model = _two(lib)
        density = None if way in ("cat", "svd", "linear") else 0.6
        model.add_weighted_adapter(["a", "b"], weights, "c", combination_type=way, density=density)
        found.append(_deltas(model, "c"))
    assert found[0].keys() == found[1].keys()
    for path, update in found[1].items():
        _close(found[0][path], update)


def test_pefts_patterns_are_lost_when_it_combines_and_ours_are_not() -> None:
    """PEFT takes all adapters' largest r and leaves the rest of A and B zero; the sum is right, the file is larger."""
    sizes = {}
    for lib in (peftcli, peft):
        model = _two(lib, rank_pattern={"q_proj": 6})
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="cat")
        assert _off(model, "c", [0.7, 0.3]) < 1e-6
        sizes[lib.__name__] = sum(
            value.numel() for value in lib.get_peft_model_state_dict(model, adapter_name="c").values()
        )
    assert sizes["peftcli"] < sizes["peft"]


@pytest.mark.grid
@pytest.mark.parametrize("way", ["cat", "svd"])
def test_peft_reads_a_combined_adapter(way: str, kind: str, tmp_path: Path) -> None:
    model = _two(peftcli, kind)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", way)
    model.set_adapter("c")
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    with silence():
        oracle = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "c").eval()
    _close(logits(oracle, batch(kind)), logits(model, batch(kind)))
