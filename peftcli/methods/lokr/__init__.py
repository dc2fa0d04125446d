"""LoKr: the Kronecker product of LyCORIS (https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftcli.methods._settings import Problems
from peftcli.methods.loha import LycorisConfig


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """Settings of LoKr, under PEFT's names."""

    peft_type = "LOKR"
    learning_rate = 2e-3

    decompose_both: bool = False
    """Make the first matrix of the Kronecker product of two thin ones too, where r is below half its sides."""
    decompose_factor: int = -1
    """Sides of the first matrix of the product, where they divide the layer's; -1: as near to square as goes.
    Larger ones give a larger first and a smaller second matrix."""
    rank_dropout_scale: bool = False
    """Make the update stronger by as much as rank_dropout leaves out."""
    init_weights: bool | Literal["lycoris"] = True
    """Which matrix starts at zero. true: the first; lycoris: the second; false: none, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            found.append(("decompose_factor", f"must be at least 1, or -1, not {self.decompose_factor}"))
        return found
