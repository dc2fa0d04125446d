"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (https://arxiv.org/abs/2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1


@dataclass(kw_only=True)
class FourierFTConfig(BiasConfig, FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of FourierFT, under PEFT's names."""

    peft_type = "FOURIERFT"
    learning_rate = 5e-3
    sizes: ClassVar[tuple[str, ...]] = ("n_frequency", "n_frequency_pattern")
    always_written: ClassVar[tuple[str, ...]] = ("n_frequency", "scaling", "target_modules", "random_loc_seed")

    n_frequency: int = field(default=1000, metadata=AT_LEAST_1)
    """Trained coefficients of the update's spectrum, in each layer. The file holds this many numbers for each layer."""
    scaling: float = field(default=150.0, metadata=ABOVE_0)
    """Strength of the update. About 300 for Llama models."""
    random_loc_seed: int = 777
    """Seed of the places in the spectrum that are trained."""
    n_frequency_pattern: dict[str, int] = field(default_factory=dict, metadata=AT_LEAST_1)
    """An n_frequency of their own for some layers: name ending or regular expression -> n_frequency."""
    init_weights: bool = False
    """Start from no update at all. false: the spectrum starts at random."""
