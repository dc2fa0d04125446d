"""Uni-LoRA: One Vector is All You Need (https://arxiv.org/abs/2506.00799)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE


@dataclass(kw_only=True)
class UniLoraConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of Uni-LoRA, under PEFT's names."""

    peft_type = "UNILORA"
    sizes: ClassVar[tuple[str, ...]] = ("r", "theta_d_length")
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules", "theta_d_length", "proj_seed", "save_indices")

    r: int = field(default=4, metadata=AT_LEAST_1)
    """Size of the bottleneck."""
    theta_d_length: int = field(default=256, metadata=AT_LEAST_1)
    """Trained numbers of the whole model. The file is as large as that."""
    proj_seed: int = field(default=42, metadata=AT_LEAST_0)
    """Seed of the choice which number stands where in the layers' matrices."""
    save_indices: bool = False
    """Write that choice to the file too: it is as large as LoRA's then, and does not depend on the random generator."""
    unilora_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    init_theta_d_bound: float = field(default=0.02, metadata=ABOVE_0)
    """The numbers start uniform between plus and minus this."""
    init_weights: bool = True
    """false: they start normal with deviation 1, for tests."""

    @property
    def learning_rate(self) -> float:
        """A number that stands at many places is scaled down there, so fewer numbers take larger steps."""
        return 8 / max(self.theta_d_length, 1) ** 0.5
