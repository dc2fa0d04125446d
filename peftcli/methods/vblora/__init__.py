"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (https://arxiv.org/abs/2405.15179)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftcli.core.config import BiasConfig, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.methods._settings import Problems, not_positive, outside_unit_interval, too_small


@dataclass(kw_only=True)
class VBLoRAConfig(BiasConfig, FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of VB-LoRA, under PEFT's names."""

    peft_type = "VBLORA"
    learning_rate = 5e-3
    sizes: ClassVar[tuple[str, ...]] = ("r", "num_vectors", "vector_length", "topk")
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules", "num_vectors", "vector_length", "topk")

    r: int = 4
    """Size of the bottleneck."""
    num_vectors: int = 256
    """Vectors in the bank that all layers share. Training memory grows with it in every layer."""
    vector_length: int = 256
    """Numbers in each vector. It divides the inputs and outputs of every adapted layer."""
    topk: int = 2
    """Number of the bank's vectors that each piece of a matrix mixes. The file grows with it."""
    save_only_topk_weights: bool = False
    """Write the mixtures instead of the scores that they are made from: a far smaller file, with which the choice of
    vectors can no longer be trained."""
    vblora_dropout: float = 0.0
    """Share of the input values that the update does not see during training."""
    init_vector_bank_bound: float = 0.02
    """The bank starts uniform between plus and minus this."""
    init_logits_std: float = 0.1
    """Deviation of the scores at the start."""

    def problems(self) -> Problems:
        found = super().problems() + too_small(self, r=1, num_vectors=1, vector_length=1, topk=1, init_logits_std=0)
        found += outside_unit_interval(self, "vblora_dropout") + not_positive(self, "init_vector_bank_bound")
        if self.topk > self.num_vectors:
            found.append(("topk", f"{self.topk} of {self.num_vectors} vectors cannot be chosen"))
        return found
