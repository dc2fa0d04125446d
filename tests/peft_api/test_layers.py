"""What libraries that know PEFT ask of one layer of a model: merge, unmerge, delete your adapter."""

from __future__ import annotations

import itertools

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from torch import nn

import peftcli
from peftcli.core.inject import inject
from peftcli.core.layer import AdapterLayer, adapter_layers
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError

CONFIGS = {
    "first": peftcli.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="lora_only"),
    "second": peftcli.LoraConfig(r=6, target_modules=["q_proj"], use_dora=True),
    "plain": peftcli.LoraConfig(r=2, target_modules=["q_proj"]),
    "third": peftcli.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


def several(*names: str) -> nn.Module:
    """A model with these adapters of random weights, all active."""
    model = tiny("qwen2")
    for name in names or CONFIGS:
        inject(model, CONFIGS[name], name)
    randomise(model)
    for layer in adapter_layers(model).values():
        layer.set_adapter(list(names or CONFIGS))
    return model.eval()


def test_layers_merge_in_any_order_and_take_it_back_exactly() -> None:
    model = several()
    expected, weights = logits(model, batch("qwen2")), dict(model.named_parameters())
    for order in itertools.permutations(CONFIGS):
        for layer in [layer for name in order for layer in adapter_layers(model, name).values()]:
            layer.merge()
        assert not any(layer.enabled for layer in adapter_layers(model).values())
        torch.testing.assert_close(logits(model, batch("qwen2")), expected, atol=1e-5, rtol=1e-4)
        for layer in [layer for name in order for layer in adapter_layers(model, name).values()]:
            layer.unmerge()
        assert all(value is weights[name] for name, value in model.named_parameters())
        assert torch.equal(logits(model, batch("qwen2")), expected)


def test_one_of_several_is_merged_and_switching_keeps_it() -> None:
    model = several("first", "plain")
    for layer in adapter_layers(model).values():
        layer.merge(adapter_names=["plain"])
        layer.set_adapter("first")
    found = logits(model, batch("qwen2"))
    for layer in adapter_layers(model).values():
        layer.unmerge()
        layer.set_adapter(["first", "plain"])
    torch.testing.assert_close(logits(model, batch("qwen2")), found, atol=1e-5, rtol=1e-4)


def test_disabled_layers_unmerge() -> None:
    model = several()
    expected = logits(tiny("qwen2"), batch("qwen2"))
    for layer in adapter_layers(model).values():
        layer.merge()
    for layer in adapter_layers(model).values():
        layer.enable_adapters(False)
    assert torch.equal(logits(model, batch("qwen2")), expected)


def test_a_layer_that_cannot_be_merged_stays_as_it_is() -> None:
    model = several()
    before = [layer.enabled for layer in adapter_layers(model).values()]
    broken = next(iter(adapter_layers(model, "first").values()))
    with torch.no_grad():
        next(iter(broken.own_tensors().values())).fill_(torch.nan)
    with pytest.raises(AdapterError, match="first seems to be broken"):
        broken.merge()
    assert [layer.enabled for layer in adapter_layers(model).values()] == before
    assert not broken.merged_adapters


def test_a_deleted_adapter_leaves_nothing_once_the_next_one_comes() -> None:
    model = several()
    for layer in adapter_layers(model).values():
        layer.set_adapter("second")
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            module.delete_adapter("second")
    assert {layer.adapter for layer in adapter_layers(model).values()} == {"first", "plain", "third"}
    enabled = {layer.adapter for layer in adapter_layers(model).values() if layer.enabled}
    assert enabled == {"first"}, "the first that is left"
    found, names = logits(model, batch("qwen2")), list(adapter_state(model, "first"))
    alone = several()
    for layer in adapter_layers(alone).values():
        layer.set_adapter("first")
    assert torch.equal(logits(alone, batch("qwen2")), found)
    assert names == list(adapter_state(alone, "first"))
    inject(model, CONFIGS["second"], "second")
    assert len([module for module in model.modules() if isinstance(module, AdapterLayer)]) == len(adapter_layers(alone))


def test_a_merged_adapter_that_is_deleted_stays_in_the_weights() -> None:
    model = tiny("qwen2")
    inject(model, CONFIGS["first"])
    randomise(model)
    expected = logits(model, batch("qwen2"))
    for layer in adapter_layers(model).values():
        layer.merge()
        layer.delete_adapter("default")
    assert not adapter_layers(model)
    torch.testing.assert_close(logits(model, batch("qwen2")), expected, atol=1e-5, rtol=1e-4)
