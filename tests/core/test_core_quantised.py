"""Base layers whose weights are packed, by stand-ins that hold what the packages' layers hold."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import promises
import pytest
import torch
import torch.nn.functional as F
from models_tiny import batch, labelled, logits, randomise, tiny
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import disabled, inject, replace_modules, set_trainable
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.linear import dense_weight, linear_view
from peftcli.core.merge import merge
from peftcli.core.quantised import is_quantised, num_weights
from peftcli.core.targets import find_targets
from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError
from peftcli.methods import METHODS
from peftcli.methods._delta import stored_weight
from peftcli.methods.lora import LoraConfig
from peftcli.train.setup import unquantised_experts


class Packed(nn.Module):
    """As GPTQ's and AWQ's: no tensor called weight."""

    passes_gradients = True

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 7
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8).T.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.passes_gradients and torch.is_grad_enabled()):
            return F.linear(x, (self.qweight.float() * self.scale).T, self.bias)


class Opaque(Packed):
    """One that no gradient passes."""

    passes_gradients = False


class Int8(nn.Linear):
    """As bitsandbytes' 8-bit layers: integers and the largest absolute value of each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scales = linear.weight.detach().abs().amax(1)
        values = (linear.weight.detach() * (127 / scales).unsqueeze(1)).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.state = SimpleNamespace(SCB=scales)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (self.weight * (self.state.SCB / 127).unsqueeze(1)).to(x.dtype), self.bias)


class _Halved(torch.Tensor):
    """As torchao's weights: a tensor that says it is ordinary, and can ``dequantize``."""

    @staticmethod
    def __new__(cls, stored: torch.Tensor) -> _Halved:
        return torch.Tensor._make_subclass(cls, stored, False)

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor) * 2

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return nn.Parameter(_Halved(self.as_subclass(torch.Tensor).clone()), requires_grad=False)


class Tensors(nn.Linear):
    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight = nn.Parameter(_Halved(linear.weight.detach() / 2), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.dequantize(), self.bias)


FORMS = [Packed, Int8, Tensors]


def quantised(form: type[nn.Module], kind: str = "llama") -> nn.Module:
    """A tiny model whose linear layers, but for the head, are of a form."""
    model = tiny(kind)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    replace_modules(model, {module: form(module) for module in linear})
    return model.eval()


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
def form(request: pytest.FixtureRequest) -> type[nn.Module]:
    return request.param


def test_experts_that_are_not_quantised_are_told() -> None:
    model = quantised(Int8, "mixtral")
    whole = sum(each.numel() for each in model.parameters())
    layers = sum(module.weight.numel() for module in model.modules() if isinstance(module, Int8))
    told = f"{1 - layers / whole:.0%} of the weights are not quantised: int8 takes linear layers, not "
    assert unquantised_experts(model, "int8") == f"{told}experts.gate_up_proj and experts.down_proj"
    assert unquantised_experts(quantised(Int8), "int8") is None


def test_a_layer_is_seen_in_its_true_shape(form: type[nn.Module]) -> None:
    linear = nn.Linear(8, 6)
    layer = form(linear)
    view = linear_view(layer)
    assert view is not None
    assert (view.in_features, view.out_features, view.transposed) == (8, 6, False)
    assert is_quantised(layer)
    assert not is_quantised(linear)
    with torch.no_grad():
        computed = (layer(torch.eye(8)) - linear.bias).T
    assert torch.allclose(dense_weight(layer), computed, atol=1e-6)
    assert dense_weight(layer).dtype == torch.float32
    assert stored_weight(layer).device == linear.weight.device


def test_counts_are_those_of_the_model_itself(form: type[nn.Module]) -> None:
    assert num_weights(quantised(form)) == num_weights(tiny("llama"))
    injection = inject(quantised(form), LoraConfig(target_modules="all-linear"))
    assert injection.total == inject(tiny("llama"), LoraConfig(target_modules="all-linear")).total


def test_four_bits_count_as_what_they_stand_for() -> None:
    model = nn.Linear(64, 32, bias=False)
    model.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
    model.weight.quant_state = type("State", (), {"shape": (32, 64)})  # type: ignore[attr-defined]
    assert num_weights(model) == 2048


