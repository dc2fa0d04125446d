"""The layer of FourierFT (https://arxiv.org/abs/2405.03003)."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import widened
from peftcli.core.targets import pattern_value
from peftcli.methods._delta import DeltaLinear, drawn_places, factory_kwargs, scattered
from peftcli.methods.fourierft import FourierFTConfig


class FourierFTLinear(DeltaLinear):
    """``delta = scaling * Re(inverse DFT of F)``; ``F: (out, in)`` is zero but for ``n`` trained places."""

    places: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: FourierFTConfig):
        super().__init__(module, name, "FourierFT", config.bias)
        count = int(pattern_value(config.n_frequency_pattern, name, config.n_frequency))
        places = drawn_places(self, name, "n_frequency", count, config.random_loc_seed)
        start = torch.zeros if config.init_weights else torch.randn
        self.fourierft_spectrum = nn.Parameter(start(count, **factory_kwargs(self)))
        self.register_buffer("places", places, persistent=False)
        self.scaling = config.scaling

    def delta(self) -> torch.Tensor:
        spectrum = scattered(widened(self.fourierft_spectrum), self.places, self.view)
        return self.scaling * torch.fft.ifft2(spectrum).real


wrap = FourierFTLinear
