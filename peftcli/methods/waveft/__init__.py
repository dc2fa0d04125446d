"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (https://arxiv.org/abs/2505.12532)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1
from peftcli.methods._settings import Problems, not_one_of

MOMENTS = {**{f"db{n}": n for n in range(1, 11)}, "sym2": 2, "sym3": 3}
"""Wavelet -> how many moments of it vanish. These are Daubechies'; symlets 2 and 3 are the same ones."""


@dataclass(kw_only=True)
class WaveFTConfig(BiasConfig, FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of WaveFT, under PEFT's names."""

    peft_type = "WAVEFT"
    learning_rate = 2e-4
    sizes: ClassVar[tuple[str, ...]] = ("n_frequency", "n_frequency_pattern")
    always_written: ClassVar[tuple[str, ...]] = ("n_frequency", "scaling", "target_modules", "random_loc_seed")

    n_frequency: int = field(default=2592, metadata=AT_LEAST_1)
    """Trained wavelet coefficients of the update, in each layer. The file holds this many numbers for each layer."""
    scaling: float = field(default=25.0, metadata=ABOVE_0)
    """Strength of the update."""
    wavelet_family: str = "db1"
    """The wavelet: db1 (Haar) to db10, which are longer and slower, sym2 or sym3."""
    use_idwt: bool = True
    """false: train numbers of the update itself instead of wavelet coefficients. Faster, and learns less."""
    random_loc_seed: int = 777
    """Seed of the coefficients that are trained."""
    n_frequency_pattern: dict[str, int] = field(default_factory=dict, metadata=AT_LEAST_1)
    """An n_frequency of their own for some layers: name ending or regular expression -> n_frequency."""
    proportional_parameters: bool = False
    """Share the coefficients of all layers out in proportion to the layers' sizes, in place of n_frequency for each."""
    init_weights: bool = True
    """Start from no update at all; false starts at random."""

    def problems(self) -> Problems:
        found = super().problems()
        found += not_one_of(self, "wavelet_family", *MOMENTS)
        if self.proportional_parameters and self.n_frequency_pattern:
            found.append(("n_frequency_pattern", "means nothing with proportional_parameters"))
        return found
