"""PVeRA: its formula, what is drawn and when, and the matrices that all layers share."""

from __future__ import annotations

import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods.pvera import PveraConfig
from peftcli.methods.pvera.layers import PveraLinear, attach

TARGETS = {"target_modules": ["q_proj", "down_proj"], "r": 3}


def _layer(**settings: object) -> tuple[nn.Linear, PveraLinear]:
    base, config = nn.Linear(5, 7), PveraConfig(r=3, init_weights=False, **settings)  # type: ignore[arg-type]
    layer = PveraLinear(base, "x", config)
    attach(base, config, {"x": layer})
    return base, layer


def test_after_training_the_mean_counts() -> None:
    base, layer = _layer(pvera_dropout=0.5)
    x = torch.randn(2, 4, 5)
    with torch.no_grad():
        means = torch.diag(layer.pvera_lambda_d[:3]) @ layer.pvera_A[:3]
        delta = torch.diag(layer.pvera_lambda_b) @ layer.pvera_B @ means
        torch.testing.assert_close(layer.eval()(x), base(x) + x @ delta.T)
        torch.testing.assert_close(layer.delta(), delta)


@pytest.mark.parametrize(("training", "always"), [(True, False), (False, True)])
def test_what_is_drawn_has_the_mean_and_the_variance_that_it_should(training: bool, always: bool) -> None:
    base, layer = _layer(sample_at_inference=always)
    layer.train(training)
    torch.manual_seed(0)
    x = torch.randn(5).expand(20000, 5)
    with torch.no_grad():
        a, b = layer.pvera_lambda_d.unsqueeze(1) * layer.pvera_A, torch.diag(layer.pvera_lambda_b) @ layer.pvera_B
        found = layer(x) - base(x)
        variance = b.square() @ (a[3:] @ x[0]).exp()
        torch.testing.assert_close(found.mean(0), b @ a[:3] @ x[0], atol=0.1, rtol=0.1)
        torch.testing.assert_close(found.var(0), variance, atol=0.1, rtol=0.1)


def test_a_new_adapter_changes_nothing_though_it_draws() -> None:
    model = tiny("llama").train()
    inject(model, PveraConfig(**TARGETS))  # type: ignore[arg-type]
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama").train(), batch("llama")))


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key", [0, 5])
def test_the_matrices_are_pefts_bit_for_bit(key: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").to(dtype)
    inject(model, PveraConfig(**TARGETS, projection_prng_key=key))  # type: ignore[arg-type]
    layer = next(iter(adapter_layers(model).values()))
    monkeypatch.setattr("oracle.tiny", lambda kind: tiny(kind).to(dtype))
    oracle = theirs("llama", "pvera", **TARGETS, projection_prng_key=key).base_model
    for found, expected in ((layer.pvera_A, oracle.pvera_A["default"]), (layer.pvera_B, oracle.pvera_B["default"])):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_an_adapter_that_always_draws_is_not_merged() -> None:
    model, config = ours("llama", "pvera", **TARGETS, sample_at_inference=True)
    with pytest.raises(AdapterError, match="drawn anew"):
        merge(model, config)


def test_pefts_seed_is_for_its_files_only() -> None:
    with pytest.raises(AdapterError, match="not used in training; set the run's seed"):
        inject(tiny("llama"), PveraConfig(generator_seed=3))
    inject(tiny("llama"), PveraConfig(generator_seed=3, inference_mode=True))
