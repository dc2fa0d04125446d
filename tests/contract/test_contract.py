"""What every method promises, on every shape of base model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import KINDS, batch, checkpoint_activations, labelled, logits, randomise, tiny
from promises import base_settings, why_not
from safetensors.torch import load_file
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.layer import TrainedBias, adapter_layers
from peftcli.core.merge import merge
from peftcli.core.weights import load_training_state, named_tensors, training_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict

pytestmark = pytest.mark.grid(keep=4)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with every method, or with every method on every model that it goes with."""
    if "kind" in metafunc.fixturenames:
        pairs = [(method, kind) for kind in KINDS for method in METHODS if why_not(method, kind) is None]
        metafunc.parametrize(("method", "kind"), pairs)
    elif "method" in metafunc.fixturenames:
        metafunc.parametrize("method", METHODS)


def _config(method: str, kind: str, **settings: Any) -> AdapterConfig:
    return METHODS[method].config_class()(**base_settings(method, kind), **settings)


def _adapted(kind: str, method: str, base: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, AdapterConfig]:
    model, config = tiny(kind) if base is None else base, _config(method, kind, **settings)
    torch.manual_seed(0)  # for methods that draw what does not train
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model, config


def _gradients(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # for methods that draw
    model(**labelled(kind)).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two tensors are from one another, as a share of the second's size."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.grid(each="method")
def test_only_the_adapters_weights_get_gradients(method: str, kind: str) -> None:
    model, _ = _adapted(kind, method)
    own = {id(parameter) for _, _, parameter in named_tensors(model).values()}
    found = _gradients(model, kind)
    assert {id(parameter) for name, parameter in model.named_parameters() if name in found} == own
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    assert own == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_new_adapter_is_counted_right(method: str, kind: str) -> None:
    model, before = tiny(kind), sum(value.numel() for value in tiny(kind).parameters())
    injection = inject(model, _config(method, kind))
    assert injection.trainable == sum(value.numel() for _, _, value in named_tensors(model).values())
    replaced = sum(layer.bias.numel() for layer in injection.layers.values() if isinstance(layer, TrainedBias))
    assert injection.total == before + injection.trainable - replaced  # PEFT trains the biases that are there


@pytest.mark.grid(each="method")
def test_disabled_is_the_base_model_exactly(method: str, kind: str) -> None:
    model, _ = _adapted(kind, method)
    if method == "adaption_prompt":  # the tiny BERT's weights let little of it through
        for _, _, value in named_tensors(model).values():
            value.data.mul_(10)
    expected = logits(tiny(kind), batch(kind))
    with disabled(model):
        assert torch.equal(logits(model, batch(kind)), expected)
    changed = logits(model, batch(kind))[..., -expected.shape[-1] :]
    assert changed.shape != expected.shape or not torch.allclose(changed, expected, atol=1e-3)


def test_disabled_comes_back_after_an_error_and_keeps_what_was_off(method: str) -> None:
    model, _ = _adapted("llama", method)
    expected = logits(model, batch("llama"))
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(logits(model, batch("llama")), expected)
    with disabled(model):
        with disabled(model):
            pass
        assert not any(layer.enabled for layer in adapter_layers(model).values())


@pytest.mark.grid(each="method")
def test_saved_and_loaded_is_the_same(method: str, kind: str, tmp_path: Path) -> None:
    model, config = _adapted(kind, method)
    save_adapter(model, config, tmp_path / "a")
    loaded, read = tiny(kind), config_from_dict(read_config(tmp_path / "a"))
    load_adapter(loaded, read, tmp_path / "a")
    assert torch.equal(logits(loaded, batch(kind)), logits(model, batch(kind)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    save_adapter(loaded, read, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_state_goes_out_and_in_again(method: str, kind: str) -> None:
    model, _ = _adapted(kind, method)
    other, _ = _adapted(kind, method)
    randomise(other, seed=7)
    assert not torch.equal(logits(other, batch(kind)), logits(model, batch(kind)))
    load_training_state(other, training_state(model))
    assert torch.equal(logits(other, batch(kind)), logits(model, batch(kind)))


@pytest.mark.grid(keep=8)
def test_unload_restores_the_base_model(method: str, kind: str) -> None:
    base = tiny(kind)
    model, _ = _adapted(kind, method)
    unload(model)
    assert not adapter_layers(model)
    assert torch.equal(logits(model, batch(kind)), logits(base, batch(kind)))
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


def test_another_adapter_goes_in_after_unload(method: str, kind: str) -> None:
    model, _ = _adapted(kind, method)
    unload(model)
    again, fresh = _adapted(kind, method, base=model)[0], _adapted(kind, method)[0]
    assert torch.equal(logits(again, batch(kind)), logits(fresh, batch(kind)))


@pytest.mark.grid(each="method")
def test_merged_equals_unmerged_or_is_refused(method: str, kind: str) -> None:
    model, config = _adapted(kind, method)
    expected = logits(model, batch(kind))
    if config.merge_problem():
        with pytest.raises(AdapterError, match="cannot be merged"):
            merge(model, config)
        assert torch.equal(logits(model, batch(kind)), expected)
        return
    merge(model, config)
    assert not adapter_layers(model)
    assert list(model.state_dict()) == list(tiny(kind).state_dict())
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.grid(keep=8)
def test_a_bf16_base_carries_an_fp32_adapter(method: str, kind: str, tmp_path: Path) -> None:
    model, config = _adapted(kind, method, base=tiny(kind).to(torch.bfloat16))
    assert {value.dtype for _, _, value in named_tensors(model).values()} == {torch.float32}
    assert logits(model, batch(kind)).dtype == torch.bfloat16
    assert {gradient.dtype for gradient in _gradients(model, kind).values()} == {torch.float32}
    save_adapter(model, config, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors").values()
    assert {value.dtype for value in saved if value.is_floating_point()} == {torch.float32}  # others are indices
    exact = tiny(kind)  # the file's adapter: what a method draws from the base weight differs with its rounding
    load_adapter(exact, config_from_dict(read_config(tmp_path)), tmp_path)
    assert _distance(logits(model, batch(kind)).float(), logits(exact, batch(kind))) < 0.2


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, kind: str, reentrant: bool) -> None:
    model, _ = _adapted(kind, method)
    expected = _gradients(model.train(), kind)
    checkpoint_activations(model, reentrant=reentrant)
    if reentrant:
        model.enable_input_require_grads()
    if reentrant and method == "xlora":
        with pytest.raises(AdapterError, match="use_reentrant=False"):
            _gradients(model, kind)
        return
    found = _gradients(model, kind)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert _distance(gradient, expected[name]) < 1e-4


def test_a_copy_is_a_model_of_its_own(method: str, kind: str) -> None:
    model, _ = _adapted(kind, method)
    twin = copy.deepcopy(model)
    expected = logits(model, batch(kind))
    assert torch.equal(logits(twin, batch(kind)), expected)
    randomise(twin, seed=9)
    assert torch.equal(logits(model, batch(kind)), expected)
    assert not torch.equal(logits(twin, batch(kind)), expected)
    with disabled(twin):
        assert torch.equal(logits(model, batch(kind)), expected)


def test_a_second_adapter_is_refused(method: str, kind: str) -> None:
    model, _ = _adapted(kind, method)
    expected = logits(model, batch(kind))
    with pytest.raises(AdapterError, match="already holds an adapter"):
        inject(model, _config(method, kind))
    assert torch.equal(logits(model, batch(kind)), expected)
    assert all(parameter.requires_grad for _, _, parameter in named_tensors(model).values())


def test_the_mode_of_the_model_is_kept(method: str, kind: str) -> None:
    for training in (False, True):
        model = tiny(kind).train(training)
        inject(model, _config(method, kind))
        assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("name", [name for name in METHODS if why_not(name, "bert") is None])
def test_modules_to_save_go_with_every_method(name: str, tmp_path: Path) -> None:
    model, config = _adapted("bert", name, modules_to_save=["classifier"])
    save_adapter(model, config, tmp_path)
    loaded = tiny("bert", seed=0)
    nn.init.zeros_(loaded.classifier.weight)
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("bert")), logits(model, batch("bert")))
    with disabled(model):
        assert torch.equal(logits(model, batch("bert")), logits(tiny("bert"), batch("bert")))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_a_tied_embedding_is_untied_by_merging_it(targets: list[str]) -> None:
    model, config = _adapted("llama_tied", "lora", target_modules=targets)
    expected = logits(model, batch("llama_tied"))
    assert merge(model, config)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    torch.testing.assert_close(logits(model, batch("llama_tied")), expected, atol=1e-4, rtol=1e-4)


def test_merging_other_layers_leaves_the_tie() -> None:
    model, config = _adapted("llama_tied", "lora")
    assert not merge(model, config)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
