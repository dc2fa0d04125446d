"""WaveFT: an update whose wavelet coefficients are trained in a few places, and the wavelets."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from models_tiny import tiny
from oracle import ours, theirs
from peft.tuners.waveft.wavelet import Wavelet
from peft.tuners.waveft.waverec2d import waverec2d
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods.waveft import MOMENTS, WaveFTConfig
from peftcli.methods.waveft.layers import WaveFTLinear, _daubechies, synthesis


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


def test_without_the_transform_the_numbers_are_the_update() -> None:
    layer = WaveFTLinear(nn.Linear(4, 6), "x", WaveFTConfig(n_frequency=3, use_idwt=False, scaling=2.0))
    nn.init.ones_(layer.waveft_spectrum)
    assert layer.delta().flatten()[layer.places].tolist() == [2.0] * 3
    assert layer.delta().count_nonzero() == 3


def test_proportional_sizes_are_pefts() -> None:
    settings = {"target_modules": "all-linear", "n_frequency": 37, "proportional_parameters": True}
    model, oracle = ours("llama", "waveft", **settings)[0], theirs("llama", "waveft", **settings)
    sizes = {name: len(value) for name, value in adapter_state(model).items()}
    assert sizes == {name: len(value) for name, value in peft.get_peft_model_state_dict(oracle).items()}
    assert len(set(sizes.values())) > 1


def test_what_means_nothing_is_named() -> None:
    with pytest.raises(AdapterError, match="coif2") as caught:
        WaveFTConfig(wavelet_family="coif2").check()
    assert caught.value.key == "wavelet_family"
    with pytest.raises(AdapterError, match="n_frequency_pattern: means nothing with proportional_parameters"):
        WaveFTConfig(proportional_parameters=True, n_frequency_pattern={"q_proj": 3}).check()
    model = tiny("llama")
    with pytest.raises(AdapterError, match="n_frequency: asks for 2592 x 4 of the 3072 numbers of the layers"):
        inject(model, WaveFTConfig(proportional_parameters=True))
    assert not adapter_layers(model)
