"""FourierFT: an update whose spectrum is trained in a few places."""

from __future__ import annotations

import cmath
from pathlib import Path

import pytest
import torch
from models_tiny import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftcli
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError
from peftcli.methods import METHODS
from peftcli.methods.fourierft import FourierFTConfig
from peftcli.methods.fourierft.layers import FourierFTLinear


@pytest.mark.parametrize("base", [nn.Linear(4, 3), Conv1D(3, 4)])
def test_the_update_is_a_sum_of_waves(base: nn.Module) -> None:
    layer = FourierFTLinear(base, "x", FourierFTConfig(n_frequency=5, scaling=7.0)).eval()
    expected = torch.zeros(3, 4)
    for place, value in zip(layer.places.tolist(), layer.fourierft_spectrum.tolist(), strict=True):
        u, v = divmod(place, 4)
        for o in range(3):
            for i in range(4):
                wave = cmath.exp(2j * cmath.pi * (u * o / 3 + v * i / 4))
                expected[o, i] += 7.0 * value * wave.real / 12
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer.delta(), expected)
        torch.testing.assert_close(layer(x), base(x) + x @ expected.T)


def test_places_differ_by_seed_and_never_repeat() -> None:
    layers = [FourierFTLinear(nn.Linear(8, 8), "x", FourierFTConfig(n_frequency=64, random_loc_seed=s)) for s in (1, 2)]
    assert not torch.equal(layers[0].places, layers[1].places)
    assert layers[0].places.unique().numel() == 64


def test_layers_may_have_numbers_of_their_own() -> None:
    model = tiny("llama")
    inject(model, FourierFTConfig(n_frequency=9, n_frequency_pattern={"v_proj": 4, "layers.1.self_attn.q_proj": 2}))
    sizes = [len(layer.fourierft_spectrum) for layer in adapter_layers(model).values()]
    assert sizes == [9, 4, 2, 4]
    with pytest.raises(AdapterError, match="no adapted module matches 'k_proj'"):
        inject(tiny("llama"), FourierFTConfig(n_frequency=9, n_frequency_pattern={"k_proj": 4}))


def test_a_default_that_no_layer_uses_does_not_keep_a_small_model_from_loading(tmp_path: Path) -> None:
    config = FourierFTConfig(n_frequency_pattern={"0": 5}, target_modules=["0"])
    peftcli.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config).save_pretrained(tmp_path)
    loaded = peftcli.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    assert [len(layer.fourierft_spectrum) for layer in adapter_layers(loaded).values()] == [5]


def test_more_places_than_numbers_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"asks for 1000 of the 512 numbers of .*v_proj") as caught:
        inject(tiny("llama"), FourierFTConfig())
    assert caught.value.key == "n_frequency"


@pytest.mark.parametrize(("method", "key"), [("fourierft", "n_frequency"), ("waveft", "n_frequency"), ("shira", "r")])
def test_more_than_fit_into_memory_are_refused_before_they_are_made(method: str, key: str) -> None:
    config = METHODS[method].config_class()(target_modules=["0"], **{key: 10**13})
    with pytest.raises(AdapterError, match="of the 12 numbers of 0") as caught:
        inject(nn.Sequential(nn.Linear(4, 3)), config)
    assert caught.value.key == key


def test_init_weights_starts_from_no_update() -> None:
    layer = FourierFTLinear(nn.Linear(4, 3), "x", FourierFTConfig(n_frequency=5, init_weights=True))
    assert not layer.delta().any()
