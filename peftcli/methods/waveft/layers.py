"""The layer of WaveFT (https://arxiv.org/abs/2505.12532), and Daubechies' wavelets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.core.targets import pattern_value
from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaLinear, drawn_places, factory_kwargs, scattered
from peftcli.methods.waveft import MOMENTS, WaveFTConfig


class WaveFTLinear(DeltaLinear):
    """``delta = scaling * inverse wavelet transform of C``; ``C`` is zero but for ``n`` trained places.

    ``C`` has the shape of the weight, and a rim of zeros as wide as the wavelet reaches over its edges.
    """

    places: torch.Tensor
    filters: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: WaveFTConfig):
        super().__init__(module, name, "WaveFT", config.bias)
        self.scaling, self.use_idwt = config.scaling, config.use_idwt
        if not config.proportional_parameters:  # else the sizes of all layers decide: see attach
            self.allocate(name, int(pattern_value(config.n_frequency_pattern, name, config.n_frequency)), config)

    def allocate(self, name: str, count: int, config: WaveFTConfig) -> None:
        """Make ``count`` trained coefficients."""
        places = drawn_places(self, name, "n_frequency", count, config.random_loc_seed)
        self.waveft_spectrum = nn.Parameter(torch.zeros(count, **factory_kwargs(self)))
        if not config.init_weights:
            nn.init.normal_(self.waveft_spectrum, std=0.01)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("filters", synthesis(MOMENTS[config.wavelet_family]).to(places.device), persistent=False)

    def delta(self) -> torch.Tensor:
        numbers = self.scaling * scattered(self.waveft_spectrum, self.places, self.view)
        return self._inverse_transform(numbers) if self.use_idwt else numbers

    def _inverse_transform(self, numbers: torch.Tensor) -> torch.Tensor:
        """One level: the four quarters of the matrix are the coefficients, each with a filter of its own."""
        (rows, columns), length = numbers.shape, self.filters.shape[-1]
        rim = length // 2 - 1
        padded = F.pad(numbers, (rim, rim + columns % 2, rim, rim + rows % 2))
        quarters = torch.stack([quarter for half in padded.chunk(2) for quarter in half.chunk(2, dim=1)])
        whole = F.conv_transpose2d(quarters.unsqueeze(0), self.filters.to(numbers), stride=2)[0, 0]
        first = length - 2
        return whole[first : first + rows, first : first + columns]


def attach(model: nn.Module, config: WaveFTConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Share out the coefficients of ``proportional_parameters``, rounded as PEFT rounds: its files need the counts."""
    if not config.proportional_parameters:
        return
    given: dict[str, Any] = dict(layers)
    sizes = {name: layer.view.in_features * layer.view.out_features for name, layer in given.items()}
    total, budget = sum(sizes.values()), config.n_frequency * len(sizes)
    if budget > total:
        text = f"asks for {config.n_frequency} x {len(sizes)} of the {total} numbers of the layers"
        raise AdapterError(text, key="n_frequency")
    for name, layer in given.items():
        layer.allocate(name, max(1, round(sizes[name] / total * budget)), config)


@cache
def synthesis(moments: int) -> torch.Tensor:
    """The filters of the four quarters: (4, 1, 2 * moments, 2 * moments)."""
    low = _daubechies(moments)
    high = low.flip(0) * torch.tensor([1.0, -1.0], dtype=low.dtype).repeat(moments)
    pairs = ((low, low), (high, low), (low, high), (high, high))
    return torch.stack([torch.outer(a, b) for a, b in pairs]).unsqueeze(1)


def _daubechies(moments: int) -> torch.Tensor:
    """Return the low-pass filter with ``moments`` vanishing moments: (2 * moments,).

    Its polynomial is ``(1 + z)^n`` times that half of ``P(y) = sum of C(n-1+k, k) y^k`` whose roots are inside the unit
    circle, where ``y = (2 - z - 1/z) / 4`` (Daubechies, Ten Lectures on Wavelets, chapter 6).
    """
    coefficients = [math.comb(moments - 1 + k, k) for k in range(moments)]
    half = 1 - 2 * np.roots(coefficients[::-1]).astype(complex)
    roots = [min(one + root, one - root, key=abs) for one, root in zip(half, np.sqrt(half**2 - 1), strict=True)]
    polynomial = np.poly([*roots, *[-1] * moments]).real
    return torch.from_numpy(math.sqrt(2) * polynomial / polynomial.sum())


wrap = WaveFTLinear
