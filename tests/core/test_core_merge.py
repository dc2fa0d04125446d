"""Merged weights are the sum, rounded once; taking it back is exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import Gated, batch, logits, randomise, tiny
from promises import base_settings
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import peftcli
from peftcli.core.inject import inject, set_active
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.merge import merge, merge_in_place, merge_layer_by_layer
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS
from peftcli.peft_api import PeftModel, get_peft_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "wte"], "bias": "all"}),
    "t5": ("t5", {"target_modules": ["embed_tokens", "q", "wo"]}),
    "heads": ("bert", {"modules_to_save": ["classifier", "pooler"]}),
    "tied, embedding": ("llama_tied", {"target_modules": ["embed_tokens"]}),
    "tied, both": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "convnet": ("convnet", {"target_modules": ["convolution"]}),
    "dora": ("llama", {"use_dora": True}),
}


def _adapted(kind: str, **settings: Any) -> PeftModel:
    model = get_peft_model(tiny(kind), peftcli.LoraConfig(**settings))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("first", ["ia3", "lora"])
def test_a_trained_bias_over_another_adapter_is_merged_as_it_computes(first: str) -> None:
    model = tiny("gpt2")
    inject(model, one := METHODS[first].config_class()(target_modules=["c_attn"]), "a")
    inject(model, two := peftcli.LoraConfig(target_modules=["c_attn"], bias="lora_only"), "b")
    randomise(model)
    expected = logits(model, batch("gpt2"))
    merge(model, one, two)
    torch.testing.assert_close(logits(model, batch("gpt2")), expected, atol=1e-4, rtol=1e-4)


def _two(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(tiny("llama").to(dtype), peftcli.LoraConfig(), "a")
    model.add_adapter("b", peftcli.LoraConfig(target_modules=["q_proj", "up_proj"], r=3))
    for seed, name in enumerate("ab"):
        model.set_adapter(name)
        randomise(model, seed + 1)
    return model.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, PeftModel]:
    kind, settings = CASES[request.param]
    return kind, _adapted(kind, **settings)


def test_merged_and_taken_back(case: tuple[str, PeftModel]) -> None:
    kind, model = case
    inputs = batch(kind)
    expected, parameters = logits(model, inputs), [(name, id(p)) for name, p in model.named_parameters()]
    values = [value.clone() for value in model.parameters()]
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)
    assert not any(layer.enabled for layer in adapter_layers(model).values())
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), expected)
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), values, strict=True))


def test_disabling_while_merged_is_the_base_model_exactly(case: tuple[str, PeftModel]) -> None:
    kind, model = case
    model.merge_adapter()
    merged = logits(model, batch(kind))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch(kind)), logits(tiny(kind), batch(kind)))
    assert torch.equal(logits(model, batch(kind)), merged)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model, batch(kind)), merged)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, batch(kind)), merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_is_rounded_once(dtype: torch.dtype) -> None:
    model = _two(dtype)
    model.set_adapter(["a", "b"])
    base = {path: base_module(layer).weight.detach().clone() for path, layer in adapter_layers(model).items()}
    sums: dict[nn.Module, torch.Tensor] = {}
    for layer in reversed(adapter_layers(model).values()):  # from below
        module = base_module(layer)
        sums[module] = sums.get(module, module.weight.detach().float()) + layer.delta().detach()
    expected = {
        name: sums[module].to(dtype) for name, module in model.get_base_model().named_modules() if module in sums
    }
    merged = model.merge_and_unload()
    assert expected
    for name, weight in expected.items():
        found = merged.get_submodule(name.replace(".base_layer", "")).weight
        assert found.dtype == dtype
        assert torch.equal(found, weight)
        assert not any(torch.equal(found, before) for before in base.values() if before.shape == found.shape)


def test_a_tie_is_undone_while_merged_and_back_afterwards() -> None:
    model = _adapted("llama_tied", target_modules=["lm_head"])
    base = model.get_base_model()
    before = base.get_input_embeddings().weight.clone()
    model.merge_adapter()
    assert torch.equal(base.get_input_embeddings().weight, before)
    assert not torch.equal(base.get_output_embeddings().weight, before)
    model.unmerge_adapter()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b"], []])
def test_named_adapters_are_merged_and_no_others(names: list[str]) -> None:
    model = _two()
    model.set_adapter("a")
    active, asked = logits(model, batch("llama")), copy.deepcopy(model)
    asked.set_adapter(names)
    expected = logits(asked, batch("llama"))
    model.merge_adapter(names)
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert model.active_adapter == "a"
    assert torch.equal(logits(model, batch("llama")), active)
    merged = model.merge_and_unload(adapter_names=names)
    torch.testing.assert_close(logits(merged, batch("llama")), expected, atol=1e-4, rtol=1e-4)
    assert not adapter_layers(merged)


def test_a_second_adapter_is_merged_beside_the_first() -> None:
    model, together = _two(), _two()
    before = logits(model, batch("llama"))
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    together.merge_adapter(["a", "b"])
    assert torch.equal(logits(model, batch("llama")), logits(together, batch("llama")))
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch("llama")), before)


def test_merging_again_does_nothing_and_an_adapter_that_is_not_merged_can_be_deleted() -> None:
    model = _two()
    model.set_adapter("a")
    before = logits(model, batch("llama"))
    model.merge_adapter()
    merged = logits(model, batch("llama"))
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    model.delete_adapter("b")
    assert torch.equal(logits(model, batch("llama")), merged)
    assert list(model.peft_config) == ["a"]
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch("llama")), before)


@pytest.mark.parametrize(
    "config",
    [
        peftcli.OFTConfig(oft_block_size=4, module_dropout=0.5),
        peftcli.BOFTConfig(boft_block_size=4, boft_dropout=0.5),
        peftcli.PolyConfig(r=2, n_tasks=1),
        peftcli.LoraConfig(monteclora_config={}),
    ],
    ids=lambda config: config.peft_type,
)
def test_a_model_in_training_mode_merges_without_what_is_random(config: Any) -> None:
    model = get_peft_model(tiny("llama"), config)
    randomise(model)
    model.eval().merge_adapter()
    expected = [value.clone() for value in model.get_base_model().parameters()]
    model.unmerge_adapter()
    model.train().merge_adapter()
    assert all(torch.equal(*pair) for pair in zip(model.get_base_model().parameters(), expected, strict=True))
    assert all(module.training for layer in adapter_layers(model).values() for module in layer.children())


def test_while_merged_other_changes_are_refused_and_switching_takes_it_back(tmp_path: Path) -> None:
    model = _two()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter(["a", "b"])
    for act in (
        lambda: model.add_adapter("c", peftcli.LoraConfig()),
        lambda: model.load_adapter(tmp_path / "before/a", "c"),
        lambda: model.delete_adapter("a"),
        lambda: model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c"),
    ):
        with pytest.raises(AdapterError, match=r" merged; call unmerge_adapter\(\) first|while they are merged"):
            act()
    model.save_pretrained(tmp_path / "after")
    for file in ("a/adapter_model.safetensors", "b/adapter_model.safetensors", "b/adapter_config.json"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    model.set_adapter("b")
    assert torch.equal(logits(model, batch("llama")), logits(_use(_two(), "b"), batch("llama")))


def _use(model: PeftModel, name: str) -> PeftModel:
    model.set_adapter(name)
    return model


def test_a_copy_of_a_merged_model_is_taken_back_by_itself() -> None:
    model = _two()
    expected = logits(model, batch("llama"))
    model.merge_adapter()
    merged, twin = logits(model, batch("llama")), copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin, batch("llama")), expected)
    assert torch.equal(logits(model, batch("llama")), merged)


@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
def test_what_cannot_be_merged_is_refused_and_stays(act: str) -> None:
    model = _two()
    model.add_adapter("p", peftcli.PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(AdapterError, match="Adapter x does not exist"):
        getattr(model, act)(adapter_names=["x"])
    with pytest.raises(AdapterError, match="cannot be merged"):
        getattr(model, act)(adapter_names=["a", "p"])
    expected = logits(model, batch("llama"))
    layer = list(adapter_layers(model, "b").values())[-1]
    with torch.no_grad():
        layer.lora_B.weight[0, 0] = torch.inf
    with pytest.raises(AdapterError, match=r"NaNs detected in the merged weights\. The adapter b seems"):
        getattr(model, act)(adapter_names=["a", "b"])
    model.set_adapter("a")
    model.set_adapter("b")
    with torch.no_grad():
        layer.lora_B.weight[0, 0] = 0.0
    assert logits(model, batch("llama")).shape == expected.shape
    getattr(model, act)(adapter_names=["a"])


def test_a_weight_that_is_computed_is_not_merged_into() -> None:
    base = nn.Sequential()
    base.add_module("normed", weight_norm(nn.Linear(4, 6)))
    model = get_peft_model(base, peftcli.LoraConfig(r=2, target_modules=["normed"]))
    randomise(model)
    x = torch.randn(3, 4)
    expected = model(x)
    for fold_in in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="normed computes its weight from other tensors"):
            fold_in()
    assert torch.equal(model(x), expected)
    biases = get_peft_model(nn.Sequential(weight_norm(nn.Linear(4, 6))), peftcli.BeftConfig(target_modules="0"))
    randomise(biases)
    expected = biases(x)
    torch.testing.assert_close(biases.merge_and_unload()(x), expected)


def test_fold_and_merge_of_the_core_take_the_enabled_ones() -> None:
    model, configs = tiny("llama"), [peftcli.LoraConfig(init_lora_weights=False) for _ in "ab"]
    for name, config in zip("ab", configs, strict=True):
        inject(model, config, name)
    set_active(model, ["b"])
    expected = logits(model, batch("llama"))
    folded = merge_in_place(model)
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-4, rtol=1e-4)
    folded.undo()
    assert {layer.adapter for layer in adapter_layers(model).values() if layer.enabled} == {"b"}
    merge(model, configs[1])
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == list(tiny("llama").state_dict())


def test_a_module_with_anothers_layers_inside_has_no_copy() -> None:
    model = _adapted("llama")
    expected = logits(model, batch("llama"))
    with pytest.raises(AdapterError, match="layers of another adapter cannot be trained"):
        model.add_adapter("b", peftcli.LoraConfig(target_modules=["lm_head"], modules_to_save=["self_attn"]))
    assert torch.equal(logits(model, batch("llama")), expected)
    model = get_peft_model(tiny("llama"), peftcli.LoraConfig(target_modules=["lm_head"], modules_to_save=["self_attn"]))
    model.add_adapter("b", peftcli.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"default replaces model\.layers\.0\.self_attn, which b changes too"):
        model.set_adapter(["default", "b"])
    randomise(model)
    expected = logits(model, batch("llama"))
    model.merge_adapter()  # the copy, over modules that b adapts
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch("llama")), expected)


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_to_half_precision_computes_and_merges(method: str, dtype: torch.dtype) -> None:
    kind = "gpt2" if method in ("beft", "glora") else "llama"  # these change biases too
    config = METHODS[method].config_class()(**base_settings(method, kind))
    model = tiny(kind)
    inject(model, config)
    if config.merge_problem():
        return
    randomise(model)
    model.to(dtype).eval()
    state = {name: value.clone() for name, value in adapter_state(model).items()}
    adapted = logits(model, batch(kind)).float()
    merge_in_place(model)
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(model).items())
    assert {parameter.dtype for parameter in model.parameters()} <= {dtype, torch.int64}
    error = (logits(model, batch(kind)).float() - adapted).norm() / adapted.norm()
    assert error < (0.05 if dtype is torch.float16 else 0.2)


@pytest.mark.parametrize("name", ["llama", "tied, both"])
def test_layer_by_layer_weights_are_merged_where_they_are(name: str) -> None:
    kind, settings = CASES[name]
    model = _adapted(kind, **settings).get_base_model()
    before = {weight.data_ptr() for weight in base_module(model).state_dict().values()}
    expected = logits(model, batch(kind))
    merge_layer_by_layer(model)
    assert not adapter_layers(model)
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-5, rtol=1e-5)
    if name == "llama":
        assert {weight.data_ptr() for weight in model.state_dict().values()} <= before


@pytest.mark.parametrize("settings", [{"target_modules": ["inner"]}, {"modules_to_save": ["inner"]}])
@pytest.mark.parametrize("adapters", [["default"], ["default", "b"], ["b"]])
def test_an_adapter_inside_a_module_with_an_adapted_parameter_is_merged_too(
    settings: dict[str, Any], adapters: list[str]
) -> None:
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"gated": Gated()}), torch.randn(2, 8)
    names = list(base.state_dict())
    model = get_peft_model(base, peftcli.LoraConfig(target_parameters=["gated.gate"], **settings))
    model.add_adapter("b", peftcli.LoraConfig(target_modules=["inner"]))
    randomise(model)
    model.base_model.set_adapter(adapters)
    expected = base.eval()["gated"](x)
    by_layer = copy.deepcopy(base)
    merge_layer_by_layer(by_layer)
    model.merge_adapter()
    merged = base["gated"](x)
    model.unmerge_adapter()
    assert torch.equal(base["gated"](x), expected)
    for found in (merged, by_layer["gated"](x), model.merge_and_unload()["gated"](x)):  # type: ignore[operator, index]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert list(base.state_dict()) == list(by_layer.state_dict()) == names


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj"]), ("llama_tied", ["embed_tokens"])])
def test_the_parameter_that_was_there_holds_the_sum_unless_another_module_has_it_too(
    kind: str, targets: list[str]
) -> None:
    model = _adapted(kind, target_modules=targets)
    module = base_module(next(iter(adapter_layers(model.get_base_model()).values())))
    weight, before = module.weight, module.weight.clone()
    merged = model.merge_and_unload()
    changed = not torch.equal(weight, before)
    assert changed == (kind == "llama")
    assert (module.weight is weight) == changed
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert torch.equal(merged.lm_head.weight, tiny(kind).lm_head.weight)
