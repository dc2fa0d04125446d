"""How LoRA's A and B start, with a base model that stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, randomise, tiny
from starting import FROM_DATA, STARTED, TARGETS, Rows, layers_of, started
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.protocols import needs_batches
from peftcli.core.weights import adapter_state, load_training_state, training_state, unsaved_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import CordaConfig, EvaConfig, LoraGAConfig
from peftcli.methods.lora.layers import calibrate
from peftcli.methods.lora.variants import VeloraConfig

LR = 0.05


def train_a_step(model: nn.Module, kind: str) -> None:
    model(**labelled(kind)).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad.sign()
                parameter.grad = None


@pytest.mark.grid(each="init")
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("init", STARTED)
def test_the_start_is_the_base_model_exactly_and_training_leaves_its_weights(init: str, kind: str) -> None:
    model, _ = started(kind, init)
    base = tiny(kind)
    assert torch.equal(logits(model, batch(kind)), logits(base, batch(kind)))
    assert all(layer.delta().any() == False for layer in layers_of(model).values())  # noqa: E712 - a tensor
    assert all(layer.lora_B.weight.any() and layer.lora_A.weight.any() for layer in layers_of(model).values())
    train_a_step(model, kind)
    assert not torch.allclose(logits(model, batch(kind)), logits(base, batch(kind)), atol=1e-3)
    with disabled(model):
        assert torch.equal(logits(model, batch(kind)), logits(base, batch(kind)))
    expected = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if ".base_layer." in name:
            assert torch.equal(parameter, expected[name.replace(".base_layer", "")])


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(
    ("init", "settings"),
    [("eva", {}), ("orthogonal", {}), ("mica", {}), ("gaussian", {})]
    + [(init, {"inference_mode": True}) for init in ("pissa", "olora")],  # as the config of a file says
)
def test_the_other_starts_are_the_base_model_too(init: str, settings: dict[str, Any]) -> None:
    model, _ = started("llama", init, **settings)
    torch.testing.assert_close(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")), atol=1e-5, rtol=0)


def test_dropout_leaves_the_start_alone() -> None:
    model, _ = started("llama", "pissa", lora_dropout=0.5)
    expected = logits(tiny("llama"), batch("llama"))
    assert torch.equal(logits(model.train(), batch("llama")), expected)
    train_a_step(model, "llama")
    assert not torch.equal(logits(model, batch("llama")), logits(model, batch("llama")))


def test_pissa_starts_with_the_largest_singular_values() -> None:
    model, _ = started("gpt2", "pissa", lora_alpha=6)
    for name, layer in layers_of(model).items():
        weight = tiny("gpt2").get_submodule(name).weight.T.detach()
        u, s, vh = torch.linalg.svd(weight)
        best = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
        torch.testing.assert_close(1.5 * layer.lora_B.weight @ layer.lora_A.weight, best, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.lora_B.weight.norm(dim=0), layer.lora_A.weight.norm(dim=1))


def test_more_iterations_of_fast_pissa_come_closer() -> None:
    def gap(init: str) -> float:
        exact, fast = (layers_of(started("llama", name)[0]).values() for name in ("pissa", init))
        products = [[layer.lora_B.weight @ layer.lora_A.weight for layer in each] for each in (exact, fast)]
        return sum((one - other).norm().item() for one, other in zip(*products, strict=True))

    assert gap("pissa_niter_60") < 0.1 * gap("pissa_niter_1")


def test_olora_starts_with_columns_of_q_and_rows_of_r() -> None:
    model, _ = started("gpt2", "olora")
    for name, layer in layers_of(model).items():
        weight = tiny("gpt2").get_submodule(name).weight.T.detach()
        b, a = layer.lora_B.weight, layer.lora_A.weight
        torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(b @ a, b @ b.T @ weight, atol=1e-4, rtol=1e-4)  # what Q's first columns span


def test_mica_trains_a_beside_the_weakest_directions() -> None:
    model, _ = started("llama", "mica")
    before = {name: layer.lora_B.weight.clone() for name, layer in layers_of(model).items()}
    for name, layer in layers_of(model).items():
        weight = tiny("llama").get_submodule(name).weight.detach()
        smallest = torch.linalg.svdvals(weight)[-4:]
        torch.testing.assert_close((layer.lora_B.weight.T @ weight).norm(dim=1), smallest, atol=1e-4, rtol=1e-3)
    train_a_step(model, "llama")
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.lora_B.weight, before[name])
        assert layer.lora_A.weight.any()
        assert list(layer.own_tensors()) == ["lora_A.weight"]
        assert sorted(layer.file_tensors()) == ["lora_A.weight", "lora_B.weight"]


def test_orthogonal_starts_from_halves_of_a_basis() -> None:
    model, _ = started("llama", "orthogonal")
    for layer in layers_of(model).values():
        assert layer.lora_A.weight.std() > 0.02
        assert layer.lora_B.weight.std() > 0.02
        torch.testing.assert_close(layer.lora_B.weight @ layer.lora_A.weight, torch.zeros_like(layer.delta()))


@pytest.mark.grid(each="init")
@pytest.mark.parametrize("extra", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=["plain", "rslora"])
@pytest.mark.parametrize("init", STARTED)
def test_the_file_is_a_plain_lora_of_twice_the_r(init: str, extra: dict[str, Any], tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"v_proj": 3, "down_proj": 6}, "alpha_pattern": {"down_proj": 20}}
    model, config = started("llama", init, **extra, **patterns)
    randomise(model)
    expected = logits(model, batch("llama"))
    save_adapter(model, config, tmp_path)
    read = config_from_dict(read_config(tmp_path))
    assert isinstance(read, LoraConfig)
    assert (read.r, read.rank_pattern, read.init_lora_weights) == (8, {"v_proj": 6, "down_proj": 12}, True)
    assert not set(read_config(tmp_path)) & {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}
    loaded = tiny("llama")
    load_adapter(loaded, read, tmp_path)
    scalings = [layer.scaling for layer in layers_of(model).values()]
    assert [layer.scaling for layer in layers_of(loaded).values()] == pytest.approx(scalings, rel=1e-12)
    torch.testing.assert_close(logits(loaded, batch("llama")), expected, atol=1e-5, rtol=1e-5)
    assert config.r == 4, "the config of the run says what it trains"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_merging_and_copies(init: str) -> None:
    model, config = started("gpt2", init)
    randomise(model)
    twin, expected = copy.deepcopy(model), logits(model, batch("gpt2"))
    randomise(twin, seed=5)
    assert torch.equal(logits(model, batch("gpt2")), expected)
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("gpt2")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", STARTED)
def test_training_goes_on_from_file_and_unsaved_state(init: str) -> None:
    model, _ = started("llama", init)
    train_a_step(model, "llama")
    kept = {**adapter_state(model), **unsaved_state(model)}
    torch.manual_seed(9)
    other, config = tiny("llama"), LoraConfig(init_lora_weights=init, r=4, target_modules=TARGETS["llama"])
    inject(other, config)
    if needs_batches(config):
        calibrate(other, config, Rows("llama", count=1))  # another start, which the state replaces
    load_training_state(other, {name: value.clone() for name, value in kept.items()})
    assert training_state(other).keys() == training_state(model).keys()
    assert torch.equal(logits(other, batch("llama")), logits(model, batch("llama")))


def test_a_bf16_base_keeps_its_bits() -> None:
    model, config = tiny("llama").to(torch.bfloat16), LoraConfig(init_lora_weights="pissa")
    inject(model, config)
    assert {layer.start_A.dtype for layer in layers_of(model).values()} == {torch.float32}
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama").to(torch.bfloat16), batch("llama")))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"init_lora_weights": "pisa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 5}}, "r"),
        ({"eva_config": EvaConfig()}, "eva_config"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "eva_config.rho"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 2}}, "eva_config.tau"),
        ({"init_lora_weights": "eva", "corda_config": CordaConfig()}, "corda_config"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "x"}}, "corda_config.corda_method"),
        (
            {"init_lora_weights": "corda", "corda_config": {"use_float16_for_covariance": True}},
            "corda_config.use_float16_for_covariance",
        ),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "x"}}, "lora_ga_config.direction"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "x"}}, "lora_ga_config.scale"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}}, "lora_ga_config.stable_gamma"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_config.loftq_iter"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "loftq_config.loftq_bits"),
        ({"init_lora_weights": "loftq", "use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa", "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    ],
)
def test_settings_that_mean_nothing_are_named(settings: dict[str, Any], key: str) -> None:
    assert [found for found, _ in LoraConfig.unchecked(**settings).problems()] == [key]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("eva_config", {"rho": 1.5, "roh": 2}),
        ("eva_config", {"use_label_mask": 3}),
        ("lora_ga_config", {"direktion": "ArBr"}),
    ],
)
def test_a_section_takes_its_own_settings_only(section: str, values: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=list(values)[-1]) as caught:
        LoraConfig(**{section: values})
    assert caught.value.key == f"{section}.{list(values)[-1]}"


@pytest.mark.parametrize(
    ("section", "key"),
    [(VeloraConfig, "init_type"), (CordaConfig, "corda_method"), (LoraGAConfig, "direction"), (LoraGAConfig, "scale")],
)
def test_a_choice_of_a_section_is_not_unset(section: Any, key: str) -> None:
    with pytest.raises(AdapterError, match=rf"^{section.key}\.{key}: must be .* or .*, not null"):
        section(**{key: None})


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "pissa_niter_2", *FROM_DATA])
def test_more_directions_than_a_layer_has_are_refused(init: str) -> None:
    with pytest.raises(AdapterError, match="fewer") as caught:
        started("llama", init, r=33)
    assert caught.value.key == "r"


@pytest.mark.parametrize("init", [*STARTED, "orthogonal"])
def test_only_linear_layers_start_so(init: str) -> None:
    with pytest.raises(AdapterError, match="embed_tokens is a Embedding") as caught:
        inject(tiny("llama"), LoraConfig(init_lora_weights=init, target_modules=["q_proj", "embed_tokens"]))
    assert caught.value.key == "init_lora_weights"


def test_a_projection_that_its_attention_never_calls_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    with pytest.raises(AdapterError, match="out_proj is a NonDynamicallyQuantizableLinear"):
        inject(model, LoraConfig(init_lora_weights="pissa", target_modules=["out_proj"]))


@pytest.mark.parametrize("init", ["pissa_niter_4", *FROM_DATA])
def test_a_file_that_means_nothing_by_itself_is_refused(init: str, tmp_path: Path) -> None:
    model = tiny("llama")
    plain = LoraConfig()
    inject(model, plain)
    save_adapter(model, plain, tmp_path)
    config: AdapterConfig = LoraConfig.from_dict({**plain.file_dict(), "init_lora_weights": init})
    other = tiny("llama")
    with pytest.raises(AdapterError, match=f"does not hold what {init} started from"):
        load_adapter(other, config, tmp_path)
    assert not adapter_layers(other)


def test_settings_of_other_initialisations_in_a_file_are_passed_over() -> None:
    written = {"init_lora_weights": True, "corda_config": {"corda_method": "kpm"}, "loftq_config": {}, "r": 4}
    assert LoraConfig.from_dict(written).problems() == []
    kept = LoraConfig.from_dict({"init_lora_weights": "eva", "eva_config": {"rho": 1.5}, "loftq_config": {}})
    assert isinstance(kept, LoraConfig)
    assert kept.eva_config == EvaConfig(rho=1.5)
