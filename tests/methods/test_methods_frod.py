"""FRoD: the basis that layers of a kind share, and what belongs to a basis that came from a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import ours
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.merge import merge
from peftcli.core.weights import load_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.frod import FrodConfig
from peftcli.methods.frod.layers import FrodLinear, decompose, kind_of, shared_basis

torch.sparse.check_sparse_tensor_invariants.disable()  # PEFT's FRoD leaves it open, of which torch warns


def test_dropout_falls_on_what_differs_from_the_base_layer() -> None:
    config = FrodConfig(target_modules=["0"], frod_dropout=0.5, init_weights=False)
    base, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    layer: Any = inject(nn.Sequential(base), config).layers["0"]
    with torch.no_grad():
        torch.manual_seed(0)
        found = layer.train()(x)
        torch.manual_seed(0)
        dropped = nn.functional.dropout(x, 0.5)
        torch.testing.assert_close(found, base(x) + dropped @ layer.delta().T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shapes", [[(3, 6)], [(3, 6), (8, 6)], [(4, 6), (4, 6), (4, 6)]])
def test_every_weight_is_scales_in_the_shared_basis(shapes: list[tuple[int, int]]) -> None:
    weights = [torch.randn(shape) for shape in shapes]
    basis = shared_basis(weights, 1e-3)
    assert basis.shape == (6, 6)
    for weight in weights:
        left, lengths = decompose(basis, weight)
        torch.testing.assert_close(left @ lengths.diag() @ basis.T, weight, atol=1e-4, rtol=1e-4)
        norms = left.norm(dim=0)
        torch.testing.assert_close(norms[lengths > 1e-6], torch.ones_like(norms)[lengths > 1e-6])


def test_weights_that_do_not_span_their_inputs_have_a_basis_too() -> None:
    weights = [torch.cat([torch.randn(8, 4), torch.zeros(8, 2)], dim=1)]
    basis = torch.cat([torch.randn(6, 5), torch.zeros(6, 1)], dim=1)
    assert torch.isfinite(decompose(basis, weights[0])[0]).all()
    assert torch.isfinite(shared_basis(weights, 1e-3)).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.11.attention.self.query", "self_query"),
        ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
        ("transformer.h.0.c_attn", "c_attn"),
        ("classifier", "classifier"),
    ],
)
def test_layers_are_of_a_kind_by_the_end_of_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_layers_of_a_kind_have_one_basis_and_the_file_has_it_once() -> None:
    model, _ = ours("llama", "frod")
    layers: list[Any] = list(adapter_layers(model).values())
    assert len({id(layer.frod_V) for layer in layers}) == 2 < len(layers)
    assert not any(layer.frod_V.requires_grad for layer in layers)


def test_what_belongs_to_the_basis_follows_it_and_copies_are_apart(tmp_path: Path) -> None:
    model, config = ours("llama", "frod", target_modules=["q_proj"])
    save_adapter(model, config, tmp_path)
    tensors = read_tensors(tmp_path)
    expected, twin = logits(model, batch("llama")), copy.deepcopy(model)
    tensors["base_model.frod_V.self_attn_q_proj"] *= -1  # as another machine may have found it
    load_state(model, tensors)
    torch.testing.assert_close(logits(model, batch("llama")), expected)
    assert torch.equal(logits(twin, batch("llama")), expected)


def test_a_loaded_adapter_that_answered_first_can_be_trained(tmp_path: Path) -> None:
    model, config = ours("llama", "frod")
    save_adapter(model, config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path, trainable=True)
    with torch.inference_mode():
        assert torch.equal(loaded(**batch("llama")).logits, logits(model, batch("llama")))
    loaded(**labelled("llama")).loss.backward()


def test_it_trains_under_autocast() -> None:
    model, _ = ours("llama", "frod", target_modules=["q_proj"])
    model(**labelled("llama")).loss.backward()
    layers: list[Any] = list(adapter_layers(model).values())
    expected = [layer.frod_lambda_s_values.grad for layer in layers]
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(**labelled("llama")).loss.backward()
    for layer, gradient in zip(layers, expected, strict=True):
        assert (layer.frod_lambda_s_values.grad - gradient).norm() < 0.2 * gradient.norm()


def test_a_new_adapter_that_is_not_to_be_trained_changes_nothing_and_is_not_saved(tmp_path: Path) -> None:
    model, config = tiny("llama"), FrodConfig(inference_mode=True)
    inject(model, config)
    torch.testing.assert_close(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))
    with pytest.raises(AdapterError, match="inference_mode: the adapter was made for a file to fill its basis"):
        save_adapter(model, config, tmp_path)  # PEFT would find another basis


def test_without_the_basis_in_its_file_an_adapter_is_not_merged() -> None:
    model, config = ours("llama", "frod", save_projection=False)
    with pytest.raises(AdapterError, match="depends on the weights of the others"):
        merge(model, config)


def test_layers_of_a_kind_with_inputs_of_two_sizes_are_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peftcli.methods.frod.layers.shared_basis", None)  # not even that of "down" is computed
    model = nn.Sequential(
        *(nn.ModuleDict({"down": nn.Linear(4, 4), "up": nn.Linear(inputs, 4)}) for inputs in (6, 5, 6))
    )
    with pytest.raises(AdapterError, match=r"modules like 1\.up have 5 inputs and 6"):
        inject(model, FrodConfig(target_modules=["up", "down"]))
    assert not adapter_layers(model)


def test_no_sparse_numbers_at_all() -> None:
    model = nn.Sequential(nn.Linear(1, 3))
    layer = inject(model, FrodConfig(target_modules=["0"], sparse_rate=0.0)).layers["0"]
    assert isinstance(layer, FrodLinear)
    assert layer.frod_lambda_s_values.shape == (0,)
    assert model(torch.ones(2, 1)).shape == (2, 3)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_base_weight_is_not_read_while_the_adapter_answers_alone(bias: Any) -> None:
    model, _ = ours("llama", "frod", bias=bias)
    before = logits(model, batch("llama"))
    layer = next(iter(adapter_layers(model).values()))
    weight = base_module(layer).weight
    kept = weight.data
    weight.data = torch.full_like(kept, torch.nan)
    assert torch.equal(logits(model, batch("llama")), before)
    weight.data = kept
    layer.enabled = False
    assert not torch.equal(logits(model, batch("llama")), before)


@pytest.mark.gpu
def test_offloaded_base_weights_are_in_the_cpus_memory_while_the_adapter_answers_alone() -> None:
    model, config = ours("llama", "frod", runtime_offload_base_weight=True)
    inputs = {name: value.to("cuda") for name, value in batch("llama").items()}
    expected = logits(model, batch("llama"))
    layers = list(adapter_layers(model.to("cuda")).values())

    def places() -> set[str]:
        return {base_module(layer).weight.device.type for layer in layers}

    assert places() == {"cpu"}
    torch.testing.assert_close(logits(model, inputs).cpu(), expected, atol=1e-4, rtol=1e-4)
    assert places() == {"cpu"}
    for layer in layers:
        layer.enabled = False
    logits(model, inputs)
    assert places() == {"cuda"}
    for layer in layers:
        layer.enabled = True
    merge(model.to("cuda"), config)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    torch.testing.assert_close(logits(model, inputs).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_quantised_weight_is_not_offloaded() -> None:
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match="the weight of up is quantised, and stays on its device"):
        FrodLinear(packed, "up", FrodConfig(runtime_offload_base_weight=True))


def test_parameters_are_of_one_dtype_and_layers_share_the_places() -> None:
    """FSDP takes no others."""
    model = tiny("llama")
    inject(model, FrodConfig(target_modules=["q_proj"]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    first, second = adapter_layers(model.to("meta")).values()
    assert first.frod_s.indices is second.frod_s.indices
