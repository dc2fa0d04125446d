"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution (https://arxiv.org/abs/2407.19342)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peftcli.core.config import BiasConfig, LayeredConfig
from peftcli.guard.ranges import AT_LEAST_1


@dataclass(kw_only=True)
class C3AConfig(BiasConfig, LayeredConfig):
    """Settings of C3A, under PEFT's names."""

    peft_type = "C3A"
    learning_rate = 5e-2
    sizes: ClassVar[tuple[str, ...]] = ("block_size", "block_size_pattern")
    always_written: ClassVar[tuple[str, ...]] = ("block_size", "target_modules")

    block_size: int = field(default=256, metadata=AT_LEAST_1)
    """Side of the blocks into which each weight is cut. It divides the inputs and outputs of every adapted layer;
    the trained numbers are those of the weight divided by it."""
    block_size_pattern: dict[str, int] = field(default_factory=dict, metadata=AT_LEAST_1)
    """A block_size of their own for some layers: name ending or regular expression -> block_size."""
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"
    """How the kernels start. true: at zero, from no update at all; false is xavier_uniform."""
