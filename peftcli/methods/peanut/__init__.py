"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (https://arxiv.org/abs/2410.01870)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import ExcludingConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1
from peftcli.methods._settings import Problems, not_one_of

ACTIVATIONS = (
    "relu", "relu2", "relu6", "leaky_relu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate",
    "gelu_pytorch_tanh", "gelu_python_tanh", "quick_gelu", "silu", "swish", "mish", "hardswish", "sigmoid", "tanh",
    "linear",
)  # fmt: skip
"""Those of transformers' activations that have no weights of their own."""


@dataclass(kw_only=True)
class PeanutConfig(ExcludingConfig, LayeredConfig):
    """Settings of PEANuT, under PEFT's names."""

    peft_type = "PEANUT"
    learning_rate = 5e-4
    sizes: ClassVar[tuple[str, ...]] = ("r", "depth")
    always_written: ClassVar[tuple[str, ...]] = ("r", "depth", "act_fn", "scaling", "target_modules")

    r: int = field(default=32, metadata=AT_LEAST_1)
    """Width of the small network that makes the update from the base weight. Parameters grow linearly with it."""
    depth: int = field(default=0, metadata=AT_LEAST_0 | {"most": 100})
    """Pairs of hidden layers of that network, besides its first and last. Each costs 2 * r * r parameters."""
    act_fn: str = "relu"
    """The network's activation: relu, gelu, silu, tanh, ..., by transformers' names."""
    scaling: float = field(default=1.0, metadata=ABOVE_0)
    """What the update is multiplied by."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        return found + not_one_of(self, "act_fn", *ACTIVATIONS)