def test_all_linear_finds_them(form: type[nn.Module]) -> None:
    config = LoraConfig(target_modules="all-linear")
    assert find_targets(quantised(form), config) == find_targets(tiny("llama"), config)


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_trains_and_merges(method: str, form: type[nn.Module]) -> None:
    base, inputs, extra = quantised(form), batch("llama"), dict[str, torch.Tensor]()
    before = logits(base, inputs)
    if method == "multitask_prompt_tuning":
        extra["task_ids"] = torch.tensor([1, 0])
    inputs |= extra
    config = promises.config_of(method, "llama")
    model = _adapted(base, config)
    after = logits(model, inputs)
    assert not torch.allclose(after[:, -before.shape[1] :], before, atol=1e-3)
    with disabled(model):
        assert torch.equal(logits(model, inputs), before)
    assert torch.equal(logits(copy.deepcopy(model), inputs), after)
    _trains(model, labelled("llama") | extra)
    if config.merge_problem() is None and any(map(is_quantised, map(base_module, adapter_layers(model).values()))):
        _merges(model, config, inputs)


def _adapted(model: nn.Module, config: AdapterConfig) -> nn.Module:
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model.eval()


def _trains(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs).loss.backward()
    tensors = [parameter for _, _, parameter in named_tensors(model).values()]
    assert all(parameter.is_floating_point() for parameter in tensors)
    assert all(torch.isfinite(parameter.grad).all() for parameter in tensors if parameter.grad is not None)
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tensors)


def _merges(model: nn.Module, config: AdapterConfig, inputs: dict[str, torch.Tensor]) -> None:
    adapted = logits(model, inputs)
    with pytest.raises(AdapterError, match="is quantised"):
        merge(model, config)
    assert torch.equal(logits(model, inputs), adapted), "a merge that is refused changes nothing"
    merge(model, config, dequantise=True)
    assert not any(map(is_quantised, model.modules()))
    assert not adapter_layers(model)
    assert (logits(model, inputs) - adapted).abs().max() < 1e-4 * adapted.std()


def test_a_merge_that_fails_leaves_the_weights_packed() -> None:
    config = LoraConfig()
    model = _adapted(quantised(Packed), config)
    next(iter(named_tensors(model).values()))[2].data.fill_(float("nan"))
    before = [type(module) for module in model.modules()]
    with pytest.raises(AdapterError, match="NaN or Inf"):
        merge(model, config, dequantise=True)
    assert [type(module) for module in model.modules()] == before


def test_dequantising_keeps_dtype_and_bias() -> None:
    config, inputs = LoraConfig(), batch("bert")
    model = _adapted(quantised(Packed, "bert"), config)
    expected = logits(model, inputs)
    merge(model, config, dequantise=True)
    assert (logits(model, inputs) - expected).abs().max() < 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_dequantised_weights_have_the_dtype_of_the_base_model_and_not_of_the_adapter() -> None:
    model, config = quantised(Int8), LoraConfig(target_modules=["embed_tokens", "q_proj"])
    model.to(torch.bfloat16)
    merge(_adapted(model, config), config, dequantise=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_base_model_that_passes_no_gradients_is_refused_for_training_only() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="Opaque passes no gradients"):
        inject(quantised(Opaque), config)
    config.inference_mode = True
    inject(quantised(Opaque), config)


def test_a_quantised_layer_is_not_trained_in_full(form: type[nn.Module]) -> None:
    with pytest.raises(AdapterError, match=r"v_proj is quantised, and cannot be trained in full") as caught:
        inject(quantised(form), LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"]))
    assert "llm_int8_skip_modules=['model.layers.0.self_attn.v_proj']" in str(caught.value.hint)


def test_a_large_r_is_measured_by_the_true_shape() -> None:
    inject(quantised(Packed), LoraConfig(r=64, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="is far larger than"):
        inject(quantised(Packed), LoraConfig(r=512, target_modules=["q_proj"]))
