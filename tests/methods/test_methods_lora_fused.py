"""LoRA as one function computes what the plain layers do, with the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models_tiny import KINDS, batch, checkpoint_activations, labelled, tiny
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.methods.lora import LoraConfig, fused
from peftcli.methods.lora.layers import wrap
from peftcli.methods.lora.lora import LoraLinear
from peftcli.peft_api.mixed_batch import BASE, adapted_by_row


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, no layer is fused."""
    fused.FUSED.enabled = False
    try:
        yield
    finally:
        fused.FUSED.enabled = True


def outcome(model: nn.Module, inputs: dict[str, Any], autocast: bool = False) -> torch.Tensor:
    """The loss and the gradients, as one vector."""
    torch.manual_seed(0)
    with torch.autocast("cpu", enabled=autocast):
        loss = model(**inputs).loss
    loss.backward()
    gradients = [parameter.grad for _, _, parameter in named_tensors(model).values()]
    model.zero_grad()
    return torch.cat([loss.detach().view(1), *(each.flatten() for each in gradients if each is not None)])


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["whole", "reentrant", "checkpointed"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_gradients_are_those_of_plain_layers(
    kind: str, dropout: float, checkpointing: bool | None, precision: str
) -> None:
    """In half precision they are about as close to those of float32 as plain ones under autocast."""
    model = tiny(kind, scale=1.0).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    inject(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout))
    if checkpointing is not None:
        checkpoint_activations(model, reentrant=checkpointing)
        model.enable_input_require_grads()
    model.train()
    inputs, autocast = labelled(kind), precision == "autocast"
    found = outcome(model, inputs, autocast)
    with plainly():
        plain = outcome(model, inputs, autocast=precision != "float32")
        exact = outcome(model.float(), inputs)
    off, plainly_off = (float((each - exact).norm() / exact.norm()) for each in (found, plain))
    assert off < (1e-5 if precision == "float32" else 1.5 * plainly_off + 2e-3)


def filled(base: nn.Module, **settings: Any) -> Any:
    layer = wrap(base, "x.proj", LoraConfig(r=3, init_lora_weights=False, **settings))
    assert isinstance(layer, LoraLinear)
    return layer


def gradients_of(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    given = [x, *(each for each in layer.parameters() if each.requires_grad)]
    return list(torch.autograd.grad(layer(x).square().sum(), given))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 0, 5), (2, 3, 4, 5)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    layer, x = filled(nn.Linear(5, 7)), torch.randn(shape)
    found = [layer(x), *gradients_of(layer, x)]
    with torch.no_grad():
        found.append(layer(x))
    with plainly():
        plain = [layer(x), *gradients_of(layer, x), layer(x)]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_may_change_the_output_in_place() -> None:
    for shape in ((4, 5), (2, 4, 5)):
        layer, x = filled(nn.Linear(5, 7)), torch.randn(shape)
        (nn.ReLU(inplace=True)(layer(x)) * 2).sum().backward()
        found = layer.lora_B.weight.grad.clone()
        layer.zero_grad()
        (nn.ReLU()(layer(x)) * 2).sum().backward()
        torch.testing.assert_close(layer.lora_B.weight.grad, found)


@pytest.mark.parametrize("base_trains", [False, True])
def test_the_gradient_may_be_differentiated(base_trains: bool) -> None:
    layer = filled(nn.Linear(5, 7)).double()
    layer.base_layer.weight.requires_grad_(base_trains)

    def penalty() -> list[torch.Tensor]:
        x = torch.ones(3, 5, dtype=torch.double, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad((gradient.norm() - 1) ** 2, [layer.lora_A.weight, layer.lora_B.weight]))

    found = penalty()
    with plainly():
        plain = penalty()
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_another_number_format_has_no_second_derivative() -> None:
    layer, x = filled(nn.Linear(5, 7)), torch.ones(3, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = layer(x).float().tanh().sum()
    (gradient,) = torch.autograd.grad(made, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, where it differentiates forward
def test_transforms_of_torch_func_and_forward_derivatives() -> None:
    layer, x = filled(nn.Linear(5, 7)), torch.randn(3, 5)
    rows = torch.autograd.functional.jacobian(layer, x[0])
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), rows)
    _, along = torch.func.jvp(layer, (x[0],), (x[1],))
    torch.testing.assert_close(along, rows @ x[1])
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x[0], x[1])))
    torch.testing.assert_close(dual.tangent, along)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_a_module_used_twice_and_adapted_twice() -> None:
    layer = filled(filled(nn.Linear(5, 5)))
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(4, 5)
    found = gradients_of(model, x)
    with plainly():
        plain = gradients_of(model, x)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_each_row_has_its_adapter() -> None:
    model, inputs = tiny("llama"), batch("llama", rows=3)
    for adapter in ("one", "other"):
        inject(model, LoraConfig(r=4, init_lora_weights=False), adapter=adapter)
    with torch.no_grad(), adapted_by_row(model, ["one", BASE, "other"]):
        found = model(**inputs).logits
        with plainly():
            torch.testing.assert_close(found, model(**inputs).logits)


def test_the_input_is_saved_once_and_not_in_another_dtype() -> None:
    base = nn.Linear(64, 96, dtype=torch.bfloat16).requires_grad_(False)
    layer, x = filled(base), torch.randn(10, 64).bfloat16()
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    foreign = {each.data_ptr() for each in layer.parameters()}
    own = [each for each in saved if each.data_ptr() not in foreign]
    assert [each.data_ptr() for each in own if each.shape == x.shape] == [x.data_ptr()]
    assert sum(each.numel() for each in own) == x.numel() + (10 + 64 + 96) * layer.r


def test_what_is_more_than_two_products_stays_plain() -> None:
    assert filled(nn.Linear(5, 7)).fused_pair() is not None
    for settings in ({"lora_bias": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"kasa_config": {}}):
        layer = wrap(nn.Linear(5, 7), "x.proj", LoraConfig(**{"r": 3, **settings}))
        assert isinstance(layer, LoraLinear)
        assert layer.fused_pair() is None, settings


def test_a_hook_on_lora_a_is_called() -> None:
    layer, seen = filled(nn.Linear(5, 7)), list[Any]()
    with layer.lora_A.register_forward_hook(lambda *given: seen.append(given)):
        layer(torch.randn(2, 5))
    assert seen


def test_a_frozen_pair_gets_no_gradient() -> None:
    """MiCA trains A alone."""
    layer = wrap(nn.Linear(5, 7), "x.proj", LoraConfig(r=3, init_lora_weights="mica"))
    layer(torch.randn(2, 5)).sum().backward()
    assert layer.lora_A.weight.grad is not None
    assert layer.lora_B.weight.grad is None


@pytest.mark.slow
def test_a_compiled_layer_computes_the_same() -> None:
    layer, x = filled(nn.Linear(5, 7)), torch.randn(2, 5)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
