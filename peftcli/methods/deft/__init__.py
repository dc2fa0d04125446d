"""DEFT: Decompositional Efficient Fine-Tuning (https://arxiv.org/abs/2509.22793)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peftcli.core.config import BiasConfig, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1, SHARE


@dataclass(kw_only=True)
class DeftConfig(BiasConfig, FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of DEFT, under PEFT's names."""

    peft_type = "DEFT"
    learning_rate = 1e-3
    always_written: ClassVar[tuple[str, ...]] = ("r", "decomposition_method", "target_modules")

    r: int = field(default=8, metadata=AT_LEAST_1)
    """How many directions of a layer's output are taken from the weight and given back new. Parameters and memory
    grow linearly with it."""
    decomposition_method: Literal["relu", "qr"] = "relu"
    """How a direction is taken away. qr: exactly, by a projection; relu: nearly, and faster."""
    alpha: int | None = field(default=None, metadata=ABOVE_0)
    """Strength of what is given back: it is multiplied by alpha / r. Unset: by 1."""
    para: bool = False
    """Only take directions away, and give nothing back (PaRa): half the parameters. Such an adapter changes the model
    before it is trained."""
    deft_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that what is given back does not see during training."""
    init_scale: float = 1.0
    """With init_weights: false, how large that starts."""
    init_weights: bool = True
    """Start from no update at all; false starts with directions of the weight gone."""
