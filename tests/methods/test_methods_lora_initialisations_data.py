"""LoRA's starts that look at the training data, or at the base model before it was quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import PAD, batch, logits, randomise, tiny
from safetensors.torch import save_file
from starting import FROM_DATA, TARGETS, EightBits, Rows, layers_of, started
from torch import nn

from peftcli import peft_api
from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import disabled, inject, unload
from peftcli.core.protocols import needs_base_weights
from peftcli.core.weights import adapter_state, training_state
from peftcli.errors import AdapterError, ModelError
from peftcli.methods import config_from_dict
from peftcli.methods.combinations import Adapter, Combination, combine
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import EvaConfig, LoftQConfig, LoraGAConfig
from peftcli.methods.lora.initialisations.corda import covariances
from peftcli.methods.lora.initialisations.eva import eva_directions, start_eva
from peftcli.methods.lora.initialisations.loftq import start_loftq
from peftcli.methods.lora.initialisations.lora_ga import gradients
from peftcli.methods.lora.initialisations.residual import ResidualLinear
from peftcli.methods.lora.layers import calibrate
from peftcli.models.open import BaseWeights, open_base
from peftcli.schema import BaseModel


@pytest.mark.parametrize("init", FROM_DATA)
def test_an_adapter_that_has_not_seen_its_data_says_so(init: str) -> None:
    model = tiny("llama")
    inject(model, LoraConfig(init_lora_weights=init))
    with pytest.raises(AdapterError, match="has not seen"):
        logits(model, batch("llama"))
    with disabled(model):
        logits(model, batch("llama"))


@pytest.mark.grid
@pytest.mark.parametrize("init", ["eva", *FROM_DATA])
def test_equal_data_give_equal_starts_and_padding_does_not_count(init: str) -> None:
    starts = []
    for filler in (PAD, PAD, 7):
        torch.manual_seed(0)
        model, config = tiny("llama"), LoraConfig(init_lora_weights=init, r=4, target_modules=["q_proj", "down_proj"])
        inject(model, config)
        before = model.training
        calibrate(model, config, Rows("llama", filler))
        assert model.training == before
        assert not any(parameter.grad is not None for parameter in model.parameters())
        starts.append({name: value.clone() for name, value in training_state(model).items()})
    for other in starts[1:]:
        assert other.keys() == starts[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, starts[0][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["eva", *FROM_DATA])
def test_data_that_do_not_reach_a_layer_are_refused(init: str) -> None:
    for batches, message in ((list[dict[str, torch.Tensor]](), "q_proj"), (Rows("llama", count=1), "unused")):
        model = tiny("llama")
        model.unused = nn.Linear(4, 4)
        targets = ["q_proj"] if message == "q_proj" else ["q_proj", "unused"]
        config = LoraConfig(init_lora_weights=init, r=1, target_modules=targets)
        inject(model, config)
        with pytest.raises(AdapterError, match=f"do not reach .*{message}"):
            calibrate(model, config, batches)


def test_the_covariance_is_that_of_what_the_layer_reads() -> None:
    model, rows = tiny("llama"), Rows("llama", count=2)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found = covariances(model, {"x": layer}, lambda: [model(**each) for each in rows])["x"]
    handle.remove()
    examples = [
        example[keep.bool()]
        for x, each in zip(seen, rows, strict=True)
        for example, keep in zip(x, each["attention_mask"], strict=True)
    ]
    scaled = [x / x.max().abs() for x in examples]
    assert [len(x) for x in examples] == [20, 20, 20, 15] * 2
    torch.testing.assert_close(found, sum(x.T @ x for x in scaled) / len(scaled))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradients_are_those_of_the_weights_and_nothing_else_gets_any(kind: str) -> None:
    model, rows = tiny(kind), Rows(kind, count=2)
    modules = {
        name: module for name, module in model.named_modules() if name.endswith(tuple(TARGETS[kind])) and name != ""
    }
    assert len(modules) >= 4
    for each in rows:
        model(**each).loss.backward()
    expected = {name: module.weight.grad.clone() for name, module in modules.items()}
    model.zero_grad()
    found = gradients(model, modules, lambda: [each_loss(model, each).backward() for each in rows])
    for name, value in found.items():
        turned = value.T if kind == "gpt2" else value
        assert (turned - expected[name]).norm() < 1e-4 * expected[name].norm()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def each_loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**inputs).loss
    return loss


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_takes_other_directions_of_the_gradient_for_a_than_for_b(direction: Any) -> None:
    model, _ = started("llama", "lora_ga", r=3, lora_ga_config=LoraGAConfig(direction=direction, scale="unit"))
    base = tiny("llama")
    path = "model.layers.0.self_attn.q_proj"
    run = lambda: [each_loss(base, each).backward() for each in Rows("llama")]  # noqa: E731
    gradient = gradients(base, {path: base.get_submodule(path)}, run)[path]
    u, _, vh = torch.linalg.svd(gradient)
    layer = layers_of(model)[path]
    in_a, in_b = (vh @ layer.lora_A.weight.T).abs() > 0.99, (u.T @ layer.lora_B.weight).abs() > 0.99
    a, b = in_a.float().argmax(0).tolist(), in_b.float().argmax(0).tolist()
    assert in_a.any(0).all()
    assert in_b.any(0).all()
    wanted = {"ArB2r": ([0, 1, 2], [3, 4, 5]), "A2rBr": ([3, 4, 5], [0, 1, 2]), "ArBr": ([1, 3, 5], [0, 2, 4])}
    assert (a, b) == wanted[direction] if direction in wanted else sorted(a + b) == list(range(6))


@pytest.mark.parametrize(
    ("scale", "size"),
    [("unit", 1.0), ("gd_scale", 0.5), ("stable", 32**0.25 / 4), ("weight_svd", None)],
)
def test_lora_gas_scales(scale: Any, size: float | None) -> None:
    model, _ = started("llama", "lora_ga", lora_alpha=8, lora_ga_config=LoraGAConfig(scale=scale))
    layer = layers_of(model)["model.layers.0.self_attn.q_proj"]
    assert isinstance(layer, ResidualLinear)
    if size is None:
        size = (torch.linalg.svdvals(layer.base_layer.weight)[:4] / layer.scaling).sqrt().mean().item()
    tolerance = 1e-2 if scale == "weight_svd" else 1e-4  # the singular values there are approximate
    for vectors in (layer.lora_A.weight.norm(dim=1), layer.lora_B.weight.norm(dim=0)):
        torch.testing.assert_close(vectors, torch.full((4,), size), atol=tolerance, rtol=0)


def test_cordas_methods_take_opposite_ends() -> None:
    sizes = {}
    for method in ("ipm", "kpm"):
        model, _ = started("llama", "corda", corda_config={"corda_method": method})
        sizes[method] = [layer.lora_B.weight.norm() for layer in layers_of(model).values()]
    assert all(ipm > kpm for ipm, kpm in zip(*sizes.values(), strict=True))


def test_eva_moves_r_to_where_the_inputs_vary_and_keeps_the_sum() -> None:
    model, config = started("llama", "eva")
    layers = layers_of(model)
    sizes = {name: layer.r for name, layer in layers.items()}
    assert sum(sizes.values()) == 6 * 4
    assert len(set(sizes.values())) > 1
    assert max(sizes.values()) <= 8
    assert config.rank_pattern == {name: r for name, r in sizes.items() if r != 4}
    for layer in layers.values():
        a = layer.lora_A.weight
        assert a.shape[0] == layer.lora_B.weight.shape[1] == layer.r
        torch.testing.assert_close(a @ a.T, torch.eye(layer.r), atol=1e-4, rtol=0)
        assert layer.scaling == 2  # lora_alpha grew and shrank with r
        assert a.requires_grad
    fixed, plain = started("llama", "eva", eva_config={"rho": 1.0})
    assert {layer.r for layer in layers_of(fixed).values()} == {4}
    assert not plain.rank_pattern
    free, _ = started("llama", "eva", eva_config={"adjust_scaling_factors": False})
    assert {round(layer.scaling * layer.r, 6) for layer in layers_of(free).values()} == {8.0}


def test_evas_directions_are_the_main_ones_of_the_inputs() -> None:
    model, rows = tiny("llama"), Rows("llama", count=1)
    path = "model.layers.1.mlp.down_proj"
    config = LoraConfig(init_lora_weights="eva", r=3, target_modules=[path], eva_config=EvaConfig(rho=1, tau=0.9999))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    logits(model, rows.batches[0])
    handle.remove()
    counted = (rows.batches[0]["labels"] != -100) & rows.batches[0]["attention_mask"].bool()
    x = seen[0][counted]
    _, _, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    inject(model, config)
    calibrate(model, config, rows)
    cosines = (layers_of(model)[path].lora_A.weight * vh[:3]).sum(1).abs()
    assert (cosines > 0.99).all()


def test_eva_takes_a_layer_out_that_gets_no_directions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    targets: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1]}
    config = LoraConfig(init_lora_weights="eva", r=2, **targets)
    inject(model, config)
    layers = layers_of(model)
    names = list(layers)
    directions = {name: torch.linalg.qr(torch.randn(layer.view.in_features, 4))[0].T for name, layer in layers.items()}
    directions[names[0]] = directions[names[0]][:0]
    start_eva(model, config, layers, directions)
    assert list(layers_of(model)) == names[1:]
    assert type(model.get_submodule(names[0])) is nn.Linear
    randomise(model)
    save_adapter(model, config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))


def test_eva_joins_batches_that_are_too_small_and_stops_where_none_suffice() -> None:
    model, config = tiny("llama"), LoraConfig(init_lora_weights="eva", r=4, target_modules=["q_proj"])
    inject(model, config)
    small = Rows("llama", rows=2, length=5, count=12)  # 4 positions count in each, and 8 directions are wanted
    assert len(eva_directions(model, config, layers_of(model), small)) == 2
    config.eva_config = EvaConfig(tau=1.0)
    with pytest.raises(AdapterError, match="did not converge"):
        eva_directions(model, config, layers_of(model), iter(small.batches))


def _quantised() -> nn.Module:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = EightBits(layer.self_attn.q_proj)
    return model


def test_loftq_makes_up_for_quantisation() -> None:
    full, model = tiny("llama"), _quantised()
    config = LoraConfig(init_lora_weights="loftq", r=8, lora_alpha=24, target_modules=["q_proj"])
    inject(model, config)
    assert needs_base_weights(config)
    before = (logits(model, batch("llama")) - logits(full, batch("llama"))).norm()
    names: list[str] = []
    start_loftq(model, full.state_dict().__getitem__, keep=lambda name: names.append(name) is None)
    assert names == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert (logits(model, batch("llama")) - logits(full, batch("llama"))).norm() < 0.8 * before
    for name, layer in layers_of(model).items():
        error = full.get_submodule(name).weight - layer.base_layer.weight.float() * (layer.weight.SCB / 127)[:, None]
        u, s, vh = torch.linalg.svd(error)
        best = u[:, :8] @ torch.diag(s[:8]) @ vh[:8]
        torch.testing.assert_close(layer.delta(), best, atol=1e-5, rtol=1e-3)
    assert config.file_dict()["init_lora_weights"] is True


def test_loftq_puts_a_layer_back_that_the_callback_refuses() -> None:
    model = _quantised()
    inject(model, LoraConfig(target_modules=["q_proj"]))
    before = {name: value.clone() for name, value in adapter_state(model).items()}
    start_loftq(model, tiny("llama").state_dict().__getitem__, keep=lambda name: ".0." in name)
    assert {name for name, value in adapter_state(model).items() if not torch.equal(value, before[name])} == {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loftq_computes_with_rounded_weights_and_makes_up_for_them(kind: str) -> None:
    model, expected = tiny(kind), logits(tiny(kind), batch(kind))
    distances: dict[int, torch.Tensor] = {}
    for iterations in (1, 3):
        settings = LoftQConfig(loftq_bits=4, loftq_iter=iterations)
        config = LoraConfig(
            init_lora_weights="loftq", lora_alpha=24, target_modules="all-linear", loftq_config=settings
        )
        inject(model, config, str(iterations))
        distances[iterations] = (logits(model, batch(kind)) - expected).norm()
        with torch.no_grad():
            for layer in layers_of(model).values():
                layer.lora_B.weight.zero_()
        rounding = (logits(model, batch(kind)) - expected).norm()
        assert distances[iterations] < 0.9 * rounding
        unload(model)
    assert distances[3] < distances[1]
    assert torch.equal(logits(model, batch(kind)), expected)


def test_a_reader_rounds_the_weights_again(tmp_path: Path) -> None:
    model = peft_api.get_peft_model(
        tiny("llama"), LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_iter=2))
    )
    randomise(model)
    expected = logits(model, batch("llama"))
    model.peft_config["default"].init_lora_weights = True  # as scripts do that save PEFT's changed base model too
    model.save_pretrained(tmp_path)
    loaded = peft_api.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded, batch("llama")), expected)
    loaded.load_adapter(tmp_path, "again")
    loaded.base_model.set_adapter(["default", "again"])
    both = logits(loaded, batch("llama"))
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batch("llama")), both)
    given = Adapter("one", loaded.peft_config["again"], read_tensors(tmp_path))
    with pytest.raises(AdapterError, match="variant of LoRA that cannot be combined"):
        combine([given, given], [0.5, 0.5], Combination())


def test_loftq_says_what_it_needs() -> None:
    with pytest.raises(AdapterError, match="quantised") as caught:
        inject(tiny("llama"), LoraConfig(init_lora_weights="loftq"))
    assert "loftq_config" in str(caught.value.hint)
    with pytest.raises(AdapterError, match="quantised already") as caught:
        inject(_quantised(), LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig()))
    assert caught.value.key == "loftq_config"
    model = tiny("llama")
    inject(model, LoraConfig())
    with pytest.raises(AdapterError, match="this one is not"):
        start_loftq(model, model.state_dict().__getitem__)


def test_a_file_that_changes_the_base_weights_is_not_read_over_quantised_ones() -> None:
    config = LoraConfig(init_lora_weights="olora", target_modules=["v_proj"], inference_mode=True)
    inject(_quantised(), config)
    config.target_modules = ["q_proj"]
    with pytest.raises(AdapterError, match="q_proj is quantised") as caught:
        inject(_quantised(), config)
    assert caught.value.key == "init_lora_weights"


def test_full_weights_are_found_with_and_without_the_models_prefix(tmp_path: Path) -> None:
    full, name = tiny("llama"), "model.layers.0.self_attn.q_proj.weight"
    full.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    full.model.save_pretrained(tmp_path / "body")
    for folder in ("whole", "body"):
        weights = BaseWeights(open_base(BaseModel(name=str(tmp_path / folder))), "model")
        assert torch.equal(weights(name), full.get_parameter(name))
    with pytest.raises(ModelError, match=r"has no tensor model\.nothing"):
        weights("model.nothing")
    tensors = {name: torch.zeros(2, 2, dtype=torch.int8)}
    save_file(tensors, tmp_path / "body" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="quantised"):
        BaseWeights(open_base(BaseModel(name=str(tmp_path / "body"))), "model")(name)
