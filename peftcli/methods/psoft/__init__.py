"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation (https://arxiv.org/abs/2505.11235)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peftcli.core.config import ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, INSIDE_0_1, SHARE


@dataclass(kw_only=True)
class PsoftConfig(FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of PSOFT, under PEFT's names."""

    peft_type = "PSOFT"
    learning_rate = 2e-3
    always_written: ClassVar[tuple[str, ...]] = ("r", "psoft_alpha", "target_modules", "ab_svd_init", "psoft_svd")

    r: int = field(default=32, metadata=AT_LEAST_1)
    """How many of a weight's principal directions are turned. About r * r / 2 numbers train in each layer, so it may
    be larger than LoRA's: 32 to 128, and more for hard tasks. At most the smaller side of a layer."""
    psoft_alpha: int = field(default=32, metadata=ABOVE_0)
    """Changes nothing: the scaling, psoft_alpha / r, cancels out. PEFT's files name it."""
    psoft_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    """How the singular values are shared out. psoft_init: all to the outputs' side, so that a rotation keeps the
    lengths of the weight's rows, one for each output, and the angles between them; pissa_init: half to each side."""
    psoft_svd: Literal["full", "lowrank"] = "full"
    """How the principal directions are found: exactly, or faster and nearly so. The file does not hold them, so that
    a reader has to find the same ones."""
    psoft_svd_lowrank_niter: int = field(default=10, metadata=AT_LEAST_0 | {"most": 1000})
    """Rounds of refinement with psoft_svd: lowrank."""
    random_seed: int = 0
    """Seed of psoft_svd: lowrank."""
    psoft_orth: bool = True
    """Turn the directions only; false trains any r x r matrix, with twice the numbers."""
    psoft_mag_b: bool = True
    """Train a factor for each direction after the rotation, too."""
    psoft_mag_a: bool = True
    """Train a factor for each direction before the rotation, too."""
    use_cayley_neumann: bool = False
    """Make the rotation by a sum instead of a linear solve: faster with a large r, and a rotation only nearly."""
    num_cayley_neumann_terms: int = field(default=5, metadata=AT_LEAST_1 | {"most": 100})
    """Terms of that sum."""
    cayley_neumann_eps: float | None = field(default=None, metadata=INSIDE_0_1)
    """Bound in (0, 1) on what that sum is made from, which keeps it near a rotation. Unset: none."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
