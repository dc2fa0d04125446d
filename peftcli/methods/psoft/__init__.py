"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation (https://arxiv.org/abs/2505.11235)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from peftcli.core.config import ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.methods._settings import Problems, not_positive, outside_unit_interval, too_large, too_small


@dataclass(kw_only=True)
class PsoftConfig(FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of PSOFT, under PEFT's names."""

    peft_type = "PSOFT"
    learning_rate = 2e-3
    always_written: ClassVar[tuple[str, ...]] = ("r", "psoft_alpha", "target_modules", "ab_svd_init", "psoft_svd")

    r: int = 32
    """How many of a weight's principal directions are turned. About r * r / 2 numbers train in each layer, so it may
    be larger than LoRA's: 32 to 128, and more for hard tasks. At most the smaller side of a layer."""
    psoft_alpha: int = 32
    """Changes nothing: the scaling, psoft_alpha / r, cancels out. PEFT's files name it."""
    psoft_dropout: float = 0.0
    """Share of the input values that the update does not see during training."""
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    """How the singular values are shared out. psoft_init: all to the outputs' side, so that a rotation keeps the
    lengths of the weight's rows, one for each output, and the angles between them; pissa_init: half to each side."""
    psoft_svd: Literal["full", "lowrank"] = "full"
    """How the principal directions are found: exactly, or faster and nearly so. The file does not hold them, so that
    a reader has to find the same ones."""
    psoft_svd_lowrank_niter: int = 10
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
    num_cayley_neumann_terms: int = 5
    """Terms of that sum."""
    cayley_neumann_eps: float | None = None
    """Bound in (0, 1) on what that sum is made from, which keeps it near a rotation. Unset: none."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems() + too_small(self, r=1, num_cayley_neumann_terms=1, psoft_svd_lowrank_niter=0)
        found += too_large(self, num_cayley_neumann_terms=100, psoft_svd_lowrank_niter=1000)
        found += not_positive(self, "psoft_alpha") + outside_unit_interval(self, "psoft_dropout")
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            found.append(("cayley_neumann_eps", f"must be in (0, 1), not {self.cayley_neumann_eps}"))
        return found
