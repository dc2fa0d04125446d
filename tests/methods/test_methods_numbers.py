"""What is special of the methods that train chosen numbers, blocks or directions of a weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import randomise, tiny
from oracle import loaded_by_peft, ours, same_logits, theirs
from peft.tuners.waveft.wavelet import Wavelet
from peft.tuners.waveft.waverec2d import waverec2d
from torch import nn
from transformers.activations import ACT2FN

import peftcli
from peftcli.core.layer import adapter_layers
from peftcli.core.targets import wrap
from peftcli.core.weights import adapter_state, named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.c3a import C3AConfig
from peftcli.methods.c3a.layers import C3ALinear
from peftcli.methods.deft import DeftConfig
from peftcli.methods.deft.layers import DeftLinear
from peftcli.methods.fourierft import FourierFTConfig
from peftcli.methods.fourierft.layers import FourierFTLinear
from peftcli.methods.osf import OSFConfig
from peftcli.methods.peanut import ACTIVATIONS, PeanutConfig
from peftcli.methods.peanut.layers import _ACTIVATIONS
from peftcli.methods.shira import ShiraConfig
from peftcli.methods.shira.layers import ShiraLinear
from peftcli.methods.supertuning import SupertuningConfig
from peftcli.methods.supertuning.layers import SupertuningLinear
from peftcli.methods.waveft import MOMENTS, WaveFTConfig
from peftcli.methods.waveft.layers import WaveFTLinear, _daubechies, synthesis
from peftcli.peft_api import PeftModel, get_peft_model


@pytest.mark.parametrize(
    ("start", "bound"), [("xavier_uniform", 6 / 500), (False, 6 / 500), ("kaiming_uniform", 1 / 300)]
)
def test_how_kernels_start(start: Any, bound: float) -> None:
    kernel = C3ALinear(nn.Linear(300, 200), "x", C3AConfig(block_size=10, init_weights=start)).c3a_kernel
    assert 0.98 * math.sqrt(bound) < kernel.abs().max() <= math.sqrt(bound)


def test_true_starts_from_no_update_and_gaussian_from_a_normal_one() -> None:
    zero, normal = (
        C3ALinear(nn.Linear(300, 200), "x", C3AConfig(block_size=10, init_weights=start)).c3a_kernel  # type: ignore[arg-type]
        for start in (True, "gaussian")
    )
    assert not zero.any()
    assert normal.std().item() == pytest.approx(1.0, rel=0.05)


def test_places_differ_by_seed_and_never_repeat() -> None:
    layers = [FourierFTLinear(nn.Linear(8, 8), "x", FourierFTConfig(n_frequency=64, random_loc_seed=s)) for s in (1, 2)]
    assert not torch.equal(layers[0].places, layers[1].places)
    assert layers[0].places.unique().numel() == 64


def test_a_default_that_no_layer_uses_does_not_keep_a_small_model_from_loading(tmp_path: Path) -> None:
    config = FourierFTConfig(n_frequency_pattern={"0": 5}, target_modules=["0"])
    peftcli.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config).save_pretrained(tmp_path)
    loaded = peftcli.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    assert [len(layer.fourierft_spectrum) for layer in adapter_layers(loaded).values()] == [5]


@pytest.mark.parametrize("name", MOMENTS)
def test_the_filters_are_pywavelets(name: str) -> None:
    """PEFT has them as tables; here they are computed."""
    expected = torch.tensor(Wavelet(name).rec_lo, dtype=torch.float64)
    torch.testing.assert_close(_daubechies(MOMENTS[name]), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("moments", [1, 2, 7])
def test_the_filters_are_orthonormal_and_their_moments_vanish(moments: int) -> None:
    low = _daubechies(moments)
    high = synthesis(moments)[3, 0].diagonal().abs().sqrt()
    for shift in range(0, len(low), 2):
        overlap = (low[shift:] * low[: len(low) - shift]).sum().item()
        assert overlap == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-9)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(moments)
    torch.testing.assert_close(high, low.flip(0).abs())
    for power in range(moments):
        steps = torch.arange(len(low), dtype=torch.float64) ** power
        assert (low.flip(0) * signs * steps).sum().item() == pytest.approx(0.0, abs=1e-5)
    assert low.sum().item() == pytest.approx(math.sqrt(2))


def test_haar_spreads_a_number_over_four() -> None:
    layer = WaveFTLinear(nn.Linear(4, 6), "x", WaveFTConfig(n_frequency=1, scaling=2.0))
    with torch.no_grad():
        layer.waveft_spectrum.fill_(3.0)
        layer.places.fill_(0)
        delta = layer.delta()
    torch.testing.assert_close(delta[:2, :2], torch.full((2, 2), 3.0))
    assert delta.count_nonzero() == 4


@pytest.mark.parametrize("name", ["db1", "db3", "sym2", "db10"])
@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (7, 9)])
def test_the_inverse_transform_is_pywavelets(name: str, rows: int, columns: int) -> None:
    config = WaveFTConfig(n_frequency=rows * columns, wavelet_family=name, scaling=1.0, init_weights=False)
    layer = WaveFTLinear(nn.Linear(columns, rows), "x", config)
    rim = MOMENTS[name] - 1
    with torch.no_grad():
        numbers = torch.zeros(rows * columns).index_put((layer.places,), layer.waveft_spectrum).view(rows, columns)
        padded = torch.zeros(rows + 2 * rim + rows % 2, columns + 2 * rim + columns % 2)
        padded[rim : rim + rows, rim : rim + columns] = numbers
        (top_left, top_right), (low_left, low_right) = (half.chunk(2, dim=1) for half in padded.chunk(2))
        expected = waverec2d((top_left, (top_right, low_left, low_right)), name)[:rows, :columns]
        torch.testing.assert_close(layer.delta(), expected, atol=1e-6, rtol=1e-5)


def test_proportional_sizes_are_pefts() -> None:
    settings = {"target_modules": "all-linear", "n_frequency": 37, "proportional_parameters": True}
    model, oracle = ours("llama", "waveft", **settings)[0], theirs("llama", "waveft", **settings)
    sizes = {name: len(value) for name, value in adapter_state(model).items()}
    assert sizes == {name: len(value) for name, value in peft.get_peft_model_state_dict(oracle).items()}
    assert len(set(sizes.values())) > 1


def test_the_file_says_where_and_training_leaves_that_alone() -> None:
    model, _ = ours("llama", "shira", r=2)
    state = adapter_state(model)
    assert {value.dtype for name, value in state.items() if name.endswith("indices")} == {torch.int32}
    assert {name.rpartition(".")[2] for name in named_tensors(model)} == {"shira_weight"}


def test_a_seed_chooses_the_places() -> None:
    def places(seed: int | None) -> torch.Tensor:
        return ShiraLinear(nn.Linear(20, 20), "x", ShiraConfig(r=2, random_seed=seed)).shira_indices

    assert torch.equal(places(None), places(None))
    assert torch.equal(places(3), places(3))
    assert not torch.equal(places(3), places(4))


def _every_eighth(layer: nn.Linear, r: int, **_: Any) -> torch.Tensor:
    return (torch.arange(layer.weight.numel()).view(layer.weight.shape) % 8 == 3).to(layer.weight)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Argument self.mask_type")  # PEFT's
def test_a_mask_of_ones_own_is_pefts(tmp_path: Path) -> None:
    masked = {}
    for name, classes in {
        "here": (ShiraConfig, get_peft_model),
        "peft": (peft.ShiraConfig, peft.get_peft_model),
    }.items():
        settings = classes[0](r=2, target_modules=["q_proj"], mask_type="every eighth")
        settings.mask_fn = _every_eighth
        masked[name] = classes[1](tiny("llama"), settings)
    here, there = adapter_state(masked["here"].get_base_model()), peft.get_peft_model_state_dict(masked["peft"])
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key].int(), there[key].int()) for key in here if key.endswith("indices"))
    model = masked["here"]
    randomise(model)
    model.save_pretrained(tmp_path)
    same_logits("llama", PeftModel.from_pretrained(tiny("llama"), tmp_path), model)
    same_logits("llama", loaded_by_peft("llama", tmp_path), model)


def test_what_is_no_mask_is_refused_and_files_need_none() -> None:
    wrong: dict[str, Any] = {
        r"must return a tensor \(6, 9\) of zeros and ones": lambda layer, r, **_: layer.weight.T,
        "chose 1 numbers of x, not 30": lambda layer, r, **_: torch.eye(6, 9) * torch.eye(9)[0],
    }
    for message, mask_fn in wrong.items():
        config = ShiraConfig(r=2)
        config.mask_fn = mask_fn  # type: ignore[misc]
        with pytest.raises(AdapterError, match=message) as caught:
            ShiraLinear(nn.Linear(9, 6), "x", config)
        assert caught.value.key == "mask_fn"
    with pytest.raises(AdapterError, match="'mine' needs a function"):
        ShiraConfig(mask_type="mine").check()
    ShiraConfig.from_dict({"peft_type": "SHIRA", "mask_type": "mine", "inference_mode": True})


def test_at_least_one_number_trains() -> None:
    layer = SupertuningLinear(nn.Linear(3, 3), "x", SupertuningConfig())
    assert layer.supertuning_values.shape == (1,)


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(_ACTIVATIONS[name](x), ACT2FN[name](x))


def test_activations_that_have_weights_or_are_unknown_are_refused() -> None:
    assert set(ACT2FN) - set(ACTIVATIONS) == {"gelu_10", "laplace", "prelu", "sqrtsoftplus", "xielu"}
    assert [key for key, _ in PeanutConfig.unchecked(act_fn="prelu").problems()] == ["act_fn"]


def test_only_what_is_given_back_is_dropped_out() -> None:
    base = nn.Linear(5, 7)
    layer = DeftLinear(base, "x", DeftConfig(r=3, deft_dropout=0.999))
    nn.init.normal_(layer.deft_P)
    x = torch.randn(2, 5)
    with torch.no_grad():
        weight = base.weight - layer.deft_P @ layer.deft_P.relu().T @ base.weight
        torch.manual_seed(1)  # drops all of x
        torch.testing.assert_close(layer(x), x @ weight.T + base.bias)


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_an_adapter_in_half_precision_computes_as_it_does_in_full(method: Any) -> None:
    layer = DeftLinear(nn.Linear(5, 7), "x", DeftConfig(r=3, decomposition_method=method)).bfloat16()
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    found = layer(x)
    found.sum().backward()
    assert all(value.grad is not None for value in layer.own_tensors().values())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer.float()(x.float()), atol=0.05, rtol=0.02)


BASES = [nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(8, 8)]


def _layer(base: nn.Module, **settings: Any) -> Any:
    return wrap(base.requires_grad_(False), "layers.3.x", OSFConfig(**settings))


@pytest.mark.parametrize("base", BASES)
def test_steps_have_nothing_along_the_stronger_directions(base: nn.Linear) -> None:
    layer, x = _layer(base, effective_rank=3), torch.randn(50, base.in_features)
    u, _, v = torch.linalg.svd(base.weight, full_matrices=False)
    optimizer = torch.optim.SGD(layer.own_tensors().values(), lr=0.5)
    (layer(x) - torch.randn(50, base.out_features)).square().mean().backward()
    optimizer.step()
    moved = layer.delta_of(base.weight)
    assert moved.norm() > 1e-2
    assert (u[:, :3].T @ moved).norm() < 1e-4 * moved.norm()
    assert (moved @ v[:3].T).norm() < 1e-4 * moved.norm()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 4),
        ({"effective_rank": 3}, 3),
        ({"effective_rank": 1}, 1),
        ({"effective_rank": 0.9}, 7),
        ({"rank_pattern": {"layers.3": 2}}, 2),
        ({"rank_pattern": {"layers.4": 2, "3": 0.25, "x": 5}}, 2),
    ],
)
def test_how_many_directions_stay(settings: dict[str, Any], kept: int) -> None:
    assert _layer(nn.Linear(12, 8), **settings).kept == kept
