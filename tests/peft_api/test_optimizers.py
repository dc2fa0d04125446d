"""Optimizers that know of LoRA's A and B take PEFT's steps."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from models_tiny import labelled, tiny
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer, lorafa

import peftcli
from peftcli.errors import AdapterError

_ADAM = torch.optim.AdamW


def _adapted(lib: Any, **settings: Any) -> Any:
    given = {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}, "modules_to_save": ["lm_head"], **settings}
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(**given))
    tensors = lib.get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: 0.1 * torch.randn(tensors[name].shape, generator=generator) for name in sorted(tensors)}
    lib.set_peft_model_state_dict(model, drawn)
    return model


def _after(lib: Any, make: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """The adapter after three steps."""
    model = _adapted(lib, **settings)
    optimizer = make(model)
    for seed in range(3):
        optimizer.zero_grad()
        model(**labelled("llama", seed)).loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in lib.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}])
def test_lora_fa_takes_pefts_steps(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else it rounds the gradients
    given = {"r": 4, "lora_alpha": 8, "lr": 1e-3, "weight_decay": 0.01}
    found = _after(peftcli, lambda model: peftcli.create_lorafa_optimizer(model, **given), **settings)
    expected = _after(peft, lambda model: create_lorafa_optimizer(model, **given), **settings)
    before = peftcli.get_peft_model_state_dict(_adapted(peftcli, **settings))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
        assert torch.equal(found[name], before[name]) == ("lora_A" in name)


@pytest.mark.parametrize("optimizer", [_ADAM, torch.optim.SGD])
def test_riemannian_preconditioning_takes_pefts_steps(optimizer: type[torch.optim.Optimizer]) -> None:
    given = {"optimizer_cls": optimizer, "lr": 1e-3, "reg": 1e-2, "weight_decay": 0.01}
    found = _after(peftcli, lambda model: peftcli.create_riemannian_optimizer(model, **given), use_dora=True)
    expected = _after(peft, lambda model: create_riemannian_optimizer(model, **given), use_dora=True)
    plain = _after(peftcli, lambda model: optimizer(model.parameters(), lr=1e-3, weight_decay=0.01), use_dora=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(plain[name], value, atol=1e-6) for name, value in expected.items())


def test_the_state_of_lora_fa_goes_on_where_it_was() -> None:
    model = _adapted(peftcli)
    optimizer = peftcli.create_lorafa_optimizer(model, lr=1e-2)
    model(**labelled("llama")).loss.backward()
    optimizer.step()
    again = peftcli.create_lorafa_optimizer(_continued(model), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert [each["step"] for each in again.state.values()] == [1] * len(optimizer.state)


def _continued(model: Any) -> Any:
    other = _adapted(peftcli)
    peftcli.set_peft_model_state_dict(other, peftcli.get_peft_model_state_dict(model))
    return other


def test_what_has_no_a_and_b_of_its_own_is_an_error() -> None:
    other = peftcli.get_peft_model(tiny("llama"), peftcli.IA3Config())
    model = _adapted(peftcli)
    for make, problem in {
        lambda: peftcli.create_lorafa_optimizer(other, lr=1): "LoRA-FA needs lora_A",
        lambda: peftcli.create_riemannian_optimizer(other, _ADAM, lr=1): "Riemannian preconditioning needs lora_A",
        lambda: peftcli.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1): "LBFGS requires a closure",
        lambda: peftcli.create_riemannian_optimizer(model, _ADAM, lr=1).step(
            lambda: 1.0
        ): "step\\(\\) does not support closures",
        lambda: peftcli.create_lorafa_optimizer(
            model, lr=1, use_rslora=True
        ): "use_rslora=True was passed to create_lorafa_optimizer; it is False",
    }.items():
        with pytest.raises(AdapterError, match=problem):
            make()
    with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer"):
        peftcli.create_riemannian_optimizer(model, dict, lr=1)
